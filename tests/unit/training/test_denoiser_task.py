"""The denoiser's loss for either prediction, with prefixes and without, and a whole run with alignment."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from medsora.models.denoiser import Denoiser
from medsora.pipeline import VideoPipeline
from medsora.request import resolve_request
from training.alignment import AlignmentFiles
from training.config import TrainConfig, override
from training.data.clips import ClipSet
from training.data.latents import LatentSet
from training.denoiser_task import DenoiserTask
from training.distributed import Share
from training.errors import TrainingError
from training.export import Sampling, export_checkpoint
from training.flow import Raft
from training.recipes import recipe
from training.runs import load_result, train_autoencoder, train_denoiser

CPU = torch.device("cpu")
NOISE = ("model.denoiser.prediction=noise", "model.denoiser.out_channels=8", "denoiser_loss.clean_prefixes=0")


def task(*assignments: str) -> DenoiserTask:
    config = override(recipe("denoiser_tiny"), assignments)
    torch.manual_seed(0)
    model = Denoiser(config.model.denoiser).train()
    torch.nn.init.normal_(model.patch_out.weight, std=0.02)  # at the start the prediction is 0 whatever is asked
    generator = torch.Generator().manual_seed(2)
    data = LatentSet(
        latents=torch.randn(6, 4, 4, 4, 4, generator=generator).half(), conditions=torch.zeros(6, 2, dtype=torch.int64)
    )
    clips = ClipSet(
        records=(), num_frames=16, frames=torch.zeros(16, 8, 8, 3, dtype=torch.uint8), starts=torch.zeros(3).long(),
        strides=torch.ones(3).long(), clips=torch.zeros(3).long(), conditions=torch.zeros(3, 2).long(),
    )  # fmt: skip
    return DenoiserTask(config, model, data, data, clips=clips)


class Recorder(torch.nn.Module):
    """Answers with what is right, and remembers what it was asked."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.asked = channels, []

    def forward(self, noisy: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.asked.append((noisy, t, condition))
        return noisy.new_zeros(len(noisy), self.channels, *noisy.shape[2:])


def test_prefixes_are_given_clean_as_often_as_the_recipe_says() -> None:
    chosen = task("loop.batch_size=400", "denoiser_loss.clean_prefixes=0.4", "denoiser_loss.label_dropout=0.25")
    indices = chosen._draw(torch.Generator().manual_seed(1))
    drawn = chosen._sample(
        chosen.train, indices, torch.Generator().manual_seed(2), label_dropout=0.25, clean_prefixes=0.4
    )
    known = ~drawn.is_noisy
    assert abs(float(known.any(dim=1).float().mean()) - 0.4) < 0.07
    assert torch.equal(drawn.t == 0, known)
    clean = chosen.train.latents[indices].float()
    assert torch.equal(drawn.noisy.transpose(1, 2)[known], clean.transpose(1, 2)[known])
    assert abs(float((drawn.condition[:, 0] == 4).float().mean()) - 0.25) < 0.07


@pytest.mark.parametrize("assignments", [("denoiser_loss.clean_prefixes=0.5",), NOISE])
def test_the_parts_of_the_shares_make_the_whole(assignments: tuple[str, ...]) -> None:
    whole, _ = task(*assignments).loss(torch.Generator().manual_seed(0), 0)
    losses = []
    for rank in range(2):
        chosen = task(*assignments)
        chosen.take_share(Share(rank, 2))
        losses.append(chosen.loss(torch.Generator().manual_seed(0), 0)[0])
    assert losses[0] != losses[1]
    torch.testing.assert_close(torch.stack(losses).mean(), whole)


def test_noise_is_predicted_with_its_variance() -> None:
    chosen = task(*NOISE)
    loss, parts = chosen.loss(torch.Generator().manual_seed(0), 0)
    assert set(parts) == {"noise_mse", "variance_bound"}
    assert loss.item() == pytest.approx(sum(part.item() for part in parts.values()))
    assert not any(part.requires_grad for part in parts.values())
    asked = Recorder(8)
    figures = chosen.evaluate(asked)
    assert set(figures) == {f"{split}_{part}" for split in ("train", "test") for part in parts}
    assert figures["test_noise_mse"] == pytest.approx(1.0, abs=0.1)  # of an answer of 0
    for _, t, _ in asked.asked:
        torch.testing.assert_close(t * 1000, (t * 1000).round(), atol=1e-3, rtol=0)
        assert torch.equal(t, t[:, :1].expand_as(t))


def test_figures_are_of_whole_clips_and_the_same_every_time() -> None:
    chosen, asked = task("denoiser_loss.clean_prefixes=0.9", "denoiser_loss.label_dropout=0.9"), Recorder(4)
    figures = chosen.evaluate(asked)
    assert set(figures) == {"train_velocity_mse", "test_velocity_mse"}
    assert figures == chosen.evaluate(asked)
    for _, t, condition in asked.asked:
        assert (t > 0).all()
        assert (condition == 0).all()


@pytest.mark.parametrize("assignments", [("denoiser_loss.clean_prefixes=0.3",), NOISE])
def test_either_loss_falls(assignments: tuple[str, ...]) -> None:
    chosen = task("loop.batch_size=6", *assignments)
    before = chosen.evaluate(chosen.model.eval())
    chosen.model.train()
    optimizer = torch.optim.AdamW(chosen.model.parameters(), lr=3e-3)
    for step in range(40):
        chosen.loss(torch.Generator().manual_seed(step), step)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = chosen.evaluate(chosen.model.eval())
    for name, value in after.items():
        assert value < 0.97 * before[name], name


def test_prefixes_are_refused_where_noise_is_predicted() -> None:
    with pytest.raises(ValueError, match=r"denoiser_loss.clean_prefixes is for model.denoiser.prediction=velocity"):
        task(*NOISE[:2], "denoiser_loss.clean_prefixes=0.1")


def config(*assignments: str) -> TrainConfig:
    return override(recipe("denoiser_tiny"), ["loop.steps=6", "loop.log_every=2", *assignments])


@pytest.fixture(scope="module")
def autoencoder_run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "autoencoder"
    settings = override(recipe("autoencoder_tiny"), ["loop.steps=2"])
    train_autoencoder(settings, folder, table=table, device=CPU, report=lambda text: None)
    return folder


@pytest.mark.slow
def test_a_whole_run_with_alignment_measures_once_and_goes_on(
    autoencoder_run: Path, table: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    raft = tmp_path / "raft.pth"
    torch.save({f"module.{name}": value for name, value in Raft().state_dict().items()}, raft)
    said: list[str] = []
    options = {
        "table": table, "autoencoder": autoencoder_run, "device": CPU, "report": said.append,
        "alignment_files": AlignmentFiles(raft=raft),
    }  # fmt: skip
    aligned = ("alignment.kind=raft", "alignment.block=0", "alignment.stop_step=5")
    train_denoiser(config(*aligned), tmp_path / "d", **options)  # type: ignore[arg-type]
    assert any("alignment 0." in line or "alignment 1." in line for line in said)
    cache = tmp_path / "d" / "flow-features.safetensors"
    stamp = cache.stat().st_mtime_ns
    train_denoiser(config(*aligned, "loop.steps=8"), tmp_path / "d", is_resuming=True, **options)  # type: ignore[arg-type]
    assert cache.stat().st_mtime_ns == stamp
    # what is exported is the denoiser as it always was
    names = set(load_result(tmp_path / "d", part="denoiser").weights)
    assert names == set(Denoiser(config().model.denoiser).state_dict())
    train_denoiser(config(), tmp_path / "plain", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "plain" / "flow-features.safetensors").exists()


def test_a_denoiser_of_noise_becomes_a_checkpoint_that_samples(
    autoencoder_run: Path, table: Path, tmp_path: Path
) -> None:
    train_denoiser(
        config(*NOISE), tmp_path / "run", table=table, autoencoder=autoencoder_run, device=CPU,
        report=lambda text: None,
    )  # fmt: skip
    runs = {"autoencoder_run": autoencoder_run, "denoiser_run": tmp_path / "run", "name": "noise"}
    with pytest.raises(TrainingError, match="predicts noise is sampled by ddim or ddpm, not euler"):
        export_checkpoint(tmp_path / "c", **runs, sampling=Sampling(sampler="euler"))
    made = export_checkpoint(tmp_path / "c", **runs, sampling=Sampling(num_inference_steps=(1, 3, 250), sampler="ddpm"))
    assert made.limits.samplers == ("ddpm", "ddim")
    assert made.limits.num_inference_steps == (2, 3, 250)
    pipeline = VideoPipeline.from_checkpoint(tmp_path / "c", device="cpu")
    (clip,) = pipeline([resolve_request(pipeline.manifest, label="regular-convex", seed=1)])
    assert clip.shape == (16, 32, 32, 3)
