"""The ``medsora`` command: generate a clip here, without a server, show what a checkpoint is, and measure speed.

Torch is loaded by ``generate``, ``bench`` and ``import-released`` alone: ``info`` and ``--help`` answer at once.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from medsora import __version__
from medsora.errors import CheckpointError, MedsoraError, RequestError, VideoError
from medsora.files import read_weight_header, sha256_of
from medsora.jsonconfig import to_json
from medsora.manifest import Manifest, find_checkpoint, list_checkpoints, read_manifest
from medsora.provenance import clip_metadata
from medsora.request import GenerationRequest, no_clean_prefixes, random_seed, resolve_request
from medsora.threads import let_idle_threads_sleep

__all__ = ["app", "main"]

SHOWN_SYNONYMS = 5
BENCH_COLUMNS = (
    "frames",
    "batch",
    "mixers (spatial, temporal)",
    "GFLOP a step",
    "GFLOP decode",
    "s first",
    "ms a step",
    "ms decode",
    "clips/s",
    "of matrix rate",
    "peak MiB",
)
ABOUT_FIELDS = ("description", "modality", "intended_use", "licence", "created_at")

app = typer.Typer(
    name="medsora",
    help="Generate synthetic medical video on this machine, and look into checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; exits with 2 for what was asked wrongly, 1 for what failed."""
    let_idle_threads_sleep()
    app()


@contextmanager
def _errors_as_one_line() -> Iterator[None]:
    """Show expected errors as a line on stderr instead of a traceback."""
    try:
        yield
    except MedsoraError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        raise typer.Exit(2) from error
    except OSError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        raise typer.Exit(1) from error


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medsora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Generate synthetic medical video on this machine, and look into checkpoints."""


def _default_checkpoint() -> str:
    names = list_checkpoints()
    if len(names) != 1:
        raise CheckpointError(f"name a checkpoint: a directory, or one of: {', '.join(names) or '(none shipped)'}")
    return names[0]


@app.command()
def generate(
    label: Annotated[str, typer.Option(help="What to show: a label of the checkpoint, or one of its synonyms.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .mp4, or .mkv with --lossless.")],
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same clip. Default: a random one.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="A directory, or the name of a shipped checkpoint.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler. Default: the checkpoint's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 is none. Default: the checkpoint's.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Default: the checkpoint's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Length in frames. Default: the checkpoint's.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the checkpoint's.")] = None,
    given: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="PICTURE_OR_VIDEO",
            help="What the clip begins with, of its size and rate; for checkpoints with limits.clean_prefixes.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    lossless: Annotated[bool, typer.Option("--lossless", help="Write FFV1 in Matroska, exact to the bit.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Generate one clip and write it to a file."""
    with _errors_as_one_line():
        _check_output(output, lossless=lossless, force=force)
        directory = find_checkpoint(checkpoint or _default_checkpoint())
        manifest = read_manifest(directory)
        width, height = _parse_size(size)
        if given is not None and not manifest.limits.clean_prefixes:
            raise RequestError("from", no_clean_prefixes(manifest))
        request = resolve_request(
            manifest,
            label=label,
            seed=random_seed() if seed is None else seed,
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=sampler,
        )
        request, seconds = _generate_to_file(
            directory, manifest, request, output, given, device=device, lossless=lossless
        )
        Console().print(_settings_table(manifest, request, seconds, output))


