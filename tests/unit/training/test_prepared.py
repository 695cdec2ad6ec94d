"""A prepared cache trains just as the table it was made from."""

import dataclasses
from pathlib import Path

import pytest
import torch

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.pipeline import prepare
from training.recipes import recipe
from training.runs import load_split

CPU = torch.device("cpu")


def test_the_same_windows_as_from_the_table(table: Path, tmp_path: Path) -> None:
    config = PrepareConfig(height=32, width=32, cuts="given", excluded_labels=("uncertain",))
    prepare(table, tmp_path / "cache", config)
    tiny = recipe("denoiser_tiny")
    for split in ("train", "test"):
        ours = load_split(tmp_path / "cache", tiny.data, tiny.model, split, device=CPU, step=1)
        theirs = load_split(table, tiny.data, tiny.model, split, device=CPU, step=1)
        for name in ("frames", "starts", "strides", "clips", "conditions"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for mine, other in zip(ours.records, theirs.records, strict=True):
            assert dataclasses.replace(mine, labels={}) == other


def test_what_does_not_fit_is_refused(table: Path, tmp_path: Path) -> None:
    prepare(table, tmp_path / "cache", PrepareConfig(height=32, width=48))
    tiny = recipe("denoiser_tiny")
    with pytest.raises(DataError, match="holds frames of 48x32 pixels, the recipe wants 32x32"):
        load_split(tmp_path / "cache", tiny.data, tiny.model, "train", device=CPU)
    data = dataclasses.replace(tiny.data, width=48, condition_columns={"finding": "grade", "probe": "probe"})
    with pytest.raises(DataError, match="has no column 'grade'; there are: label, probe"):
        load_split(tmp_path / "cache", data, tiny.model, "train", device=CPU)
