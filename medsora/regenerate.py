"""Clips of a dataset made again from its manifest, and compared with what it says of them."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from medsora.clip_files import frames_sha256, write_clip
from medsora.errors import CheckpointError, MedsoraError
from medsora.files import sha256_of
from medsora.manifest import find_checkpoint, read_manifest
from medsora.pipeline import VideoPipeline
from medsora.provenance import clip_metadata
from medsora.request import resolve_request

__all__ = ["MadeClip", "read_clips", "regenerate_clips"]

_KEYS: dict[str, type | tuple[type, ...]] = {
    "clip": str,
    "label": str,
    "seed": int,
    "model": str,
    "model_sha256": str,
    "num_frames": int,
    "width": int,
    "height": int,
    "fps": (int, float),
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "sampler": str,
    "format": str,
    "modality": str,
    "frames_sha256": str,
    "files": list,
}
"""Keys of a line of a manifest that are needed -> their types."""


@dataclass(frozen=True)
class MadeClip:
    """A clip that was made again."""

    clip: str
    is_same: bool
    """Whether frames and files are the same to the bit."""
    difference: str
    """What is not, in words."""


def read_clips(path: Path, *, wanted: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read the lines of a manifest.

    Args:
        wanted: Names of the clips to read; None: all.

    Raises:
        MedsoraError: A line is none of a manifest, or a wanted clip is not in it.
        OSError: It cannot be read.
    """
    clips = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                clip = json.loads(line)
                wrong = [key for key, kind in _KEYS.items() if not isinstance(clip[key], kind)]
                if wrong:
                    raise ValueError(f"{wrong[0]} is {clip[wrong[0]]!r}")
                for entry in clip["files"]:
                    _safe(entry["path"])
            except (KeyError, TypeError, ValueError) as error:
                raise MedsoraError(f"{path}, line {number} is no line of a dataset's manifest: {error!r}") from error
            if wanted is None or clip["clip"] in wanted:
                clips.append(clip)
    lacking = set(wanted or ()) - {clip["clip"] for clip in clips}
    if lacking:
        raise MedsoraError(f"{path} has no clip {', '.join(sorted(lacking))}")
    return clips


def regenerate_clips(
    clips: Sequence[dict[str, Any]], output: Path, *, checkpoint: str | None, device: str = "auto", force: bool = False
) -> Iterator[MadeClip]:
    """Make clips again, write their files to a folder, and compare.

    Args:
        clips: Of :func:`read_clips`.
        checkpoint: Directory or name; None: what the manifest names.
        force: Overwrite files that are there.

    Raises:
        CheckpointError: The checkpoint is not there, or another than that of the clips.
        RequestError: It cannot make such a clip.
        MedsoraError: A file is there already.
        OSError: A file cannot be written.
    """
    pipelines: dict[str, VideoPipeline] = {}
    for clip in clips:
        directory = find_checkpoint(checkpoint or clip["model"])
        digest = sha256_of(directory / "manifest.json")
        if digest != clip["model_sha256"]:
            raise CheckpointError(
                f"{clip['clip']} was made by a checkpoint whose manifest has the SHA-256 {clip['model_sha256']}; "
                f"{directory} is another: {digest}"
            )
        if digest not in pipelines:
            pipelines[digest] = VideoPipeline.from_checkpoint(directory, device=device)
        yield _make(pipelines[digest], clip, directory, digest, output, force=force)


def _make(
    pipeline: VideoPipeline, clip: dict[str, Any], directory: Path, digest: str, output: Path, *, force: bool
) -> MadeClip:
    targets = [output / _safe(entry["path"]) for entry in clip["files"]]
    there = [target for target in targets if target.exists()]
    if there and not force:
        raise MedsoraError(f"{there[0]} exists already; give --force to overwrite it")
    names = ("label", "seed", "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "sampler")
    request = resolve_request(read_manifest(directory), **{name: clip[name] for name in names})
    frames = pipeline([request])[0]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".medsora-") as scratch:
        path = Path(scratch) / "clip"
        parts = write_clip(
            path,
            frames,
            clip_format=clip["format"],
            fps=clip["fps"],
            metadata=clip_metadata(request, model=clip["model"], model_sha256=digest),
            modality=clip["modality"],
        )
        content = path.read_bytes()
    differing = []
    if frames_sha256(frames) != clip["frames_sha256"]:
        differing.append("its frames differ")
    if len(parts) != len(targets):
        differing.append(f"it has {len(parts)} files where the manifest has {len(targets)}")
    offset = 0
    for part, target, entry in zip(parts, targets, clip["files"], strict=False):
        piece = content[offset : offset + part.size_bytes]
        offset += part.size_bytes
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(piece)
        # a C2PA manifest was put in afterwards; it cannot be made again, and what it was put into can
        if hashlib.sha256(piece).hexdigest() != entry.get("unsigned_sha256", entry["sha256"]):
            differing.append(f"{entry['path']} differs")
    return MadeClip(clip["clip"], not differing, "; ".join(differing[:3]))


def _safe(path: str) -> PurePosixPath:
    """A path that stays in the folder that it is put into."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path or "\\" in path:
        raise ValueError(f"path {path!r} leads out of the folder")
    return pure
