"""What lies where in the archive of a dataset: clips by its format, a manifest, drops, and a card."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from server.datasets.archive import FilePiece, Group, Member, Piece, Run, tar_member
from server.datasets.card import MANIFEST_NAME, dataset_card
from server.datasets.files import DatasetFiles
from server.datasets.model import FORMATS
from server.datasets.repository import ClipRecord, DatasetRecord, DatasetRepository

__all__ = ["PORTION_CLIPS", "SHARD_CLIPS", "groups_of"]

SHARD_CLIPS = 256
"""Most clips of a WebDataset shard."""
PORTION_CLIPS = 128
"""Clips whose rows are read at once: as many as a range of one byte costs at most."""


def groups_of(dataset: DatasetRecord, repository: DatasetRepository, files: DatasetFiles) -> list[Group]:
    """Groups of members of the archive of what was done when ``dataset`` was read.

    Rows are read a portion at a time, here and whenever a group is listed; kept is where portions begin and end.
    """
    card = dataset_card(dataset, repository.drop_counts(dataset)).encode()
    rows = _Rows(dataset, repository)
    about: list[Member] = [Member.of("README.md", card), Member(MANIFEST_NAME, rows.runs(_manifest_line))]
    if dataset.dropped:
        about.append(Member("dropped.jsonl", tuple(_drops(dataset, repository))))
    if dataset.format == "videofolder":
        for number, split in enumerate(dataset.splits):
            runs = rows.runs(_metadata_line, split=number)
            if runs:
                about.append(Member(f"{split['name']}/metadata.jsonl", runs))
    groups: list[Group] = [partial(list, [member]) for member in about]
    if dataset.format == "webdataset":
        return groups + [partial(list, [shard]) for shard in _shards(dataset, rows, files)]

    def clips(portion: _Portion) -> Iterator[Member]:
        for clip in rows.of(portion):
            yield from _parts(dataset, clip, files, _clip_name(dataset, clip))

    return groups + [partial(clips, portion) for portion in rows.portions()]


@dataclass(frozen=True)
class _Portion:
    """Some of the clips that are done, one behind another."""

    first: int
    last: int
    count: int
    split: int | None


class _Rows:
    """The rows of the clips that were done when ``dataset`` was read."""

    def __init__(self, dataset: DatasetRecord, repository: DatasetRepository) -> None:
        self._dataset, self._repository = dataset, repository

    def of(self, portion: _Portion) -> list[ClipRecord]:
        """The clips of a portion, which are the same ones for ever."""
        return self._repository.done_clips(
            self._dataset, first=portion.first, last=portion.last, split=portion.split, limit=portion.count
        )

    def portions(self, *, split: int | None = None) -> Iterator[_Portion]:
        """All clips, or those of a split."""
        return (portion for portion, _ in self._walk(split))

    def runs(self, line: Callable[[DatasetRecord, ClipRecord], bytes], *, split: int | None = None) -> tuple[Run, ...]:
        """A line for each clip."""

        def again(portion: _Portion) -> Iterator[Piece]:
            return (line(self._dataset, clip) for clip in self.of(portion))

        return tuple(
            Run.of(partial(again, portion), now=[line(self._dataset, clip) for clip in clips])
            for portion, clips in self._walk(split)
        )

    def _walk(self, split: int | None) -> Iterator[tuple[_Portion, list[ClipRecord]]]:
        first = 0
        while True:
            clips = self._repository.done_clips(self._dataset, first=first, split=split, limit=PORTION_CLIPS)
            if clips:
                yield _Portion(clips[0].number, clips[-1].number, len(clips), split), clips
            if len(clips) < PORTION_CLIPS:
                return
            first = clips[-1].number + 1


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
    open_file = partial(files.objects.open, files.key(dataset.id, clip.job_id, clip.attempt))
    offset = 0
    for part in clip.parts or []:
        yield Member.of(name + part["name"], FilePiece(open_file, offset, part["size_bytes"], part["crc32"]))
        offset += part["size_bytes"]


def _shards(dataset: DatasetRecord, rows: _Rows, files: DatasetFiles) -> Iterator[Member]:
    """TARs as WebDataset reads them: files with the same name before the dot are one sample."""

    def samples(portion: _Portion) -> Iterator[Piece]:
        for clip in rows.of(portion):
            for member in _parts(dataset, clip, files, _key(clip)):
                yield from tar_member(member)
            yield from tar_member(Member.of(f"{_key(clip)}.json", _manifest_line(dataset, clip)))

    end = Run.of(lambda: [bytes(1024)])
    for number, split in enumerate(dataset.splits):
        portions = rows.portions(split=number)
        shard = 0
        while some := list(islice(portions, SHARD_CLIPS // PORTION_CLIPS)):
            runs = [Run.of(partial(samples, portion)) for portion in some]
            yield Member(f"shards/{split['name']}-{shard:06d}.tar", (*runs, end))
            shard += 1


def _drops(dataset: DatasetRecord, repository: DatasetRepository) -> Iterator[Run]:
    """A line for each try that had come to nothing when ``dataset`` was read."""

    def lines(after: int, limit: int) -> list[Piece]:
        return [_json_line(drop) for _, drop in repository.drops(dataset, after=after, limit=limit)]

    after, left = 0, dataset.dropped
    while left > 0 and (drops := repository.drops(dataset, after=after, limit=min(left, PORTION_CLIPS))):
        yield Run.of(partial(lines, after, len(drops)), now=[_json_line(drop) for _, drop in drops])
        after, left = drops[-1][0], left - len(drops)


def _metadata_line(dataset: DatasetRecord, clip: ClipRecord) -> bytes:
    """From which the library ``datasets`` takes the columns beside the video."""
    label = dataset.labels[clip.label]
    name = f"{label['folder']}/{_key(clip)}.mp4"
    return _json_line({"file_name": name, "label": label["name"], "clip": _key(clip), "seed": clip.seed})


def _manifest_line(dataset: DatasetRecord, clip: ClipRecord) -> bytes:
    """Everything from which the clip can be made again, and by which that can be checked."""
    name = _key(clip) if dataset.format == "webdataset" else _clip_name(dataset, clip)
    settings = dataset.settings
    entry = {
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
            {
                "path": name + part["name"],
                **{key: part[key] for key in ("size_bytes", "sha256", "unsigned_sha256") if key in part},
            }
            for part in clip.parts or []
        ],
        "measures": clip.measures,
        "tries": clip.tries,
        "video_id": clip.job_id,
    }
    return _json_line(entry)


def _json_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
