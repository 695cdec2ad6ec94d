"""Alignment with motion: which tokens, which gradients, what is compared, and that the loss falls."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsora.models.denoiser import Denoiser, modulate
from training.alignment import (
    AlignmentFiles,
    BlockTaps,
    ColourAlignment,
    MotionAlignment,
    alignment_weight,
    colour_features,
    layers_of_blocks,
    make_alignment,
    motion_features,
)
from training.config import AlignmentConfig, TrainConfig, override
from training.data.clips import ClipSet
from training.data.latents import LatentSet
from training.denoiser_task import DenoiserTask
from training.distributed import Share
from training.errors import TrainingError
from training.flow import Raft
from training.flow_targets import FlowTargets
from training.recipes import recipe
from training.squeezenet import SqueezeNet

CPU = torch.device("cpu")
WINDOWS, FRAMES, GRID = 6, 4, 2
TEACHER = 5
"""Channels of the targets of these tests."""


def settings(*assignments: str) -> TrainConfig:
    base = override(recipe("denoiser_tiny"), ["model.denoiser.depth=3", "alignment.kind=raft", "alignment.block=1"])
    return override(base, assignments)


def network(config: TrainConfig) -> Denoiser:
    """A denoiser in the middle of its training: at the start every block is the identity, which hides mistakes."""
    torch.manual_seed(0)
    model = Denoiser(config.model.denoiser)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modulation" in name or "patch_out" in name:
                value.normal_(std=0.1)
    return model.train()


def targets(channels: int = TEACHER) -> FlowTargets:
    generator = torch.Generator().manual_seed(1)
    pairs = torch.arange(WINDOWS * 15).reshape(WINDOWS, 15)
    features = torch.randn(len(pairs.flatten()), channels, GRID, GRID, generator=generator)
    return FlowTargets(features=features.half(), pairs=pairs)


def latents(config: TrainConfig) -> LatentSet:
    generator = torch.Generator().manual_seed(2)
    shape = (WINDOWS, config.model.denoiser.in_channels, FRAMES, 2 * GRID, 2 * GRID)
    return LatentSet(
        latents=torch.randn(shape, generator=generator).half(), conditions=torch.zeros(WINDOWS, 2, dtype=torch.int64)
    )


def some_clips() -> ClipSet:
    return ClipSet(
        records=(), num_frames=16, frames=torch.zeros(16, 8, 8, 3, dtype=torch.uint8), starts=torch.zeros(1).long(),
        strides=torch.ones(1).long(), clips=torch.zeros(1).long(), conditions=torch.zeros(1, 2).long(),
    )  # fmt: skip


def task(config: TrainConfig) -> DenoiserTask:
    model, data = network(config), latents(config)
    alignment = MotionAlignment(model, targets(), config.alignment)
    return DenoiserTask(config, model, data, data, clips=some_clips(), alignment=alignment)


def a_pass(model: Denoiser) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(3, model.config.in_channels, FRAMES, 2 * GRID, 2 * GRID, generator=generator)
    t = torch.rand(3, FRAMES, generator=generator)
    model(latent, t, torch.zeros(3, 2, dtype=torch.int64))
    return latent, t, torch.ones(3, FRAMES, dtype=torch.bool)


def test_tokens_are_those_between_spatial_and_temporal_mamba() -> None:
    model = network(settings())
    taps = BlockTaps(model, [1])
    latent, t, _ = a_pass(model)
    (found,) = taps.take()
    with torch.no_grad():
        x, embedding = model._embed(latent, t, torch.zeros(3, 2, dtype=torch.int64))
        x = model.blocks[0](x, embedding, model.backend)
        block = model.blocks[1]
        shift1, scale1, gate1, shift2, scale2, gate2, *_ = block.modulation(embedding)
        rows = modulate(block.norm1(x), shift1, scale1).flatten(0, 1).flatten(1, 2)
        x = x + gate1 * block.attention(rows).reshape(x.shape)
        x = x + gate2 * block.spatial(modulate(block.norm2(x), shift2, scale2), backend=model.backend)
    torch.testing.assert_close(found, x)


def test_nothing_is_kept_where_nobody_asks() -> None:
    model = network(settings())
    names = set(model.state_dict())
    taps = BlockTaps(model, [0, 2])
    a_pass(model)
    assert [tokens.shape for tokens in taps.take()] == [(3, FRAMES, GRID, GRID, 32)] * 2
    assert not hasattr(model.blocks[0].norm3, "tokens")  # it would hold on to the pass, and could not be copied
    model.eval()
    a_pass(model)
    assert not hasattr(model.blocks[0].norm3, "tokens")
    assert set(model.state_dict()) == names


def test_gradients_reach_what_is_before_the_aligned_tokens_and_nothing_after() -> None:
    model = network(settings())
    alignment = MotionAlignment(model, targets(), AlignmentConfig(kind="raft", block=1))
    _, t, is_noisy = a_pass(model)
    alignment.loss(torch.tensor([0, 3, 5]), t, is_noisy).backward()
    reached = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    before = ("patch_in.", "time_in.", "time_out.", "blocks.0.", "blocks.1.attention.", "blocks.1.spatial.",
              "blocks.1.norm1.", "blocks.1.norm2.", "blocks.1.modulation.")  # fmt: skip
    for name, value in model.named_parameters():
        if name.startswith("conditions."):
            continue  # one row of each table was used
        assert (name in reached) == name.startswith(before), name
        if not name.startswith(before):
            assert value.grad is None or not value.grad.any(), name
    # of the aligned block's nine modulations the three of temporal Mamba come later
    gradient = model.blocks[1].modulation.up.bias.grad.reshape(9, -1).abs().sum(dim=1)
    assert (gradient[:6] > 0).all()
    assert (gradient[6:] == 0).all()
    assert all(value.grad.any() for value in alignment.projector.parameters())


def train(chosen: DenoiserTask, steps: int, first: int = 0) -> list[dict[str, float]]:
    """As the loop does it, with one optimizer for each network."""
    modules = [chosen.model, *chosen.auxiliary().values()]
    optimizers = [torch.optim.AdamW(module.parameters(), lr=3e-3) for module in modules]
    history = []
    for step in range(first, first + steps):
        loss, parts = chosen.loss(torch.Generator().manual_seed(step), step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        history.append({name: float(value) for name, value in parts.items()} | {"loss": float(loss.detach())})
    return history


def test_the_alignment_loss_falls() -> None:
    history = [parts["alignment"] for parts in train(task(settings()), 50)]
    assert 0.8 < history[0] < 1.2  # tokens know nothing of these targets: a right angle
    assert sum(history[-10:]) / 10 < 0.6


def test_it_falls_in_the_denoiser_and_not_in_the_projector_alone() -> None:
    config = settings()
    chosen = task(config)
    chosen.auxiliary()["projector"].requires_grad_(False)
    history = [parts["alignment"] for parts in train(chosen, 50)]
    assert sum(history[-10:]) / 10 < history[0] - 0.2


def test_the_weight_counts_until_the_stop() -> None:
    config = settings("alignment.weight=0.3", "alignment.stop_step=5")
    assert [alignment_weight(config.alignment, step) for step in (0, 4, 5, 6)] == [0.3, 0.3, 0.0, 0.0]
    assert alignment_weight(replace(config.alignment, stop_step=None), 10**6) == 0.3
    assert alignment_weight(replace(config.alignment, kind="none"), 0) == 0.0
    chosen = task(config)
    before, after = train(chosen, 1, first=4)[0], train(chosen, 1, first=5)[0]
    assert before["loss"] == pytest.approx(before["velocity_mse"] + 0.3 * before["alignment"])
    assert after == {"velocity_mse": after["loss"], "loss": after["loss"]}
    assert not hasattr(chosen.model.blocks[1].norm3, "tokens")


def test_the_parts_of_the_shares_make_the_whole() -> None:
    config = settings("denoiser_loss.clean_prefixes=0.5")
    whole, _ = task(config).loss(torch.Generator().manual_seed(0), 0)
    losses = []
    for rank in range(2):
        chosen = task(config)
        chosen.take_share(Share(rank, 2))
        losses.append(chosen.loss(torch.Generator().manual_seed(0), 0)[0])
    torch.testing.assert_close(torch.stack(losses).mean(), whole)


@pytest.mark.parametrize("kind", [MotionAlignment, ColourAlignment])
def test_frames_that_were_given_do_not_count(kind: type[MotionAlignment] | type[ColourAlignment]) -> None:
    config = settings("alignment.margin=0")
    model = network(config)
    channels = TEACHER if kind is MotionAlignment else 3 * 32
    first, second = targets(channels), targets(channels)
    second.features[:8] = -3  # the pairs of the first two latent frames of window 0
    is_noisy = torch.tensor([[False, False, True, True], [True] * 4, [True] * 4])
    torch.manual_seed(0)
    alignment = kind(model, first, config.alignment)
    losses = []
    for chosen, known in ((first, is_noisy), (second, is_noisy), (second, torch.ones_like(is_noisy))):
        alignment.targets = chosen
        _, t, _ = a_pass(model)
        losses.append(alignment.loss(torch.tensor([0, 3, 5]), t, known).item())
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_projection_that_points_the_same_way_costs_nothing() -> None:
    model, wanted = network(settings()), targets()
    alignment = MotionAlignment(model, wanted, AlignmentConfig(kind="raft", block=1))
    indices = torch.tensor([0, 3, 5])
    for factor, expected in ((2.5, 0.0), (-1.0, 2.0)):
        answer = factor * wanted.gather(indices)
        alignment.projector = Constant(answer)
        _, t, is_noisy = a_pass(model)
        assert alignment.loss(indices, t, is_noisy).item() == pytest.approx(expected, abs=1e-5)


class Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, tokens: Tensor) -> Tensor:
        return self.value


def test_the_papers_loss_is_one_minus_pearson_weighted_by_time_above_a_margin() -> None:
    """Against torch's own correlation, vector by vector."""
    config = settings("alignment.kind=paper", "alignment.margin=0.002")
    model, wanted = network(config), targets(3 * 32)
    alignment, taps = ColourAlignment(model, wanted, config.alignment), BlockTaps(model, range(3))
    indices = torch.tensor([0, 3, 5])
    _, t, is_noisy = a_pass(model)
    blocks = [norm.tokens.detach() for norm in taps._norms]
    t = torch.tensor([0.001, 0.04, 0.8])[:, None].expand(-1, FRAMES)
    found = alignment.loss(indices, t, is_noisy)
    teacher = wanted.gather(indices).unflatten(1, (3, 32))
    expected = 0.0
    for clip in range(3):
        total = 0.0
        for block in range(3):
            for frame in range(FRAMES):
                for row in range(GRID):
                    for column in range(GRID):
                        pair = [blocks[block][clip, frame, row, column], teacher[clip, block, :, frame, row, column]]
                        total += 1 - float(torch.corrcoef(torch.stack(pair))[0, 1])
        mean = total / (3 * FRAMES * GRID * GRID)
        expected += max(0.0, mean / (float(t[clip, 0]) * 1000 + 1) - 0.002) / 3
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_the_papers_alignment_reaches_every_block() -> None:
    config = settings("alignment.kind=paper")
    model = network(config)
    alignment = ColourAlignment(model, targets(3 * 32), config.alignment)
    _, t, is_noisy = a_pass(model)
    alignment.loss(torch.tensor([0, 3, 5]), t / 1000, is_noisy).backward()
    for block in model.blocks:
        assert block.spatial.mamba.in_proj.weight.grad.any()
    assert model.blocks[1].temporal.mamba.in_proj.weight.grad.any()
    assert model.blocks[2].temporal.mamba.in_proj.weight.grad is None
    assert model.patch_out.weight.grad is None


