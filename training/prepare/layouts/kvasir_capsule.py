"""Kvasir-Capsule: capsule endoscopy videos with labels of single frames and two official split files.

``labelled_videos/<id>.mp4``; ``split_0.csv`` and ``split_1.csv`` (beside them or in ``official_splits``) with columns
``filename`` (``<id>_<frame>.jpg``) and ``label``; else ``metadata.csv``, separated by semicolons, with ``video_id``,
``frame_number`` and ``finding_class``. Where there are only ``labelled_images/<Class>/<id>_<frame>.jpg``, those are the
frames. A clip is a run of consecutive frames with one label.
Source: github.com/simula/kvasir-capsule; doi:10.1038/s41597-021-00920-z.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.layouts.files import natural_key, relative_name
from training.prepare.layouts.folder import name_columns
from training.prepare.layouts.table import read_table
from training.prepare.segments import FrameLabel, runs_to_segments
from training.prepare.source import FRAME_SUFFIXES, VIDEO_SUFFIXES, Item, Listing, Skipped

__all__ = ["is_kvasir_capsule", "list_kvasir_capsule"]

SPLIT_FILES = ("split_0.csv", "split_1.csv")
FRAME_NAME = re.compile(r"(?P<video>[0-9a-zA-Z]+)_(?P<frame>\d+)(\.\w+)?")


def is_kvasir_capsule(root: Path) -> bool:
    """Whether a folder has labelled videos or images, and a table of their labels."""
    if not root.is_dir():
        return False
    has_media = (root / "labelled_videos").is_dir() or (root / "labelled_images").is_dir()
    return has_media and (bool(_split_files(root)) or (root / "metadata.csv").is_file())


def _split_files(root: Path) -> list[Path]:
    for folder in (root, root / "official_splits", root / "splits"):
        paths = [folder / name for name in SPLIT_FILES if (folder / name).is_file()]
        if paths:
            return paths
    return []


def list_kvasir_capsule(root: Path, config: PrepareConfig) -> Listing:
    """Runs of labelled frames of every video.

    With ``fold`` 0 or 1 that split file is the test split, the other one trains. The official files have some videos
    in both; then the whole video goes where more of its labelled frames are, which is noted.
    """
    columns = name_columns(config, ("label",), ("label",))
    labels, side = _read_labels(root, config)
    files, unlabelled = _media(root)
    items: list[Item] = []
    skipped: list[Skipped] = []
    notes: list[str] = []
    for video in sorted(labels, key=natural_key):
        frames = [
            FrameLabel(number, (("label", label),) if columns else ())
            for number, label in sorted(labels[video].items())
        ]
        if video not in files:
            reason = f"has {len(frames)} labelled frames, but no video and no images"
            skipped.append(Skipped(name=video, reason=reason))
            continue
        kind, paths = files[video]
        name = relative_name(paths[0], root) if kind == "video" else f"labelled_images/{video}"
        if kind == "frames" and config.fps is None:
            raise DataError("labelled_images do not say their frame rate: give it with --fps, or add labelled_videos")
        segments, short = runs_to_segments(
            name, frames, min_frames=config.min_frames, bridge_frames=config.bridge_frames
        )
        skipped += short
        if not segments:
            continue
        split = None
        if config.fold is not None:
            counts = side[video]
            split = "test" if counts["test"] > counts["train"] else "train"
            if len(counts) > 1:
                notes.append(
                    f"video {video} is in both split files ({counts['train']} frames train, {counts['test']} test): "
                    f"all of it went to {split}"
                )
        items.append(
            Item(
                name=name,
                kind=kind,
                paths=paths,
                numbers=tuple(_frame_of(path) for path in paths) if kind == "frames" else (),
                segments=segments,
                group=video,
                split=split,
                licence=config.licence or "CC BY 4.0",
                source=config.source or "Kvasir-Capsule, doi:10.1038/s41597-021-00920-z",
                attribution=config.attribution or "P.H. Smedsrud et al., Scientific Data 8 (2021) 142",
            )
        )
    if unlabelled:
        notes.append(f"{unlabelled} videos without any labelled frame were passed over")
    return Listing(
        layout="kvasir-capsule",
        dataset=config.dataset or "kvasir_capsule",
        items=tuple(items),
        skipped=tuple(skipped),
        notes=tuple(notes),
        modality="ES",
    )


def _read_labels(root: Path, config: PrepareConfig) -> tuple[dict[str, dict[int, str]], dict[str, Counter[str]]]:
    """Label of each frame of each video, and how many frames each video has on either side."""
    labels: dict[str, dict[int, str]] = defaultdict(dict)
    side: dict[str, Counter[str]] = defaultdict(Counter)
    paths = _split_files(root)
    if config.fold is not None and (len(paths) != 2 or config.fold not in (0, 1)):
        raise DataError(
            f"fold must be 0 or 1 for Kvasir-Capsule, with both {' and '.join(SPLIT_FILES)} there; got {config.fold} "
            f"and {len(paths)} files"
        )
    for path in paths:
        part = "test" if path.name == f"split_{config.fold}.csv" else "train"
        for row in read_table(path):
            if not {"filename", "label"} <= row.values.keys():
                raise DataError(f"{path} needs the columns filename and label, has {', '.join(row.values)}")
            match = FRAME_NAME.fullmatch(row.values["filename"])
            if match is None or not row.values["label"]:
                raise DataError(f"{row.where}: filename must be like <id>_<frame>.jpg, with a label")
            labels[match["video"]][int(match["frame"])] = row.values["label"]
            side[match["video"]][part] += 1
    if not paths:
        for row in read_table(root / "metadata.csv"):
            if not {"video_id", "frame_number", "finding_class"} <= row.values.keys():
                raise DataError(f"{row.where}: metadata.csv needs video_id, frame_number and finding_class")
            try:
                labels[row.values["video_id"]][int(row.values["frame_number"])] = row.values["finding_class"]
            except ValueError:
                raise DataError(f"{row.where}, column frame_number: is no whole number") from None
    return labels, side


def _media(root: Path) -> tuple[dict[str, tuple[str, tuple[Path, ...]]], int]:
    """Videos by their name, images of videos that are not there; and how many videos are not labelled."""
    found: dict[str, tuple[str, tuple[Path, ...]]] = {}
    images: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((root / "labelled_images").rglob("*")):
        match = FRAME_NAME.fullmatch(path.name)
        if path.suffix.lower() in FRAME_SUFFIXES and match is not None:
            images[match["video"]].append(path)
    for video, paths in images.items():
        found[video] = ("frames", tuple(sorted(paths, key=_frame_of)))
    for path in sorted((root / "labelled_videos").glob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            found[path.stem] = ("video", (path,))
    unlabelled = sum(path.suffix.lower() in VIDEO_SUFFIXES for path in (root / "unlabelled_videos").glob("*"))
    return found, unlabelled


def _frame_of(path: Path) -> int:
    match = FRAME_NAME.fullmatch(path.name)
    assert match is not None  # only such names are listed
    return int(match["frame"])
