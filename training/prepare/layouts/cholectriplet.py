"""CholecTriplet: CholecT45 and CholecT50, frame folders at 1 frame a second with labels of every frame.

CholecT45: ``data/VID01/000000.png``, and in ``triplet``, ``instrument``, ``verb`` and ``target`` a ``VID01.txt`` with
the frame's number and one 0 or 1 for each class; ``dict`` names the classes. CholecT50: ``videos/VID01/000000.png``
and ``labels/VID01.json``. A clip is a run of frames with the same labels.
Source: README files of github.com/CAMMA-public/cholect45 and cholect50; folds: arXiv:2204.05235.
"""

import json
import re
from pathlib import Path
from typing import Any

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.layouts.files import natural_key
from training.prepare.layouts.folder import name_columns
from training.prepare.segments import FrameLabel, runs_to_segments
from training.prepare.source import FRAME_SUFFIXES, Item, Listing, Segment, Skipped

__all__ = ["is_cholectriplet", "list_cholectriplet"]

TASKS = ("triplet", "instrument", "verb", "target")
# In a T50 annotation of 15 numbers: triplet, instrument with score and box, verb, target with score and box, phase.
PLACES = {"triplet": 0, "instrument": 1, "verb": 7, "target": 8, "phase": 14}
NOTHING = "none"
FPS = 1.0
FOLDS = (
    (79, 2, 51, 6, 25, 14, 66, 23, 50, 111),
    (80, 32, 5, 15, 40, 47, 26, 48, 70, 96),
    (31, 57, 36, 18, 52, 68, 10, 8, 73, 103),
    (42, 29, 60, 27, 65, 75, 22, 49, 12, 110),
    (78, 43, 62, 35, 74, 1, 56, 4, 13, 92),
)
"""Videos of the five published folds; CholecT45 lacks the last of each."""


def is_cholectriplet(root: Path) -> bool:
    """Whether a folder has the videos and labels of either."""
    if not root.is_dir():
        return False
    frames = _frames_folder(root)
    return frames is not None and ((root / "labels").is_dir() or (root / "triplet").is_dir())


def _frames_folder(root: Path) -> Path | None:
    for name in ("videos", "data"):
        folder = root / name
        if folder.is_dir() and any(re.fullmatch(r"(?i)VID\d+", path.name) for path in folder.iterdir()):
            return folder
    return None


def list_cholectriplet(root: Path, config: PrepareConfig) -> Listing:
    """Videos with a clip for each run of frames that have the same value in all ``label_columns``.

    Several triplets of one frame are joined by ``+``; a frame without any is ``none``.
    """
    frames = _frames_folder(root)
    if frames is None:
        raise DataError(f"{root} has no folder videos/VID01 or data/VID01")
    is_json = (root / "labels").is_dir()
    columns = name_columns(config, (*TASKS, "phase") if is_json else TASKS, ("triplet",))
    if config.fold is not None and not 1 <= config.fold <= len(FOLDS):
        raise DataError(f"fold must be 1 to {len(FOLDS)} for CholecTriplet, got {config.fold}")
    names = {} if is_json else {task: _class_names(root / "dict" / f"{task}.txt") for task in columns}
    items: list[Item] = []
    skipped: list[Skipped] = []
    folders = [path for path in frames.iterdir() if path.is_dir() and re.fullmatch(r"(?i)VID\d+", path.name)]
    for folder in sorted(folders, key=lambda path: natural_key(path.name)):
        name = f"{frames.name}/{folder.name}"
        pictures = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
        pictures = sorted((path for path in pictures if path.stem.isdigit()), key=lambda path: int(path.stem))
        if not pictures:
            skipped.append(Skipped(name=name, reason="holds no frames called 000000.png and so on"))
            continue
        fps = FPS
        segments: tuple[Segment, ...] = (Segment(),)
        if columns:
            try:
                if is_json:
                    labels, fps = _json_labels(root / "labels" / f"{folder.name}.json", columns)
                else:
                    labels = _text_labels(root, folder.name, columns, names)
            except DataError as error:
                skipped.append(Skipped(name=name, reason=str(error)))
                continue
            segments, short = runs_to_segments(
                name, labels, min_frames=config.min_frames, bridge_frames=config.bridge_frames
            )
            skipped += short
        if segments:
            items.append(_item(name, folder, tuple(pictures), segments, fps, config))
    return Listing(
        layout="cholectriplet",
        dataset=config.dataset or "cholectriplet",
        items=tuple(items),
        skipped=tuple(skipped),
        notes=() if config.fold is None else (f"test split: published fold {config.fold}",),
        modality="ES",
    )


