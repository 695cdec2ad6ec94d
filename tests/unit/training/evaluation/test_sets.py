"""The sets that are compared: how labels are shared out, and which windows belong to which."""

import dataclasses
from pathlib import Path

import pytest
import torch

from medsora.pipeline import VideoPipeline
from training.data.clips import ClipSet
from training.errors import TrainingError
from training.evaluation.config import EvaluationConfig
from training.evaluation.sets import allocate_labels, collect_sets, cut_windows, evenly, windows_of
from training.recipes import recipe
from training.runs import load_split

DATA = dataclasses.replace(recipe("denoiser_tiny").data, excluded_labels=("uncertain", "viral"))


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> VideoPipeline:
    return VideoPipeline.from_checkpoint(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def splits(pipeline: VideoPipeline, table: Path) -> dict[str, ClipSet]:
    device = torch.device("cpu")
    return {name: load_split(table, DATA, pipeline.config, name, device=device) for name in ("train", "test")}


def test_labels_are_shared_out_exactly() -> None:
    assert allocate_labels([70, 29, 1], 10) == [6, 3, 1]
    assert allocate_labels([1, 1, 1], 8) in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert sum(allocate_labels([5000, 800, 1200, 77, 212, 106], 512)) == 512
    assert min(allocate_labels([5000, 1, 1], 5)) == 1


def test_samples_follow_the_training_labels(pipeline: VideoPipeline, splits: dict[str, ClipSet]) -> None:
    settings = EvaluationConfig(num_samples=6, batch_size=4, num_inference_steps=1, seed=7)
    sets, requests = collect_sets(pipeline, splits, settings, lambda text: None)
    assert [request.seed for request in requests] == list(range(7, 13))
    assert {request.num_inference_steps for request in requests} == {1}
    wanted = ["regular-convex", "covid-convex"]
    assert [request.label for request in requests] == [wanted[index] for index in sets["samples"].labels.tolist()]
    in_training = (splits["train"].conditions[:, 0] == 0).float().mean()
    assert (sets["samples"].labels == 0).float().mean() == pytest.approx(float(in_training), abs=0.1)
    assert torch.equal(sets["train"].labels, sets["samples"].labels)  # the same mix
    assert torch.equal(sets["test"].labels, splits["test"].conditions[:, 0])
    assert len(sets["train"].clips) == 6
    covid = (splits["train"].conditions[:, 0] == 1).nonzero()[:, 0]
    few = sets["train"].clips[sets["train"].labels == 1]
    assert torch.equal(few[0], cut_windows(splits["train"], covid[:1])[0])
    assert torch.equal(few[-1], cut_windows(splits["train"], covid[-1:])[0])


def test_a_checkpoint_of_other_labels_is_refused(pipeline: VideoPipeline, splits: dict[str, ClipSet]) -> None:
    strange = {
        name: dataclasses.replace(clips, conditions=torch.full_like(clips.conditions, 9))
        for name, clips in splits.items()
    }
    with pytest.raises(TrainingError, match="no training clip has a label of tiny: regular-convex, covid-convex"):
        collect_sets(pipeline, strange, EvaluationConfig(num_samples=2), lambda text: None)


def test_a_part_of_the_windows_is_cut_alike(splits: dict[str, ClipSet]) -> None:
    clips = splits["train"]
    chosen = evenly(clips, 4)
    assert (chosen[0], chosen[-1]) == (0, len(clips) - 1)
    part = windows_of(clips, chosen)
    assert len(part) == 4
    assert torch.equal(cut_windows(part, torch.arange(4)), cut_windows(clips, chosen))
    assert torch.equal(evenly(clips, 10_000), torch.arange(len(clips)))
