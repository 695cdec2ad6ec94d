"""The report of a preparation: figures as JSON, and one HTML file with everything in it, pictures too. Torch-free."""

import base64
import html
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from medsora.files import write_file
from medsora.jsonconfig import to_json
from training.prepare.analysis import ClipDraft, ItemAnalysis
from training.prepare.cache import Cache, CachedClip
from training.prepare.config import Box, PrepareConfig
from training.prepare.duplicates import Duplicate
from training.prepare.source import Listing, Skipped
from training.prepare.splits import Plan

__all__ = ["ReportData", "build_report", "write_html"]

SHEET_COLUMNS, SHEET_SIDE = 8, 112
CLIPS_A_LABEL, CLIPS_IN_ALL = 3, 48
FINDINGS, ROWS = 24, 500


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportData:
    """What the report is made from."""

    source: str
    listing: Listing
    config: PrepareConfig
    analyses: Sequence[ItemAnalysis]
    drafts: Sequence[ClipDraft]
    plan: Plan
    duplicates: Sequence[Duplicate]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    conditions: dict[str, tuple[str, ...]]


def build_report(data: ReportData) -> dict[str, Any]:
    """The figures. The same preparation gives the same report."""
    splits: dict[str, dict[str, Any]] = {}
    by_label: dict[str, Counter[str]] = defaultdict(Counter)
    frames_by_label: dict[str, Counter[str]] = defaultdict(Counter)
    for draft, split in zip(data.drafts, data.plan.splits, strict=True):
        if split is None:
            continue
        label = label_text(draft.conditions)
        by_label[label][split] += 1
        frames_by_label[label][split] += draft.frames
    for side in ("train", "test"):
        members = [draft for draft, split in zip(data.drafts, data.plan.splits, strict=True) if split == side]
        splits[side] = {
            "clips": len(members),
            "groups": len({draft.group for draft in members}),
            "frames": sum(draft.frames for draft in members),
            "seconds": round(sum(draft.frames / draft.fps for draft in members), 1),
            "cuts": sum(len(draft.cuts) for draft in members),
        }
    items = data.listing.items
    return {
        "source": data.source,
        "layout": data.listing.layout,
        "dataset": data.listing.dataset,
        "settings": to_json(data.config) | {"group_salt": None},
        "conditions": {name: list(values) for name, values in data.conditions.items()},
        "splits": splits,
        "labels": {
            label: {
                side: {"clips": by_label[label][side], "frames": frames_by_label[label][side]}
                for side in ("train", "test")
            }
            for label in sorted(by_label)
        },
        "items": len(items),
        "skipped_count": sum(entry.count for entry in data.skipped),
        "skipped": [{"name": entry.name, "reason": entry.reason, "count": entry.count} for entry in data.skipped],
        "ignored": list(data.listing.ignored),
        "notes": list(data.notes),
        "black_frames": {
            items[analysis.item].cache_name: analysis.black_frames
            for analysis in data.analyses
            if analysis.black_frames
        },
        "borders": [
            {
                "name": items[analysis.item].cache_name,
                "size": [analysis.width, analysis.height],
                "picture": to_json(analysis.picture),
                "is_cropped": data.config.crop_borders,
            }
            for analysis in data.analyses
            if analysis.picture is not None
        ],
        "overlays": [
            {
                "name": items[analysis.item].cache_name,
                "boxes": [to_json(box) for box in analysis.overlays],
                "what": data.config.overlay,
            }
            for analysis in data.analyses
            if analysis.overlays
        ],
        "duplicates": [
            {
                "first": data.drafts[pair.first].name,
                "second": data.drafts[pair.second].name,
                "frames": pair.frames,
                "share": pair.share,
                "splits": [data.plan.splits[pair.first], data.plan.splits[pair.second]],
            }
            for pair in data.duplicates
        ],
        "removed_elements": dict(data.listing.removed_tags),
        "cuts": {draft.name: list(draft.cuts) for draft in data.drafts if draft.cuts},
    }