@app.command()
def regenerate(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="manifest.jsonl of a dataset.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the files of the clips to.")],
    clip: Annotated[list[str] | None, typer.Option(help="Only this clip, such as clip_000007. Repeatable.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Directory of the checkpoint. Default: a shipped one of the name in the manifest."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Make clips of a dataset again, and compare them with what its manifest says; ends with 1 where one differs."""
    with _errors_as_one_line():
        try:
            from medsora.regenerate import read_clips, regenerate_clips
        except ModuleNotFoundError as error:
            raise MedsoraError(f"generating needs the package {error.name}: pip install 'medsora[model]'") from error
        clips = read_clips(manifest, wanted=clip)
        differ = 0
        for made in regenerate_clips(clips, output, checkpoint=checkpoint, device=device, force=force):
            differ += not made.is_same
            typer.echo(f"{made.clip}: {'the same to the bit' if made.is_same else made.difference}")
        typer.echo(f"{len(clips)} clips, {differ} differ")
    if differ:
        raise typer.Exit(1)


def _check_output(output: Path, *, lossless: bool, force: bool) -> None:
    """Refuse before the sampling what could not be written after it."""
    wanted = ".mkv" if lossless else ".mp4"
    if output.suffix.lower() != wanted:
        kind = "lossless video" if lossless else "MP4 (or give --lossless)"
        raise VideoError(f"{output}: the name must end with {wanted} for {kind}")
    if output.exists() and not force:
        raise VideoError(f"{output} exists already; give --force to overwrite it")
    if not output.parent.is_dir():
        raise VideoError(f"{output}: its folder does not exist")


def _parse_size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    width, separator, height = size.partition("x")
    digits = width + height
    if not (separator and width and height and digits.isascii() and digits.isdigit() and len(digits) <= 12):
        raise RequestError("size", f"{size[:40]!r} is no WIDTHxHEIGHT such as 128x128")
    return int(width), int(height)


def _generate_to_file(
    directory: Path,
    manifest: Manifest,
    request: GenerationRequest,
    output: Path,
    given: Path | None,
    *,
    device: str,
    lossless: bool,
) -> tuple[GenerationRequest, dict[str, float]]:
    """Sample and write; returns the request with what was given, and the seconds that each part took, by name."""
    try:
        from medsora.given import read_given_frames
        from medsora.pipeline import VideoPipeline
        from medsora.video_io import write_ffv1, write_mp4
    except ModuleNotFoundError as error:
        raise MedsoraError(f"generating needs the package {error.name}: pip install 'medsora[model]'") from error
    started = time.perf_counter()
    sources, origin = None, None
    if given is not None:
        size = (request.width, request.height)
        frames = read_given_frames(given, size=size, most=request.num_frames - 1, limits=manifest.limits)
        request = replace(request, prefix_frames=len(frames))
        sources, origin = [frames], {"kind": "reference", "sha256": sha256_of(given)}
    pipeline = VideoPipeline.from_checkpoint(directory, device=device)
    loaded = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("sampling", total=request.num_inference_steps)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        (clip,) = pipeline([request], sources=sources, on_step=show)
    sampled = time.perf_counter()
    write = write_ffv1 if lossless else write_mp4
    metadata = clip_metadata(request, model=manifest.name, model_sha256=_manifest_sha256(directory), source=origin)
    # A hidden folder beside the file: renaming within one file system is atomic, and nothing partial is left.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".medsora-") as scratch:
        partial = Path(scratch) / output.name
        write(partial, clip, fps=manifest.limits.fps, metadata=metadata)
        partial.replace(output)
    written = time.perf_counter()
    return request, {"load": loaded - started, "sample and decode": sampled - loaded, "write": written - sampled}


def _settings_table(manifest: Manifest, request: GenerationRequest, seconds: dict[str, float], output: Path) -> Table:
    length = f"{request.num_frames} frames"
    if request.prefix_frames:
        length += f" ({request.prefix_frames} of them given)"
    parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    return _pairs_table(
        [
            ("file", str(output)),
            ("checkpoint", manifest.name),
            ("label", request.label),
            ("seed", str(request.seed)),
            ("video", f"{length}, {request.width}x{request.height}, {manifest.limits.fps:g}/s"),
            ("sampler", f"{request.sampler}, {request.num_inference_steps} steps"),
            ("guidance", f"{request.guidance_scale:g}"),
            ("seconds", f"{sum(seconds.values()):.2f} ({parts})"),
        ]
    )


@app.command()
def info(
    checkpoint: Annotated[str | None, typer.Argument(help="A directory, or the name of a shipped checkpoint.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    training_data: Annotated[
        bool, typer.Option("--training-data", help="List every training clip with licence and attribution.")
    ] = False,
) -> None:
    """Show a checkpoint: labels, limits, files and whether they are unaltered, figures, licences."""
    with _errors_as_one_line():
        directory = find_checkpoint(checkpoint or _default_checkpoint())
        manifest = read_manifest(directory)
        files = {name: _describe_file(directory, manifest, name) for name in sorted(manifest.files)}
        if as_json:
            found = {"manifest_sha256": _manifest_sha256(directory), "files_found": files}
            shown = {"directory": str(directory), **found}
            typer.echo(json.dumps({**shown, **to_json(manifest)}, indent=2))
        else:
            _print_manifest(manifest, directory, files, training_data=training_data)
        bad = [name for name, found in files.items() if found["state"] != "ok"]
        if bad:
            raise CheckpointError(f"{directory}: missing or altered: {', '.join(bad)}")


def _manifest_sha256(directory: Path) -> str:
    return sha256_of(directory / "manifest.json")


def _describe_file(directory: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    """Compare a file with what the manifest says of it; count the values in it when it holds weights."""
    record = manifest.files[name]
    path = directory / name
    found: dict[str, Any] = {"size_bytes": record.size_bytes, "sha256": record.sha256}
    if not path.is_file():
        return {**found, "state": "missing"}
    unaltered = sha256_of(path) == record.sha256
    found["state"] = "ok" if unaltered else "altered"
    if unaltered and path.suffix == ".safetensors":
        found["values"] = _count_values(path)
    return found


def _count_values(path: Path) -> int:
    """Number of values in a safetensors file, from its header alone."""
    try:
        return sum(math.prod(entry["shape"]) for entry in read_weight_header(path).values())
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has no valid safetensors header") from error


def _pairs_table(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _print_manifest(
    manifest: Manifest, directory: Path, files: dict[str, dict[str, Any]], *, training_data: bool
) -> None:
    # markup off: names in a checkpoint are data, and may hold square brackets
    console = Console(markup=False, highlight=False)
    about = [(name.replace("_", " "), getattr(manifest, name)) for name in ABOUT_FIELDS]
    makes = "video" if manifest.has_autoencoder else "latents only: it has no autoencoder"
    sections = {
        manifest.name: _pairs_table([*about, ("makes", makes), ("directory", str(directory))]),
        "labels": _labels_table(manifest),
        "limits": _limits_table(manifest),
        "files": _files_table(files),
    }
    if manifest.metrics:
        sections["metrics"] = _pairs_table(_flatten(manifest.metrics))
    if manifest.training:
        sections["training"] = _pairs_table(_flatten(manifest.training))
    if manifest.training_data and training_data:
        sections["training data"] = _training_data_table(manifest)
    elif manifest.training_data:
        sections["training data (every clip: --training-data)"] = _licences_table(manifest)
    for title, table in sections.items():
        console.print(f"\n{title}", style="bold underline")
        console.print(table)


def _labels_table(manifest: Manifest) -> Table:
    table = Table("label", "also called", "condition", "description")
    for label in manifest.labels:
        condition = ", ".join(f"{name}={value}" for name, value in label.condition.items())
        also = ", ".join(label.synonyms[:SHOWN_SYNONYMS])
        if len(label.synonyms) > SHOWN_SYNONYMS:
            also += f", ... ({len(label.synonyms)} in all: --json)"
        table.add_row(label.name, also, condition, label.description)
    return table


def _limits_table(manifest: Manifest) -> Table:
    limits = manifest.limits
    steps_low, steps_default, steps_high = limits.num_inference_steps
    guidance_low, guidance_default, guidance_high = limits.guidance_scale
    lengths = ", ".join(f"{count} frames = {manifest.seconds_for(count)} s" for count in limits.num_frames)
    return _pairs_table(
        [
            ("size", ", ".join(f"{width}x{height}" for width, height in limits.sizes)),
            ("length", f"{lengths} at {limits.fps:g} frames/s"),
            ("steps", f"{steps_low} to {steps_high}, default {steps_default}"),
            ("guidance", f"{guidance_low:g} to {guidance_high:g}, default {guidance_default:g}"),
            ("sampler", ", ".join(limits.samplers)),
            *(
                [
                    (
                        "shortcut",
                        f"{', '.join(map(str, limits.shortcut_steps))} steps, guidance {limits.shortcut_guidance:g}",
                    )
                ]
                if limits.shortcut_steps
                else []
            ),
        ]
    )


def _files_table(files: dict[str, dict[str, Any]]) -> Table:
    table = Table("file", "bytes", "values", "SHA-256", "state")
    for name, found in files.items():
        values = f"{found['values']:,}" if "values" in found else ""
        table.add_row(name, f"{found['size_bytes']:,}", values, found["sha256"][:16], found["state"])
    return table


def _training_data_table(manifest: Manifest) -> Table:
    columns = ("file", "licence", "source", "attribution")
    table = Table(*(Column(name, overflow="fold") for name in columns))
    for clip in manifest.training_data:
        table.add_row(*(clip.get(name, "") for name in columns))
    return table


def _licences_table(manifest: Manifest) -> Table:
    counts = Counter(clip.get("licence", "not stated") for clip in manifest.training_data)
    table = Table("licence", "clips")
    for licence, count in sorted(counts.items()):
        table.add_row(licence, str(count))
    return table


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested JSON objects as dotted names with their values."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:g}"
        else:
            yield f"{prefix}{name}", str(value)


@app.command("import-released")
def import_released(
    source: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint file of the authors' released code.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not exist.")],
    weights: Annotated[str, typer.Option(help="ema: their moving average, as the released sampler; or model.")] = "ema",
    autoencoder: Annotated[
        str | None, typer.Option(help="A checkpoint whose autoencoder to take. Default: none, so latents only.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the new checkpoint.")] = "medsora-released",
    label: Annotated[str, typer.Option(help="Name of the one thing that can be asked for.")] = "unconditional",
    fps: Annotated[float, typer.Option(help="Frames a second that the denoiser was trained at.")] = 6.0,
) -> None:
    """Convert weights of the authors' released MedSora code to a checkpoint directory."""
    with _errors_as_one_line():
        try:
            from medsora.released import import_released as convert
        except ModuleNotFoundError as error:
            raise MedsoraError(f"importing needs the package {error.name}: pip install 'medsora[model]'") from error
        manifest = convert(source, output, weights=weights, autoencoder=autoencoder, name=name, label=label, fps=fps)
        files = {name: _describe_file(output, manifest, name) for name in sorted(manifest.files)}
        _print_manifest(manifest, output, files, training_data=False)
        if manifest.has_autoencoder:
            note = (
                "The autoencoder's latent space must be the one that the denoiser was trained in (the released "
                "denoisers': the authors' CogVideoX autoencoder with frequency compensation). Nothing here can check "
                "that; of another space the videos are meaningless."
            )
        else:
            note = "There is no autoencoder: this checkpoint gives latents, no video, until --autoencoder names one."
        Console(soft_wrap=True, highlight=False).print(f"\n{note}")


@app.command()
def bench(
    preset: Annotated[str | None, typer.Option(help="Network with random weights: tiny, small, base, large.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Instead: a directory, or a shipped checkpoint.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float64.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="Of the mixers: auto, fused, dual, chunked, mamba_ssm, reference.")
    ] = "auto",
    compiled: Annotated[str, typer.Option(help="auto, on, off: compile, and record as CUDA graphs.")] = "auto",
    batch: Annotated[str, typer.Option(help="Clips at once; several as 1,8,64.")] = "1",
    frames: Annotated[str, typer.Option(help="Length in frames; several as 16,32,64,128.")] = "16",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels.")] = "128x128",
    steps: Annotated[int | None, typer.Option(help="Steps a clip. Default: the network's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none. Default: the network's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Default: the network's.")] = None,
    repeats: Annotated[int, typer.Option(help="Calls that each median is taken of.")] = 7,
    output: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure speed and memory: of a step, of decoding, against the rate of a large matrix product."""
    with _errors_as_one_line():
        if (preset is None) == (checkpoint is None):
            raise RequestError("preset", "give either --preset or --checkpoint")
        batches, lengths = _parse_counts("batch", batch), _parse_counts("frames", frames)
        width, height = _parse_size(size)
        if output is not None and not output.parent.is_dir():
            raise RequestError("json", f"{output}: its folder does not exist")
        try:
            from medsora import bench as measuring
            from medsora.pipeline import VideoPipeline
        except ModuleNotFoundError as error:
            raise MedsoraError(f"measuring needs the package {error.name}: pip install 'medsora[model]'") from error
        options = {"device": device, "dtype": dtype, "backend": backend, "compiled": compiled}
        if preset is not None:
            pipeline = measuring.preset_pipeline(preset, **options, batch_sizes=batches, window=max(lengths))
        else:
            pipeline = VideoPipeline.from_checkpoint(checkpoint or "", **options, batch_sizes=batches)
        rate = measuring.matrix_rate(pipeline.device, pipeline.dtype)
        rows = [
            measuring.measure(
                pipeline,
                batch=clips,
                num_frames=length,
                height=height or 0,
                width=width or 0,
                num_steps=steps,
                guidance_scale=guidance,
                sampler=sampler,
                rate=rate,
                repeats=repeats,
            )
            for length in lengths
            for clips in batches
        ]
        figures = {**measuring.describe(pipeline, rate=rate), "rows": [asdict(row) for row in rows]}
        _print_bench(figures)
        if output is not None:
            output.write_text(json.dumps(figures, indent=2) + "\n")


def _parse_counts(field: str, text: str) -> list[int]:
    """Whole numbers between commas, each at least 1."""
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and len(word) <= 9 and int(word) >= 1 for word in words):
        raise RequestError(field, f"{text[:40]!r} are no numbers from 1 on, such as 1,8,64")
    return [int(word) for word in words]


def _print_bench(figures: dict[str, Any]) -> None:
    console = Console(markup=False, highlight=False)
    about = [
        ("network", figures["network"]),
        (
            "parameters",
            f"{figures['denoiser_parameters']:,} denoiser, {figures['autoencoder_parameters']:,} autoencoder",
        ),
        ("device", f"{figures['gpu'] or figures['device']}, {figures['dtype']}, torch {figures['torch']}"),
        ("matrix rate", f"{figures['matrix_rate_tflops']:.3g} TFLOP/s (measured)"),
    ]
    console.print(_pairs_table(about))
    table = Table(*BENCH_COLUMNS)
    for column in table.columns:
        column.justify = "right"
    for row in figures["rows"]:
        shape = (f"{row['num_frames']}", f"{row['batch']}", f"{row['spatial_backend']}, {row['temporal_backend']}")
        counted = (f"{row['step_flops'] / 1e9:,.3g}", f"{row['decode_flops'] / 1e9:,.3g}")
        if row["error"] is None:
            measured = (
                f"{row['warm_up_s']:,.1f}",
                f"{row['step_ms']:,.2f}",
                f"{row['decode_ms']:,.2f}",
                f"{row['clips_per_second']:,.4g}",
                f"{100 * row['share_of_matrix_rate']:.1f} %",
                f"{row['peak_memory_mib']:,.0f}",
            )
        else:
            measured = (row["error"], "", "", "", "", "")
        table.add_row(*shape, *counted, *measured)
    console.print(table)
    first = figures["rows"][0]
    guidance = "no guidance" if first["guidance_scale"] == 1 else f"guidance {first['guidance_scale']:g}"
    compiled = "compiled, CUDA graphs" if first["is_compiled"] else "not compiled"
    console.print(
        f"{first['width']}x{first['height']}; {first['sampler']}, {first['num_steps']} steps, {guidance}; {compiled}"
    )
