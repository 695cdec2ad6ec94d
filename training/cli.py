"""``medsora-train``: prepare, autoencoder, denoiser, evaluate, export. Torch is loaded only by a command that runs.

A training command ends with status 0 when the run is finished or its time budget is used, with 143 or 130 when SIGTERM
or SIGINT stopped it (what there is, is saved), and with 1 when it failed.
"""

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from medsora.errors import BackendError, MedsoraError
from medsora.threads import let_idle_threads_sleep
from training.config import TrainConfig, override
from training.prepare.command import prepare_command, verify_command
from training.recipes import RECIPES, recipe

__all__ = ["app", "main"]

STARTED = time.monotonic()

app = typer.Typer(
    name="medsora-train",
    help="Train, measure and export MedSora checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.command("prepare")(prepare_command)
app.command("verify")(verify_command)

RecipeArgument = Annotated[str, typer.Argument(help=f"One of: {', '.join(RECIPES)}.")]
DataOption = Annotated[
    Path, typer.Option(help="Folder of a prepared cache, or a table of clips (clips.csv) with the clips beside it.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Replace a field of the recipe: loop.batch_size=32. Repeatable.")
]
SqueezeOption = Annotated[Path | None, typer.Option(help="SqueezeNet 1.0 weights, Caffe layer names.")]
AVERAGE_HELP = "Average of the weights: ema-HALFLIFE or best, as result.json lists them; default its first."
BudgetOption = Annotated[
    float | None,
    typer.Option(help="Stop and save after so many seconds, counted from the start of the process.", min=1.0),
]


@app.command("autoencoder")
def autoencoder_command(
    name: RecipeArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    squeezenet: SqueezeOption = None,
    lpips: Annotated[
        Path | None,
        typer.Option(help="LPIPS weights (state of the lpips package's network), used instead of SqueezeNet."),
    ] = None,
    lpips_backbone: Annotated[
        Path | None,
        typer.Option(help="AlexNet or VGG-16 as torchvision names it, where --lpips holds the learned weights alone."),
    ] = None,
    settings: SetOption = None,
    init: Annotated[Path | None, typer.Option(help="Start from the weights of this run or checkpoint.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")] = False,
    time_budget_s: BudgetOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train an autoencoder."""
    config = _configure(name, settings, data)
    from training.distributed import join
    from training.perceptual import load_distance
    from training.runs import load_autoencoder, train_autoencoder

    place = _device(device)
    distance = None
    if config.autoencoder_loss.perceptual > 0:
        distance = load_distance(squeezenet=squeezenet, lpips=lpips, lpips_backbone=lpips_backbone, device=place)
    with join(place, config.loop.distributed) as processes:
        result = train_autoencoder(
            config,
            out,
            table=data,
            perceptual=distance,
            device=place,
            processes=processes,
            initial=None if init is None else load_autoencoder(init)[0].state_dict(),
            is_resuming=resume,
            time_budget_s=time_budget_s,
            started=STARTED,
            report=_report if processes.is_first else _keep_quiet,
        )
    _exit(result.signal_number)


@app.command("denoiser")
def denoiser_command(
    name: RecipeArgument,
    data: DataOption,
    autoencoder: Annotated[Path, typer.Option(help="Folder of the autoencoder's run, or a checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    autoencoder_ema: Annotated[str | None, typer.Option(help=f"Of the autoencoder's run. {AVERAGE_HELP}")] = None,
    raft: Annotated[
        Path | None, typer.Option(help="RAFT-small weights (raft-small.pth), for every alignment but none.")
    ] = None,
    dino: Annotated[
        Path | None, typer.Option(help="DINO or the like as TorchScript, for alignment.kind=paper.")
    ] = None,
    squeezenet: Annotated[
        Path | None, typer.Option(help="SqueezeNet 1.0 weights: stands in for --dino where there is none.")
    ] = None,
    settings: SetOption = None,
    init: Annotated[Path | None, typer.Option(help="Start from the weights of this run or checkpoint.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")] = False,
    time_budget_s: BudgetOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a denoiser on the latents of an autoencoder."""
    config = _configure(name, settings, data)
    from training.alignment import AlignmentFiles
    from training.distributed import join
    from training.runs import load_denoiser_weights, train_denoiser

    place = _device(device)
    with join(place, config.loop.distributed) as processes:
        result = train_denoiser(
            config,
            out,
            table=data,
            autoencoder=autoencoder,
            autoencoder_average=autoencoder_ema,
            alignment_files=AlignmentFiles(raft=raft, dino=dino, squeezenet=squeezenet),
            device=place,
            processes=processes,
            initial=None if init is None else load_denoiser_weights(init),
            is_resuming=resume,
            time_budget_s=time_budget_s,
            started=STARTED,
            report=_report if processes.is_first else _keep_quiet,
        )
    _exit(result.signal_number)


@app.command("distill")
def distill_command(
    name: RecipeArgument,
    data: DataOption,
    autoencoder: Annotated[Path, typer.Option(help="Folder of the autoencoder's run, or a checkpoint.")],
    teacher: Annotated[Path, typer.Option(help="Folder of the denoiser's run to learn from.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    autoencoder_ema: Annotated[str | None, typer.Option(help=f"Of the autoencoder's run. {AVERAGE_HELP}")] = None,
    teacher_ema: Annotated[str | None, typer.Option(help=f"Of the teacher's run. {AVERAGE_HELP}")] = None,
    settings: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")] = False,
    time_budget_s: BudgetOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Make a trained denoiser sample in few steps."""
    config = _configure(name, settings, data)
    if config.distillation is None:
        able = ", ".join(known for known in RECIPES if recipe(known).distillation is not None)
        raise typer.BadParameter(f"{name} is no recipe of a distillation; those are {able}")
    from training.distributed import join
    from training.runs import train_denoiser

    place = _device(device)
    with join(place, config.loop.distributed) as processes:
        result = train_denoiser(
            config,
            out,
            table=data,
            autoencoder=autoencoder,
            autoencoder_average=autoencoder_ema,
            teacher=teacher,
            teacher_average=teacher_ema,
            device=place,
            processes=processes,
            is_resuming=resume,
            time_budget_s=time_budget_s,
            started=STARTED,
            report=_report if processes.is_first else _keep_quiet,
        )
    _exit(result.signal_number)


@app.command("latents")
def latents_command(
    name: RecipeArgument,
    data: Annotated[Path, typer.Option(help="Folder of a prepared cache.")],
    autoencoder: Annotated[Path, typer.Option(help="Folder of the autoencoder's run, or a checkpoint.")],
    autoencoder_ema: Annotated[str | None, typer.Option(help=f"Of the autoencoder's run. {AVERAGE_HELP}")] = None,
    raft: Annotated[Path | None, typer.Option(help="RAFT-small's weights: keep features of motion, too.")] = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Encode the windows of a prepared cache once, for every denoiser that is trained on them."""
    config = _configure(name, settings, data)
    from training.data.cached_latents import store_latents
    from training.runs import ENCODE_BATCH, load_autoencoder

    place = _device(device)
    coder, digest = load_autoencoder(autoencoder, average=autoencoder_ema)
    record = store_latents(
        data, coder.to(place).requires_grad_(False), autoencoder_sha256=digest, data=config.data, device=place,
        batch_size=ENCODE_BATCH,
        progress=_report_clips,
    )  # fmt: skip
    size = sum(file.size_bytes for file in record.files.values())
    typer.echo(f"{data}: latents {record.key}, {size / 2**20:.1f} MiB")
    if raft is None:
        return
    from medsora.files import sha256_of
    from training.alignment import PAIRS_AT_ONCE, motion_features, patch_grid
    from training.data.cached_flow import store_flow
    from training.flow import load_raft

    grid = patch_grid(config)
    record = store_flow(
        data, motion_features(load_raft(raft, device=place), grid), network_sha256=sha256_of(raft), grid=grid,
        data=config.data, device=place, batch_size=PAIRS_AT_ONCE, progress=_report_clips,
    )  # fmt: skip
    size = sum(file.size_bytes for file in record.files.values())
    typer.echo(f"{data}: flow features {record.key}, {size / 2**20:.1f} MiB")


@app.command("evaluate")
def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory, or the name of a shipped one.")],
    data: DataOption,
    squeezenet: Annotated[Path, typer.Option(help="SqueezeNet 1.0 weights, Caffe layer names.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.json and contact sheets.")],
    i3d: Annotated[Path | None, typer.Option(help="StyleGAN-V's i3d_torchscript.pt: FVD.")] = None,
    videomae: Annotated[Path | None, typer.Option(help="VideoMAE of SSv2 as TorchScript: CD-FVD.")] = None,
    inception: Annotated[Path | None, typer.Option(help="inception-2015-12-05.pt: FID, inception score.")] = None,
    clip: Annotated[Path | None, typer.Option(help="CLIP ViT, OpenAI's .pt or .safetensors.")] = None,
    raft: Annotated[Path | None, typer.Option(help="raft-small.pth: flow warping error.")] = None,
    name: Annotated[str, typer.Option("--recipe", help="Recipe that says which clips and windows.")] = "denoiser_small",
    settings: SetOption = None,
    samples: Annotated[int, typer.Option(help="Clips to generate.", min=2)] = 512,
    batch_size: Annotated[int, typer.Option(help="Clips generated together.", min=1)] = 64,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default the checkpoint's.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default the checkpoint's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler; default the checkpoint's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first sample; each has the next one.", min=0)] = 1_000_000,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap; 0: no intervals.", min=0)] = 200,
    dtype: Annotated[str, typer.Option(help="Of the sampler: float32 or bfloat16.")] = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Measure a checkpoint on the test split: report.html, report.json and contact sheets."""
    config = _configure(name, settings, data)
    from training.evaluate import EvaluationConfig, evaluate_checkpoint, summary
    from training.evaluation.networks import load_networks

    place = _device(device)
    figures = evaluate_checkpoint(
        checkpoint,
        out,
        table=data,
        data=config.data,
        networks=load_networks(
            squeezenet=squeezenet, i3d=i3d, videomae=videomae, inception=inception, clip=clip, raft=raft, device=place
        ),
        device=place,
        settings=EvaluationConfig(
            num_samples=samples,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype,
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=sampler,
            resamples=resamples,
        ),
        report=_report,
    )
    for line in summary(figures):
        typer.echo(line)
    typer.echo(f"{out / 'report.html'}")


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of denoiser runs.")],
    data: DataOption,
    autoencoder: Annotated[Path, typer.Option(help="Folder of the autoencoder's run, or a checkpoint.")],
    squeezenet: Annotated[Path, typer.Option(help="SqueezeNet 1.0 weights, Caffe layer names.")],
    autoencoder_ema: Annotated[str | None, typer.Option(help=f"Of the autoencoder's run. {AVERAGE_HELP}")] = None,
    ema: Annotated[list[str] | None, typer.Option(help=f"Of the denoisers. {AVERAGE_HELP} Repeatable.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Sampling steps; default 50. Repeatable.")] = None,
    guidance: Annotated[list[float] | None, typer.Option(help="Guidance scale; default 1.5. Repeatable.")] = None,
    samples: Annotated[int, typer.Option(help="Clips to generate at each setting.", min=2)] = 512,
    sampler: Annotated[str | None, typer.Option(help="Default: what a run's network is made for.")] = None,
    batch_size: Annotated[int, typer.Option(help="Clips generated together.", min=1)] = 64,
    out: Annotated[Path | None, typer.Option(help="File for the figures, JSON.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure denoiser runs at several settings, to choose among them: a Markdown table."""
    from dataclasses import asdict

    from training.compare import compare_runs, comparison_table
    from training.evaluation.config import EvaluationConfig
    from training.evaluation.networks import load_networks

    place = _device(device)
    lines, floor = compare_runs(
        runs,
        table=data,
        autoencoder=autoencoder,
        autoencoder_average=autoencoder_ema,
        averages=ema or [None],
        num_inference_steps=steps or [50],
        guidance_scales=guidance or [1.5],
        sampler=sampler,
        networks=load_networks(squeezenet=squeezenet, device=place),
        device=place,
        settings=EvaluationConfig(
            num_samples=samples, batch_size=batch_size, dtype="bfloat16" if place.type == "cuda" else "float32"
        ),
        report=_report,
    )
    if out is not None:
        made = {"lines": [asdict(line) for line in lines], "floor": floor}
        out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for row in comparison_table(lines, floor):
        typer.echo(row)


@app.command("export")
def export_command(
    autoencoder: Annotated[Path, typer.Option(help="Folder of the autoencoder's run, or the checkpoint it is from.")],
    denoiser: Annotated[Path, typer.Option(help="Folder of the denoiser's run.")],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write; an old checkpoint there is replaced.")],
    ema: Annotated[str | None, typer.Option(help=f"Of the denoiser's run. {AVERAGE_HELP}")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the checkpoint; default that of the directory.")] = None,
    report: Annotated[Path | None, typer.Option(help="report.json of an evaluation, for the manifest.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="As the runs had it: fingerprints of its training clips go into the checkpoint (2 MiB at most)."
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Default number of steps, of samplers that take any.", min=1, max=250)
    ] = 30,
    guidance: Annotated[float, typer.Option(help="Default guidance scale.", min=1.0, max=8.0)] = 1.5,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Default sampler: shortcut (its default, where it was distilled), euler or heun; of a network that "
            "predicts noise, ddim or ddpm."
        ),
    ] = None,
) -> None:
    """Write a checkpoint directory from two runs."""
    from training.export import Sampling, export_checkpoint, report_metrics

    metrics: dict[str, Any] = {}
    try:
        if report is not None:
            metrics = report_metrics(json.loads(report.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    manifest = export_checkpoint(
        out,
        autoencoder_run=autoencoder,
        denoiser_run=denoiser,
        average=ema,
        name=name or out.resolve().name,
        metrics=metrics,
        table=data,
        sampling=Sampling(num_inference_steps=(1, steps, 250), guidance_scale=(1.0, guidance, 8.0), sampler=sampler),
    )
    size = sum(record.size_bytes for record in manifest.files.values())
    typer.echo(f"{out}: {len(manifest.labels)} labels, {size / 2**20:.1f} MiB")


@app.command("fingerprints")
def fingerprints_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory; its manifest is written anew.")],
    data: DataOption,
    name: Annotated[
        str | None,
        typer.Option("--recipe", help="Whose training windows; default that which made the checkpoint."),
    ] = None,
    settings: SetOption = None,
    count: Annotated[int, typer.Option(help="Most fingerprints, 1 KiB each.", min=1, max=2048)] = 2048,
) -> None:
    """Put fingerprints of its training clips into a checkpoint, so that a server can drop copies of them."""
    from medsora.checkpoint import load_checkpoint
    from training.fingerprints import fingerprint_checkpoint

    loaded = load_checkpoint(checkpoint)
    made_by = name or loaded.manifest.training.get("denoiser", {}).get("recipe")
    if made_by is None:
        raise typer.BadParameter(f"{checkpoint} does not say which recipe made it: give --recipe")
    config = _configure(made_by, settings, data)
    fingerprint_checkpoint(checkpoint, data, config.data, loaded.config, count=count, report=typer.echo)


def _configure(name: str, settings: list[str] | None, data: Path) -> TrainConfig:
    """The recipe, made to fit the data where they are a prepared cache, with the user's values replaced."""
    from training.prepare.cache import is_cache, open_cache
    from training.prepare.recipe import fit_recipe

    try:
        if not is_cache(data):
            return override(recipe(name), settings or [])
        index = open_cache(data).index
        fitted, said = fit_recipe(recipe(name), index)
        excluded = override(fitted, settings or []).data.excluded_labels
        if excluded != fitted.data.excluded_labels:
            fitted, said = fit_recipe(recipe(name), index, excluded_labels=excluded)
        typer.echo(said)
        return override(fitted, settings or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _device(name: str) -> Any:
    import torch

    from medsora.pipeline import device_named

    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # the GPU that torchrun gave to this process
    try:
        place: torch.device = device_named(name)
    except BackendError as error:
        raise typer.BadParameter(str(error)) from error
    if place.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return place


def _report(text: str) -> None:
    typer.echo(f"[{time.monotonic() - STARTED:7.1f} s] {text}")


def _report_clips(done: int, total: int, name: str) -> None:
    if done % 100 == 0 or done == total:
        _report(f"{done} of {total} clips")


def _keep_quiet(text: str) -> None:
    """What the first of several processes reports, the others need not."""


def _exit(signal_number: int) -> None:
    """End with the status that says which signal stopped the run, if any."""
    if signal_number:
        raise typer.Exit(128 + signal_number)


def main() -> None:
    """Console script: errors of MedSora end with one line and status 1, not with a stack trace."""
    let_idle_threads_sleep()
    try:
        app()
    except MedsoraError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
