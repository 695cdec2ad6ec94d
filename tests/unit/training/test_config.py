"""Recipes and overrides: complete, strict, and free of torch."""

import dataclasses
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

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
        ("data.num_frames=6", "must be a multiple of 8"),
        ("data.width=72", "data.width of 16 for patches of 2"),
        ("denoiser_loss.clean_prefixes=1", "must be in"),
        ("autoencoder_loss.adversarial=-1", "below 0"),
        ("autoencoder_loss.discriminator_frames=0", "at least 1"),
        ("autoencoder_loss.adversarial_start_step=-1", "at least 0"),
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


def test_base_is_what_the_paper_trained() -> None:
    config = recipe("denoiser_base")
    assert (config.model.denoiser.prediction, config.model.denoiser.depth) == ("noise", 12)
    assert (config.optimizer.learning_rate, config.optimizer.schedule, config.optimizer.weight_decay) == (
        1e-4, "constant", 0.0
    )  # fmt: skip
    assert (config.alignment.kind, config.alignment.weight, config.alignment.margin) == ("paper", 0.1, 0.01)
    assert 0.5 ** (1 / config.loop.ema_half_lives[0]) == pytest.approx(0.9999, abs=1e-7)


def test_flow_and_ddpm_differ_in_the_objective_alone() -> None:
    flow, noise = recipe("denoiser_small"), recipe("denoiser_small_ddpm")
    changed = {line.split(":")[0] for line in differences(flow, noise)}
    assert changed == {
        "recipe", "model.denoiser.prediction", "model.denoiser.out_channels", "denoiser_loss.clean_prefixes",
        "denoiser_loss.time_mean",
    }  # fmt: skip


def documented_commands() -> list[tuple[str, str, list[str]]]:
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    found = []
    for line in text.splitlines():
        words = shlex.split(line) if line.startswith("medsora-train ") else []
        if len(words) > 2 and words[1] in ("autoencoder", "denoiser"):
            found.append((words[1], words[2], [b for a, b in pairwise(words) if a == "--set"]))
    return found


@pytest.mark.parametrize(("part", "name", "assignments"), documented_commands())
def test_documented_commands_are_recipes_with_fields_that_exist(part: str, name: str, assignments: list[str]) -> None:
    config = override(recipe(name), assignments)
    assert config.part == part
    for assignment in assignments:
        assert any(line.startswith(assignment.partition("=")[0]) for line in differences(recipe(name), config))


def test_every_ablation_is_documented() -> None:
    words = {assignment for _, _, assignments in documented_commands() for assignment in assignments}
    assert {
        "alignment.kind=none", "alignment.kind=paper", "model.denoiser.scan_order=released",
        "model.denoiser.temporal_directions=1", "model.autoencoder.has_frequency_compensation=false",
    } <= words  # fmt: skip
    assert "denoiser_small_ddpm" in {name for _, name, _ in documented_commands()}


def test_configuration_and_command_line_load_no_torch() -> None:
    code = "import sys, training.cli, training.recipes, training.data.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
