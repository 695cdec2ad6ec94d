"""The second pass: frames in their final size into shards whose places were planned. Torch-free.

Every clip's place is known beforehand, so a run that was stopped goes on after the shards that are complete.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from medsora.files import write_file
from training.errors import DataError
from training.prepare.cache import FileRecord, Span
from training.prepare.config import Box, PrepareConfig
from training.prepare.frames import Dropped, fit_frame, kept_frames, paint_black
from training.prepare.source import Item

__all__ = ["Placement", "place_clips", "write_shards"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A clip with its place."""

    item: int
    segment: int
    split: str
    frames: int
    spans: tuple[Span, ...]


def place_clips(clips: Sequence[tuple[int, int, str, int]], config: PrepareConfig) -> list[Placement]:
    """Give every clip its place.

    Args:
        clips: Item, segment, split and number of frames of each, in the order of the cache.
    """
    capacity = max(1, config.shard_mib * 2**20 // (config.height * config.width * 3))
    used: dict[str, int] = {}
    placements = []
    for item, segment, split, frames in clips:
        spans, left = [], frames
        while left:
            position = used.get(split, 0)
            number, offset = divmod(position, capacity)
            count = min(left, capacity - offset)
            spans.append(Span(shard=f"{split}-{number:05d}.safetensors", offset=offset, count=count))
            used[split] = position + count
            left -= count
        placements.append(Placement(item=item, segment=segment, split=split, frames=frames, spans=tuple(spans)))
    return placements


class _Shard:
    """A shard while its frames come in."""

    def __init__(self, frames: int, config: PrepareConfig) -> None:
        self.pixels = np.zeros((frames, config.height, config.width, 3), dtype=np.uint8)
        self.missing = frames


def write_shards(
    folder: Path,
    items: Sequence[Item],
    placements: Sequence[Placement],
    pictures: dict[int, Box | None],
    overlays: Mapping[int, Sequence[Box]],
    config: PrepareConfig,
    on_item: Callable[[str, int], None],
) -> dict[str, FileRecord]:
    """Write the shards that are not there yet.

    Args:
        folder: Where shards, and the notes by which a later run knows them, are written.
        pictures: Part of each item's frames that is used.
        overlays: Places of each item that are painted black.
        on_item: Gets the name of each item that is done, and its frames.

    Raises:
        DataError: An item no longer gives the frames that it gave in the first pass.
    """
    sizes: dict[str, int] = {}
    for placement in placements:
        for span in placement.spans:
            sizes[span.shard] = sizes.get(span.shard, 0) + span.count
    done = {name: record for name in sizes if (record := _complete(folder, name, sizes[name])) is not None}
    open_shards: dict[str, _Shard] = {}
    by_item: dict[int, list[Placement]] = {}
    for placement in placements:
        by_item.setdefault(placement.item, []).append(placement)
    for index, members in by_item.items():
        is_done = all(span.shard in done for placement in members for span in placement.spans)
        if not is_done:
            frames = _fitted_frames(items[index], members, pictures.get(index), overlays.get(index, ()), config)
            for name, offset, pixels in frames:
                if name in done:
                    continue
                if name not in open_shards:
                    open_shards[name] = _Shard(sizes[name], config)
                shard = open_shards[name]
                shard.pixels[offset] = pixels
                shard.missing -= 1
                if not shard.missing:
                    done[name] = _finish(folder, name, open_shards.pop(name))
        on_item(items[index].name, sum(placement.frames for placement in members))
    assert not open_shards  # every place was filled
    return {name: done[name] for name in sorted(sizes)}


def _fitted_frames(
    item: Item,
    placements: Sequence[Placement],
    picture: Box | None,
    overlays: Sequence[Box],
    config: PrepareConfig,
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Frames of an item in the cache's size, each with its shard and place."""
    places = {
        placement.segment: iter(
            [(span.shard, span.offset + step) for span in placement.spans for step in range(span.count)]
        )
        for placement in placements
    }
    written = 0
    for kept in kept_frames(item, config, lambda name, reason: None, Dropped()):  # named in the first pass
        if kept.segment not in places:
            continue
        place = next(places[kept.segment], None)
        if place is None:
            raise DataError(f"{item.name} has more frames than in the first pass: did it change?")
        yield *place, fit_frame(paint_black(kept.frame.pixels, overlays), picture, config)
        written += 1
    if written != sum(placement.frames for placement in placements):
        raise DataError(f"{item.name} has fewer frames than in the first pass: did it change?")


def _finish(folder: Path, name: str, shard: _Shard) -> FileRecord:
    sha256, size = write_file(folder / name, save({"frames": shard.pixels}))
    record = FileRecord(sha256=sha256, size_bytes=size, frames=len(shard.pixels))
    write_file(_note(folder, name), json.dumps(vars(record)).encode())
    return record


def _note(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _complete(folder: Path, name: str, frames: int) -> FileRecord | None:
    """The record of a shard that an earlier run finished; its note is written after it, so it is whole."""
    try:
        record = FileRecord(**json.loads(_note(folder, name).read_text(encoding="utf-8")))
        is_same = (folder / name).stat().st_size == record.size_bytes and record.frames == frames
    except (OSError, ValueError, TypeError):
        return None
    return record if is_same else None