def label_text(conditions: dict[str, str]) -> str:
    """One line for a clip's conditions."""
    return " / ".join(conditions.values())


def write_html(path: Path, data: ReportData, report: dict[str, Any], cache: Cache | None) -> None:
    """Write the report with pictures: of the cache, or of the source where nothing was written."""
    parts = [
        _tiles(report),
        _section("Notes", _list(report["notes"])),
        _section("Labels and splits", _label_table(report)),
        _section("Skipped", _skipped(report), is_open=bool(report["skipped"])),
        _section("Clips", _cache_sheets(cache) if cache is not None else _source_sheets(data)),
        _section("Findings", _findings(data)),
        _section("Near-duplicates of different groups", _duplicates(report, data, cache)),
        _section("De-identification", _removed(report)),
        _section("Cuts", _cuts(report), is_open=False),
        _section("Files that are no part of the data", _list(report["ignored"]), is_open=False),
        _section("Settings", _settings(report), is_open=False),
    ]
    title = f"{report['dataset']}: prepared data" + ("" if cache is not None else " (dry run)")
    page = PAGE.replace("{{title}}", html.escape(title)).replace("{{body}}", "\n".join(part for part in parts if part))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page.encode())


def _section(title: str, body: str, *, is_open: bool = True) -> str:
    if not body:
        return ""
    return f"<details{' open' if is_open else ''}><summary>{html.escape(title)}</summary>{body}</details>"


def _tiles(report: dict[str, Any]) -> str:
    tiles = [
        (f"{report['splits'][side][name]:,}", f"{side}: {name}")
        for side in ("train", "test")
        for name in ("clips", "groups", "frames")
    ]
    tiles += [
        (f"{report['skipped_count']:,}", "skipped"),
        (f"{len(report['overlays']):,}", "with overlays"),
        (f"{len(report['borders']):,}", "with black borders"),
        (f"{len(report['duplicates']):,}", "near-duplicate pairs"),
    ]
    cells = "".join(f"<div><b>{value}</b><span>{html.escape(name)}</span></div>" for value, name in tiles)
    about = f"Layout {report['layout']}, source {report['source']}, {report['items']:,} files or folders"
    if "cache_sha256" in report:
        about += f", cache {report['cache_sha256'][:16]}"
    return f"<p>{html.escape(about)}</p><div class='tiles'>{cells}</div>"


def _list(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    rest = f"<li>... and {len(lines) - ROWS:,} more in report.json</li>" if len(lines) > ROWS else ""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines[:ROWS]) + rest + "</ul>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    shown = list(rows)
    if not shown:
        return ""
    cells = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in shown[:ROWS])
    rest = f"<p>... and {len(shown) - ROWS:,} more in report.json</p>" if len(shown) > ROWS else ""
    numeric = [isinstance(cell, int | float) for cell in shown[0]]
    titles = "".join(
        f"<th{' class=n' if is_number else ''}>{html.escape(name)}</th>"
        for name, is_number in zip(head, numeric, strict=True)
    )
    return f"<div class='wide'><table><tr>{titles}</tr>{cells}</table></div>{rest}"


def _cell(value: object) -> str:
    if isinstance(value, Markup):
        return f"<td>{value}</td>"
    if isinstance(value, int | float):
        return f"<td class=n>{value:,}</td>"
    return f"<td>{html.escape(str(value))}</td>"


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def _label_table(report: dict[str, Any]) -> str:
    most = max((entry["train"]["frames"] + entry["test"]["frames"] for entry in report["labels"].values()), default=1)
    rows: list[Sequence[object]] = []
    for label, entry in report["labels"].items():
        bars = "".join(
            f"<i class='{side}' style='width:{200 * entry[side]['frames'] / most:.0f}px'></i>"
            for side in ("train", "test")
        )
        counts = [entry[side][name] for side in ("train", "test") for name in ("clips", "frames")]
        rows.append((label, *counts, Markup(f"<span class='bar'>{bars}</span>")))
    title = " / ".join(report["conditions"])
    return _table((title, "train clips", "train frames", "test clips", "test frames", "frames"), rows)


