"""How long a scrape of /metrics takes with a big job table.

    python benchmarks/scrape.py [--rows 100000] [--scrapes 20]

Fills the database of an API without a worker with jobs, once nine tenths done and the others waiting, once all waiting,
and asks for /metrics again and again, within this process. Prints the spread of the seconds a scrape.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from fastapi.testclient import TestClient
from sqlalchemy import insert, text

from medsora.checkpoint import write_tiny_checkpoint
from server.app import create_app
from server.jobs.model import Job, new_job_id
from server.settings import Settings

AT_ONCE = 1000
VALUES = {
    "tenant": "default", "model": "tiny", "prompt": "covid lung", "label": "covid-convex", "seed": 7, "num_frames": 16,
    "width": 32, "height": 32, "fps": 8.0, "seconds": "2", "num_inference_steps": 4, "guidance_scale": 1.0,
    "sampler": "euler", "handed_back": 0, "cancel_requested": False, "created_at": 1.0, "queued_at": 1.0,
}  # fmt: skip
WAITING = {**VALUES, "status": "queued", "attempt": 0, "steps_done": 0}
DONE = {
    **VALUES, "status": "succeeded", "attempt": 1, "steps_done": 4, "started_at": 2.0, "completed_at": 3.0,
    "artifact": "a.mp4", "size_bytes": 9, "sha256": "0" * 64, "sampling_s": 1.0, "encode_s": 0.1, "store_s": 0.1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="jobs in the table")
    parser.add_argument("--scrapes", type=int, default=20, help="how often to ask")
    options = parser.parse_args()
    for name, done in (("nine tenths done", options.rows * 9 // 10), ("all waiting", 0)):
        seconds = scrape(done=done, waiting=options.rows - done, times=options.scrapes)
        print(f"{options.rows} jobs, {name}: median {1e3 * seconds[len(seconds) // 2]:.1f} ms", end=", ")
        print(f"fastest {1e3 * seconds[0]:.1f}, slowest {1e3 * seconds[-1]:.1f}")


def scrape(*, done: int, waiting: int, times: int) -> list[float]:
    """Seconds of each of some scrapes, sorted."""
    with tempfile.TemporaryDirectory(prefix="medsora-scrape-") as folder:
        settings = Settings(
            data_dir=Path(folder),
            redis_url="redis://127.0.0.1:1/0",
            checkpoints=(str(write_tiny_checkpoint(Path(folder) / "tiny")),),
            max_queued_jobs=1_000_000,
        )
        app = create_app(settings)
        with TestClient(app) as client:
            with app.state.services.database.write() as connection:
                for values, count in ((DONE, done), (WAITING, waiting)):
                    for start in range(0, count, AT_ONCE):
                        rows = [{"id": new_job_id()} for _ in range(min(AT_ONCE, count - start))]
                        connection.execute(insert(Job.__table__).values(values), rows)
                connection.execute(text("analyze"))
            client.get("/metrics")
            took = []
            for _ in range(times):
                began = time.perf_counter()
                answer = client.get("/metrics")
                took.append(time.perf_counter() - began)
                assert answer.status_code == 200, answer.text
    return sorted(took)


if __name__ == "__main__":
    main()
