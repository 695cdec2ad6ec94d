"""``prepare``: list the source, look at every frame, plan, write, put the finished cache in place. Torch-free."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medsora.files import write_file
from medsora.jsonconfig import to_json
from training.errors import DataError
from training.prepare.analysis import ClipDraft, ItemAnalysis, analyse_item
from training.prepare.atomic import put_in_place
from training.prepare.cache import (
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    CachedClip,
    CacheIndex,
    FileRecord,
    index_bytes,
    is_cache,
    open_cache,
)
from training.prepare.config import PrepareConfig
from training.prepare.duplicates import find_duplicates
from training.prepare.layouts import list_source
from training.prepare.report import ReportData, build_report, write_html
from training.prepare.shards import Placement, place_clips, write_shards
from training.prepare.source import UNLABELLED, Item, Listing, Skipped
from training.prepare.splits import Candidate, Plan, plan_splits

__all__ = ["Prepared", "prepare"]

REPORT, HTML = "report.json", "report.html"
PLAN = "plan.json"
KEPT_THUMBNAILS = 400
"""Items without a finding whose pictures are kept for the report of a dry run."""

Progress = Callable[[str, int, int, str], None]
"""Stage, done, total, name of what was done last."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What came out."""

    path: Path | None
    """The cache; None after a dry run."""
    report: dict[str, Any]
    """As in ``report.json``."""


