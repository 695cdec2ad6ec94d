from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medsora.manifest import read_manifest
from medsora.provenance import SYNTHETIC_NOTE, clip_metadata
from medsora.request import GenerationRequest, resolve_request
from medsora.video_io import probe_video, write_ffv1, write_mp4

CLIP_WRITERS = [(write_mp4, "clip.mp4"), (write_ffv1, "clip.mkv")]


def test_it_names_everything_a_clip_depends_on(tiny_checkpoint: Path) -> None:
    request = resolve_request(read_manifest(tiny_checkpoint), label="covid lung", seed=7)
    origin = json.loads(clip_metadata(request, model="tiny", model_sha256="ab12")["comment"])
    fields = {field.name for field in dataclasses.fields(GenerationRequest)}
    assert fields - {"prefix_frames", "strength"} <= set(origin)
    source = {"kind": "reference", "sha256": "cd34"}
    of_source = json.loads(clip_metadata(request, model="tiny", model_sha256="ab12", source=source)["comment"])
    assert fields <= set(of_source)
    assert of_source["source"] == source
    assert GenerationRequest(**{key: of_source[key] for key in dataclasses.asdict(request)}) == request
    assert (origin["model"], origin["model_sha256"], origin["synthetic"]) == ("tiny", "ab12", True)


@pytest.mark.parametrize(("write", "name"), CLIP_WRITERS)
def test_files_keep_it(tiny_checkpoint: Path, tmp_path: Path, write: Callable[..., None], name: str) -> None:
    request = resolve_request(read_manifest(tiny_checkpoint), label="covid lung", seed=2**63 - 1)
    metadata = clip_metadata(request, model="tiny", model_sha256="ab12")
    write(tmp_path / name, np.zeros((2, 16, 16, 3), np.uint8), fps=8, metadata=metadata)
    assert probe_video(tmp_path / name).metadata == metadata
    assert metadata["description"] == SYNTHETIC_NOTE