def _item(
    name: str,
    folder: Path,
    pictures: tuple[Path, ...],
    segments: tuple[Segment, ...],
    fps: float,
    config: PrepareConfig,
) -> Item:
    split = None
    if config.fold is not None:
        split = "test" if int(folder.name[3:]) in FOLDS[config.fold - 1] else "train"
    return Item(
        name=name,
        kind="frames",
        paths=pictures,
        numbers=tuple(int(path.stem) for path in pictures),
        segments=segments,
        group=folder.name.upper(),
        split=split,
        fps=fps,
        licence=config.licence or "CC BY-NC-SA 4.0",
        source=config.source or "CholecTriplet (CholecT45/T50), CAMMA, University of Strasbourg",
        attribution=config.attribution or "C.I. Nwoye et al., Medical Image Analysis 78 (2022) 102433",
    )


def _class_names(path: Path) -> dict[int, str]:
    """Lines ``0:grasper,dissect,cystic_plate``, or with a comma or blank after the number."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    names = {}
    for line in lines:
        match = re.match(r"\s*(\d+)\s*[:,;\s]\s*(\S.*?)\s*$", line)
        if match:
            names[int(match.group(1))] = match.group(2)
    if not names:
        raise DataError(f"{path} names no classes")
    return names


def _text_labels(
    root: Path, video: str, columns: tuple[str, ...], names: dict[str, dict[int, str]]
) -> list[FrameLabel]:
    values: dict[int, dict[str, str]] = {}
    for task in columns:
        path = root / task / f"{video}.txt"
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise DataError(f"{task}/{path.name} cannot be read: {error.strerror or error}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                frame, *flags = (int(float(part)) for part in line.split(","))
            except ValueError:
                raise DataError(f"{task}/{path.name}, line {number}: must be numbers separated by commas") from None
            if len(flags) != len(names[task]):
                raise DataError(
                    f"{task}/{path.name}, line {number}: has {len(flags)} classes, dict/{task}.txt names "
                    f"{len(names[task])}"
                )
            present = [names[task].get(index, str(index)) for index, flag in enumerate(flags) if flag]
            values.setdefault(frame, {})[task] = "+".join(present) or NOTHING
    return _frame_labels(values, columns, video)


def _json_labels(path: Path, columns: tuple[str, ...]) -> tuple[list[FrameLabel], float]:
    where = f"labels/{path.name}"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        categories, annotations = tree["categories"], tree["annotations"]
        fps = float(tree.get("fps") or FPS)
        values = {
            int(frame): {task: _json_value(instances, task, categories) for task in columns}
            for frame, instances in annotations.items()
        }
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is not as published: {type(error).__name__}: {error}") from error
    return _frame_labels(values, columns, path.stem), fps


def _json_value(instances: list[list[float]], task: str, categories: Any) -> str:
    if isinstance(categories, list):  # the format's page calls it a list of one dictionary a task
        categories = {key: value for part in categories for key, value in part.items()}
    found = sorted({int(instance[PLACES[task]]) for instance in instances if instance[PLACES[task]] >= 0})
    return "+".join(str(categories[task][str(index)]) for index in found) or NOTHING


def _frame_labels(values: dict[int, dict[str, str]], columns: tuple[str, ...], video: str) -> list[FrameLabel]:
    missing = [frame for frame, entry in values.items() if len(entry) != len(columns)]
    if missing:
        raise DataError(f"{video}: frame {missing[0]} has labels in some of {', '.join(columns)}, not in all")
    return [
        FrameLabel(frame, tuple((task, entry[task]) for task in columns)) for frame, entry in sorted(values.items())
    ]
