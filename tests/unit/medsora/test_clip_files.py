"""Files of clips: exact where they say so, the same bytes each time, and DICOM that a checker passes."""

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image

from medsora.clip_files import (
    CLIP_FORMATS,
    frames_sha256,
    mean_motion,
    write_clip,
)
from medsora.errors import MedsoraError
from medsora.provenance import SYNTHETIC_NOTE, clip_metadata
from medsora.request import GenerationRequest
from medsora.video_io import read_video

REQUEST = GenerationRequest(
    label="covid-convex", seed=7, num_frames=5, height=32, width=48, num_inference_steps=4, guidance_scale=1.0,
    sampler="euler",
)  # fmt: skip


@pytest.fixture
def frames() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)


@pytest.fixture
def metadata() -> dict[str, str]:
    return clip_metadata(REQUEST, model="tiny", model_sha256="0" * 64)


def _write(path: Path, frames: Any, metadata: dict[str, str], clip_format: str) -> list[Any]:
    return write_clip(path, frames, clip_format=clip_format, fps=8.0, metadata=metadata, modality="US")


@pytest.mark.parametrize("clip_format", CLIP_FORMATS)
def test_the_same_frames_are_the_same_bytes(
    tmp_path: Path, frames: Any, metadata: dict[str, str], clip_format: str
) -> None:
    first, second = (_write(tmp_path / name, frames, metadata, clip_format) for name in ("a", "b"))
    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sum(part.size_bytes for part in first) == (tmp_path / "a").stat().st_size


def test_ffv1_is_exact(tmp_path: Path, frames: Any, metadata: dict[str, str]) -> None:
    _write(tmp_path / "a.mkv", frames, metadata, "ffv1")
    read, fps = read_video(tmp_path / "a.mkv")
    assert np.array_equal(read, frames)
    assert fps == 8.0


def test_png_parts_are_the_frames(tmp_path: Path, frames: Any, metadata: dict[str, str]) -> None:
    parts = _write(tmp_path / "a", frames, metadata, "png")
    assert [part.name for part in parts] == [f"/frame_{number:04d}.png" for number in range(5)]
    content, offset = (tmp_path / "a").read_bytes(), 0
    for part, frame in zip(parts, frames, strict=True):
        picture = Image.open(io.BytesIO(content[offset : offset + part.size_bytes]))
        assert np.array_equal(np.asarray(picture), frame)
        assert picture.text["Description"] == SYNTHETIC_NOTE  # type: ignore[attr-defined]
        offset += part.size_bytes


def test_dicom_says_that_it_is_synthetic_and_of_nobody(tmp_path: Path, frames: Any, metadata: dict[str, str]) -> None:
    _write(tmp_path / "a.dcm", frames, metadata, "dicom")
    found = pydicom.dcmread(tmp_path / "a.dcm")
    assert np.array_equal(found.pixel_array, frames)
    assert found[0x0008, 0x001C].value == "YES"
    assert list(found.ImageType) == ["DERIVED", "SECONDARY"]
    assert json.loads(metadata["comment"])["model"] in found.DerivationDescription
    assert (found.PatientName, found.PatientID, found.PatientBirthDate, found.PatientSex) == ("", "", "", "")
    assert float(found.FrameTime) == 125.0
    other = frames.copy()
    other[0, 0, 0, 0] ^= 1
    _write(tmp_path / "b.dcm", other, metadata, "dicom")
    again = pydicom.dcmread(tmp_path / "b.dcm")
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        assert getattr(found, name) != getattr(again, name)
        assert getattr(found, name).is_valid


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian: dicom3tools) is not installed")
def test_dciodvfy_finds_no_error_but_the_attribute_that_it_may_be_too_old_for(
    tmp_path: Path, frames: Any, metadata: dict[str, str]
) -> None:
    _write(tmp_path / "a.dcm", frames, metadata, "dicom")
    done = subprocess.run(["dciodvfy", str(tmp_path / "a.dcm")], capture_output=True, text=True, check=False)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
    # Synthetic Data came into the standard in 2023; what Debian ships is older
    assert [line for line in errors if "(0x0008,0x001c)" not in line] == []


def test_an_unknown_format_is_refused(tmp_path: Path, frames: Any, metadata: dict[str, str]) -> None:
    with pytest.raises(MedsoraError, match="allowed: mp4, ffv1, png, dicom"):
        _write(tmp_path / "a", frames, metadata, "gif")


def test_motion_is_in_grey_levels() -> None:
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    assert mean_motion(frames) == 0.0
    frames[1] = 10
    assert mean_motion(frames) == 10.0
    assert mean_motion(frames[:1]) == 0.0


def test_the_hash_is_of_every_pixel(frames: Any) -> None:
    other = frames.copy()
    other[-1, -1, -1, -1] ^= 1
    assert frames_sha256(frames) == frames_sha256(frames.copy())
    assert frames_sha256(frames) != frames_sha256(other)
