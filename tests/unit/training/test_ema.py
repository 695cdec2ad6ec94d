"""The averages follow the weights by their formula, each with its own half-life."""

import pytest
import torch
from torch import nn

from training.ema import Averages


def test_each_average_follows_the_formula() -> None:
    model = nn.Linear(3, 2)
    averages = Averages(model, (10.0, 2.5))
    assert averages.names == ("ema-10", "ema-2.5")
    expected = {half_life: model.weight.detach().clone() for half_life in (10.0, 2.5)}
    for step in range(200):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        averages.update(step)
        for half_life, value in expected.items():
            kept = 0.5 ** (1 / min(half_life, (step + 1) / 2))
            expected[half_life] = kept * value + (1 - kept) * model.weight.detach()
    for half_life, value in expected.items():
        torch.testing.assert_close(averages.whole(f"ema-{half_life:g}")["weight"], value)


def test_after_a_half_life_a_weight_counts_half() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averages = Averages(model, (100.0,))
    nn.init.ones_(model.weight)
    for _ in range(100):
        averages.update(100_000)  # long after the start
    torch.testing.assert_close(averages.whole("ema-100")["weight"], torch.full((1, 1), 0.5), rtol=1e-5, atol=0)


def test_what_was_saved_comes_back_and_something_else_does_not() -> None:
    model = nn.Linear(3, 2)
    averages, others = (Averages(model, (10.0, 2.5)) for _ in range(2))
    nn.init.ones_(model.weight)
    averages.update(0)
    saved = {name: averages.whole(name) for name in averages.names}
    assert not torch.equal(others.whole("ema-10")["weight"], saved["ema-10"]["weight"])
    others.load(saved)
    for name in others.names:
        assert torch.equal(others.whole(name)["weight"], saved[name]["weight"])
    with pytest.raises(KeyError, match=r"ema-2\.5"):
        others.load({"ema-10": saved["ema-10"]})