def _skipped(report: dict[str, Any]) -> str:
    reasons = Counter(_general(entry["reason"]) for entry in report["skipped"])
    summary = _table(("reason", "entries"), reasons.most_common())
    names = _table(("name", "reason"), ((entry["name"], entry["reason"]) for entry in report["skipped"]))
    return summary + names if len(report["skipped"]) > 5 else names


def _general(reason: str) -> str:
    """A reason without its numbers."""
    return "".join("#" if letter.isdigit() else letter for letter in reason.split(" (")[0])[:120]


def _cache_sheets(cache: Cache) -> str:
    """Rows of frames, some clips of every label and split, as training will see them."""
    chosen: list[CachedClip] = []
    seen: Counter[tuple[str, str]] = Counter()
    for clip in cache.index.clips:
        key = (label_text(clip.conditions), clip.split)
        if seen[key] < CLIPS_A_LABEL and len(chosen) < CLIPS_IN_ALL:
            seen[key] += 1
            chosen.append(clip)
    rows = []
    for clip, frames in cache.iterate(tuple(chosen)):
        picked = np.linspace(0, len(frames) - 1, SHEET_COLUMNS).round().astype(int)
        images = [_small(Image.fromarray(frames[index])) for index in picked]
        facts = f"{clip.frames:,} frames, {clip.fps:g}/s, {len(clip.cuts)} cuts, group {clip.group}"
        rows.append(_row(label_text(clip.conditions), clip.split, clip.name, facts, _strip(images)))
    return f"<p>{len(rows)} of {len(cache.index.clips):,} clips.</p>" + "".join(rows)


def _source_sheets(data: ReportData) -> str:
    """The same from the pictures of the first pass."""
    rows: list[str] = []
    seen: Counter[tuple[str, str]] = Counter()
    for draft, split in zip(data.drafts, data.plan.splits, strict=True):
        thumbnails = data.analyses[draft.item].thumbnails
        key = (label_text(draft.conditions), split or "")
        if split is None or not thumbnails or seen[key] >= CLIPS_A_LABEL or len(rows) >= CLIPS_IN_ALL:
            continue
        seen[key] += 1
        images = [_small(Image.open(io.BytesIO(thumbnail))) for thumbnail in thumbnails]
        facts = f"{draft.frames:,} frames, {draft.fps:g}/s, {len(draft.cuts)} cuts, group {draft.group}"
        rows.append(_row(key[0], split, draft.name, facts, _strip(images)))
    return f"<p>{len(rows)} of {len(data.drafts):,} clips; pictures of their files, not yet cut to size.</p>" + "".join(
        rows
    )


def _row(label: str, split: str, name: str, facts: str, picture: str) -> str:
    return (
        f"<figure><figcaption><b>{html.escape(label)}</b> <em class='{split}'>{split}</em> {html.escape(name)} "
        f"<span>{html.escape(facts)}</span></figcaption>{picture}</figure>"
    )


def _small(image: Image.Image) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return small


def _strip(images: Sequence[Image.Image]) -> str:
    if not images:
        return ""
    gap = 2
    sheet = Image.new(
        "RGB", (sum(image.width + gap for image in images) - gap, max(image.height for image in images)), (90, 90, 90)
    )
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return _image(sheet)


def _image(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<img width='{image.width}' height='{image.height}' loading='lazy' alt='' "
        f"src='data:image/jpeg;base64,{encoded}'>"
    )


