"""Features of motion in a prepared cache are those that a run would measure, of its own network and windows alone."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.data.cached_flow import cached_flow, flow_key, store_flow
from training.flow_targets import measure_windows
from training.prepare.cache import open_cache
from training.prepare.config import PrepareConfig
from training.prepare.pipeline import prepare
from training.recipes import recipe
from training.runs import load_split

CPU = torch.device("cpu")
TINY = recipe("denoiser_tiny")
GRID = (2, 2)


def change(first: Tensor, second: Tensor) -> Tensor:
    """Stands in for a network: how much each quarter and each colour changes. (n 3 2 2)"""
    return torch.nn.functional.adaptive_avg_pool2d(second - first, GRID)


@pytest.mark.parametrize("has_flips", [True, False])
def test_the_same_targets_as_measured_for_a_run(table: Path, tmp_path: Path, has_flips: bool) -> None:
    prepare(table, tmp_path / "cache", PrepareConfig(height=32, width=32, excluded_labels=("uncertain",)))
    data = dataclasses.replace(TINY.data, has_flips=has_flips)
    clips = load_split(tmp_path / "cache", data, TINY.model, "train", device=CPU)
    about = {"network_sha256": "abc", "grid": GRID, "batch_size": 50}
    assert cached_flow(open_cache(tmp_path / "cache"), clips, data=data, **about) is None
    record = store_flow(tmp_path / "cache", change, data=data, device=CPU, **about)
    assert record.key == flow_key("abc", GRID, data)
    cache = open_cache(tmp_path / "cache")
    stored = cached_flow(cache, clips, data=data, **about)
    made = measure_windows(clips, change, has_flips=has_flips, is_standardised=True, batch_size=50)
    assert stored is not None
    assert torch.equal(stored.pairs, made.pairs)
    torch.testing.assert_close(stored.features, made.features, rtol=5e-3, atol=5e-3)
    assert cached_flow(cache, clips, data=data, **(about | {"network_sha256": "def"})) is None
    assert cached_flow(cache, clips, data=dataclasses.replace(data, target_fps=4.0), **about) is None
    # every other window only: those are other pairs, and measured anew
    fewer = dataclasses.replace(data, window_step=2 * data.window_step)
    assert cached_flow(cache, clips, data=fewer, **about) is None
