"""What the report's tables hold: distances between sets, and one number a clip with its mean for each set."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from medsora.models.autoencoder import VideoAutoencoder
from medsora.video_io import from_uint8
from training.data.clips import index_batches
from training.evaluation.bootstrap import mean_interval, percentile_interval
from training.evaluation.config import EvaluationConfig
from training.evaluation.consistency import frame_consistency
from training.evaluation.frechet import Comparison, distance
from training.evaluation.inception_score import inception_score, resampled_scores, split_scores
from training.evaluation.networks import EvaluationNetworks
from training.evaluation.sets import ClipGroup, Report, subset_units, through_autoencoder
from training.evaluation.warping import warping_statistics
from training.metrics import high_frequency_energy, motion_statistics

__all__ = ["clip_figures", "frechet_distances", "inception_scores"]

COUNTS = {"samples": "samples", "train_windows": "train", "test_windows": "test"}


def frechet_distances(
    networks: EvaluationNetworks,
    autoencoder: VideoAutoencoder,
    sets: dict[str, ClipGroup],
    names: Sequence[str],
    settings: EvaluationConfig,
    report: Report,
) -> dict[str, Any]:
    """Distances between the sets, of all labels and of the labels that the test split has."""
    in_test = torch.unique(sets["test"].labels)
    scopes: dict[str, tuple[str, dict[str, Tensor]]] = {
        "all_labels": ("All labels", {key: torch.arange(len(group.labels)) for key, group in sets.items()})
    }
    rows = {key: torch.isin(group.labels, in_test[in_test >= 0]).nonzero()[:, 0] for key, group in sets.items()}
    is_part = any(len(rows[key]) < len(sets[key].labels) for key in rows)
    if is_part and min(len(indices) for indices in rows.values()) >= 2:
        kept = ", ".join(names[index] for index in in_test.tolist() if index >= 0)
        scopes["labels_of_the_test_split"] = (f"Labels that the test split has, alone ({kept})", rows)
    result: dict[str, Any] = {}
    for scope, (title, chosen) in scopes.items():
        result[scope] = {
            "title": title,
            **{key: len(chosen[name]) for key, name in COUNTS.items()},
            "train_units": str(subset_units(sets["train"].units, chosen["train"])),
            "test_units": str(subset_units(sets["test"].units, chosen["test"])),
            "metrics": {},
        }
    decoded = through_autoencoder(autoencoder, sets["test"].clips)
    for metric in networks.distance_metrics():
        report(f"  {metric.title}")
        features = {key: metric.extract(group.clips) for key, group in sets.items()}
        features["reconstruction"] = metric.extract(decoded)
        for scope, (_, chosen) in scopes.items():
            result[scope]["metrics"][metric.name] = {
                "title": metric.title,
                "ddof": metric.ddof,
                **_compare(features, sets, chosen, metric.ddof, settings),
            }
    return result


def _compare(
    features: dict[str, Tensor],
    sets: dict[str, ClipGroup],
    chosen: dict[str, Tensor],
    ddof: int,
    settings: EvaluationConfig,
) -> dict[str, Any]:
    part = {key: features[key][rows.to(features[key].device)] for key, rows in chosen.items()}
    part["reconstruction"] = features["reconstruction"][chosen["test"].to(features["test"].device)]
    weights = {
        key: ClipGroup(clips=part[key], labels=rows, units=subset_units(sets[key].units, rows)).weights(settings, salt)
        for salt, (key, rows) in enumerate(chosen.items())
    }
    pairs: dict[str, Any] = {}
    kept = {}
    draws = {}
    for first, second in (("samples", "test"), ("train", "test"), ("samples", "train")):
        name = f"{first}_to_{second}"
        if weights[first] is None and weights[second] is None:
            pairs[name] = {"value": distance(part[first], part[second], ddof=ddof)}
            continue
        comparison = Comparison(part[first], part[second], ddof=ddof)
        drawn = comparison.resample(weights[first], weights[second])
        pairs[name] = {"value": drawn.estimate, "interval": list(drawn.interval)}
        draws[name], kept[name] = drawn.centred, drawn.variance_kept
        if first == "samples" and weights["samples"] is not None:
            pairs[name]["interval_samples"] = list(comparison.resample(weights["samples"], None).interval)
    floor = pairs["train_to_test"]["value"]
    if floor > 0:
        over: dict[str, Any] = {"value": pairs["samples_to_test"]["value"] / floor}
        if len(draws) == 3 and float(draws["train_to_test"].min()) > 0:
            # the same test clips in both: what they have in common cancels
            ratio = draws["samples_to_test"] / draws["train_to_test"]
            over["interval"] = list(percentile_interval(ratio))
        pairs["samples_to_test"]["over_floor"] = over
    pairs["reconstruction_to_test"] = {"value": distance(part["reconstruction"], part["test"], ddof=ddof)}
    return {"pairs": pairs, "variance_in_the_plane_of_the_intervals": min(kept.values(), default=None)}


def inception_scores(
    probabilities: Callable[[Tensor], Tensor], sets: dict[str, ClipGroup], settings: EvaluationConfig
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for salt, (name, group) in enumerate(sets.items()):
        found = probabilities(group.clips)
        mean, std = split_scores(found)
        result[name] = {"value": inception_score(found), "splits_mean": mean, "splits_std": std}
        weights = group.weights(settings, salt)
        if weights is not None:
            values = resampled_scores(found, weights)
            result[name]["interval"] = list(percentile_interval(values, estimate=result[name]["value"]))
    return result


def clip_figures(
    networks: EvaluationNetworks, sets: dict[str, ClipGroup], names: Sequence[str], settings: EvaluationConfig
) -> dict[str, Any]:
    """One number a clip: means with intervals, of all labels and by label."""
    result: dict[str, Any] = {"all_labels": {}, "by_label": {name: {} for name in names}}
    for salt, (key, group) in enumerate(sets.items()):
        values = {name: found.double().cpu() for name, found in motion_statistics(group.clips).items()}
        values["fine_detail"] = _fine_detail(group.clips)
        values["frame_consistency_squeezenet"] = frame_consistency(networks.squeezenet.extract(group.clips)).cpu()
        if networks.clip is not None:
            values["frame_consistency_clip"] = frame_consistency(networks.clip.extract(group.clips)).cpu()
        if networks.flow is not None:
            values |= warping_statistics(networks.flow, group.clips)
        everything = torch.arange(len(group.labels))
        result["all_labels"][key] = _means(values, everything, group, settings, salt)
        for index, name in enumerate(names):
            rows = (group.labels == index).nonzero()[:, 0]
            if len(rows) > 0:
                result["by_label"][name][key] = _means(values, rows, group, settings, salt)
    return result


def _means(
    values: dict[str, Tensor], rows: Tensor, group: ClipGroup, settings: EvaluationConfig, salt: int
) -> dict[str, Any]:
    result: dict[str, Any] = {"count": len(rows)}
    for name, numbers in values.items():
        known = rows[numbers[rows].isfinite()]  # a clip without a visible pixel has no warping error
        if len(known) == 0:
            continue
        result[name] = {"value": float(numbers[known].mean())}
        if len(known) < len(rows):
            result[name]["left_out"] = len(rows) - len(known)
        part = ClipGroup(clips=group.clips, labels=known, units=subset_units(group.units, known))
        weights = part.weights(settings, salt)
        if weights is not None:
            result[name]["interval"] = list(mean_interval(numbers[known], weights))
    return result


def _fine_detail(clips: Tensor) -> Tensor:
    """Root-mean-square of what is finer than half the Nyquist frequency, in grey levels."""
    parts = []
    for rows in index_batches(len(clips), 32, clips.device):
        video = from_uint8(clips[rows])
        parts.append((high_frequency_energy(video) / video[0].numel()).sqrt() * 127.5)
    return torch.cat(parts).double().cpu()
