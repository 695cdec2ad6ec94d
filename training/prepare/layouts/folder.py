"""Any folder of videos or of frame folders: the folder's name is the label."""

from pathlib import Path

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.dicom import is_dicom
from training.prepare.layouts.files import Found, frame_numbers, relative_name, walk
from training.prepare.source import Item, Listing, Segment, Skipped

__all__ = ["item_of", "list_folder", "name_columns"]


def item_of(
    found: Found,
    root: Path,
    config: PrepareConfig,
    *,
    conditions: dict[str, str],
    group: str | None = None,
    split: str | None = None,
) -> Item:
    """An item of a video file or frame folder.

    Args:
        group: Default the file itself.
    """
    name = relative_name(found.path, root)
    return Item(
        name=name,
        kind=found.kind,
        paths=found.frames or (found.path,),
        numbers=frame_numbers(found.frames) if found.frames else (),
        segments=(Segment(conditions=conditions),),
        group=group or str(Path(name).with_suffix("")) if found.kind == "video" else group or name,
        split=split,
        licence=config.licence,
        source=config.source,
        attribution=config.attribution,
    )


def name_columns(config: PrepareConfig, known: tuple[str, ...], usual: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that become conditions.

    Raises:
        DataError: ``label_columns`` names one that there is not.
    """
    wanted = usual if config.label_columns is None else config.label_columns
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise DataError(f"label_columns names {', '.join(unknown)}; allowed: {', '.join(known) or '(none)'}")
    return wanted


def list_folder(root: Path, config: PrepareConfig) -> Listing:
    """Videos and frame folders below ``root``.

    A file ``root/a/b/x.mp4`` has the label ``a/b``, a frame folder ``root/a/x/`` the label ``a``; those in ``root``
    itself have none. The group is the file.
    """
    columns = name_columns(config, ("label",), ("label",))
    items, skipped, ignored = [], [], []
    for found in walk(root):
        name = relative_name(found.path, root)
        if found.kind == "other":
            if is_dicom(found.path):
                skipped.append(Skipped(name=name, reason="is DICOM: use --layout dicom"))
            else:
                ignored.append(name)
            continue
        label = Path(name).parent.as_posix()
        if name == ".":  # the source itself is a folder of frames
            label, found = ".", Found("frames", found.path, found.frames)
        conditions = {"label": label} if "label" in columns and label != "." else {}
        items.append(item_of(found, root, config, conditions=conditions))
    _require_fps(items, config)
    return Listing(
        layout="folder",
        dataset=config.dataset or root.resolve().name,
        items=tuple(items),
        skipped=tuple(skipped),
        ignored=tuple(ignored),
    )


def _require_fps(items: list[Item], config: PrepareConfig) -> None:
    folders = [item for item in items if item.kind == "frames"]
    if folders and config.fps is None:
        raise DataError(
            f"{len(folders)} items are folders of frames, e.g. {folders[0].name}, which do not say their frame rate: "
            "give it with --fps"
        )
