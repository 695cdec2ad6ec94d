"""Clips made again from a manifest: the same to the bit, or it is said what differs."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from medsora.clip_files import frames_sha256, write_clip
from medsora.errors import CheckpointError, MedsoraError
from medsora.files import sha256_of
from medsora.manifest import read_manifest
from medsora.pipeline import VideoPipeline
from medsora.provenance import clip_metadata
from medsora.regenerate import read_clips, regenerate_clips
from medsora.request import resolve_request


@pytest.fixture(scope="module")
def clip(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A line of a manifest, as a server writes it."""
    settings = {
        "label": "covid-convex", "seed": 3, "num_frames": 16, "width": 32, "height": 32, "num_inference_steps": 2,
        "guidance_scale": 1.0, "sampler": "euler",
    }  # fmt: skip
    request = resolve_request(read_manifest(tiny_checkpoint), **settings)
    frames = VideoPipeline.from_checkpoint(tiny_checkpoint, device="cpu")([request])[0]
    digest = sha256_of(tiny_checkpoint / "manifest.json")
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    metadata = clip_metadata(request, model="tiny", model_sha256=digest)
    (part,) = write_clip(path, frames, clip_format="mp4", fps=8.0, metadata=metadata, modality="US")
    return {
        **settings, "clip": "clip_000000", "model": "tiny", "model_sha256": digest, "fps": 8.0, "format": "mp4",
        "modality": "US", "frames_sha256": frames_sha256(frames),
        "files": [{"path": "train/covid/clip_000000.mp4", "size_bytes": part.size_bytes, "sha256": part.sha256}],
    }  # fmt: skip


def _written(folder: Path, *clips: dict[str, Any]) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in clips))
    return path


def test_it_is_the_same_to_the_bit(clip: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    clips = read_clips(_written(tmp_path, clip))
    (made,) = regenerate_clips(clips, tmp_path / "again", checkpoint=str(tiny_checkpoint), device="cpu")
    assert (made.is_same, made.difference) == (True, "")
    content = (tmp_path / "again/train/covid/clip_000000.mp4").read_bytes()
    assert hashlib.sha256(content).hexdigest() == clip["files"][0]["sha256"]
    with pytest.raises(MedsoraError, match="exists already"):
        list(regenerate_clips(clips, tmp_path / "again", checkpoint=str(tiny_checkpoint), device="cpu"))


def test_a_signed_file_is_compared_by_its_hash_before(
    clip: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    entry = clip["files"][0]
    signed = {**clip, "files": [{**entry, "sha256": "1" * 64, "unsigned_sha256": entry["sha256"]}]}
    clips = read_clips(_written(tmp_path, signed))
    (made,) = regenerate_clips(clips, tmp_path / "again", checkpoint=str(tiny_checkpoint), device="cpu")
    assert made.is_same


def test_what_differs_is_said(clip: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = {**clip, "seed": 4}
    clips = read_clips(_written(tmp_path, other))
    (made,) = regenerate_clips(clips, tmp_path / "again", checkpoint=str(tiny_checkpoint), device="cpu")
    assert not made.is_same
    assert made.difference == "its frames differ; train/covid/clip_000000.mp4 differs"
    clips = read_clips(_written(tmp_path, {**clip, "model_sha256": "2" * 64}))
    with pytest.raises(CheckpointError, match="is another"):
        list(regenerate_clips(clips, tmp_path / "again", checkpoint=str(tiny_checkpoint), device="cpu", force=True))


@pytest.mark.parametrize("path", ["../out.mp4", "/out.mp4", "a\\b.mp4", ""])
def test_a_path_out_of_the_folder_is_refused(clip: dict[str, Any], tmp_path: Path, path: str) -> None:
    entry = {**clip["files"][0], "path": path}
    with pytest.raises(MedsoraError, match="leads out of the folder"):
        read_clips(_written(tmp_path, {**clip, "files": [entry]}))


def test_what_is_wanted_must_be_there(clip: dict[str, Any], tmp_path: Path) -> None:
    path = _written(tmp_path, clip, {**clip, "clip": "clip_000001"})
    assert [one["clip"] for one in read_clips(path, wanted=["clip_000001"])] == ["clip_000001"]
    with pytest.raises(MedsoraError, match="has no clip clip_7"):
        read_clips(path, wanted=["clip_7"])
    with pytest.raises(MedsoraError, match="line 1 is no line"):
        read_clips(_written(tmp_path, {key: value for key, value in clip.items() if key != "seed"}))
