"""What encoder processes make of the cores: clips a second, and processor time a clip.

    python benchmarks/encoders.py [--processes 1,2] [--lanes 1,2,4] [--clips 600] [--rounds 2]

Starts encoder processes as a sampling process does, each with as many lanes, and gives them clips of the shipped
checkpoint as fast as they take them; each clip becomes all of its files, checked and on the disk. All settings are
measured one after the other, several times over, so that a machine whose speed changes says something. Prints a table,
writes JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from generate import RESULTS, describe_machine, save
from load import numbers, table
from process_times import cpu_seconds

from medsora.manifest import find_checkpoint, read_manifest
from medsora.pipeline import VideoPipeline
from medsora.provenance import clip_metadata
from medsora.request import GenerationRequest, resolve_request
from server.jobs.database import Database
from server.jobs.repository import Claim, JobRepository
from server.jobs.schema import migrate
from server.settings import Settings
from server.worker import encoders
from server.worker.encoding import EncodingOrder

WARM_UP_CLIPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=numbers, default=(1, 2), help="encoder processes (default: 1,2)")
    parser.add_argument("--lanes", type=numbers, default=(1, 2, 4), help="lanes of each (default: 1,2,4)")
    parser.add_argument("--clips", type=int, default=600, help="clips of a measurement (default: 600)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each setting (default: 2)")
    parser.add_argument("--checkpoint", default="lung-ultrasound-small", help="a directory, or a shipped name")
    parser.add_argument("--output", type=Path, default=RESULTS / "encoders.json", help="JSON file")
    options = parser.parse_args()
    checkpoint = find_checkpoint(options.checkpoint)
    manifest = read_manifest(checkpoint)
    request = resolve_request(manifest, label=manifest.labels[0].name, seed=0)
    frames = VideoPipeline.from_checkpoint(checkpoint)([request])[0]
    settings_of = [(processes, lanes) for processes in options.processes for lanes in options.lanes]
    found: dict[tuple[int, int], list[tuple[float, float]]] = {one: [] for one in settings_of}
    for _ in range(options.rounds):
        for processes, lanes in settings_of:
            with tempfile.TemporaryDirectory(prefix="medsora-bench-") as folder:
                found[processes, lanes].append(
                    measure(Path(folder), request, frames, clips=options.clips, processes=processes, lanes=lanes)
                )
    rows = [
        {
            "processes": processes,
            "lanes": lanes,
            "clips_per_s": statistics.median(rate for rate, _ in measured),
            "cpu_ms": statistics.median(cpu_ms for _, cpu_ms in measured),
        }
        for (processes, lanes), measured in found.items()
    ]
    each = [[*setting, *one] for setting, measured in found.items() for one in measured]
    save({"machine": describe_machine("cpu"), "clips": options.clips, "encoders": rows, "each": each}, options.output)
    table(rows)


def measure(
    folder: Path, request: GenerationRequest, frames: Any, *, clips: int, processes: int, lanes: int
) -> tuple[float, float]:
    """Clips a second, and milliseconds of processor time a clip of the encoder processes."""
    settings = Settings(data_dir=folder, redis_url="redis://127.0.0.1:1/0", log_level="error")
    claim = claim_of(request, settings)
    metadata = clip_metadata(request, model="lung", model_sha256="0" * 64)

    def encode(number: int) -> None:
        job = replace(claim.job, id=f"video_{number:032x}")
        order = EncodingOrder(claim=replace(claim, job=job), metadata=metadata, checkpoint=folder, dataset=None)
        made.run(order, frames)

    with mock.patch.object(encoders, "LANES", lanes):
        made = encoders.EncoderProcesses(settings, processes, otherwise=NoOthers())
        try:
            made.wait_until_ready()
            with ThreadPoolExecutor(made.lanes) as threads:
                list(threads.map(encode, range(WARM_UP_CLIPS)))
                began, used = time.perf_counter(), cpu_seconds(os.getpid())["encoders"]
                list(threads.map(encode, range(WARM_UP_CLIPS, WARM_UP_CLIPS + clips)))
                took_s, used_s = time.perf_counter() - began, cpu_seconds(os.getpid())["encoders"] - used
                return clips / took_s, 1000 * used_s / clips
        finally:
            made.close()


class NoOthers:
    """In place of encoders that a benchmark must not fall back to."""

    lanes = 0

    def wait_until_ready(self) -> None: ...

    def run(self, order: EncodingOrder, frames: Any) -> Any:
        raise SystemExit("the encoder processes could not be started")

    def close(self) -> None: ...


def claim_of(request: GenerationRequest, settings: Settings) -> Claim:
    """A claim on a job of that request: every clip is one of it, under another id."""
    database = Database(settings.database_address)
    migrate(database)
    values = {name: getattr(request, name) for name in (
        "label", "seed", "num_frames", "width", "height", "num_inference_steps", "guidance_scale", "sampler",
    )}  # fmt: skip
    repository = JobRepository(database, lease_s=3600.0, max_attempts=1)
    job = repository.add({**values, "model": "lung", "prompt": "", "fps": 8.0, "seconds": "2"}, max_queued=10)
    claim = repository.claim(job.id, worker="bench")
    database.close()
    assert claim is not None
    return claim


if __name__ == "__main__":
    main()
