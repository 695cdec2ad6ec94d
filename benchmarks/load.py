"""What API processes carry: requests of each kind and streams of events, and what one costs in processor time.

    python benchmarks/load.py [--apis 1,2] [--connections 16] [--streams 250,1000] [--waiting 0] [--seconds 5]

API processes on Redis and a PostgreSQL of their own that waits for the disk at each commit (found as the tests find it;
without it SQLite); no worker, no proxy. Each connection asks again and again, with a key. Streams are each of one
video; then videos are finished at 20 a second, and who follows them hears of it. Clients share the machine with what
they ask: so besides rates there are milliseconds of processor time, which other work on the machine changes less.
Prints tables, writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import redis
from claims import JOB, fill
from generate import RESULTS, describe_machine, save

from server.embedded import find_redis_server
from server.jobs.database import Database
from server.jobs.intake import insert_jobs
from server.jobs.repository import Claim, FinishedWork, JobRepository
from server.jobs.schema import migrate
from server.keys.model import ALL_SCOPES
from server.keys.repository import KeyRepository
from server.storage import ArtifactStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from ports import free_ports
from postgres_cluster import MISSING, PostgresCluster, find_programs

TENANT = "load"
DOWNLOAD_BYTES = 100_000
START_S = 90.0
FINISHED_PER_S = 20


def main() -> None:
    options = parse_options()
    programs = find_programs()
    if programs is None:
        print(MISSING)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="medsora-bench-") as folder, place_in(Path(folder), programs) as place:
        requests = measure_requests(place, options)
        streams = measure_streams(place, options)
    machine = {**describe_machine("cpu"), "load_before": load}
    database = "sqlite" if programs is None else "postgresql"
    result = {"machine": machine, "database": database, "requests": requests, "streams": streams}
    save(result, options.output)
    print(f"\n{database}, {options.connections} connections, load of the machine before: {load:.1f}")
    table(requests)
    table(streams)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--apis", type=numbers, default=[1, 2], help="API processes at once")
    parser.add_argument("--connections", type=int, default=16, help="clients that ask at once")
    parser.add_argument("--streams", type=numbers, default=[250, 1000], help="streams of events that are open at once")
    parser.add_argument("--waiting", type=int, default=0, help="jobs that wait before those that are asked for")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--output", type=Path, default=RESULTS / "load.json")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """An option that takes several."""
    return [int(part) for part in text.split(",") if part]


# -- what is measured ------------------------------------------------------------------------------------------------


class Place:
    """A data folder, a database, Redis, and a key of the API."""

    def __init__(self, folder: Path, cluster: PostgresCluster | None) -> None:
        from medsora.checkpoint import write_tiny_checkpoint  # torch, which no measured process is to wait for

        self.folder, self.cluster = folder, cluster
        self.url = f"sqlite:///{folder}/jobs.db" if cluster is None else cluster.url(cluster.create_database())
        with closing(Database(self.url)) as database:
            migrate(database)
            _, self.key = KeyRepository(database).create(tenant=TENANT, name="load", scopes=ALL_SCOPES)
        self.checkpoint = write_tiny_checkpoint(folder / "tiny")
        self.redis = redis.Redis(unix_socket_path=str(folder / "redis.sock"))

    @contextmanager
    def apis(self, number: int) -> Iterator[list[tuple[int, psutil.Process]]]:
        """API processes that answer: their ports and processes."""
        variables = {
            "MEDSORA_DATA_DIR": str(self.folder / "data"),
            "MEDSORA_DATABASE_URL": self.url,
            "MEDSORA_REDIS_URL": f"redis+socket://{self.folder / 'redis.sock'}",
            "MEDSORA_CHECKPOINTS": str(self.checkpoint),
            "MEDSORA_MAX_QUEUED_JOBS": "1000000",
        }
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MEDSORA_")}
        ports, processes = free_ports(number), []
        try:
            with (self.folder / "api.log").open("ab") as log:
                for port in ports:
                    command = [sys.executable, "-m", "server.cli", "api", "--port", str(port)]
                    processes.append(subprocess.Popen(command, env={**clean, **variables}, stdout=log, stderr=log))
            for port in ports:
                wait_for_port(port)
            yield [(port, psutil.Process(one.pid)) for port, one in zip(ports, processes, strict=True)]
        finally:
            for one in processes:
                one.send_signal(signal.SIGTERM)
            for one in processes:
                one.wait(60)

    def used(self, apis: Sequence[tuple[int, psutil.Process]]) -> dict[str, float]:
        """Milliseconds of processor time so far, commands that Redis has got, bytes of PostgreSQL's log."""
        told = {"api_ms": 1e3 * sum(seconds_of(process) for _, process in apis)}
        if self.cluster is not None:
            told |= {"database_ms": 1e3 * database_seconds(self.cluster), "log_bytes": log_bytes(self.cluster)}
        statistics: Any = self.redis.info("stats")
        return {**told, "redis_commands": statistics["total_commands_processed"]}


