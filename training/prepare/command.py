"""``medsora-train prepare`` and ``verify``: options to settings, progress, and what is said at the end. Torch-free."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.prepare.config import CHOICES, Box, PrepareConfig

__all__ = ["prepare_command", "verify_command"]

SHOWN = 8
STAGES = {"looking": "looking at every frame", "writing": "writing the cache"}


def _choice(name: str, text: str) -> Any:
    return typer.Option(help=f"{text}: {', '.join(CHOICES[name])}.")


def prepare_command(
    source: Annotated[Path, typer.Argument(help="Folder of videos, frames or DICOM files, or a manifest.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the cache.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look at everything, write nothing but --html.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Put the new cache in the place of an older one.")] = False,
    html: Annotated[Path | None, typer.Option(help="Where to put (a copy of) the report with pictures.")] = None,
    workers: Annotated[int, typer.Option(help="Files looked at at a time.", min=1, max=64)] = 1,
    dataset: Annotated[str, typer.Option(help="Name of the data set; of a table with several, the one to take.")] = "",
    layout: Annotated[str, _choice("layout", "How the source is laid out")] = "auto",
    height: Annotated[int, typer.Option(help="Pixels; a multiple of 8.")] = 128,
    width: Annotated[int, typer.Option(help="Pixels; a multiple of 8.")] = 128,
    fit: Annotated[str, _choice("fit", "How frames come to that size")] = "crop",
    fps: Annotated[float | None, typer.Option(help="Frame rate of sources that do not say theirs.")] = None,
    max_fps: Annotated[float | None, typer.Option(help="Thin out faster sources to about this rate.")] = None,
    min_frames: Annotated[int, typer.Option(help="Leave out shorter clips.")] = 16,
    label_columns: Annotated[
        str | None, typer.Option(help="Columns that become conditions, separated by commas; empty: none.")
    ] = None,
    exclude_label: Annotated[list[str] | None, typer.Option(help="Leave out clips of this label. Repeatable.")] = None,
    bridge_frames: Annotated[int, typer.Option(help="Frame labels: runs shorter than this join the one before.")] = 0,
    group_pattern: Annotated[
        str | None, typer.Option(help="Regular expression on names; its first bracket is the patient or source.")
    ] = None,
    splits: Annotated[str, _choice("splits", "Where the split is from")] = "auto",
    validation: Annotated[str, _choice("validation", "Where a validation split goes")] = "auto",
    test_fraction: Annotated[float, typer.Option(help="Share of frames of each label to draw for the test.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the drawn split.")] = 0,
    fold: Annotated[int | None, typer.Option(help="Published fold that tests (CholecTriplet, Kvasir-Capsule).")] = None,
    cuts: Annotated[str, _choice("cuts", "Which cuts count: the source's, found ones")] = "both",
    black_frames: Annotated[str, _choice("black_frames", "All-black frames")] = "drop",
    crop: Annotated[str | None, typer.Option(help="Use only LEFT,TOP,WIDTH,HEIGHT of every frame.")] = None,
    crop_borders: Annotated[bool, typer.Option("--crop-borders", help="Cut off black borders.")] = False,
    mask: Annotated[list[str] | None, typer.Option(help="Paint LEFT,TOP,WIDTH,HEIGHT black. Repeatable.")] = None,
    overlay: Annotated[str, _choice("overlay", "Clips that seem to have text burned in")] = "warn",
    duplicates: Annotated[str, _choice("duplicates", "Near-duplicates on both sides")] = "move",
    deidentify: Annotated[bool, typer.Option("--deidentify", help="DICOM: take files that name a patient.")] = False,
    burned_in: Annotated[str, _choice("burned_in", "DICOM that may have text in its pixels")] = "refuse",
    group_salt: Annotated[str | None, typer.Option(help="DICOM: key of the hash of PatientID.")] = None,
    modality: Annotated[str, typer.Option(help="DICOM's word for the modality, e.g. US or ES.")] = "",
    licence: Annotated[str, typer.Option(help="Of sources that do not say theirs.")] = "",
    source_name: Annotated[str, typer.Option("--source-name", help="Where the data are from, for the record.")] = "",
    attribution: Annotated[str, typer.Option(help="Whom to credit, where the source does not say it.")] = "",
    shard_mib: Annotated[int, typer.Option(help="Size of a full shard.")] = 64,
) -> None:
    """Make a training cache of a folder of videos: cuts, borders, overlays, split, duplicates, report."""
    if (out is None) == (not dry_run):
        raise typer.BadParameter("give --out for the cache, or --dry-run to write none", param_hint="--out")
    try:
        config = PrepareConfig(
            dataset=dataset, layout=layout, height=height, width=width, fit=fit, fps=fps, max_fps=max_fps,
            min_frames=min_frames, label_columns=_names(label_columns), excluded_labels=tuple(exclude_label or ()),
            bridge_frames=bridge_frames, group_pattern=group_pattern, splits=splits, validation=validation,
            test_fraction=test_fraction, seed=seed, fold=fold, cuts=cuts, black_frames=black_frames,
            crop=None if crop is None else _box(crop, "--crop"), crop_borders=crop_borders,
            masks=tuple(_box(text, "--mask") for text in mask or ()), overlay=overlay, duplicates=duplicates,
            deidentify=deidentify, burned_in=burned_in, group_salt=group_salt, modality=modality, licence=licence,
            source=source_name, attribution=attribution, shard_mib=shard_mib,
        )  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    from training.prepare.pipeline import prepare

    console = Console(stderr=True)
    with _bar(console) as progress:
        result = prepare(
            source, out or Path("dry-run"), config, is_dry_run=dry_run, is_replacing=replace, workers=workers,
            html=html, progress=progress,
        )  # fmt: skip
    _say(result.report)
    if result.path is not None:
        typer.echo(f"{result.path}: train with --data {result.path}; the report is {result.path / 'report.html'}")
    elif html is not None:
        typer.echo(f"dry run, nothing written but {html}")
    else:
        typer.echo("dry run, nothing written; --html FILE shows pictures")


def verify_command(cache: Annotated[Path, typer.Argument(help="Folder of a prepared cache.")]) -> None:
    """Check every file of a prepared cache against its hash."""
    from training.prepare.cache import open_cache

    opened = open_cache(cache)
    size = opened.verify()
    counts = ", ".join(f"{len(opened.clips(split))} {split}" for split in ("train", "test"))
    typer.echo(f"{cache}: {counts} clips, {size / 2**20:.1f} MiB, all hashes match; cache {opened.sha256[:16]}")
    for record in opened.index.arrays:
        typer.echo(
            f"  {record.name}, made by {record.key[:16]}: {sum(file.frames for file in record.files.values())} clips"
        )


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _box(text: str, option: str) -> Box:
    parts = text.split(",")
    try:
        if len(parts) != 4:
            raise ValueError(f"{option} must be LEFT,TOP,WIDTH,HEIGHT, got {text!r}")
        left, top, width, height = (int(part) for part in parts)
        return Box(left=left, top=top, width=width, height=height)
    except ValueError as error:
        raise ValueError(str(error) if "LEFT" in str(error) else f"{option}: {text!r} holds no whole numbers") from None


class _bar:  # noqa: N801 - it is used like a function
    """A progress bar for every stage; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[name]}"), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._said: dict[str, int] = {}

    def __enter__(self) -> Callable[[str, int, int, str], None]:
        self._progress.start()
        return self._update

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _update(self, stage: str, done: int, total: int, name: str) -> None:
        if self._console.is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(STAGES[stage], total=total, name="")
            self._progress.update(self._tasks[stage], completed=done, name=name[-40:])
            return
        tenth = done * 10 // total
        if self._said.get(stage) != tenth:
            self._said[stage] = tenth
            self._console.print(f"{STAGES[stage]}: {done} of {total}", highlight=False)


