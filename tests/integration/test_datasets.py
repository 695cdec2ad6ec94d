"""Datasets from real processes, read by the libraries that they are for, and made again from their manifest."""

import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from sqlalchemy import func, select

from server.datasets.model import Dataset, DatasetClip
from server.jobs.model import Job, JobStatus

if TYPE_CHECKING:
    from conftest import RunningServer

pytestmark = pytest.mark.integration

READ = """
import json, sys
import datasets, webdataset
datasets.disable_progress_bars()
folder, shard, cache = sys.argv[1:]
found = datasets.load_dataset("videofolder", data_dir=folder, cache_dir=cache)
found = found.cast_column("video", datasets.Video(decode=False))
rows = {split: [[row["clip"], row["label"]] for row in found[split]] for split in found}
read = webdataset.WebDataset(shard, shardshuffle=False)
samples = [[one["__key__"], json.loads(one["json"])["label"]] for one in read]
print(json.dumps([rows, samples]))
"""


def _made(client: httpx.Client, folder: Path, dataset_id: str | None = None, **fields: Any) -> Path:
    """Ask for a dataset unless there is one, wait for it, unpack it."""
    body = {"name": "d", "labels": {"covid-convex": 3, "regular-convex": 2}, "seed": 7, **fields}
    if dataset_id is None:
        dataset_id = client.post("/v1/datasets", json=body).raise_for_status().json()["id"]
    deadline = time.monotonic() + 240
    while client.get(f"/v1/datasets/{dataset_id}").json()["status"] != "completed":
        assert time.monotonic() < deadline, client.get(f"/v1/datasets/{dataset_id}").json()
        time.sleep(0.1)
    content = client.get(f"/v1/datasets/{dataset_id}/content").raise_for_status().content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
    return folder


def test_libraries_read_it_and_clips_are_made_again(
    server: "RunningServer", tiny_checkpoint: Path, tmp_path: Path
) -> None:
    splits = {"train": 0.6, "test": 0.4}
    folder = _made(server.http, tmp_path / "folder", splits=splits)
    shards = _made(server.http, tmp_path / "shards", format="webdataset")
    frames = _made(server.http, tmp_path / "png", format="png")
    arguments = [str(folder), str(shards / "shards" / "train-000000.tar"), str(tmp_path / "cache")]
    done = subprocess.run([sys.executable, "-c", READ, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, samples = json.loads(done.stdout.splitlines()[-1])
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for split in splits:
        expected = [[one["clip"], one["label"]] for one in entries if one["split"] == split]
        assert sorted(rows[split]) == expected
    assert samples == [[one["clip"], one["label"]] for one in entries]
    for made in (folder, frames):
        again = tmp_path / f"{made.name}-again"
        command = [
            Path(sys.executable).with_name("medsora"),
            "regenerate",
            str(made / "manifest.jsonl"),
            "-o",
            str(again),
        ]
        done = subprocess.run(
            [*command, "--checkpoint", str(tiny_checkpoint)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        for line in (made / "manifest.jsonl").read_text().splitlines():
            for entry in json.loads(line)["files"]:
                assert (again / entry["path"]).read_bytes() == (made / entry["path"]).read_bytes()


def _count(server: "RunningServer", query: Any) -> int:
    with server.database.read() as connection:
        return connection.scalar(query) or 0


def _kill_runner(server: "RunningServer") -> None:
    """The reaper's process makes the jobs of datasets and records what came of them."""
    server.child("reaper").kill()


def _kill_worker(server: "RunningServer") -> None:
    """In the middle of a clip, with the process that samples."""
    at_work = select(func.count()).where(Job.status == JobStatus.RUNNING.value, Job.steps_done > 0)
    server.wait_until(lambda: _count(server, at_work), timeout_s=120, what="a clip that is being made")
    worker = server.child("worker")
    for process in [*worker.children(recursive=True), worker]:
        process.kill()
    psutil.wait_procs([worker], timeout=10)


def test_killed_in_the_middle_it_has_exactly_the_clips_that_were_asked_for(
    server: "RunningServer", tmp_path: Path
) -> None:
    """And the very files of a run that nothing disturbed."""
    body = {"labels": {"covid-convex": 9, "regular-convex": 9}, "num_inference_steps": 40, "splits": {"a": 2, "b": 1}}
    quiet = _made(server.http, tmp_path / "quiet", **body)
    dataset_id = server.http.post("/v1/datasets", json={"name": "d", "seed": 7, **body}).raise_for_status().json()["id"]
    seq = _count(server, select(Dataset.seq).where(Dataset.id == dataset_id))
    done = select(func.count()).where(DatasetClip.dataset_seq == seq, DatasetClip.state == "done")
    for least, kill in ((1, _kill_runner), (3, _kill_worker), (6, _kill_runner), (8, _kill_worker), (8, _kill_runner)):
        server.wait_until(lambda: _count(server, done) >= least, timeout_s=180, what=f"{least} clips")  # noqa: B023
        kill(server)
    assert _count(server, done) < 18, "all was done before the last kill"
    killed = _made(server.http, tmp_path / "killed", dataset_id=dataset_id)

    manifests = []
    for folder in (quiet, killed):
        lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        manifests.append([{key: value for key, value in line.items() if key != "video_id"} for line in lines])
    assert manifests[0] == manifests[1]
    assert len({line["clip"] for line in manifests[1]}) == len({line["seed"] for line in manifests[1]}) == 18
    for line in manifests[0]:
        for entry in line["files"]:
            assert (quiet / entry["path"]).read_bytes() == (killed / entry["path"]).read_bytes()
    made = {str(path.relative_to(quiet)) for path in quiet.rglob("*")}
    assert made == {str(path.relative_to(killed)) for path in killed.rglob("*")}
    of_it = Job.id.in_(select(DatasetClip.job_id).where(DatasetClip.dataset_seq == seq))
    assert _count(server, select(func.count()).where(of_it, Job.status == JobStatus.SUCCEEDED.value)) == 18
    assert _count(server, select(func.sum(Job.attempt)).where(of_it)) > 18, "no kill hit a clip"
    # of all datasets that were made here: a job a clip, and not one more
    clips = _count(server, select(func.count()).select_from(DatasetClip))
    assert _count(server, select(func.count()).select_from(Job)) == clips