@contextmanager
def place_in(folder: Path, programs: Path | None) -> Iterator[Place]:
    """A place, with its servers running."""
    command = [find_redis_server(), "--port", "0", "--unixsocket", str(folder / "redis.sock"), "--save", ""]
    broker = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    cluster = None if programs is None else PostgresCluster(programs, is_durable=True)
    try:
        place = Place(folder, cluster)
        yield place
        place.redis.close()
    finally:
        if cluster is not None:
            cluster.close()
        broker.terminate()
        broker.wait(30)


def measure_requests(place: Place, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Requests a second, by kind and number of API processes."""
    if options.waiting:
        fill(place.url, options.waiting)
    video, finished = one_that_waits_and_one_that_is_finished(place)
    body = json.dumps({"prompt": "covid lung", "num_inference_steps": 4, "seed": 1}).encode()
    kinds = {
        "submit": request(place, "POST", "/v1/videos", body),
        "retrieve": request(place, "GET", f"/v1/videos/{video}"),
        "list of 20": request(place, "GET", "/v1/videos?limit=20"),
        f"download of {DOWNLOAD_BYTES // 1000} kB": request(place, "GET", f"/v1/videos/{finished}/content"),
    }
    figures = []
    for number in options.apis:
        with place.apis(number) as apis:
            ports = [port for port, _ in apis]
            for kind, asked in kinds.items():
                asyncio.run(ask(asked, ports, options.connections, 1.0))
                before = place.used(apis)
                latencies, took_s = asyncio.run(ask(asked, ports, options.connections, options.seconds))
                after = place.used(apis)
                figure: dict[str, Any] = {"request": kind, "apis": number, "per_s": len(latencies) / took_s}
                figure |= {"p50_ms": quantile_ms(latencies, 0.5), "p99_ms": quantile_ms(latencies, 0.99)}
                figure |= {name: (after[name] - before[name]) / len(latencies) for name in after}
                figures.append(figure)
                print(figure, flush=True)
    return figures


def one_that_waits_and_one_that_is_finished(place: Place) -> list[str]:
    """Ids of two jobs; of the second there is a file."""
    with closing(Database(place.url)) as database:
        with database.write() as connection:
            ids = insert_jobs(connection, [{**JOB, "tenant": TENANT, "seed": seed} for seed in range(2)])
        repository = JobRepository(database, lease_s=600.0, max_attempts=3)
        claim = repository.claim(ids[1], worker="load")
        assert claim is not None
        store = ArtifactStore(place.folder / "data" / "artifacts")
        written = store.write(
            ids[1], claim.token, lambda path: path.write_bytes(b"v" * DOWNLOAD_BYTES) and None, lambda path: None
        )
        finish(repository, [claim], artifact=written.name, size_bytes=written.size_bytes, sha256=written.sha256)
    return ids


def finish(repository: JobRepository, claims: Sequence[Claim], **work: Any) -> None:
    """End jobs well, in one transaction."""
    made = {"artifact": "a.mp4", "size_bytes": 9, "sha256": "0" * 64, "sampling_s": 0.1, "encode_s": 0.01, **work}
    finished = [(claim.job.id, claim.token, FinishedWork(store_s=0.01, **made)) for claim in claims]
    assert len(repository.succeed_all(finished)) == len(claims)


async def ask(asked: bytes, ports: Sequence[int], connections: int, seconds: float) -> tuple[list[float], float]:
    """Seconds that each of many requests took, and all together."""
    latencies: list[float] = []
    until = time.monotonic() + seconds

    async def one_client(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (began := time.monotonic()) < until:
            writer.write(asked)
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.partition(b"\r\n")[0]:
                raise SystemExit(f"refused: {head.decode()}{(await reader.read(1000)).decode(errors='replace')}")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            latencies.append(time.monotonic() - began)
        writer.close()

    began = time.monotonic()
    await asyncio.gather(*(one_client(ports[number % len(ports)]) for number in range(connections)))
    return latencies, time.monotonic() - began


def measure_streams(place: Place, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What streams weigh, and how late they are."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    figures = []
    for number in options.streams:
        with closing(Database(place.url)) as database, place.apis(1) as apis:
            repository = JobRepository(database, lease_s=600.0, max_attempts=3)
            with database.write() as connection:
                ids = insert_jobs(connection, [{**JOB, "tenant": TENANT, "seed": seed} for seed in range(number)])
            figures.append(asyncio.run(follow(place, repository, apis, ids, options.seconds)))
            for job_id in ids:
                repository.request_cancel(job_id)
        print(figures[-1], flush=True)
    return figures


async def follow(
    place: Place, repository: JobRepository, apis: list[tuple[int, psutil.Process]], ids: list[str], seconds: float
) -> dict[str, Any]:
    """Open a stream for each job, look at what that costs in rest, then finish jobs and see who hears of it when."""
    port, process = apis[0]
    heard: dict[str, float] = {}

    async def listen(job_id: str, opened: asyncio.Semaphore) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        try:
            writer.write(request(place, "GET", f"/v1/videos/{job_id}/events"))
            assert b" 200 " in await reader.readline()
            opened.release()
            while line := await reader.readline():
                if line.startswith(b"event: video.completed"):
                    heard[job_id] = time.monotonic()
        finally:
            writer.close()

    memory = process.memory_full_info().pss
    opened = asyncio.Semaphore(0)
    tasks = []
    for start in range(0, len(ids), 50):
        tasks += [asyncio.create_task(listen(job_id, opened)) for job_id in ids[start : start + 50]]
        for _ in ids[start : start + 50]:
            await asyncio.wait_for(opened.acquire(), 60)
    before, began = place.used(apis), time.monotonic()
    await asyncio.sleep(seconds)
    rest_s, after = time.monotonic() - began, place.used(apis)
    memory = process.memory_full_info().pss - memory
    finished: dict[str, float] = {}

    def work() -> None:
        for job_id in ids[: int(FINISHED_PER_S * seconds)]:
            claim = repository.claim(job_id, worker="load")
            assert claim is not None
            finish(repository, [claim])
            finished[job_id] = time.monotonic()
            time.sleep(1 / FINISHED_PER_S)

    await asyncio.to_thread(work)
    deadline = time.monotonic() + 30
    while set(finished) - set(heard) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    late = [heard[job_id] - at for job_id, at in finished.items() if job_id in heard]
    return {
        "streams": len(ids),
        "kib_a_stream": memory / len(ids) / 1024,
        **{
            f"{name}_a_second": (after[name] - before[name]) / rest_s
            for name in ("api_ms", "database_ms")
            if name in after
        },
        "finished": len(finished),
        "never_heard": len(finished) - len(late),
        "late_p50_ms": quantile_ms(late, 0.5),
        "late_p99_ms": quantile_ms(late, 0.99),
    }


# -- how -------------------------------------------------------------------------------------------------------------


def request(place: Place, method: str, path: str, body: bytes = b"") -> bytes:
    """A request over HTTP/1.1 with a key."""
    lines = [f"{method} {path} HTTP/1.1", "Host: load", f"Authorization: Bearer {place.key}"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise SystemExit(f"no API answers on port {port}") from None
            time.sleep(0.05)


def seconds_of(process: psutil.Process) -> float:
    """Processor time of a process so far; 0 of one that has ended meanwhile."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def database_seconds(cluster: PostgresCluster) -> float:
    """Processor time of a PostgreSQL so far, of ended connections, too."""
    postmaster = psutil.Process(int((cluster.folder / "data" / "postmaster.pid").read_text().split()[0]))
    ended = postmaster.cpu_times()
    running = sum(map(seconds_of, [postmaster, *postmaster.children()]))
    return float(ended.children_user + ended.children_system) + running


def log_bytes(cluster: PostgresCluster) -> int:
    """Bytes of the write-ahead log of a PostgreSQL so far."""
    with cluster.connect() as connection:
        row = connection.execute("select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint").fetchone()
    assert row is not None
    return int(str(row[0]))


def quantile_ms(seconds: Sequence[float], share: float) -> float:
    ordered = sorted(seconds)
    return 1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def table(figures: Sequence[dict[str, Any]]) -> None:
    """Print figures as a table."""
    if figures:
        print("\n| " + " | ".join(figures[0]) + " |\n|" + "---|" * len(figures[0]))
    for one in figures:
        print(
            "| "
            + " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in one.values())
            + " |"
        )


if __name__ == "__main__":
    main()
