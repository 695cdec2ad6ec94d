"""Recipes and overrides: complete, strict, and free of torch."""

import dataclasses
import subprocess
import sys

import pytest

from medsora.jsonconfig import from_json, to_json
from training.config import TrainConfig, differences, override
from training.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name: str) -> None:
    config = recipe(name)
    assert config.recipe == name
    assert from_json(TrainConfig, to_json(config), where="x") == config


def test_overrides_replace_values() -> None:
    config = override(
        recipe("autoencoder_small"),
        ["loop.batch_size=8", "loop.precision=fp32", "optimizer.betas=[0.5, 0.9]", "model.autoencoder.dropout=0.1"],
    )
    assert (config.loop.batch_size, config.loop.precision) == (8, "fp32")
    assert config.optimizer.betas == (0.5, 0.9)
    assert config.model.autoencoder.dropout == 0.1


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("loop.batch_size", "must look like"),
        ("loop.batchsize=3", "'loop.batchsize' is no field of the recipe; here there are: batch_size"),
        ("nothing.at=3", "here there are"),
        ("loop.batch_size=many", "recipe.loop.batch_size must be int"),
        ("loop.batch_size=0", "at least 1"),
        ("loop.precision=fp8", "must be one of"),
        ("loop.clock=seconds", "needs loop.total_seconds"),
        ("data.sampling_exponent=2", "must be 0 to 1"),
        ("loop.keep_checkpoints=1", "at least 2"),
    ],
)
def test_bad_overrides_say_why(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(recipe("denoiser_small"), [assignment])


def test_unknown_recipes_are_listed() -> None:
    with pytest.raises(ValueError, match="denoiser_small"):
        recipe("denoiser_huge")


def test_only_bookkeeping_may_change_between_legs() -> None:
    old = recipe("denoiser_tiny")
    longer = dataclasses.replace(old, loop=dataclasses.replace(old.loop, steps=99, log_every=1))
    assert differences(old, longer) == []
    other = override(old, ["optimizer.learning_rate=0.5", "data.dataset=x"])
    assert differences(old, other) == [
        "data.dataset: 'lung_ultrasound' -> 'x'", "optimizer.learning_rate: 0.002 -> 0.5"
    ]  # fmt: skip


def test_configuration_and_command_line_load_no_torch() -> None:
    code = "import sys, training.cli, training.recipes, training.data.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
