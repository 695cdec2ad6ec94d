"""Which samples the report shows, each with the training clip it resembles most; and the contact sheets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from medsora.models.autoencoder import VideoAutoencoder
from medsora.request import GenerationRequest
from medsora.video_io import write_contact_sheet
from training.data.clips import ClipSet
from training.evaluation.config import EvaluationConfig
from training.evaluation.memorisation import Nearest
from training.evaluation.pictures import first_frame, moving, strip
from training.evaluation.report import Pair
from training.evaluation.sets import ClipGroup, cut_windows, evenly, through_autoencoder

__all__ = ["attributions", "choose_shown", "make_pairs", "write_sheets"]

CLOSEST_SHOWN = 6


def choose_shown(labels: Tensor, nearest: Nearest, settings: EvaluationConfig) -> dict[str, list[int]]:
    """Samples in the report: the first of every label, unselected, and those nearest to a training clip."""
    first = [
        row
        for number in sorted({*labels.tolist()})
        for row in (labels == number).nonzero()[:, 0].tolist()[: settings.sheet_clips]
    ]
    closest = nearest.resemblance.argsort(descending=True)[:CLOSEST_SHOWN].tolist()
    return {"first": first, "closest": closest}


def make_pairs(
    sets: dict[str, ClipGroup],
    train: ClipSet,
    nearest: Nearest,
    figures: dict[str, Any],
    shown: dict[str, list[int]],
    requests: Sequence[GenerationRequest],
    settings: EvaluationConfig,
    *,
    fps: float,
) -> dict[str, list[Pair]]:
    """Pictures and captions of the shown samples, by heading."""
    bar = figures["memorisation"]["threshold"]["value"]

    def pictures(clip: Tensor) -> tuple[str, str, str]:
        frames = clip.cpu().numpy()
        return moving(frames, fps=fps), first_frame(frames), strip(frames, columns=settings.sheet_columns)

    def pair(row: int) -> Pair:
        value, request = float(nearest.resemblance[row]), requests[row]
        window = int(nearest.window[row])
        mirrored = ", mirrored" if bool(nearest.is_mirrored[row]) else ""
        return Pair(
            title=f"{request.label}, seed {request.seed}: resemblance {value:.3f}",
            is_copy=value >= bar,
            sample_caption="Generated (synthetic)",
            training_caption=f"Closest training clip: {train.describe(window)}{mirrored}",
            sample=pictures(sets["samples"].clips[row]),
            training=pictures(_twin(train, nearest, row)),
        )

    return {
        "Unselected samples beside their closest training clips": [pair(row) for row in shown["first"]],
        "The samples that come nearest to a training clip": [pair(row) for row in shown["closest"]],
    }


def _twin(train: ClipSet, nearest: Nearest, row: int) -> Tensor:
    device = train.frames.device
    return train.gather(nearest.window[row : row + 1].to(device), nearest.is_mirrored[row : row + 1].to(device))[0]


def attributions(train: ClipSet, windows: Tensor) -> list[dict[str, str]]:
    clips = dict.fromkeys(train.clips[windows.to(train.clips.device)].tolist())
    return [
        {
            "file": train.records[clip].file,
            "licence": train.records[clip].licence,
            "source": train.records[clip].source,
            "attribution": train.records[clip].attribution,
        }
        for clip in clips
    ]


def write_sheets(
    directory: Path,
    autoencoder: VideoAutoencoder,
    sets: dict[str, ClipGroup],
    splits: dict[str, ClipSet],
    nearest: Nearest,
    shown: dict[str, list[int]],
    names: Sequence[str],
    settings: EvaluationConfig,
) -> None:
    """Contact sheets for documents: ``samples.png``, ``nearest.png``, ``reconstruction.png``."""
    samples = sets["samples"]

    def write(name: str, rows: Sequence[Tensor], labels: Sequence[str]) -> None:
        clips = [clip.cpu().numpy() for clip in rows]
        write_contact_sheet(directory / name, clips, columns=settings.sheet_columns, labels=labels)

    write(
        "samples.png",
        [samples.clips[row] for row in shown["first"]],
        [names[int(samples.labels[row])] for row in shown["first"]],
    )
    rows: list[Tensor] = []
    labels: list[str] = []
    for row in shown["closest"]:
        rows += [samples.clips[row], _twin(splits["train"], nearest, row)]
        source = splits["train"].describe(int(nearest.window[row]))
        labels += [f"sample {row}", f"nearest: {source}, resemblance {float(nearest.resemblance[row]):.3f}"]
    write("nearest.png", rows, labels)
    originals = cut_windows(splits["test"], evenly(splits["test"], 4))
    decoded = through_autoencoder(autoencoder, originals)
    write(
        "reconstruction.png",
        [clip for pair in zip(originals, decoded, strict=True) for clip in pair],
        ["test clip", "reconstruction"] * len(originals),
    )
