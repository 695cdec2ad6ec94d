"""What lies where in the archive of a dataset: clips by its format, a manifest, drops, and a card."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from medsora.provenance import SYNTHETIC_NOTE
from server.datasets.archive import FilePiece, Member, Piece, tar_member
from server.datasets.files import DatasetFiles
from server.datasets.model import FORMATS, DatasetStatus
from server.datasets.repository import ClipRecord, DatasetRecord, DatasetRepository

__all__ = ["MANIFEST_NAME", "SHARD_CLIPS", "members_of", "training_sources"]

SHARD_CLIPS = 256
"""Most clips of a WebDataset shard."""
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


def members_of(
    dataset: DatasetRecord, repository: DatasetRepository, files: DatasetFiles
) -> Callable[[], Iterator[Member]]:
    """Lists the members of the archive of what was done when ``dataset`` was read."""
    card = _card(dataset, repository.drop_counts(dataset)).encode()

    def lines() -> Iterator[Piece]:
        for clip in repository.done_clips(dataset):
            yield _json_line(_manifest_entry(dataset, clip))

    def drops() -> Iterator[Piece]:
        for drop in repository.drops(dataset):
            yield _json_line(drop)

    fixed = [Member.of("README.md", lambda: [card]), Member.of(MANIFEST_NAME, lines)]
    if dataset.dropped:
        fixed.append(Member.of("dropped.jsonl", drops))
    if dataset.format == "videofolder":
        fixed += _folder_metadata(dataset, repository)

    def members() -> Iterator[Member]:
        yield from fixed
        if dataset.format == "webdataset":
            yield from _shards(dataset, repository, files)
            return
        for clip in repository.done_clips(dataset):
            yield from _parts(dataset, clip, files, _clip_name(dataset, clip))

    return members


def _clip_name(dataset: DatasetRecord, clip: ClipRecord) -> str:
    """Where a clip lies, without the ending."""
    split, label = dataset.splits[clip.split]["name"], dataset.labels[clip.label]["folder"]
    return f"{split}/{label}/{_key(clip)}"


def _key(clip: ClipRecord) -> str:
    return f"clip_{clip.number:06d}"


def _parts(dataset: DatasetRecord, clip: ClipRecord, files: DatasetFiles, name: str) -> Iterator[Member]:
    """The files that a clip is in an archive."""
    assert clip.job_id is not None  # it is done
    assert clip.attempt is not None
    path, offset = files.path(dataset.id, clip.job_id, clip.attempt), 0
    for part in clip.parts or []:
        piece = FilePiece(path, offset, part["size_bytes"], part["crc32"])
        yield Member(name + part["name"], piece.size, piece.crc32, lambda piece=piece: [piece])  # type: ignore[misc]
        offset += piece.size


def _shards(dataset: DatasetRecord, repository: DatasetRepository, files: DatasetFiles) -> Iterator[Member]:
    """TARs as WebDataset reads them: files with the same name before the dot are one sample."""
    for number, split in enumerate(dataset.splits):
        clips = repository.done_clips(dataset, split=number)
        shard = 0
        while portion := list(islice(clips, SHARD_CLIPS)):
            yield Member.of(
                f"shards/{split['name']}-{shard:06d}.tar",
                lambda portion=portion: _shard(dataset, portion, files),  # type: ignore[misc]
            )
            shard += 1


def _shard(dataset: DatasetRecord, clips: Iterable[ClipRecord], files: DatasetFiles) -> Iterator[Piece]:
    for clip in clips:
        for member in _parts(dataset, clip, files, _key(clip)):
            yield from tar_member(member)
        about = _json_line(_manifest_entry(dataset, clip))
        yield from tar_member(Member.of(f"{_key(clip)}.json", lambda about=about: [about]))  # type: ignore[misc]
    yield b"\0" * 1024


def _folder_metadata(dataset: DatasetRecord, repository: DatasetRepository) -> list[Member]:
    """One ``metadata.jsonl`` a split, from which the library ``datasets`` takes the columns beside the video."""
    members = []
    present = {clip.split for clip in repository.done_clips(dataset)}
    for number, split in enumerate(dataset.splits):
        if number not in present:
            continue

        def lines(number: int = number) -> Iterator[Piece]:
            for clip in repository.done_clips(dataset, split=number):
                label = dataset.labels[clip.label]
                name = f"{label['folder']}/{_key(clip)}.mp4"
                yield _json_line({"file_name": name, "label": label["name"], "clip": _key(clip), "seed": clip.seed})

        members.append(Member.of(f"{split['name']}/metadata.jsonl", lines))
    return members


def _manifest_entry(dataset: DatasetRecord, clip: ClipRecord) -> dict[str, Any]:
    """Everything from which the clip can be made again, and by which that can be checked."""
    name = _key(clip) if dataset.format == "webdataset" else _clip_name(dataset, clip)
    settings = dataset.settings
    return {
        "clip": _key(clip),
        "label": dataset.labels[clip.label]["name"],
        "split": dataset.splits[clip.split]["name"],
        "seed": clip.seed,
        "synthetic": True,
        "model": dataset.model,
        "model_sha256": dataset.model_sha256,
        "num_frames": settings["num_frames"],
        "width": settings["width"],
        "height": settings["height"],
        "fps": settings["fps"],
        "num_inference_steps": settings["num_inference_steps"],
        "guidance_scale": settings["guidance_scale"],
        "sampler": settings["sampler"],
        "deterministic": settings["deterministic"],
        "format": FORMATS[dataset.format],
        "modality": dataset.about["modality"],
        "frames_sha256": clip.frames_sha256,
        "files": [
            {"path": name + part["name"], "size_bytes": part["size_bytes"], "sha256": part["sha256"]}
            for part in clip.parts or []
        ],
        "measures": clip.measures,
        "tries": clip.tries,
        "video_id": clip.job_id,
    }


def _card(dataset: DatasetRecord, dropped: dict[str, int]) -> str:
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
        for name in ("min_motion", "min_distance", "min_training_distance")
        if filters[name] is not None
    ]
    return f"{', '.join(used)}; at most {filters['max_tries']} tries a clip" if used else "none"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _json_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def training_sources(entries: Iterable[dict[str, str]]) -> list[dict[str, Any]]:
    """Licence, source and attribution of the training clips, each once with the number of its clips."""
    names = ("licence", "source", "attribution")
    counts = Counter(tuple(entry.get(name, "not stated") for name in names) for entry in entries)
    return [{"clips": count, **dict(zip(names, key, strict=True))} for key, count in counts.most_common()]