def _findings(data: ReportData) -> str:
    """Pictures of items with overlays or borders, with what was found drawn in."""
    found = [analysis for analysis in data.analyses if analysis.overlays or analysis.picture is not None]
    found.sort(key=lambda analysis: not analysis.overlays)
    rows = []
    for analysis in found[:FINDINGS]:
        if not analysis.thumbnails:
            continue
        name = data.listing.items[analysis.item].cache_name
        said = []
        if analysis.overlays:
            said.append(f"overlay at {', '.join(str(box) for box in analysis.overlays[:4])} ({data.config.overlay})")
        if analysis.picture is not None:
            said.append(f"picture at {analysis.picture} ({'cropped' if data.config.crop_borders else 'not cropped'})")
        images = [_marked(thumbnail, analysis) for thumbnail in analysis.thumbnails]
        rows.append(_row("", "", name, "; ".join(said), _strip(images)))
    if not rows:
        return ""
    more = f" ({len(found):,} in all)" if len(found) > len(rows) else ""
    legend = f"<p>Red: seems to be burned in. Yellow: the picture inside black borders.{more}</p>"
    return legend + "".join(rows)


def _marked(thumbnail: bytes, analysis: ItemAnalysis) -> Image.Image:
    image = Image.open(io.BytesIO(thumbnail)).convert("RGB")
    draw = ImageDraw.Draw(image)
    scale = image.width / analysis.width

    def outline(box: Box, colour: tuple[int, int, int]) -> None:
        corners = (box.left * scale, box.top * scale, box.right * scale - 1, box.bottom * scale - 1)
        draw.rectangle(corners, outline=colour)

    if analysis.picture is not None:
        outline(analysis.picture, (240, 200, 40))
    for box in analysis.overlays:
        outline(box, (255, 60, 60))
    return image


def _duplicates(report: dict[str, Any], data: ReportData, cache: Cache | None) -> str:
    if not report["duplicates"]:
        return ""
    rows = [
        (entry["first"], entry["splits"][0] or "left out", entry["second"], entry["splits"][1] or "left out",
         f"{entry['frames']} frames, {100 * entry['share']:.0f} %")
        for entry in report["duplicates"]
    ]  # fmt: skip
    pictures = ""
    for pair in data.duplicates[:8]:
        for index in (pair.first, pair.second):
            draft = data.drafts[index]
            thumbnails = data.analyses[draft.item].thumbnails
            images = [_small(Image.open(io.BytesIO(thumbnail))) for thumbnail in thumbnails]
            pictures += _row(label_text(draft.conditions), "", draft.name, f"group {draft.group}", _strip(images))
    return _table(("one", "side", "other", "side", "alike"), rows) + pictures


def _removed(report: dict[str, Any]) -> str:
    return _table(("element that stayed out of the cache", "files"), report["removed_elements"].items())


def _cuts(report: dict[str, Any]) -> str:
    rows = ((name, len(cuts), " ".join(map(str, cuts[:40]))) for name, cuts in report["cuts"].items())
    return _table(("clip", "cuts", "frames that begin a scene"), rows)


def _settings(report: dict[str, Any]) -> str:
    return _table(("setting", "value"), ((name, str(value)) for name, value in report["settings"].items()))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title><style>
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5d6770; --page: #fbfbfa; --card: #fff; --line: #dcdfe2;
  --train: #2f6f9f; --test: #c2762b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa4ad; --page: #14171a; --card: #1c2024;
  --line: #333a41; --train: #5fa3d6; --test: #e39a4d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 66rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } p { color: var(--soft); }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem;
  margin: 1rem 0; }
summary { font-weight: 600; font-size: 1.05rem; cursor: pointer; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .6rem; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem .8rem; }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tiles span { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin: .5rem 0; font-size: .92em; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: inline-flex; height: .8em; } .bar i { display: block; height: 100%; }
i.train { background: var(--train); }
i.test { background: var(--test); }
figure { margin: .8rem 0; } figcaption { font-size: .9em; overflow-wrap: anywhere; }
figcaption span { color: var(--soft); }
em { font-style: normal; font-weight: 600; } em.train { color: var(--train); } em.test { color: var(--test); }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; margin-top: .2rem; }
</style></head><body><h1>{{title}}</h1>
{{body}}
</body></html>
"""