def prepare(
    source: Path,
    out: Path,
    config: PrepareConfig,
    *,
    is_dry_run: bool = False,
    is_replacing: bool = False,
    workers: int = 1,
    html: Path | None = None,
    progress: Progress = lambda stage, done, total, name: None,
) -> Prepared:
    """Make a cache of a source.

    It is written beside its place under another name, and renamed when all of it is there and synced. A run that was
    stopped is gone on with by the same call.

    Args:
        out: Folder of the cache; must not be there, or be a cache and ``is_replacing``.
        is_dry_run: Do everything but write shards; the report goes to ``html`` alone.
        workers: Items looked at at a time in the first pass. The result does not depend on it.
        html: Further copy of the report with pictures.

    Raises:
        DataError: The source cannot be used, or nothing of it is left; the message says what to do.
    """
    _check_place(out, is_replacing, is_dry_run)
    if workers < 1:
        raise DataError(f"workers must be at least 1, got {workers}")
    listing = list_source(source, config)
    analyses = _analyse(listing, config, workers, progress)
    drafts, skipped = _drafts(listing, analyses, config)
    conditions, drafts, notes = _conditions(drafts)
    if not drafts:
        raise DataError(_nothing_left(source, listing, skipped))
    duplicates = find_duplicates([draft.signature for draft in drafts], [draft.group for draft in drafts])
    plan = plan_splits(
        [
            Candidate(
                name=draft.name,
                group=draft.group,
                frames=draft.frames,
                condition=tuple(sorted(draft.conditions.items())),
                given_split=draft.given_split,
            )
            for draft in drafts
        ],
        [(pair.first, pair.second) for pair in duplicates],
        config,
    )
    skipped += [Skipped(name=drafts[index].name, reason=reason) for index, reason in sorted(plan.reasons.items())]
    chosen = [(draft, split) for draft, split in zip(drafts, plan.splits, strict=True) if split is not None]
    if not any(split == "train" for _, split in chosen):
        raise DataError("no clip is left to train on; see what was skipped with a dry run, or choose --splits draw")
    placements = place_clips([(draft.item, draft.segment, split, draft.frames) for draft, split in chosen], config)
    used = {draft.item for draft, _ in chosen}
    pictures = {
        index: analysis.picture if config.crop_borders else None
        for index, analysis in enumerate(analyses)
        if index in used
    }
    overlays = {
        index: analysis.overlays if config.overlay == "mask" else ()
        for index, analysis in enumerate(analyses)
        if index in used
    }
    data = ReportData(
        source=source.resolve().name,
        listing=listing,
        config=config,
        analyses=analyses,
        drafts=drafts,
        plan=plan,
        duplicates=duplicates,
        skipped=tuple(skipped),
        notes=(*listing.notes, *notes, *plan.notes, *_split_notes(plan, chosen)),
        conditions=conditions,
    )
    report = build_report(data)
    if is_dry_run:
        if html is not None:
            write_html(html, data, report, None)
        return Prepared(path=None, report=report)
    partial = _partial_folder(out, listing, placements, config)
    shards = write_shards(
        partial, listing.items, placements, pictures, overlays, config,
        _counting(progress, len({placement.item for placement in placements})),
    )  # fmt: skip
    index = _index(listing, config, conditions, chosen, placements, shards)
    write_file(partial / INDEX, index_bytes(index))
    report = report | {"cache_sha256": open_cache(partial).sha256}
    write_file(partial / REPORT, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    write_html(partial / HTML, data, report, open_cache(partial))
    for note in [partial / PLAN, *partial.glob("*.safetensors.json")]:
        note.unlink()
    if html is not None:
        write_file(html, (partial / HTML).read_bytes())
    put_in_place(partial, out)
    return Prepared(path=out, report=report)


def _check_place(out: Path, is_replacing: bool, is_dry_run: bool) -> None:
    if is_dry_run or not out.exists():
        return
    if not is_cache(out):
        raise DataError(f"{out} is there and is no prepared cache: choose another place")
    if not is_replacing:
        raise DataError(f"{out} is there: replace it with --replace, or choose another place")


def _analyse(listing: Listing, config: PrepareConfig, workers: int, progress: Progress) -> list[ItemAnalysis]:
    """First pass over all items, in order; at most ``workers`` are decoded at a time."""
    analyses: list[ItemAnalysis] = []
    kept = 0
    with ThreadPoolExecutor(workers) as pool:
        for analysis in _in_order(pool, listing.items, config, workers):
            item = listing.items[analysis.item]
            has_finding = bool(analysis.overlays) or analysis.picture is not None
            if not has_finding:
                kept += 1
                if kept > KEPT_THUMBNAILS:
                    analysis = replace(analysis, thumbnails=())
            analyses.append(analysis)
            progress("looking", len(analyses), len(listing.items), item.name)
    return analyses


def _in_order(
    pool: ThreadPoolExecutor, items: Sequence[Item], config: PrepareConfig, workers: int
) -> Iterator[ItemAnalysis]:
    waiting = []
    for index, item in enumerate(items):
        waiting.append(pool.submit(analyse_item, index, item, config))
        if len(waiting) > workers:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _drafts(
    listing: Listing, analyses: Sequence[ItemAnalysis], config: PrepareConfig
) -> tuple[list[ClipDraft], list[Skipped]]:
    """Clips that may be used, and everything that may not."""
    drafts: list[ClipDraft] = []
    skipped = list(listing.skipped)
    for analysis in analyses:
        skipped += analysis.skipped
        for draft in analysis.clips:
            excluded = sorted(set(draft.conditions.values()) & set(config.excluded_labels))
            if excluded:
                skipped.append(Skipped(name=draft.name, reason=f"has the excluded label {excluded[0]}"))
            elif analysis.overlays and config.overlay == "skip":
                boxes = ", ".join(str(box) for box in analysis.overlays[:3])
                skipped.append(Skipped(name=draft.name, reason=f"seems to have text or symbols burned in at {boxes}"))
            else:
                drafts.append(draft)
    known = {value for analysis in analyses for draft in analysis.clips for value in draft.conditions.values()}
    unknown = sorted(set(config.excluded_labels) - known)
    if unknown and known:
        raise DataError(f"excluded_labels names {', '.join(unknown)}; there are: {', '.join(sorted(known)[:50])}")
    return drafts, skipped


def _conditions(drafts: list[ClipDraft]) -> tuple[dict[str, tuple[str, ...]], list[ClipDraft], list[str]]:
    """Values of each condition; clips that lack one get ``unlabelled``, which is noted."""
    names = list(dict.fromkeys(name for draft in drafts for name in draft.conditions))
    if (
        len(names) > 1
        and "label" in names
        and all(draft.conditions.get("label", UNLABELLED) == UNLABELLED for draft in drafts)
    ):
        names.remove("label")
    lacking = Counter(name for draft in drafts for name in names if name not in draft.conditions)
    notes = [
        f"{count} clips have no {name}: they are in a class of their own, {UNLABELLED}"
        for name, count in lacking.items()
    ]
    complete = [
        replace(draft, conditions={name: draft.conditions.get(name, UNLABELLED) for name in names}) for draft in drafts
    ]
    values = {name: tuple(sorted({draft.conditions[name] for draft in complete})) for name in names}
    return values, complete, notes


def _split_notes(plan: Plan, chosen: Sequence[tuple[ClipDraft, str]]) -> list[str]:
    notes = ["the split was drawn by group" if plan.is_drawn else "the split is the source's own"]
    if not any(split == "test" for _, split in chosen):
        notes.append("there is no test split, and training needs one: there are too few groups to draw it from")
    return notes


def _nothing_left(source: Path, listing: Listing, skipped: Sequence[Skipped]) -> str:
    reasons = Counter(entry.reason for entry in skipped)
    shown = "; ".join(
        f"{next(entry.name for entry in skipped if entry.reason == reason)}"
        f"{f' and {count - 1} others' if count > 1 else ''}: {reason}"
        for reason, count in reasons.most_common(3)
    )
    return f"nothing of {source} (layout {listing.layout}) can be used. {shown}"


def _partial_folder(out: Path, listing: Listing, placements: Sequence[Placement], config: PrepareConfig) -> Path:
    """The folder that is written to; what another plan left there is removed."""
    files = [[item.name, *(_stamp(path) for path in item.paths)] for item in listing.items]
    plan = {"settings": to_json(config), "files": files, "placements": [to_json(placement) for placement in placements]}
    key = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    partial = out.with_name(f".{out.name}.partial")
    try:
        is_same = json.loads((partial / PLAN).read_text(encoding="utf-8")) == {"key": key}
    except (OSError, ValueError):
        is_same = False
    if not is_same:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_file(partial / PLAN, json.dumps({"key": key}).encode())
    return partial


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _counting(progress: Progress, total: int) -> Callable[[str, int], None]:
    done = 0

    def on_item(name: str, frames: int) -> None:
        nonlocal done
        done += 1
        progress("writing", done, total, name)

    return on_item


def _index(
    listing: Listing,
    config: PrepareConfig,
    conditions: dict[str, tuple[str, ...]],
    chosen: Sequence[tuple[ClipDraft, str]],
    placements: Sequence[Placement],
    shards: dict[str, FileRecord],
) -> CacheIndex:
    clips = []
    for (draft, split), placement in zip(chosen, placements, strict=True):
        item = listing.items[draft.item]
        clips.append(
            CachedClip(
                name=draft.name,
                split=split,
                group=draft.group,
                frames=draft.frames,
                fps=draft.fps,
                cuts=draft.cuts,
                conditions=draft.conditions,
                licence=item.licence,
                source=item.source,
                attribution=item.attribution,
                spans=placement.spans,
            )
        )
    return CacheIndex(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        dataset=listing.dataset,
        modality=config.modality or listing.modality,
        height=config.height,
        width=config.width,
        conditions=conditions,
        clips=tuple(clips),
        shards=shards,
        settings=to_json(config) | {"layout": listing.layout, "group_salt": None},
    )
