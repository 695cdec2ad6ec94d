"""A dataset of thousands of clips: how long it takes, what the processes weigh, what a range and a comparison cost.

    python benchmarks/large_dataset.py [--clips 3000] [--checkpoint DIRECTORY] [--format webdataset] [--steps N]
    python benchmarks/large_dataset.py --rows 10000       # no clips are made: index, ranges and duplicates alone

The first starts the embedded server in a temporary folder, by default with the untrained ``tiny`` model, asks for one
dataset, watches the memory of every process until it is done, downloads the archive, with ranges too, and reads it back
with the library that the format is for. The second fills a database with rows as a worker would leave them, without
files, and compares the cost of the archive's index with that of ranges, and of a search for duplicates among all clips
with one by the bounds of :mod:`medsora.fingerprints`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from generate import RESULTS, describe_machine, save
from server_overhead import memory_by_role, running_server

from medsora.checkpoint import write_tiny_checkpoint
from medsora.fingerprints import FINGERPRINT_BYTES, FingerprintSet

RANGES = 20
RANGE_BYTES = 10_000


def main() -> None:
    options = parse_options()
    if options.rows:
        result = of_rows(options.rows)
    else:
        with tempfile.TemporaryDirectory(prefix="medsora-bench-") as folder:
            result = of_clips(options, Path(folder))
    result["machine"] = describe_machine("cpu")
    print(json.dumps(result, indent=1))
    save(result, options.json or RESULTS / f"large-dataset-{options.rows or options.clips}.json")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a dataset of thousands of clips.")
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=0, help="measure index and duplicates of so many clips instead")
    parser.add_argument("--checkpoint", help="a directory, or a shipped name (default: the untrained tiny model)")
    parser.add_argument("--format", default="webdataset", choices=["webdataset", "videofolder"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, help="file for the figures (default: in benchmarks/results)")
    return parser.parse_args()


def of_clips(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    checkpoint = options.checkpoint or str(write_tiny_checkpoint(folder / "tiny"))
    with running_server(checkpoint, folder, "cpu") as (client, process):
        labels = [label["name"] for label in client.get("/v1/models").json()["data"][0]["labels"]][:2]
        body = {
            "name": "benchmark",
            "labels": {label: options.clips // len(labels) for label in labels},
            "splits": {"train": 0.9, "test": 0.1},
            "format": options.format,
            "seed": 1,
            "num_inference_steps": options.steps,
            "filters": {"min_distance": 0.01},
        }
        idle = most = memory_by_role(process)
        began = time.perf_counter()
        dataset = client.post("/v1/datasets", json=body).raise_for_status().json()
        path = f"/v1/datasets/{dataset['id']}"
        while dataset["status"] == "in_progress":
            time.sleep(5)
            dataset = client.get(path).raise_for_status().json()
            most = heavier(most, memory_by_role(process))
        made_s = time.perf_counter() - began
        print(f"{dataset['counts']} in {made_s:.0f} s", flush=True)
        archive, sending = download(client, f"{path}/content?format=tar", folder)
        most = heavier(most, memory_by_role(process))
    return {
        "clips": dataset["counts"]["done"],
        "shortfall": dataset["shortfall"],
        "format": options.format,
        "making_s": made_s,
        "clips_a_second": dataset["counts"]["done"] / made_s,
        "download": sending,
        "read_back": read_back(archive, folder / "unpacked", options.format),
        "memory_mib_idle": idle,
        "memory_mib_most": most,
    }


def heavier(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The most that each role has weighed."""
    return {
        role: {key: max(one.get(role, other[role])[key], other[role][key]) for key in other[role]} for role in other
    }


