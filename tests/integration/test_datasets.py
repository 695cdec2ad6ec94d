"""Datasets from real processes, read by the libraries that they are for, and made again from their manifest."""

import io
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

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


def _made(client: httpx.Client, folder: Path, **fields: Any) -> Path:
    """Ask for a dataset, wait for it, unpack it."""
    body = {"name": "d", "labels": {"covid-convex": 3, "regular-convex": 2}, "seed": 7, **fields}
    dataset_id = client.post("/v1/datasets", json=body).raise_for_status().json()["id"]
    deadline = time.monotonic() + 120
    while client.get(f"/v1/datasets/{dataset_id}").json()["status"] != "completed":
        assert time.monotonic() < deadline, client.get(f"/v1/datasets/{dataset_id}").json()
        time.sleep(0.1)
    content = client.get(f"/v1/datasets/{dataset_id}/content").raise_for_status().content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
    return folder


def test_libraries_read_it_and_clips_are_made_again(
    start_server: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    server = start_server()
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
