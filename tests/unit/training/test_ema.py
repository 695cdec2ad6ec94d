"""The average follows the weights by its formula and copies batch-norm statistics."""

import torch
from torch import nn

from training.ema import ExponentialMovingAverage


def test_average_follows_the_formula() -> None:
    model = nn.Linear(3, 2)
    average = ExponentialMovingAverage(model, decay=0.9)
    expected = model.weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.model.weight, expected)
    assert not average.model.weight.requires_grad


def test_buffers_are_copied_and_the_copy_is_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4))
    average = ExponentialMovingAverage(model, decay=0.99)
    model.train()(torch.randn(8, 4, 3, 3) * 5 + 2)
    average.update(0)
    assert torch.equal(average.model[0].running_mean, model[0].running_mean)
    assert torch.equal(average.model[0].num_batches_tracked, torch.tensor(1))
    assert not average.model.training
    assert model.training
