"""A folder of multi-frame DICOM files. Which of them may be used is decided by their headers, and fails closed."""

import hashlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from pydicom.dataset import Dataset

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.deidentify import (
    hash_patient,
    identifying_elements,
    patient_words,
    read_header,
    refusal,
)
from training.prepare.dicom import dicom_facts, is_dicom
from training.prepare.layouts.files import relative_name, walk
from training.prepare.layouts.folder import name_columns
from training.prepare.source import Item, Listing, Segment, Skipped

__all__ = ["holds_dicom", "list_dicom"]


def holds_dicom(root: Path) -> bool:
    """Whether a folder has a DICOM file, and no videos."""
    if not root.is_dir():
        return False
    has_dicom = False
    for found in walk(root):
        if found.kind == "video":
            return False
        has_dicom = has_dicom or (found.kind == "other" and is_dicom(found.path))
    return has_dicom


def list_dicom(root: Path, config: PrepareConfig) -> Listing:
    """Files that may be used, under names that say nothing; the group is the hashed PatientID.

    The label is the folder's name, as long as it is not one patient's: a folder for each patient would put patients
    into the cache as classes.
    """
    columns = name_columns(config, ("label",), ("label",))
    accepted: list[tuple[Path, Dataset, Item]] = []
    skipped: list[Skipped] = []
    ignored: list[str] = []
    removed: Counter[str] = Counter()
    words: set[str] = set()
    modalities: Counter[str] = Counter()
    for found in walk(root):
        for path in found.frames or (found.path,):
            name = relative_name(path, root)
            if not is_dicom(path):
                ignored.append(name)
                continue
            header, reason = _usable_header(path, config)
            if header is None:
                skipped.append(Skipped(name=name, reason=reason))
                continue
            facts = dicom_facts(header)
            removed.update(identifying_elements(header))
            words |= patient_words(header)
            modalities[facts.modality] += 1
            label = Path(name).parent.as_posix()
            accepted.append(
                (
                    path,
                    header,
                    Item(
                        name=name,
                        kind="dicom",
                        paths=(path,),
                        segments=(Segment(conditions={"label": label} if columns and label != "." else {}),),
                        group=str(header.get("PatientID") or header.get("StudyInstanceUID") or name),
                        fps=facts.fps,
                        licence=config.licence,
                        source=config.source,
                        attribution=config.attribution,
                    ),
                )
            )
    _check_labels([item for _, _, item in accepted], words)
    salt = config.group_salt or _salt_of(header for _, header, _ in accepted)
    items = []
    counts: Counter[str] = Counter()
    for _, _, item in accepted:
        group = hash_patient(item.group, salt)
        counts[group] += 1
        items.append(replace(item, group=group, shown_name=f"{group}/{counts[group]:04d}.dcm"))
    notes = []
    if removed:
        notes.append(
            f"de-identified: {len(removed)} kinds of identifying elements of {len(items)} files stay out of the cache; "
            "names of files that were skipped are as they are on disk"
        )
    if config.burned_in == "accept":
        notes.append("burned_in=accept: files that may have names in their pixels were taken; look at the pictures")
    return Listing(
        layout="dicom",
        dataset=config.dataset or "dicom",
        items=tuple(items),
        skipped=tuple(skipped),
        ignored=tuple(ignored),
        notes=tuple(notes),
        modality=modalities.most_common(1)[0][0] if modalities else "",
        removed_tags=dict(sorted(removed.items())),
    )


def _usable_header(path: Path, config: PrepareConfig) -> tuple[Dataset | None, str]:
    """Header of a file that may be used, or None and why it may not."""
    try:
        header = read_header(str(path))
        facts = dicom_facts(header)
        identifying = identifying_elements(header)
    except Exception as error:  # a damaged header makes pydicom raise anything
        return None, f"has no usable header: {type(error).__name__}: {error}"
    is_covered = bool(config.masks) or config.crop is not None or config.burned_in == "accept"
    reason = refusal(facts, identifying, deidentify=config.deidentify, is_covered=is_covered)
    if reason is not None:
        return None, reason
    if facts.num_frames < 2:
        return None, "is a single frame, no video"
    if facts.fps is None and config.fps is None:
        return None, "does not say its frame rate (FrameTime, CineRate): give it with --fps"
    return header, ""


def _check_labels(items: list[Item], words: set[str]) -> None:
    """Refuse labels that are patients."""
    labels: dict[str, set[str]] = {}
    for item in items:
        label = item.segments[0].conditions.get("label")
        if label is not None:
            labels.setdefault(label, set()).add(item.group)
    for label in labels:
        if words & set(re.split(r"[\W_]+", label.lower())):
            raise DataError(
                "a folder is called after a patient, so folder names cannot be labels: rename it, choose "
                "--label-columns '' (none), or write a manifest of converted videos"
            )
    groups = {group for members in labels.values() for group in members}
    if len(labels) > 2 and len(labels) == len(groups) and all(len(members) == 1 for members in labels.values()):
        raise DataError(
            f"each of the {len(labels)} folders holds one patient: they look like patients, not like labels; choose "
            "--label-columns '' (none)"
        )


def _salt_of(headers: object) -> str:
    """Key of the patients' hash: known to whoever has the source, and to nobody who has the cache alone."""
    digest = hashlib.sha256()
    identifiers = sorted(str(header.get("SOPInstanceUID") or "") for header in headers)  # type: ignore[attr-defined]
    for identifier in identifiers:
        digest.update(identifier.encode() + b"\0")
    return digest.hexdigest()
