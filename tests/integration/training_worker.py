"""What torchrun starts for ``test_training_processes``: one of the scenarios below in each of several processes.

``python training_worker.py FOLDER SCENARIO...``. Loaded by the test too, which runs the same tasks in one process.
"""

import csv
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medsora.video_io import write_mp4
from training.alignment import AlignmentFiles
from training.config import TrainConfig, override
from training.data.manifest import COLUMNS
from training.distributed import Processes, Share, join
from training.errors import NonFiniteError
from training.flow import Raft
from training.recipes import recipe
from training.runs import train_autoencoder, train_denoiser
from training.trainer import train

CPU = torch.device("cpu")
STEPS = 8
LOOP = (f"loop.steps={STEPS}", "loop.log_every=1", "loop.checkpoint_every=100", "loop.evaluate_every=100",
        "loop.batch_size=4", "loop.ema_half_lives=[6.5, 2]")  # fmt: skip


def toy_config() -> TrainConfig:
    return override(recipe("autoencoder_tiny"), [*LOOP, "loop.batch_size=16"])


def autoencoder_config(strategy: str = "auto") -> TrainConfig:
    adversarial = ["autoencoder_loss.adversarial=0.1", "autoencoder_loss.discriminator_channels=4"]
    settings = [*LOOP, *adversarial, "model.autoencoder.dropout=0.2", f"loop.distributed={strategy}"]
    return override(recipe("autoencoder_tiny"), settings)


def denoiser_config(strategy: str = "auto") -> TrainConfig:
    aligned = ["alignment.kind=raft", "alignment.block=0"]
    settings = [*LOOP, *aligned, "model.autoencoder.dropout=0.2", f"loop.distributed={strategy}"]
    return override(recipe("denoiser_tiny"), settings)


def alignment_files(folder: Path) -> AlignmentFiles:
    """Random weights of RAFT's layout, written by the test before any process starts."""
    path = folder / "raft.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        save_file(Raft().state_dict(), path)
    return AlignmentFiles(raft=path)


class Toy:
    """Fits a line under batch norm and dropout, beside a critic that has a term of its own."""

    def __init__(self, *, poisoned_rank: int | None = None) -> None:
        torch.manual_seed(7)
        self.model: nn.Module = nn.Sequential(
            # a bias before batch norm has no gradient but rounding, which AdamW would blow up
            nn.Linear(4, 8, bias=False),
            nn.BatchNorm1d(8),
            nn.Dropout(0.3),
            nn.Linear(8, 1),
        )
        self.critic = nn.Linear(1, 1)
        self.share, self.poisoned_rank = Share(), poisoned_rank

    def auxiliary(self) -> dict[str, nn.Module]:
        return {"critic": self.critic}

    def take_share(self, share: Share) -> None:
        self.share = share

    def compile(self) -> None:
        raise AssertionError("not asked for")

    def describe(self, generator: torch.Generator) -> list[str]:
        return [f"row {row}" for row in self.share.of(torch.arange(16)).tolist()]

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.share.of(torch.randn(16, 4, generator=generator))
        answer = self.model(x)
        loss = (answer[:, 0] - x.sum(dim=1)).square().mean()
        if step >= 1:  # a critic that starts late has no gradients and no optimizer state before
            loss = loss + (self.critic(answer.detach()) - 1).square().mean()
        if step == 3 and self.share.rank == self.poisoned_rank:
            loss = loss * float("nan")
        return loss, {"mse": loss.detach()}

    def evaluate(self, average: nn.Module) -> dict[str, float]:
        return {"norm": float(sum(parameter.square().sum() for parameter in average.parameters()))}

    def show(self, average: nn.Module) -> dict[str, np.ndarray]:
        return {}


def write_clips(root: Path) -> Path:
    """A table of four clips of smooth drifting noise, 32x32 pixels."""
    root.mkdir()
    rng = np.random.default_rng(0)
    with (root / "clips.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for index, (label, split) in enumerate([("regular", "train"), ("covid", "train"), ("viral", "train"),
                                                ("regular", "test")]):  # fmt: skip
            field = rng.uniform(0, 255, (32, 96))
            for axis in (0, 1, 1):
                field = (field + np.roll(field, 1, axis) + np.roll(field, 2, axis)) / 3
            grey = np.stack([np.roll(field, step, axis=1)[:, :32] for step in range(40)]).astype(np.uint8)
            write_mp4(root / f"{index}.mp4", np.repeat(grey[..., None], 3, axis=-1), fps=8.0, crf=8)
            writer.writerow(
                [f"{index}.mp4", "lung_ultrasound", label, "convex", split, f"patient{index}", 40, 8.0, "",
                 "CC BY 4.0", "made for tests", "Author"]
            )  # fmt: skip
    return root / "clips.csv"


def quiet(text: str) -> None:
    """Progress is not looked at here."""


def toy(folder: Path, processes: Processes) -> None:
    for strategy in ("ddp", "fsdp"):
        same = with_strategy(processes, strategy)
        train(Toy(), toy_config(), folder / f"toy-{strategy}", device=CPU, processes=same, report=quiet)


def poisoned(folder: Path, processes: Processes) -> None:
    """The second process alone has a loss that is not finite; what each says of it is written down."""
    try:
        train(Toy(poisoned_rank=1), toy_config(), folder / "poisoned", device=CPU, processes=processes, report=quiet)
    except NonFiniteError as error:
        text = json.dumps({"step": error.step, "batch": error.batch})
        (folder / f"poisoned-{processes.share.rank}.json").write_text(text, encoding="utf-8")


def stopped(folder: Path, processes: Processes) -> None:
    """The second process alone gets a SIGTERM, in its fifth step."""

    class Interrupted(Toy):
        def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            if step == 4 and self.share.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(generator, step)

    result = train(
        Interrupted(), toy_config(), folder / "stopped",
        device=CPU, processes=with_strategy(processes, "fsdp"), report=quiet,
    )  # fmt: skip
    text = json.dumps({"step": result.step, "signal": result.signal_number})
    (folder / f"stopped-{processes.share.rank}.json").write_text(text, encoding="utf-8")


def networks(folder: Path, processes: Processes) -> None:
    """Both parts of the model, from clips to results."""
    table = folder / "clips" / "clips.csv"
    for strategy in ("ddp", "fsdp"):
        same = with_strategy(processes, strategy)
        train_autoencoder(
            autoencoder_config(strategy), folder / f"autoencoder-{strategy}", table=table,
            device=CPU, processes=same, report=quiet,
        )  # fmt: skip
        train_denoiser(
            denoiser_config(strategy), folder / f"denoiser-{strategy}", table=table,
            autoencoder=folder / "autoencoder-one", alignment_files=alignment_files(folder), device=CPU,
            processes=same, report=quiet,
        )  # fmt: skip


def with_strategy(processes: Processes, strategy: str) -> Processes:
    return Processes(processes.device, share=processes.share, strategy=strategy)


def main() -> None:
    torch.set_num_threads(1)
    folder, *scenarios = sys.argv[1:]
    with join(CPU, "auto") as processes:
        for name in scenarios:
            {"toy": toy, "poisoned": poisoned, "stopped": stopped, "networks": networks}[name](Path(folder), processes)


if __name__ == "__main__":
    main()
