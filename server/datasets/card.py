"""README.md of a dataset: what the clips are, what made them, how to read them, and what they are not good for."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from medsora.provenance import SYNTHETIC_NOTE
from server.datasets.model import FORMATS, DatasetStatus
from server.datasets.repository import DatasetRecord

__all__ = ["MANIFEST_NAME", "dataset_card", "training_sources"]

MANIFEST_NAME = "manifest.jsonl"
_HOW = {
    "videofolder": 'from datasets import load_dataset\n\ndataset = load_dataset("videofolder", data_dir=".")',
    "webdataset": (
        'import webdataset\n\ndataset = webdataset.WebDataset("shards/train-000000.tar", shardshuffle=False)\n'
        'for sample in dataset:\n    video, about = sample["mp4"], sample["json"]  # bytes'
    ),
    "ffv1": "from medsora.video_io import read_video\n\nframes, fps = read_video(path)  # exact to the bit",
    "png": "import numpy\nfrom PIL import Image\n\nframe = numpy.asarray(Image.open(path))  # exact to the bit",
    "dicom": "import pydicom\n\nframes = pydicom.dcmread(path).pixel_array  # (frames, height, width, 3)",
}


_TAGS = (
    "The tags of every file (title, description, comment) say that it is synthetic, and by which checkpoint, label, "
    "seed and settings it was made. "
)
_MARKS = {
    "mp4": _TAGS
    + f"Files that have `unsigned_sha256` in `{MANIFEST_NAME}` carry a signed C2PA manifest as well, which "
    "tells of any later change; without it, the server had no certificate. Their frames are what they were before: "
    "`unsigned_sha256` is the hash of the file without it, by which it is compared when it is made again.",
    "ffv1": _TAGS + "Matroska has no place for a C2PA manifest.",
    "png": "The text chunks of every picture (title, comment, description) say that it is synthetic, and by which "
    "checkpoint, label, seed and settings it was made. Single frames carry no C2PA manifest.",
    "dicom": "Every file has Synthetic Data (0008,001C) YES, Image Type DERIVED\\SECONDARY, no patient, and a "
    "Derivation Description with checkpoint, label, seed and settings. DICOM has no place for a C2PA manifest.",
}


def dataset_card(dataset: DatasetRecord, dropped: dict[str, int]) -> str:
    """README.md, with the header that Hugging Face reads."""
    about, settings = dataset.about, dataset.settings
    splits = ", ".join(f"{split['name']} {split['ratio']:g}" for split in dataset.splits)
    labels = "\n".join(f"| {_cell(label['name'])} | {label['count']} |" for label in dataset.labels)
    lines = ["---", f"pretty_name: {json.dumps(dataset.name)}", "license: other", "tags:", "- synthetic", "- medical"]
    lines += ["- video", "---", "", f"# {dataset.name}", "", f"**{SYNTHETIC_NOTE}**", ""]
    if dataset.done < dataset.total:
        state = "not finished" if dataset.ended_at is None else dataset.status.value
        lines.append(
            f"This archive holds {dataset.done} of the {dataset.total} clips asked for: the dataset is {state}."
        )
        lines.append("")
        if dataset.status is DatasetStatus.COMPLETED:
            lines += [f"**Shortfall**: of {dataset.missing} clips no try came to a good end.", ""]
    shape = f"{settings['num_frames']} frames, {settings['width']}x{settings['height']} pixels"
    sampler = f"{settings['sampler']}, {settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}"
    tries = ", ".join(f"{count} {code}" for code, count in sorted(dropped.items())) or "none"
    lines.append(
        f"{dataset.done} clips of {shape}, {settings['fps']:g} frames a second, format `{dataset.format}`. "
        f"Splits: {splits}, within each label."
    )
    lines += ["", "| label | asked for |", "|---|---|", labels, "", "## Reading it", ""]
    lines += ["```python", _HOW[dataset.format], "```", ""]
    lines.append(
        f"`{MANIFEST_NAME}` has a line for each clip: label, split, seed, checkpoint, settings, and SHA-256 of its "
        f"frames and files. `medsora regenerate {MANIFEST_NAME} --output FOLDER` makes the clips again and compares "
        "them; on the same platform they agree to the bit."
    )
    lines += ["", "## How it was made", ""]
    lines.append(f"- Checkpoint: {dataset.model}, SHA-256 of its manifest `{dataset.model_sha256}`")
    lines.append(f"- {about['description']}")
    lines.append(f"- Sampler {sampler}; seeds derived from {dataset.seed}")
    lines.append(f"- Filters: {_filters(dataset.filters)}")
    lines.append(f"- Tries that came to nothing: {tries}" + (" (`dropped.jsonl`)" if dataset.dropped else ""))
    lines += ["", "## What says that it is synthetic", "", _MARKS[FORMATS[dataset.format]]]
    lines += ["", "## Licence and attribution", "", f"Licence of the checkpoint: {about['licence']}", ""]
    if about["training_data"]:
        lines += ["The model was trained on these, whose licences may bear on what it makes:", ""]
        lines += ["| clips | licence | source | attribution |", "|---|---|---|---|"]
        for entry in about["training_data"]:
            cells = (entry["licence"], entry["source"], entry["attribution"])
            lines.append(f"| {entry['clips']} | {' | '.join(map(_cell, cells))} |")
        lines.append("")
    lines += ["## Limitations", "", about["intended_use"], ""]
    lines.append(
        "The clips show no patient, and nothing in them has been checked by a clinician: a label is what the model was "
        "asked for, not a finding. They can be no more varied than the model's training data, and have its biases. "
        "Validate whatever is trained on them on real data."
    )
    lines.append("")
    return "\n".join(lines)


def _filters(filters: dict[str, Any]) -> str:
    used = [
        f"{name} {filters[name]:g}"
        for name in ("min_motion", "min_distance", "max_training_resemblance")
        if filters[name] is not None
    ]
    return f"{', '.join(used)}; at most {filters['max_tries']} tries a clip" if used else "none"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def training_sources(entries: Iterable[dict[str, str]]) -> list[dict[str, Any]]:
    """Licence, source and attribution of the training clips, each once with the number of its clips."""
    names = ("licence", "source", "attribution")
    counts = Counter(tuple(entry.get(name, "not stated") for name in names) for entry in entries)
    return [{"clips": count, **dict(zip(names, key, strict=True))} for key, count in counts.most_common()]