def test_blocks_are_spread_over_layers() -> None:
    assert layers_of_blocks(12, 12) == list(range(12))
    assert layers_of_blocks(6, 12) == [0, 2, 4, 6, 8, 10]
    assert layers_of_blocks(24, 12) == [block // 2 for block in range(24)]
    assert layers_of_blocks(6, 8) == [0, 1, 3, 4, 5, 7]


def small_raft() -> Raft:
    torch.manual_seed(0)
    return Raft(num_updates=2).eval().requires_grad_(False)


def test_motion_features_are_rafts_state_by_patch() -> None:
    raft, frames = small_raft(), torch.rand(2, 2, 3, 32, 48) * 2 - 1
    found = motion_features(raft, (2, 3))(*frames)
    state = raft.flow_and_motion(*frames)[1]
    assert found.shape == (2, 96, 2, 3)
    torch.testing.assert_close(found[:, :, 1, 2], state[:, :, 2:4, 4:6].mean(dim=(2, 3)))


class TinyTransformer(nn.Module):
    """Stands in for DINO: a layer is a linear map of 8x8 patches. Three layers of 12 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, stride=8)
        self.deeper = nn.Linear(12, 12)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return tokens, self.deeper(tokens), self.deeper(self.deeper(tokens))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dino") / "dino.pt"
    save_as_torchscript(TinyTransformer(), path)
    return path


def save_as_torchscript(module: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the format, which published networks have
        torch.jit.trace(module.eval(), torch.zeros(1, 3, 32, 32)).save(str(path))


def test_colour_features_are_one_target_a_block_in_the_denoisers_width() -> None:
    def layers(images: Tensor) -> list[Tensor]:
        assert images.min() >= 0
        assert images.max() <= 1
        coarse = F.avg_pool2d(images, 8)
        return [coarse, torch.cat([coarse, 3 * coarse + 1], dim=1)]  # layers of 3 and 6 channels

    raft, frames = small_raft(), torch.rand(2, 2, 3, 32, 32) * 2 - 1
    found = colour_features(raft, layers, depth=2, hidden_size=24, grid=(2, 2))(*frames)
    assert found.shape == (2, 48, 2, 2)
    # vectors are normed, then pooled and stretched: of the first layer each channel covers eight
    vectors = layers(torch.zeros(1, 3, 32, 32))[0]
    assert vectors.shape == (1, 3, 4, 4)
    first = found[:, :24].unflatten(1, (3, 8))
    middle = first[:, :, 3:5].mean(dim=2)
    assert float(middle.mean(dim=1).abs().max()) < 1e-4
    assert float(found.abs().max()) < 3


def raft_file(folder: Path) -> Path:
    path = folder / "raft.pth"
    torch.save({f"module.{name}": value for name, value in small_raft().state_dict().items()}, path)
    return path


def moving_clips(num_windows: int = 2) -> ClipSet:
    generator = torch.Generator().manual_seed(0)
    return replace(
        some_clips(),
        frames=torch.randint(0, 256, (16 + num_windows, 32, 32, 3), dtype=torch.uint8, generator=generator),
        starts=torch.arange(num_windows), strides=torch.ones(num_windows).long(), clips=torch.zeros(num_windows).long(),
        conditions=torch.zeros(num_windows, 2).long(),
    )  # fmt: skip


def test_files_are_asked_for_by_their_options(tmp_path: Path, dino: Path) -> None:
    config = settings()
    model = network(config)

    def make(config: TrainConfig, **files: Path) -> object:
        return make_alignment(
            config, model, moving_clips(), files=AlignmentFiles(**files), cache=tmp_path / "c", device=CPU
        )

    assert make(override(config, ["alignment.kind=none"])) is None
    with pytest.raises(TrainingError, match="--raft"):
        make(config)
    with pytest.raises(TrainingError, match="--dino"):
        make(override(config, ["alignment.kind=paper"]), raft=raft_file(tmp_path))
    with pytest.raises(TrainingError, match="cannot be read"):
        make(config, raft=dino)


@pytest.mark.parametrize("image_file", ["dino", "squeezenet"])
def test_the_papers_targets_from_files(
    tmp_path: Path, dino: Path, image_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("alignment.kind=paper")
    model = network(config)
    squeezenet = tmp_path / "squeezenet.pth"
    torch.save({name.removeprefix("fires.").replace(".conv", "/conv", 1) if "fires" in name else name: value
                for name, value in SqueezeNet().state_dict().items()}, squeezenet)  # fmt: skip
    files = AlignmentFiles(raft=raft_file(tmp_path), dino=dino if image_file == "dino" else None, squeezenet=squeezenet)

    def make() -> ColourAlignment:
        alignment = make_alignment(
            config, model, moving_clips(), files=files, cache=tmp_path / "flow.safetensors", device=CPU
        )
        assert isinstance(alignment, ColourAlignment)
        return alignment

    alignment = make()
    assert alignment.targets.features.shape == (2 * 16, 3 * 32, 2, 2)
    assert len(alignment.targets) == 4  # two windows, and mirrored
    assert alignment.targets.features.isfinite().all()
    monkeypatch.setattr("training.alignment.measure_windows", refuse)
    assert torch.equal(make().targets.features, alignment.targets.features)
    if image_file == "dino":  # another network, other targets
        with pytest.raises(AssertionError):
            make_alignment(
                config, model, moving_clips(), files=replace(files, dino=None),
                cache=tmp_path / "flow.safetensors", device=CPU,
            )  # fmt: skip


def refuse(*args: object, **options: object) -> FlowTargets:
    raise AssertionError("measured again")


def test_a_transformer_with_other_tokens_is_refused(tmp_path: Path) -> None:
    class WithClassToken(TinyTransformer):
        def forward(self, images: Tensor) -> Tensor:
            tokens = self.patches(images).flatten(2).transpose(1, 2)
            return torch.cat([tokens[:, :1], tokens], dim=1)[None]

    path = tmp_path / "dino.pt"
    save_as_torchscript(WithClassToken(), path)
    config = settings("alignment.kind=paper")
    with pytest.raises(TrainingError, match=r"layer of shape \(\d+, 17, 12\).*without the class token"):
        make_alignment(
            config, network(config), moving_clips(), files=AlignmentFiles(raft=raft_file(tmp_path), dino=path),
            cache=tmp_path / "c", device=CPU,
        )  # fmt: skip


def test_a_task_wants_the_alignment_that_its_recipe_names() -> None:
    config = settings()
    data = latents(config)
    with pytest.raises(TrainingError, match=r"alignment.kind is raft"):
        DenoiserTask(config, network(config), data, data, clips=some_clips())


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["alignment.kind=dino"], "must be one of"),
        (["alignment.weight=0"], "alignment.kind=none"),
        (["alignment.block=3"], "depth, 3, got 3"),
        (["alignment.stop_step=0"], "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(assignments: Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(*assignments)