def download(client: httpx.Client, url: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The whole archive, then some ranges that must be parts of it."""
    path, digest = folder / "archive.tar", hashlib.sha256()
    began = time.perf_counter()
    with client.stream("GET", url) as answer, path.open("wb") as file:
        first_s = time.perf_counter() - began
        for chunk in answer.raise_for_status().iter_raw():
            file.write(chunk)
            digest.update(chunk)
    whole_s, size = time.perf_counter() - began, path.stat().st_size
    times = []
    with path.open("rb") as file:
        for begin in np.linspace(0, size - RANGE_BYTES, RANGES).astype(int).tolist():
            began = time.perf_counter()
            wanted = {"range": f"bytes={begin}-{begin + RANGE_BYTES - 1}"}
            part = client.get(url, headers=wanted)
            times.append(1000 * (time.perf_counter() - began))
            file.seek(begin)
            if part.status_code != 206 or part.content != file.read(RANGE_BYTES):
                raise SystemExit(f"the range from {begin} is not that part of the archive")
    figures = {
        "size_mib": size / 2**20,
        "first_byte_s": first_s,
        "whole_s": whole_s,
        "range_ms_median": statistics.median(times),
        "range_ms_most": max(times),
    }
    return path, figures


def read_back(archive: Path, folder: Path, kind: str) -> dict[str, Any]:
    """How many clips the library finds, each compared with the manifest."""
    began = time.perf_counter()
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    entries = {line["clip"]: line for line in map(json.loads, (folder / "manifest.jsonl").open())}
    same = 0
    if kind == "webdataset":
        import webdataset

        shards = sorted(map(str, folder.glob("shards/*.tar")))
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            expected = entries.pop(sample["__key__"])["files"][0]["sha256"]
            same += hashlib.sha256(sample["mp4"]).hexdigest() == expected
    else:
        import datasets

        found = datasets.load_dataset("videofolder", data_dir=str(folder), cache_dir=str(folder / "cache"))
        for rows in found.cast_column("video", datasets.Video(decode=False)).values():
            for row in rows:
                expected = entries.pop(row["clip"])["files"][0]["sha256"]
                same += hashlib.sha256(Path(row["video"]["path"]).read_bytes()).hexdigest() == expected
    if entries:
        raise SystemExit(f"{len(entries)} clips of the manifest were not found, such as {next(iter(entries))}")
    return {"library": kind, "clips_with_the_right_hash": same, "seconds": time.perf_counter() - began}


def of_rows(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="medsora-bench-") as folder:
        result = {"rows": count, "archive": index_and_ranges(Path(folder), count)}
    result["duplicates"] = {kind: searches(marks) for kind, marks in pictures(count).items()}
    return result


def index_and_ranges(folder: Path, count: int) -> dict[str, Any]:
    """Milliseconds for the index, once, and for ranges behind one another that fall anywhere."""
    from sqlalchemy import insert, update

    from server.datasets.archive import Archive
    from server.datasets.files import DatasetFiles
    from server.datasets.layout import groups_of
    from server.datasets.model import Dataset, DatasetClip, DatasetPayload
    from server.datasets.repository import DatasetRepository
    from server.jobs.database import Database
    from server.jobs.schema import migrate

    database = Database(f"sqlite:///{folder / 'rows.db'}")
    migrate(database)
    repository, files = DatasetRepository(database, lease_s=60), DatasetFiles(folder / "datasets")
    names = ("modality", "description", "licence", "intended_use")
    dataset = repository.add(
        {
            "tenant": "default", "name": "rows", "model": "tiny", "model_sha256": "0" * 64, "format": "videofolder",
            "seed": 1, "total": count, "labels": [{"name": "covid", "count": count, "folder": "covid"}],
            "splits": [{"name": "train", "ratio": 9}, {"name": "test", "ratio": 1}],
            "settings": {
                "num_frames": 16, "width": 32, "height": 32, "fps": 8.0, "num_inference_steps": 4,
                "guidance_scale": 1.0, "sampler": "euler", "deterministic": True,
            },
            "filters": {
                "min_motion": None, "min_distance": None, "max_training_resemblance": None, "max_tries": 4,
            },
            "about": dict.fromkeys(names, "x") | {"training_data": []},
        },
        max_active=1,
    )  # fmt: skip
    size = 20_000
    clips, payloads = [], []
    for number in range(count):
        job = f"video_{secrets.token_hex(16)}"
        part = {"name": ".mp4", "size_bytes": size, "crc32": number, "sha256": secrets.token_hex(32)}
        clips.append({
            "dataset_seq": dataset.seq, "number": number, "label": 0, "index_in_label": number,
            "split": int(number % 10 == 9), "state": "done", "tries": 1, "seed": number, "job_id": job, "attempt": 1,
            "done_number": number + 1,
        })  # fmt: skip
        payloads.append({
            "dataset_seq": dataset.seq, "number": number, "job_id": job, "attempt": 1, "size_bytes": size,
            "parts": [part], "frames_sha256": "0" * 64, "measures": {"motion": 1.0}, "fingerprint": b"",
        })  # fmt: skip
        path = files.path(dataset.id, job, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
    with database.write() as connection:
        connection.execute(insert(DatasetClip), clips)
        connection.execute(insert(DatasetPayload), payloads)
        connection.execute(update(Dataset).values(planned=count, done=count))
    dataset = repository.get("default", dataset.id)  # type: ignore[assignment]
    began = time.process_time()
    archive = Archive("zip", groups_of(dataset, repository, files))
    index_ms = 1000 * (time.process_time() - began)
    times = []
    for begin in np.random.default_rng(0).integers(0, archive.size() - RANGE_BYTES, 5 * RANGES).tolist():
        began = time.process_time()
        if sum(map(len, archive.read(begin, begin + RANGE_BYTES))) != RANGE_BYTES:
            raise SystemExit("a range is too short")
        times.append(1000 * (time.process_time() - began))
    database.close()
    return {
        "index_cpu_ms": index_ms,
        "range_cpu_ms_median": statistics.median(times),
        "range_cpu_ms_most": max(times),
    }


def pictures(count: int) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Fingerprints that are smooth, as those of real clips are, and of noise, against which no bound helps."""
    drawn = np.random.default_rng(0)
    coarse = drawn.normal(110, 40, (count, 4, 4, 4)).repeat(4, axis=2).repeat(4, axis=3)
    smooth = (coarse + drawn.normal(0, 6, (count, 4, 16, 16))).clip(0, 255).reshape(count, FINGERPRINT_BYTES)
    return {
        "smooth": smooth.astype(np.uint8),
        "noise": drawn.integers(0, 256, (count, FINGERPRINT_BYTES), dtype=np.uint8),
    }


def searches(marks: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, float]:
    """Milliseconds of a search for the nearest of all the others: by bounds, and through all of them."""
    known = FingerprintSet()
    known.put(range(len(marks)), [mark.tobytes() for mark in marks])
    by_bounds, through_all = [], []
    for number in range(0, len(marks), len(marks) // RANGES):
        began = time.process_time()
        found = known.nearest(marks[number].tobytes(), without=number)
        by_bounds.append(1000 * (time.process_time() - began))
        began = time.process_time()
        distances = np.square(marks.astype(np.float32) - marks[number]).mean(axis=1)
        distances[number] = np.inf
        through_all.append(1000 * (time.process_time() - began))
        if abs(found - np.sqrt(distances.min())) > 1e-3:
            raise SystemExit("the nearest is not the nearest")
    return {"by_bounds_cpu_ms": statistics.median(by_bounds), "through_all_cpu_ms": statistics.median(through_all)}


if __name__ == "__main__":
    main()