def _say(report: dict[str, Any]) -> None:
    """What a reader of the terminal should know."""
    for side, figures in report["splits"].items():
        typer.echo(
            f"{side}: {figures['clips']} clips of {figures['groups']} groups, {figures['frames']:,} frames, "
            f"{figures['seconds']:,.0f} s, {figures['cuts']} cuts"
        )
    for name, values in report["conditions"].items():
        shown = ", ".join(values[:12]) + (f", ... ({len(values)})" if len(values) > 12 else "")
        typer.echo(f"{name}: {shown}")
    for note in report["notes"]:
        typer.echo(f"note: {note}")
    for key, text in (
        ("overlays", "seem to have text or symbols burned in"),
        ("borders", "have black borders"),
        ("duplicates", "pairs of clips of different groups show the same"),
    ):
        if report[key]:
            names = [entry.get("name") or f"{entry['first']} = {entry['second']}" for entry in report[key]]
            typer.echo(f"{len(names)} {text}: {_some(names)}")
    if report["black_frames"]:
        typer.echo(
            f"{sum(report['black_frames'].values()):,} black frames in {len(report['black_frames'])} files left out"
        )
    if report["removed_elements"]:
        typer.echo(f"elements that stayed out of the cache: {', '.join(report['removed_elements'])}")
    if report["skipped"]:
        typer.secho(f"skipped: {report['skipped_count']}", fg="yellow")
        for entry in report["skipped"][:SHOWN]:
            typer.echo(f"  {entry['name']}: {entry['reason']}")
        if len(report["skipped"]) > SHOWN:
            reasons = Counter(entry["reason"].split(":")[0][:80] for entry in report["skipped"][SHOWN:])
            typer.echo(f"  and {len(report['skipped']) - SHOWN} more; most often: {reasons.most_common(1)[0][0]}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
