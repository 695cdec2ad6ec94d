"""What a clip costs the job store beside its sampling: rows, transactions, bytes of the log; and how many it carries.

    python benchmarks/clip_cost.py [--workers 1,4] [--batch 64] [--together 1,64] [--seconds 4] [--jobs 2000]

Processes on a PostgreSQL of their own, which waits for the disk at each commit, claim batches, tell of progress once
and finish them, as workers do, but sample nothing. `--together` is how many clips of a batch end in one transaction; in
a worker those that its encoders have ready at once. What clips' files weigh is told by `forms.py`. Prints a table,
writes JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from claims import fill
from generate import RESULTS, describe_machine, save
from load import database_seconds, finish, log_bytes, numbers, quantile_ms, table

from server.jobs.database import Database
from server.jobs.repository import JobRepository

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from postgres_cluster import MISSING, PostgresCluster, find_programs


def main() -> None:
    options = parse_options()
    load = os.getloadavg()[0]
    programs = find_programs()
    if programs is None:
        raise SystemExit(MISSING)
    cluster = PostgresCluster(programs, is_durable=True)
    try:
        jobs = measure_jobs(cluster, options)
    finally:
        cluster.close()
    save({"machine": {**describe_machine("cpu"), "load_before": load}, "jobs": jobs}, options.output)
    print(f"\nload of the machine before: {load:.1f}")
    table(jobs)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=numbers, default=[1, 4], help="processes that claim and finish at once")
    parser.add_argument("--batch", type=numbers, default=[64], help="most jobs of one claim")
    parser.add_argument("--together", type=numbers, default=[1, 64], help="most jobs that end in one transaction")
    parser.add_argument("--jobs", type=int, default=2000, help="jobs that wait at the beginning of each measurement")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--output", type=Path, default=RESULTS / "clip-cost.json")
    return parser.parse_args()


def measure_jobs(cluster: PostgresCluster, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Jobs a second from claim to end, and what one costs the database."""
    name = cluster.create_database()
    figures = []
    for batch in options.batch:
        for together in sorted({min(one, batch) for one in options.together}):
            for workers in options.workers:
                fill(cluster.url(name), options.jobs - waiting(cluster.url(name)))
                with cluster.connect(name) as connection:
                    connection.execute("analyze")
                figures.append(measure(cluster, name, workers=workers, batch=batch, together=together, options=options))
                print(figures[-1], flush=True)
    return figures


def waiting(url: str) -> int:
    """Jobs that wait."""
    with closing(Database(url)) as database:
        return JobRepository(database, lease_s=600.0, max_attempts=3).count_waiting()


def measure(
    cluster: PostgresCluster, name: str, *, workers: int, batch: int, together: int, options: argparse.Namespace
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    begin, answers = context.Barrier(workers + 1), context.Queue()
    arguments = (cluster.url(name), batch, together, options.seconds, begin, answers)
    processes = [context.Process(target=instant_worker, args=arguments) for _ in range(workers)]
    for process in processes:
        process.start()
    begin.wait(120)  # all are warm
    before = written(cluster, name)
    begin.wait(120)
    found = [answers.get(timeout=120 + options.seconds) for _ in processes]
    for process in processes:
        process.join()
    after = written(cluster, name)
    jobs = sum(one["jobs"] for one in found)
    finish_s = [took for one in found for took in one["finish_s"]]
    return {
        "batch": batch,
        "together": together,
        "workers": workers,
        "jobs_per_s": sum(one["jobs"] / one["took_s"] for one in found),
        "finish_p50_ms": quantile_ms(finish_s, 0.5),
        "finish_p99_ms": quantile_ms(finish_s, 0.99),
        **{what: (after[what] - before[what]) / jobs for what in after},
    }


def written(cluster: PostgresCluster, name: str) -> dict[str, float]:
    """Rows and transactions that a database has written so far, and log and processor time of its server."""
    with cluster.connect(name) as connection:
        rows = connection.execute(
            "select sum(n_tup_ins)::bigint, sum(n_tup_upd)::bigint, sum(n_tup_del)::bigint from pg_stat_user_tables"
        ).fetchone()
        commits = connection.execute(
            "select xact_commit from pg_stat_database where datname = current_database()"
        ).fetchone()
    assert rows is not None
    assert commits is not None
    told = dict(
        zip(("inserted", "updated", "deleted", "commits"), map(float, map(str, [*rows, *commits])), strict=True)
    )
    return {**told, "log_bytes": float(log_bytes(cluster)), "database_ms": 1e3 * database_seconds(cluster)}


def instant_worker(url: str, batch: int, together: int, seconds: float, begin: Any, answers: Any) -> None:
    """Claim, tell of progress once, finish: as often as it goes."""
    with closing(Database(url)) as database:
        repository = JobRepository(database, lease_s=600.0, max_attempts=3)
        name = multiprocessing.current_process().name
        work_on_one_batch(repository, name, batch, together)  # connected, and every statement known
        begin.wait(120)
        begin.wait(120)
        jobs, finish_s = 0, []
        began = time.monotonic()
        while time.monotonic() - began < seconds and (took := work_on_one_batch(repository, name, batch, together)):
            jobs += batch
            finish_s += took
        took_s = time.monotonic() - began
    answers.put({"jobs": jobs, "took_s": took_s, "finish_s": finish_s})


def work_on_one_batch(repository: JobRepository, name: str, batch: int, together: int) -> list[float]:
    """Do with a batch what a worker does, but sample it; seconds that each end took, none where no job waits."""
    claims = repository.claim_next(worker=name, most=lambda job: batch)
    if not claims:
        return []
    repository.renew_all({(claim.job.id, claim.token): 1 for claim in claims}, announce=True)
    finish_s = []
    for start in range(0, len(claims), together):
        began = time.monotonic()
        finish(repository, claims[start : start + together])
        finish_s.append(time.monotonic() - began)
    repository.count_batch("tiny", len(claims))
    return finish_s


if __name__ == "__main__":
    main()
