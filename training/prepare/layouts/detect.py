"""Which layout a source has, and the reader for it."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.layouts.cholectriplet import is_cholectriplet, list_cholectriplet
from training.prepare.layouts.colonoscopic import is_colonoscopic, list_colonoscopic
from training.prepare.layouts.dicom import holds_dicom, list_dicom
from training.prepare.layouts.folder import list_folder
from training.prepare.layouts.kvasir_capsule import is_kvasir_capsule, list_kvasir_capsule
from training.prepare.layouts.manifest import is_manifest, list_manifest
from training.prepare.layouts.videofolder import is_videofolder, list_videofolder
from training.prepare.source import Item, Listing

__all__ = ["detect_layout", "list_source"]

Reader = Callable[[Path, PrepareConfig], Listing]

READERS: dict[str, Reader] = {
    "manifest": list_manifest,
    "cholectriplet": list_cholectriplet,
    "kvasir-capsule": list_kvasir_capsule,
    "videofolder": list_videofolder,
    "dicom": list_dicom,
    "colonoscopic": list_colonoscopic,
    "folder": list_folder,
}
CHECKS: dict[str, Callable[[Path], bool]] = {
    "manifest": is_manifest,
    "cholectriplet": is_cholectriplet,
    "kvasir-capsule": is_kvasir_capsule,
    "videofolder": is_videofolder,
    "dicom": holds_dicom,
    "colonoscopic": is_colonoscopic,
}
"""In the order in which they are asked; a folder that is none of these is a plain one."""


def detect_layout(source: Path) -> str:
    """Name of the layout of a source.

    Raises:
        DataError: There is no such file or folder, or it is a file that is no manifest.
    """
    if not os.access(source, os.R_OK):
        raise DataError(f"{source} is not there, or may not be read")
    for name, check in CHECKS.items():
        if check(source):
            return name
    if not source.is_dir():
        raise DataError(f"{source} is neither a folder nor a manifest (.csv, .jsonl)")
    return "folder"


def list_source(source: Path, config: PrepareConfig) -> Listing:
    """Everything a source holds, in a fixed order.

    Raises:
        DataError: The source does not have the layout, holds nothing, or a setting does not fit it.
    """
    layout = detect_layout(source) if config.layout == "auto" else config.layout
    if config.layout != "auto":
        detect_layout(source)  # only for its errors
        if layout != "manifest" and not source.is_dir():
            raise DataError(f"layout {layout} is a folder, and {source} is none")
    _refuse_idle_settings(layout, config)
    listing = READERS[layout](source, config)
    listing = replace(listing, items=_with_groups(listing.items, config))
    names = [item.cache_name for item in listing.items]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{len(twice)} names are there twice, e.g. {twice[0]}")
    if not listing.items and not listing.skipped:
        raise DataError(f"{source} holds nothing that the layout {layout} knows")
    return listing


def _refuse_idle_settings(layout: str, config: PrepareConfig) -> None:
    """A setting that would have no effect is a mistake."""
    has_frame_labels = ("cholectriplet", "kvasir-capsule")
    for option, is_set, layouts in (
        ("--fold", config.fold is not None, has_frame_labels),
        ("--bridge-frames", config.bridge_frames > 0, has_frame_labels),
        ("--deidentify", config.deidentify, ("dicom",)),
        ("--group-salt", config.group_salt is not None, ("dicom",)),
    ):
        if is_set and layout not in layouts:
            raise DataError(f"{option} is for the layouts {', '.join(layouts)}, and this is {layout}")


def _with_groups(items: tuple[Item, ...], config: PrepareConfig) -> tuple[Item, ...]:
    """Items with their group by the user's pattern, where there is one."""
    if config.group_pattern is None:
        return items
    try:
        pattern = re.compile(config.group_pattern)
    except re.error as error:
        raise DataError(f"group_pattern {config.group_pattern!r} is no regular expression: {error}") from error
    if pattern.groups < 1:
        raise DataError(f"group_pattern {config.group_pattern!r} needs a bracket around the patient or source")
    found = [(item, pattern.search(item.name)) for item in items]
    missing = [item.name for item, match in found if match is None or not match.group(1)]
    if missing:
        raise DataError(f"group_pattern {config.group_pattern!r} does not fit {len(missing)} names, e.g. {missing[0]}")
    return tuple(replace(item, group=match.group(1)) for item, match in found if match is not None)
