"""Measures a checkpoint on real clips: ``report.json``, ``report.html`` and contact sheets.

Every figure of generated clips stands beside the same figure of real clips, and every distance beside that of real
training clips to real test clips: the floor. FVD, CD-FVD, FID, the inception score, CLIP's frame consistency and the
flow warping error are measured where their networks are given by path; where one is not, the report says so. What is
always there are Frechet distances in SqueezeNet features, under their own names: ``frechet_squeezenet`` of single
frames, ``frechet_squeezenet_motion`` of the absolute change of the features from one frame to the next. Neither is
comparable with FID or FVD, nor any distance with itself at another number of clips.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from medsora.manifest import find_checkpoint
from medsora.pipeline import VideoPipeline
from medsora.request import GenerationRequest
from training.autoencoder_task import reconstruct
from training.config import DataConfig
from training.data.clips import ClipSet
from training.errors import TrainingError
from training.evaluation.config import EvaluationConfig
from training.evaluation.copies import measure_copies
from training.evaluation.networks import EvaluationNetworks, file_hashes
from training.evaluation.report import render_report
from training.evaluation.sets import Report, collect_sets, evenly, windows_of
from training.evaluation.showcase import attributions, choose_shown, make_pairs, write_sheets
from training.evaluation.tables import clip_figures, frechet_distances, inception_scores
from training.prepare.cache import INDEX, is_cache
from training.runs import load_split

__all__ = ["EvaluationConfig", "evaluate_checkpoint", "summary"]

FORMAT_VERSION = 2
FEW_SAMPLES = 256


def evaluate_checkpoint(
    checkpoint: Path,
    directory: Path,
    *,
    table: Path,
    data: DataConfig,
    networks: EvaluationNetworks,
    device: torch.device,
    settings: EvaluationConfig | None = None,
    report: Report = print,
) -> dict[str, Any]:
    """Measure a checkpoint and write ``report.json``, ``report.html`` and three contact sheets (PNG).

    Args:
        directory: Gets the report; made when missing.
        table: As for :func:`training.runs.load_split`.
        data: Which clips, and how windows are cut from them; that of the training recipe.
        networks: Feature networks; those that are None are named as not measured.

    Returns:
        What ``report.json`` holds.

    Raises:
        TrainingError: The data have other conditions than the checkpoint, no training clip has one of its labels, or a
            network does not take these clips.
    """
    settings = settings or EvaluationConfig()
    directory.mkdir(parents=True, exist_ok=True)
    folder = find_checkpoint(checkpoint)
    pipeline = VideoPipeline.from_checkpoint(folder, device=str(device), dtype=settings.dtype)
    if set(data.condition_columns) != set(pipeline.config.condition_names):
        raise TrainingError(
            f"{pipeline.manifest.name} is conditioned on {', '.join(pipeline.config.condition_names)}, the data on "
            f"{', '.join(data.condition_columns)}: they do not belong together"
        )
    columns = {name: data.condition_columns[name] for name in pipeline.config.condition_names}
    data = replace(data, condition_columns=columns)  # in the checkpoint's order
    splits = {name: load_split(table, data, pipeline.config, name, device=device) for name in ("train", "test")}
    names = [label.name for label in pipeline.manifest.labels]
    sets, requests = collect_sets(pipeline, splits, settings, report)

    figures: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "checkpoint": {"name": pipeline.manifest.name, "sha256": file_hashes(folder)},
        "data": {
            # a cache's index has the hash of every shard
            "sha256": file_hashes(table / INDEX if is_cache(table) else table),
            "dataset": data.dataset,
            "splits": {name: _describe_split(clips) for name, clips in splits.items()},
        },
        "samples": _describe_samples(requests, settings),
        "bootstrap": {"resamples": settings.resamples, "seed": settings.seed, "confidence": 0.95},
        "networks": networks.records(),
        "absent": networks.absent(),
        "environment": _environment(device),
    }
    figures["warnings"] = _warnings(figures)
    report("reconstructing")
    figures["reconstruction"] = asdict(reconstruct(pipeline.autoencoder, splits["test"]))
    some = windows_of(splits["train"], evenly(splits["train"], len(splits["test"])))
    figures["reconstruction_train"] = asdict(reconstruct(pipeline.autoencoder, some))
    report("features and distances")
    figures["frechet"] = frechet_distances(networks, pipeline.autoencoder, sets, names, settings, report)
    if networks.inception is not None:
        figures["inception_score"] = inception_scores(networks.inception.probabilities, sets, settings)
    report("motion and consistency")
    figures["clips"] = clip_figures(networks, sets, names, settings)
    report("looking for copies of training clips")
    nearest, figures["memorisation"] = measure_copies(pipeline.autoencoder, sets, splits, names, settings)

    report("pictures")
    shown = choose_shown(sets["samples"].labels, nearest, settings)
    figures["shown_training_clips"] = attributions(
        splits["train"], nearest.window[[i for chosen in shown.values() for i in chosen]]
    )
    pairs = make_pairs(
        sets, splits["train"], nearest, figures, shown, requests, settings, fps=pipeline.manifest.limits.fps
    )
    write_sheets(directory, pipeline.autoencoder, sets, splits, nearest, shown, names, settings)
    (directory / "report.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (directory / "report.html").write_text(render_report(figures, pairs), encoding="utf-8")
    return figures


def summary(figures: dict[str, Any]) -> list[str]:
    """The figures that one looks at first, a line each."""
    lines = []
    for metric in figures["frechet"]["all_labels"]["metrics"].values():
        pairs = metric["pairs"]
        lines.append(
            f"{metric['title']}: {pairs['samples_to_test']['value']:.1f} to real test, "
            f"floor {pairs['train_to_test']['value']:.1f}"
        )
    memory = figures["memorisation"]
    recall = [entry["recall"]["value"] for entry in memory["planted"].values()]
    lines.append(
        f"copies of training clips: {memory['samples']['copies']['count']} of {memory['samples']['count']} "
        f"(threshold {memory['threshold']['value']:.3f} finds {100 * sum(recall) / len(recall):.0f} % of planted ones)"
    )
    return lines


def _patients(clips: ClipSet) -> int:
    return len({(record.dataset, record.group) for record in clips.records})


def _describe_split(clips: ClipSet) -> dict[str, int]:
    return {"clips": len(clips.records), "patients": _patients(clips), "windows": len(clips)}


def _describe_samples(requests: Sequence[GenerationRequest], settings: EvaluationConfig) -> dict[str, Any]:
    names = [request.label for request in requests]
    first = requests[0]
    return {
        "count": len(requests),
        "per_label": {name: names.count(name) for name in dict.fromkeys(names)},
        "num_inference_steps": first.num_inference_steps,
        "guidance_scale": first.guidance_scale,
        "sampler": first.sampler,
        "first_seed": first.seed,
        "dtype": settings.dtype,
    }


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    return {"device": name, "torch": torch.__version__}


def _warnings(figures: dict[str, Any]) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    for name, split in figures["data"]["splits"].items():
        if split["patients"] < 5:
            noun = "patient" if split["patients"] == 1 else "patients"
            found.append(
                f"The {name} split has {split['patients']} {noun}: its intervals say what other clips of the same "
                "might have given, nothing about other patients."
            )
    count = figures["samples"]["count"]
    if count < FEW_SAMPLES:
        found.append(
            f"{count} generated clips are few: distances are far higher than with more of them, and comparable only "
            "with those of as many."
        )
    return found
