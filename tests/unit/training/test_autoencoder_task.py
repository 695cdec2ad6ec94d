"""The autoencoder's loss: its terms and weights, and the discriminator that comes in late."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medsora.models.autoencoder import VideoAutoencoder
from training.autoencoder_task import AutoencoderTask, adversarial_weight, draw_starts
from training.checkpointing import load_newest
from training.config import AutoencoderLossConfig, TrainConfig, override
from training.data.clips import ClipSet
from training.discriminator import PatchDiscriminator, cut_runs, scores_through_fixed_weights
from training.distributed import Share
from training.errors import TrainingError
from training.recipes import recipe
from training.trainer import train

CPU = torch.device("cpu")


def clip_set() -> ClipSet:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 3, 4, 4, generator=generator)
    frames = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear") * 255
    return ClipSet(
        records=(), num_frames=16, frames=frames.permute(0, 2, 3, 1).to(torch.uint8), starts=torch.arange(20),
        strides=torch.ones(20).long(), clips=torch.zeros(20).long(), conditions=torch.zeros(20, 2).long(),
    )  # fmt: skip


def task(*assignments: str, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None) -> AutoencoderTask:
    config = settings(*assignments)
    torch.manual_seed(0)
    model = VideoAutoencoder(config.model.require_autoencoder()).train()
    clips = clip_set()
    return AutoencoderTask(config, model, clips, clips, perceptual)


def settings(*assignments: str) -> TrainConfig:
    small = ["autoencoder_loss.discriminator_channels=8", "model.autoencoder.dropout=0", "loop.log_every=1000"]
    return override(recipe("autoencoder_tiny"), [*small, *assignments])


def a_loss(chosen: AutoencoderTask, step: int = 0) -> tuple[Tensor, dict[str, float]]:
    torch.manual_seed(0)
    loss, parts = chosen.loss(torch.Generator().manual_seed(5), step)
    return loss, {name: part.item() for name, part in parts.items()}


def test_terms_add_up_by_their_weights() -> None:
    chosen = task(
        "autoencoder_loss.l1=0.5", "autoencoder_loss.mse=3", "autoencoder_loss.focal_frequency=2",
        "autoencoder_loss.kl=0.25", "autoencoder_loss.perceptual=4",
        perceptual=lambda frames, target: (frames - target).abs().mean() * 0 + 7,
    )  # fmt: skip
    loss, parts = a_loss(chosen)
    assert set(parts) == {"l1", "mse", "focal_frequency", "kl", "perceptual"}
    expected = 0.5 * parts["l1"] + 3 * parts["mse"] + 2 * parts["focal_frequency"] + 0.25 * parts["kl"] + 4 * 7
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert chosen.auxiliary() == {}


def test_the_perceptual_term_sees_some_frames_of_every_clip() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def remember(frames: Tensor, target: Tensor) -> Tensor:
        seen.append((frames, target))
        return (frames - target).square().mean()

    chosen = task("autoencoder_loss.perceptual=1", "autoencoder_loss.perceptual_frames=3", perceptual=remember)
    a_loss(chosen)
    frames, target = seen[0]
    assert frames.shape == target.shape == (2 * 3, 3, 32, 32)
    assert frames.requires_grad
    real = clip_set().frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    for frame in target:
        assert min(float((frame - other).abs().max()) for other in torch.cat([real, real.flip(-1)])) < 1e-5


def test_weights_are_asked_for() -> None:
    with pytest.raises(TrainingError, match="--squeezenet or --lpips"):
        task("autoencoder_loss.perceptual=1")


def test_the_adversarial_weight_rises_from_its_start() -> None:
    late = AutoencoderLossConfig(adversarial=0.2, adversarial_start_step=100, adversarial_ramp_steps=50)
    assert [adversarial_weight(late, step) for step in (0, 100, 125, 150, 900)] == [0, 0, 0.1, 0.2, 0.2]
    at_once = AutoencoderLossConfig(adversarial=0.2, adversarial_start_step=7, adversarial_ramp_steps=0)
    assert [adversarial_weight(at_once, step) for step in (6, 8)] == [0.0, 0.2]


ADVERSARIAL = ("autoencoder_loss.adversarial=0.5", "autoencoder_loss.adversarial_start_step=4",
               "autoencoder_loss.adversarial_ramp_steps=0")  # fmt: skip


def test_before_the_start_there_is_no_discriminator_to_be_seen() -> None:
    with_one, without = task(*ADVERSARIAL), task()
    loss, parts = a_loss(with_one, step=3)
    assert "discriminator" not in parts
    assert loss.item() == a_loss(without, step=3)[0].item()
    loss.backward()
    assert all(value.grad is None for value in with_one.auxiliary()["discriminator"].parameters())


def test_each_side_descends_its_own_term() -> None:
    """The discriminator gets the gradient of its loss alone, the autoencoder none of it."""
    chosen = task(*ADVERSARIAL)
    discriminator = chosen.auxiliary()["discriminator"]
    loss, parts = a_loss(chosen, step=10)
    assert {"adversarial", "discriminator"} <= set(parts)
    loss.backward()
    its = [value.grad.clone() for value in discriminator.parameters()]
    ours = [value.grad.clone() for value in chosen.model.parameters() if value.grad is not None]
    assert its[0].any()

    doubled = task(*ADVERSARIAL, "autoencoder_loss.adversarial=1.0")
    a_loss(doubled, step=10)[0].backward()
    again = [value.grad for value in doubled.auxiliary()["discriminator"].parameters()]
    for gradient, other in zip(its, again, strict=True):
        torch.testing.assert_close(gradient, other)  # our weight does not move the discriminator
    plain = task()
    a_loss(plain, step=10)[0].backward()
    theirs = [value.grad for value in plain.model.parameters() if value.grad is not None]
    twice = [value.grad for value in doubled.model.parameters() if value.grad is not None]
    changes = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    assert max(changes) > 1e-4
    for mine, bare, double in zip(ours, theirs, twice, strict=True):  # linear in the weight: nothing else is in it
        torch.testing.assert_close(double - bare, 2 * (mine - bare), atol=1e-4, rtol=1e-2)


def test_the_parts_of_the_shares_make_the_whole() -> None:
    config = ("model.autoencoder.has_frequency_compensation=false", "loop.batch_size=4", *ADVERSARIAL)
    whole, _ = a_loss(task(*config), step=10)
    losses = []
    for rank in range(2):
        chosen = task(*config)
        chosen.take_share(Share(rank, 2))
        losses.append(a_loss(chosen, step=10)[0])
    # the focal weight is of each frame by itself, so that every term is a mean over clips
    torch.testing.assert_close(torch.stack(losses).mean(), whole, atol=1e-5, rtol=1e-4)


def test_a_discriminator_learns_to_tell_blurred_runs_from_sharp_ones() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(num_frames=2, channels=8)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=3e-3)
    for _ in range(60):
        sharp = torch.rand(8, 3, 2, 32, 32) * 2 - 1
        blurred = torch.nn.functional.avg_pool3d(sharp, (1, 3, 3), 1, (0, 1, 1))
        real, coded = discriminator(sharp), discriminator(blurred)
        loss = torch.relu(1 - real).mean() + torch.relu(1 + coded).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (real - coded).mean().item() > 0.5
    assert loss.item() < 1.2


def test_fixed_weights_pass_the_gradient_on_and_take_none() -> None:
    discriminator = PatchDiscriminator(num_frames=2, channels=4).eval()
    runs = torch.rand(1, 3, 2, 32, 32, requires_grad=True)
    scores = scores_through_fixed_weights(discriminator, runs)
    torch.testing.assert_close(scores, discriminator(runs))
    scores.sum().backward()
    assert runs.grad is not None
    assert runs.grad.any()
    assert all(value.grad is None for value in discriminator.parameters())


def test_scores_are_computed_in_float32_whatever_the_loop_does() -> None:
    discriminator, runs = PatchDiscriminator(num_frames=2, channels=4).eval(), torch.rand(1, 3, 2, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = discriminator(runs)
    assert torch.equal(scores, discriminator(runs))


def test_runs_are_consecutive_frames() -> None:
    video = torch.arange(2 * 10.0).reshape(2, 1, 10, 1, 1)
    runs = cut_runs(video, torch.tensor([0, 6]), 4)
    assert runs.flatten(1).tolist() == [[0, 1, 2, 3], [16, 17, 18, 19]]


@pytest.mark.slow
def test_a_run_with_a_discriminator_resumes_to_the_bit(tmp_path: Path) -> None:
    def run(folder: str, steps: int, *, is_resuming: bool = False) -> dict[str, Tensor]:
        chosen = task(*ADVERSARIAL, f"loop.steps={steps}", "loop.checkpoint_every=1000", "optimizer.schedule=constant")
        train(chosen, chosen.config, tmp_path / folder, device=CPU, is_resuming=is_resuming, report=lambda text: None)
        state = load_newest(tmp_path / folder / "checkpoints", report=pytest.fail)
        assert state is not None
        assert state.step == steps
        found: dict[str, Tensor] = {}
        for group in (state.modules, state.optimizers):
            assert set(group) == {"model", "discriminator"}
            found |= {f"{name}/{key}": value for name, part in group.items() for key, value in part.items()}
        return found

    whole = run("whole", 9)
    run("cut", 6)
    resumed = run("cut", 9, is_resuming=True)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("length", [1, 4, 16])
def test_the_discriminator_sees_the_frames_at_both_ends_as_often_as_others(length: int) -> None:
    starts = draw_starts(20_000, length, 16, torch.Generator().manual_seed(0))
    assert 0 <= int(starts.min()) <= int(starts.max()) <= 16 - length
    seen = torch.zeros(16)
    for start, times in zip(*starts.unique(return_counts=True), strict=True):
        seen[start : start + length] += times
    # an end is seen by all runs that were moved to it, and so a little more often than the least seen frame
    assert float(seen[[0, -1]].min() / seen.median()) > 0.9
    assert float(seen.max() / seen.min()) < 2.1
