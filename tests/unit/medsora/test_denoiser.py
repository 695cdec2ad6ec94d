"""The denoiser as a whole."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from medsora.models.denoiser import Denoiser
from medsora.presets import DENOISERS


def lively(**changes: object) -> Denoiser:
    """A tiny denoiser whose zero-initialised parts are random, so that everything reaches the output."""
    model = Denoiser(replace(DENOISERS["tiny"], condition_sizes=(3, 2), **changes))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_untrained_network_predicts_nothing() -> None:
    model = Denoiser(replace(DENOISERS["tiny"], condition_sizes=(3,)))
    velocity = model(torch.randn(2, 4, 4, 8, 8), torch.rand(2, 4), torch.tensor([[0], [3]]))
    assert torch.equal(velocity, torch.zeros(2, 4, 4, 8, 8))


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 8, 8), (6, 6, 10)])
def test_takes_any_number_of_frames_and_any_grid(shape: tuple[int, int, int]) -> None:
    model = lively()
    latents = torch.randn(2, 4, *shape)
    velocity = model(latents, torch.rand(2, shape[0]), torch.tensor([[0, 1], [3, 2]]))
    assert velocity.shape == latents.shape
    assert torch.isfinite(velocity).all()


def test_clips_of_a_batch_do_not_touch_each_other() -> None:
    model, t = lively(), torch.rand(3, 4)
    latents, condition = torch.randn(3, 4, 4, 8, 8), torch.tensor([[0, 0], [1, 1], [3, 2]])
    together = model(latents, t, condition)
    for b in range(3):
        alone = model(latents[b : b + 1], t[b : b + 1], condition[b : b + 1])
        assert torch.allclose(together[b : b + 1], alone, atol=1e-4)


def test_condition_and_each_frames_time_matter() -> None:
    model, latents = lively(), torch.randn(1, 4, 4, 8, 8)
    t, condition = torch.full((1, 4), 0.5), torch.tensor([[0, 0]])
    base = model(latents, t, condition)
    assert not torch.allclose(base, model(latents, t, torch.tensor([[1, 0]])))
    assert not torch.allclose(base, model(latents, t, torch.tensor([[0, 2]])))
    for frame in range(4):
        other = t.clone()
        other[0, frame] = 0
        assert not torch.allclose(base, model(latents, other, condition))


@pytest.mark.parametrize("backend", ["dual", "chunked", "reference"])
def test_back_ends_agree(backend: str) -> None:
    model, latents, t = lively(), torch.randn(1, 4, 4, 8, 8), torch.rand(1, 4)
    condition = torch.tensor([[2, 1]])
    expected = model(latents, t, condition)
    model.backend = backend
    assert torch.allclose(model(latents, t, condition), expected, atol=1e-4)


def test_every_parameter_learns() -> None:
    model = lively(modulation_rank=4).train()
    model(torch.randn(2, 4, 4, 8, 8), torch.rand(2, 4), torch.tensor([[0, 1], [3, 2]])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_blocks_rotate_through_the_eight_spirals() -> None:
    model = Denoiser(replace(DENOISERS["tiny"], depth=10))
    assert [block.spatial.spiral for block in model.blocks] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]  # type: ignore[union-attr]


def test_base_has_the_published_number_of_parameters() -> None:
    # 86,466,304 counts the fixed 64 x 512 position embedding, which here is computed, not stored
    with torch.device("meta"):
        model = Denoiser(DENOISERS["base"])
    assert sum(p.numel() for p in model.parameters()) + 64 * 512 == 86_466_304


def test_compiled_equals_eager() -> None:
    model, latents, t = lively(), torch.randn(2, 4, 4, 8, 8), torch.rand(2, 4)
    condition = torch.tensor([[0, 1], [3, 2]])
    # aot_eager traces the whole network without graph breaks, and needs no C++ compiler
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(latents, t, condition), model(latents, t, condition), atol=1e-5)
