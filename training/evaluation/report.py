"""The evaluation as one page that opens anywhere: tables, then every shown sample beside its closest training clip.

Made from ``report.json``'s content alone, and from pictures. No scripts, nothing loaded from elsewhere; light and dark
by the reader's system.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

__all__ = ["Pair", "render_report"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --dim: #5b6670; --page: #fbfbfa; --card: #ffffff; --line: #d9dee2;
  --floor: #eef3f1; --mark: #9a3412; --accent: #0f5c6e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaec; --dim: #9aa6af; --page: #14181b; --card: #1b2024;
  --line: #323a40; --floor: #1f2a28; --mark: #f0a27b; --accent: #7cc4d6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { max-width: 48rem; margin: .4rem 0; }
.dim, figcaption, caption { color: var(--dim); font-size: .88rem; }
.warn { border-left: 3px solid var(--mark); padding-left: .8rem; }
.scroll { overflow-x: auto; margin: .7rem 0 1rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; caption-side: top; max-width: 48rem; }
th, td { padding: .32rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; } thead th { border-bottom-width: 2px; }
th:first-child, td:first-child { text-align: left; padding-left: .5rem; }
td.text { text-align: left; max-width: 30rem; overflow-wrap: anywhere; }
tr.floor { background: var(--floor); } tr.floor th { color: var(--accent); }
tr.group th { padding-top: 1rem; text-align: left; border-bottom-width: 2px; }
tbody th { font-weight: 500; } tr.group th { font-weight: 600; }
ul { padding-left: 1.3rem; max-width: 60rem; }
.ci { color: var(--dim); font-size: .86em; white-space: nowrap; display: block; }
.pairs { display: grid; gap: 1rem; }
.pair { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; }
.pair > p { margin: 0 0 .5rem; max-width: none; }
.pair > p { font-weight: 600; }
.sides { display: flex; flex-wrap: wrap; gap: .5rem 1rem; margin-bottom: .6rem; }
figure { margin: 0; width: 256px; } figcaption { margin: .25rem 0; overflow-wrap: anywhere; }
.loop { width: 256px; height: auto; display: block; background: #000; }
.strip { width: 100%; display: block; background: #000; margin-top: 2px; }
.copy { color: var(--mark); font-weight: 600; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); }
code { font-size: .86em; overflow-wrap: anywhere; }
"""
CLIP_FIGURES = {
    "motion": ("Motion", "mean change from frame to frame, grey levels"),
    "flicker": ("Flicker", "second difference in time over motion; 1.7 is new noise in every frame"),
    "brightness_flicker": ("Brightness flicker", "second difference of the frames' mean, grey levels"),
    "fine_detail": ("Fine detail", "rms above half the Nyquist frequency, grey levels"),
    "frame_consistency_squeezenet": ("Frame consistency, SqueezeNet", "cosine of neighbouring frames' features"),
    "frame_consistency_clip": ("Frame consistency, CLIP", "cosine of neighbouring frames' embeddings"),
    "warping_error": ("Flow warping error", "change beyond motion, grey levels over visible pixels"),
    "visible_share": ("Visible share", "pixels that the flow check keeps"),
    "flow_px": ("Flow", "mean length, pixels a frame"),
}
SETS = {"samples": "Generated", "train": "Real, train", "test": "Real, test"}
DISTANCE_ROWS = {
    "samples_to_test": "Generated to real test",
    "train_to_test": "Real train to real test: the floor",
    "samples_to_train": "Generated to real train",
    "reconstruction_to_test": "Test clips through the autoencoder to real test",
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A sample and the training clip it resembles most, as pictures (``data:`` addresses)."""

    title: str
    is_copy: bool
    sample_caption: str
    training_caption: str
    sample: tuple[str, str, str]
    """Moving, first frame, strip."""
    training: tuple[str, str, str]


def render_report(figures: Mapping[str, Any], pairs: Mapping[str, Sequence[Pair]]) -> str:
    """The whole page.

    Args:
        figures: As in ``report.json``.
        pairs: Shown samples by heading.
    """
    checkpoint, data = figures["checkpoint"], figures["data"]
    about = (
        f"{figures['samples']['count']} generated clips against {data['splits']['test']['windows']} real test windows "
        f"({_counted(data['splits']['test'])}) and {data['splits']['train']['windows']} real training windows "
        f"({_counted(data['splits']['train'])}). Small type: 95 % bootstrap intervals."
    )
    parts = [
        f"<h1>Evaluation of {escape(checkpoint['name'])}</h1>",
        f"<p class=dim>{escape(about)}</p>",
        *[f"<p class=warn>{escape(text)}</p>" for text in figures["warnings"]],
        _glance(figures),
        _distances(figures),
        _inception(figures),
        _clip_figures(figures),
        _by_label(figures),
        _memorisation(figures),
        _reconstruction(figures),
        *[_pairs(heading, found) for heading, found in pairs.items()],
        _protocol(figures),
    ]
    title = f"Evaluation of {checkpoint['name']}"
    return (
        f'<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _glance(figures: Mapping[str, Any]) -> str:
    """What a reader wants to know first."""
    lines = []
    for metric in figures["frechet"]["all_labels"]["metrics"].values():
        over = metric["pairs"]["samples_to_test"].get("over_floor")
        if over is not None:
            low, high = over.get("interval", (None, None))
            around = "" if low is None else f" ({low:.2f} to {high:.2f})"
            lines.append(f"{metric['title']}: {over['value']:.2f} times the floor{around}.")
    sets = figures["clips"]["all_labels"]
    lines += [
        f"{CLIP_FIGURES[name][0]}: {_number(sets['samples'][name]['value'])} in generated clips, "
        f"{_number(sets['train'][name]['value'])} in real training clips, "
        f"{_number(sets['test'][name]['value'])} in real test clips ({CLIP_FIGURES[name][1]})."
        for name in ("motion", "fine_detail")
        if name in sets["samples"]
    ]
    copies = figures["memorisation"]["samples"]
    low, high = copies["copies"]["interval"]
    lines.append(
        f"Copies of training clips: {copies['copies']['count']} of {copies['count']} generated clips "
        f"({_share(low)} to {_share(high)})."
    )
    return "<h2>At a glance</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _counted(split: Mapping[str, Any]) -> str:
    def count(number: int, name: str) -> str:
        return f"{number} {name}" + ("" if number == 1 else "s")

    return f"{count(split['clips'], 'clip')} of {count(split['patients'], 'patient')}"


def _number(value: float | None) -> str:
    if value is None:
        return "&ndash;"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"


def _spread(mean: float, std: float) -> str:
    return f"<td>{_number(mean)} &plusmn; {_number(std)}</td>"


def _share(value: float | None) -> str:
    return "&ndash;" if value is None else f"{100 * value:.1f} %"


def _cell(entry: Mapping[str, Any] | None, show: Any = _number) -> str:
    if entry is None:
        return "<td>&ndash;</td>"
    interval = entry.get("interval")
    small = "" if interval is None else f"<span class=ci>{show(interval[0])} to {show(interval[1])}</span>"
    return f"<td>{show(entry['value'])}{small}</td>"


def _table(caption: str, head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th scope=col>{escape(text)}</th>" for text in head)
    return (
        f"<div class=scroll><table><caption>{escape(caption)}</caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(name: str, cells: Sequence[str], *, is_floor: bool = False) -> str:
    kind = " class=floor" if is_floor else ""
    return f"<tr{kind}><th scope=row>{escape(name)}</th>{''.join(cells)}</tr>"


def _distances(figures: Mapping[str, Any]) -> str:
    parts = ["<h2>Distances between sets</h2>"]
    absent = figures["absent"]
    parts.append(
        "<p>Lower is nearer. The floor is what real training clips have to real test clips: no sampler that learns the "
        "training clips can be asked to come below it, and one that does has few clips, copies, or luck.</p>"
    )
    for scope in figures["frechet"].values():
        rows = []
        for metric in scope["metrics"].values():
            rows.append(f"<tr class=group><th colspan=4 scope=colgroup>{escape(metric['title'])}</th></tr>")
            for key, text in DISTANCE_ROWS.items():
                if key not in metric["pairs"]:
                    continue
                entry = metric["pairs"][key]
                only = entry.get("interval_samples")
                seeds = "&ndash;" if only is None else f"{_number(only[0])} to {_number(only[1])}"
                over = entry.get("over_floor")
                cells = [_cell(entry), f"<td>{seeds}</td>", _cell(over)]
                rows.append(_row(text, cells, is_floor=key == "train_to_test"))
        caption = (
            f"{scope['title']}: {scope['samples']} generated clips, {scope['train_windows']} train windows, "
            f"{scope['test_windows']} test windows. Resampled: generated clips one by one; train by "
            f"{scope['train_units']}; test by {scope['test_units']}."
        )
        parts.append(_table(caption, ["", "distance", "other seeds alone", "times the floor"], rows))
    parts += [f"<p class=dim>{escape(name)}: not measured, {escape(why)}.</p>" for name, why in absent.items()]
    return "\n".join(parts)


def _inception(figures: Mapping[str, Any]) -> str:
    score = figures.get("inception_score")
    if score is None:
        return ""
    rows = [
        _row(
            SETS[name],
            [_cell(score[name]), _spread(score[name]["splits_mean"], score[name]["splits_std"])],
            is_floor=name != "samples",
        )
        for name in SETS
    ]  # fmt: skip
    caption = "ImageNet's classes mean nothing here: only the distance to the real rows counts."
    return "<h2>Inception score</h2>" + _table(caption, ["", "all frames", "ten parts"], rows)


def _clip_figures(figures: Mapping[str, Any]) -> str:
    sets = figures["clips"]["all_labels"]
    names = [name for name in CLIP_FIGURES if name in sets["samples"]]
    rows = []
    for name in names:
        title, unit = CLIP_FIGURES[name]
        cells = "".join(_cell(sets[key].get(name)) for key in SETS)
        rows.append(f"<tr><th scope=row>{escape(title)}<span class=ci>{escape(unit)}</span></th>{cells}</tr>")
    heads = ["", *[f"{SETS[key]} ({sets[key]['count']})" for key in SETS]]
    caption = "Means over clips. The real columns are the floor: near them is good, higher or lower is not."
    return "<h2>Motion, flicker and detail</h2>" + _table(caption, heads, rows)


def _by_label(figures: Mapping[str, Any]) -> str:
    labels = figures["clips"]["by_label"]
    names = [name for name in CLIP_FIGURES if name in figures["clips"]["all_labels"]["samples"]]
    names = [name for name in names if name not in ("visible_share", "brightness_flicker")]
    rows = []
    for label, sets in labels.items():
        for key, text in SETS.items():
            if key in sets:
                cells = [f"<td>{sets[key]['count']}</td>", *[_cell(sets[key].get(name)) for name in names]]
                rows.append(_row(f"{label}: {text.lower()}", cells, is_floor=key != "samples"))
    heads = ["", "clips", *[CLIP_FIGURES[name][0] for name in names]]
    return "<h2>By label</h2>" + _table("Real rows are the floor of their label.", heads, rows)


def _memorisation(figures: Mapping[str, Any]) -> str:
    memory = figures["memorisation"]
    threshold = memory["threshold"]
    text = (
        f"Resemblance is the correlation with the nearest of {memory['windows']} training windows (1 is a copy). From "
        f"{threshold['value']:.3f} on a clip counts as a copy: 99 % of the real clips of patient "
        f"{threshold['set_by']}, who of all unseen patients resembles the training clips most, stay below it."
    )
    rows = [
        _row(
            {"samples": "Generated", "unseen": "Real clips of unseen patients"}[name],
            [f"<td>{memory[name]['count']}</td>", f"<td>{memory[name]['median']:.3f}</td>",
             f"<td>{memory[name]['highest']:.3f}</td>", _cell(memory[name]["copies"], _share)],
            is_floor=name == "unseen",
        )
        for name in ("samples", "unseen")
    ]  # fmt: skip
    parts = [
        "<h2>Copies of training clips</h2>",
        f"<p>{escape(text)}</p>",
        _table(
            "Intervals of shares: exact binomial. Unseen: test patients against all training clips, and each training "
            "patient against the others'.",
            ["", "clips", "median resemblance", "highest", "copies"],
            rows,
        ),
    ]
    label_rows = [
        _row(name, [f"<td>{entry['count']}</td>", f"<td>{entry['median']:.3f}</td>", f"<td>{entry['highest']:.3f}</td>",
                    _cell(entry["copies"], _share)])
        for name, entry in memory["by_label"].items()
    ]  # fmt: skip
    label_rows.append(rows[1])
    parts.append(
        _table("Generated clips by label", ["", "clips", "median resemblance", "highest", "copies"], label_rows)
    )
    planted = [
        _row(name, [f"<td>{entry['count']}</td>", f"<td>{entry['lowest']:.3f}</td>", _cell(entry["recall"], _share)])
        for name, entry in memory["planted"].items()
    ]
    alarms = threshold["false_alarms"]
    if alarms is not None:
        worst = max(alarms, key=lambda name: alarms[name])
        mean = sum(alarms.values()) / len(alarms)
        note = f"mean of {len(alarms)} patients; the worst is {worst} with {100 * alarms[worst]:.1f} %"
        planted.append(
            _row(f"False alarms on unseen patients ({note})", ["<td></td>", "<td></td>", f"<td>{_share(mean)}</td>"],
                 is_floor=True)
        )  # fmt: skip
    parts.append(
        _table(
            "Does the threshold work? Copies planted on purpose, and false alarms on patients left out when it is set.",
            ["planted copy", "clips", "lowest resemblance", "found"],
            planted,
        )
    )
    return "\n".join(parts)


def _reconstruction(figures: Mapping[str, Any]) -> str:
    fields = {
        "psnr_db": "PSNR, dB", "psnr_db_worst": "worst window, dB", "ssim": "SSIM",
        "high_frequency_ratio": "energy above half Nyquist, over the original's", "num_windows": "windows",
    }  # fmt: skip
    entries = {"test split": figures["reconstruction"], "train split: the floor": figures["reconstruction_train"]}
    rows = [
        _row(name, [f"<td>{_number(entry[field]) if field != 'num_windows' else entry[field]}</td>"
                    for field in fields], is_floor="floor" in name)
        for name, entry in entries.items()
    ]  # fmt: skip
    caption = "What the autoencoder keeps of real windows: no sample can have more detail than it passes on."
    return "<h2>Autoencoder</h2>" + _table(caption, ["", *fields.values()], rows)


def _pairs(heading: str, pairs: Sequence[Pair]) -> str:
    def figure(pictures: tuple[str, str, str], caption: str) -> str:
        loop, still, _ = pictures
        return (
            f'<figure><picture><source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
            f'<img class=loop src="{loop}" alt="{escape(caption)}"></picture>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    cards = []
    for pair in pairs:
        verdict = " <span class=copy>counts as a copy</span>" if pair.is_copy else ""
        cards.append(
            f"<article class=pair><p>{escape(pair.title)}{verdict}</p><div class=sides>"
            f"{figure(pair.sample, pair.sample_caption)}{figure(pair.training, pair.training_caption)}</div>"
            f'<img class=strip src="{pair.sample[2]}" alt="Frames of the generated clip">'
            f'<img class=strip src="{pair.training[2]}" alt="Frames of the training clip"></article>'
        )
    note = "Frames from first to last: above the generated clip, below the training clip."
    return f"<h2>{escape(heading)}</h2><p class=dim>{note}</p><div class=pairs>{''.join(cards)}</div>"


def _protocol(figures: Mapping[str, Any]) -> str:
    networks = [
        f"<tr><th scope=row>{escape(name)}</th><td class=text>{escape(record.get('file', '(none)'))}<br>"
        f"<code>{escape(record.get('sha256', ''))}</code></td><td class=text>{escape(record['protocol'])}</td></tr>"
        for name, record in figures["networks"].items()
    ]
    files = [
        f"<tr><th scope=row>{escape(name)}</th><td class=text><code>{escape(digest)}</code></td></tr>"
        for name, digest in {**figures["checkpoint"]["sha256"], **figures["data"]["sha256"]}.items()
    ]
    samples = figures["samples"]
    text = (
        f"{samples['num_inference_steps']} steps of {samples['sampler']}, guidance {samples['guidance_scale']:g}, "
        f"{samples['dtype']}, seeds from {samples['first_seed']} on; {figures['bootstrap']['resamples']} bootstrap "
        f"resamples, seed {figures['bootstrap']['seed']}; {figures['environment']['device']}, torch "
        f"{figures['environment']['torch']}."
    )
    shown = "".join(
        f"<tr><th scope=row>{escape(clip['file'])}</th><td class=text>{escape(clip['licence'])}</td>"
        f"<td class=text>{escape(clip['source'])}<br>{escape(clip['attribution'])}</td></tr>"
        for clip in figures["shown_training_clips"]
    )
    return (
        f"<h2>Protocol</h2><p>{escape(text)}</p>"
        f"<div class=scroll><table><thead><tr><th>network</th><th>file, SHA-256</th><th>protocol</th></tr></thead>"
        f"<tbody>{''.join(networks)}</tbody></table></div>"
        f"<details><summary>Hashes of the checkpoint and the data</summary><div class=scroll><table><tbody>"
        f"{''.join(files)}</tbody></table></div></details>"
        f"<details><summary>Training clips shown on this page: licence and source</summary><div class=scroll><table>"
        f"<tbody>{shown}</tbody></table></div></details>"
        "<p class=dim>Generated clips are synthetic. Not for diagnosis.</p>"
    )
