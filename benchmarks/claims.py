"""How many claims a second a long queue gives, and how long one takes, by how many claim at once, on both databases.

    python benchmarks/claims.py [--jobs 10000] [--claimers 1,4,8,16,32] [--batch 1,16] [--seconds 5]

Fills a job table with jobs of ten tenants that all wait, as the service accepts them, then lets processes claim: each,
as a worker does, again and again. Nothing samples, so this is what the database alone can give. SQLite and a PostgreSQL
of its own (found as the tests find it) both wait for the disk at each commit, as in service. Checks that no job was
claimed twice. Prints a table last, writes JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from generate import RESULTS, describe_machine, save

from server.jobs.database import Database
from server.jobs.intake import insert_jobs
from server.jobs.repository import JobRepository
from server.jobs.schema import migrate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from postgres_cluster import MISSING, PostgresCluster, find_programs

TENANTS = 10
JOB = {
    "model": "tiny", "prompt": "covid lung", "label": "covid-convex", "num_frames": 16, "width": 128, "height": 128,
    "fps": 8.0, "seconds": "2", "num_inference_steps": 20, "guidance_scale": 1.0, "sampler": "euler",
}  # fmt: skip


def main() -> None:
    options = parse_options()
    figures = []
    with tempfile.TemporaryDirectory(prefix="medsora-bench-") as folder:
        figures += measure_all("sqlite", [f"sqlite:///{folder}/{n}.db" for n in range(100)], options)
    programs = find_programs()
    if programs is None:
        print(MISSING)
    else:
        cluster = PostgresCluster(programs, is_durable=True)
        try:
            urls = (cluster.url(cluster.create_database()) for _ in range(100))
            figures += measure_all("postgresql", urls, options)
        finally:
            cluster.close()
    save({"machine": describe_machine("cpu"), "jobs": options.jobs, "claims": figures}, options.output)
    print(f"\n{options.jobs} jobs of {TENANTS} tenants wait\n")
    print("| database | jobs a claim | claimers | claims/s | jobs/s | p50 ms | p99 ms | given up |")
    print("|---|---|---|---|---|---|---|---|")
    for one in figures:
        print(
            f"| {one['database']} | {one['batch']} | {one['claimers']} | {one['claims_per_s']:.0f} "
            f"| {one['jobs_per_s']:.0f} | {one['p50_ms']:.1f} | {one['p99_ms']:.1f} | {one['errors']} |"
        )


def parse_options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10_000, help="jobs that wait at the beginning")
    parser.add_argument("--claimers", type=numbers, default=[1, 4, 8, 16, 32], help="processes that claim at once")
    parser.add_argument("--batch", type=numbers, default=[1, 16], help="most jobs of one claim")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--output", type=Path, default=RESULTS / "claims.json")
    return parser.parse_args()


def measure_all(name: str, urls: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    places = iter(urls)
    for batch in options.batch:
        for claimers in options.claimers:
            figure = measure(next(places), claimers, batch, options)
            figures.append({"database": name, **figure})
            print(figures[-1], flush=True)
    return figures


def measure(url: str, claimers: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    fill(url, options.jobs)
    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(claimers)
    answers: Any = context.Queue()
    arguments = (url, batch, options.seconds, begin, answers)
    processes = [context.Process(target=claim, args=arguments) for _ in range(claimers)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=300 + options.seconds) for _ in processes]
    for process in processes:
        process.join()
    latencies = sorted(took for one in found for took in one["latencies_s"])
    job_ids = [job_id for one in found for job_id in one["job_ids"]]
    if len(set(job_ids)) != len(job_ids):
        raise SystemExit(f"{len(job_ids) - len(set(job_ids))} jobs were claimed twice")
    took_s = statistics.fmean(one["took_s"] for one in found)
    return {
        "claimers": claimers,
        "batch": batch,
        "claims": len(latencies),
        "claims_per_s": len(latencies) / took_s,
        "jobs_per_s": len(job_ids) / took_s,
        "p50_ms": 1000 * latencies[len(latencies) // 2],
        "p99_ms": 1000 * latencies[len(latencies) * 99 // 100],
        "most_ms": 1000 * latencies[-1],
        "errors": sum(one["errors"] for one in found),
    }


def fill(url: str, number: int) -> None:
    database = Database(url)
    migrate(database)
    jobs = [{**JOB, "seed": n, "tenant": f"tenant-{n % TENANTS}", "priority": n % 3} for n in range(number)]
    for start in range(0, number, 1000):
        with database.write() as connection:
            insert_jobs(connection, jobs[start : start + 1000])
    database.close()


def claim(url: str, batch: int, seconds: float, begin: Any, answers: Any) -> None:
    database = Database(url)
    repository = JobRepository(database, lease_s=3600.0, max_attempts=3)
    name = multiprocessing.current_process().name
    latencies, job_ids, errors = [], [], 0
    repository.count_waiting()  # connected
    begin.wait()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        at = time.perf_counter()
        try:
            claims = repository.claim_next(worker=name, most=lambda job: batch)
        except Exception as error:  # SQLite, when its turn did not come within five seconds
            errors += 1
            print(f"{name}: {error}", file=sys.stderr)
            continue
        if not claims:
            break
        latencies.append(time.perf_counter() - at)
        job_ids += [one.job.id for one in claims]
    took_s = time.perf_counter() - began
    answers.put({"latencies_s": latencies, "job_ids": job_ids, "errors": errors, "took_s": took_s})
    database.close()


if __name__ == "__main__":
    main()
