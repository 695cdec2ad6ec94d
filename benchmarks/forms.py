"""What each form of a video weighs, and the processor seconds that it takes to make.

    python benchmarks/forms.py [--checkpoint lung-ultrasound-small] [--clips 6] [--times 5]

Makes clips of all labels in turn, then writes each in every form that the server offers, several times, by the
functions that the server writes them with. Seconds are those of the processor, all threads together, so that other
work on the machine says little; of each clip the least counts. Prints a table.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medsora.clip_files import write_clip
from medsora.manifest import find_checkpoint, read_manifest
from medsora.pipeline import VideoPipeline
from medsora.provenance import clip_metadata
from medsora.request import resolve_request
from server.worker.stills import write_preview, write_spritesheet, write_thumbnail

FORMS = {
    "video": ("mp4", ".mp4"),
    "lossless": ("ffv1", ".mkv"),
    "thumbnail": (None, ".webp"),
    "spritesheet": (None, ".jpg"),
    "dicom": ("dicom", ".dcm"),
    "preview": (None, ".webp"),
}
"""Values of ``variant`` -> formats of :func:`write_clip`, and endings. The last two are made when asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="lung-ultrasound-small", help="a directory, or a shipped name")
    parser.add_argument("--clips", type=int, default=6, help="clips to write (default: 6)")
    parser.add_argument("--times", type=int, default=5, help="how often to write each (default: 5)")
    options = parser.parse_args()
    directory = find_checkpoint(options.checkpoint)
    manifest = read_manifest(directory)
    sha256 = hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    pipeline = VideoPipeline.from_checkpoint(directory)
    found: dict[str, list[tuple[int, float]]] = {form: [] for form in FORMS}
    for seed in range(options.clips):
        request = resolve_request(manifest, label=manifest.labels[seed % len(manifest.labels)].name, seed=seed)
        frames = pipeline([request])[0]
        metadata = clip_metadata(request, model=manifest.name, model_sha256=sha256)
        for form in FORMS:
            found[form].append(measure(writer(form, frames, metadata, manifest), FORMS[form][1], times=options.times))
    shape = f"{request.num_frames} frames of {request.width}x{request.height}"
    print(f"{manifest.name}, {options.clips} clips of {shape}: median (least to most)")
    print(f"{'variant':10} {'kB':>20} {'times the MP4':>20} {'ms':>20} {'times the MP4':>20}")
    for form, measured in found.items():
        kilobytes = [size / 1000 for size, _ in measured]
        milliseconds = [1000 * seconds for _, seconds in measured]
        larger = [size / video for (size, _), (video, _) in zip(measured, found["video"], strict=True)]
        longer = [took / video for (_, took), (_, video) in zip(measured, found["video"], strict=True)]
        cells = (spread(kilobytes, 0), spread(larger, 1), spread(milliseconds, 1), spread(longer, 2))
        print(f"{form:10} " + " ".join(f"{cell:>20}" for cell in cells))


def writer(form: str, frames: Any, metadata: dict[str, str], manifest: Any) -> Callable[[Path], object]:
    """What writes a clip in a form to a path."""
    fps = manifest.limits.fps
    clip_format, _ = FORMS[form]
    if form == "thumbnail":
        return lambda path: write_thumbnail(path, frames, metadata=metadata)
    if form == "spritesheet":
        return lambda path: write_spritesheet(path, frames, metadata=metadata)
    if clip_format is None:
        return lambda path: write_preview(path, frames, fps=fps, metadata=metadata)
    return lambda path: write_clip(
        path, frames, clip_format=clip_format, fps=fps, metadata=metadata, modality=manifest.modality
    )


def measure(write: Callable[[Path], object], ending: str, *, times: int) -> tuple[int, float]:
    """Bytes of the file, and the least processor seconds that writing it took."""
    took = []
    with tempfile.TemporaryDirectory(prefix="medsora-forms-") as folder:
        path = Path(folder) / f"clip{ending}"
        write(path)  # not counted: the first one also loads libraries
        for _ in range(times):
            began = time.process_time()
            write(path)
            took.append(time.process_time() - began)
        return path.stat().st_size, min(took)


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
