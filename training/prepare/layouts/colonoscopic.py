"""Colonoscopic: colonoscopy videos of gastrointestinal lesions, in white light and narrow-band imaging.

Read as it is passed on for video generation: videos ``00001.mp4``, ... in a folder ``Colonoscopic``, or extracted
frames ``Colonoscopic_frames/00001/00000.jpg`` beside a list of frames, which is not needed. Where names or folders say
it, the kind of lesion is the label, the light a second condition, and one lesion in both lights one group.
Source: P. Mesejo et al., IEEE TMI 35(9), 2016; layout: the Endora repository's README.
"""

import re
from pathlib import Path

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.layouts.files import Found, relative_name, walk
from training.prepare.layouts.folder import item_of, name_columns
from training.prepare.source import Item, Listing

__all__ = ["is_colonoscopic", "list_colonoscopic"]

LESIONS = {
    "adenoma": "adenoma",
    "adenomas": "adenoma",
    "hyperplasic": "hyperplastic",
    "hyperplastic": "hyperplastic",
    "serrated": "serrated",
}
LIGHTS = {"nbi": "NBI", "wl": "WL"}


def is_colonoscopic(root: Path) -> bool:
    """Whether the folder, or one in it, is called Colonoscopic."""
    if not root.is_dir():
        return False
    names = [root.resolve().name, *(path.name for path in root.iterdir() if path.is_dir())]
    return any(name.lower().startswith("colonoscopic") for name in names)


def list_colonoscopic(root: Path, config: PrepareConfig) -> Listing:
    """Videos, or frame folders where there is no video of the same name."""
    columns = name_columns(config, ("label", "light"), ("label", "light"))
    found = [entry for entry in walk(root) if entry.kind != "other"]
    videos = {entry.path.stem for entry in found if entry.kind == "video"}
    items: list[Item] = []
    twins = 0
    for entry in found:
        if entry.kind == "frames" and entry.path.name in videos:
            twins += 1
            continue
        items.append(_item(entry, root, config, columns))
    folders = [item for item in items if item.kind == "frames"]
    if folders and config.fps is None:
        raise DataError(f"frame folders, e.g. {folders[0].name}, do not say their frame rate: give it with --fps")
    # a condition that only some clips have would be a class of clips whose names say less
    conditions = [item.segments[0].conditions for item in items]
    for column in columns:
        if any(column in entry for entry in conditions) and not all(column in entry for entry in conditions):
            missing = [item.name for item in items if column not in item.segments[0].conditions]
            raise DataError(f"{len(missing)} names do not say the {column}, e.g. {missing[0]}; others do")
    notes = [f"{twins} frame folders were passed over: the videos they were extracted from are there"] if twins else []
    if items and not any(conditions):
        notes.append("no name says a lesion: the clips have no label")
    return Listing(
        layout="colonoscopic",
        dataset=config.dataset or "colonoscopic",
        items=tuple(items),
        ignored=tuple(relative_name(entry.path, root) for entry in walk(root) if entry.kind == "other"),
        notes=tuple(notes),
        modality="ES",
    )


def _item(entry: Found, root: Path, config: PrepareConfig, columns: tuple[str, ...]) -> Item:
    name = relative_name(entry.path, root)
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    lesion = next((LESIONS[word] for word in words if word in LESIONS), None)
    light = next((LIGHTS[word] for word in words if word in LIGHTS), None)
    values = {"label": lesion, "light": light}
    group = None
    if light is not None:
        # the lesion, whatever the light
        plain = Path(name).with_suffix("").as_posix() if entry.kind == "video" else name
        group = re.sub(r"(?i)(^|[^a-z])(nbi|wl)(?=$|[^a-z])", r"\1", plain).strip("/_- ")
    return item_of(
        entry,
        root,
        config,
        conditions={column: value for column in columns if (value := values[column]) is not None},
        group=group,
    )
