"""Two GPUs train as one does: over NCCL, in pieces or whole, compiled or not.

Float32 sums are rounded in another order (1e-3 after eight steps of AdamW); bfloat16 and fused operations round more
(5e-2). The denoiser has no dropout, whose masks differ between processes on GPUs.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="clips are read by PyAV")
from training.config import override
from training.recipes import recipe
from training.runs import load_result, train_autoencoder, train_denoiser

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.filterwarnings(r"ignore:::torch\."),
]

GPU = torch.device("cuda", 0)
DEADLINE_S = 280
SETTINGS = ["loop.steps=8", "loop.log_every=1", "loop.checkpoint_every=100", "loop.evaluate_every=100"]


def _load_worker() -> ModuleType:
    path = Path(__file__).parent.with_name("integration") / "training_worker.py"
    spec = importlib.util.spec_from_file_location("training_worker", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses_of(run: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, an autoencoder, and a denoiser trained by one GPU."""
    root = tmp_path_factory.mktemp("training")
    worker = _load_worker()
    table = worker.write_clips(root / "clips")
    train_autoencoder(
        override(recipe("autoencoder_tiny"), SETTINGS), root / "autoencoder", table=table, perceptual=None, device=GPU
    )
    train_denoiser(
        override(recipe("denoiser_tiny"), SETTINGS), root / "denoiser",
        table=table, autoencoder=root / "autoencoder", device=GPU,
    )  # fmt: skip
    return root


def train_on_two(folder: Path, out: str, part: str, *settings: str) -> Path:
    values = [part for value in (*SETTINGS, *settings) for part in ("--set", value)]
    options = ["--autoencoder", str(folder / "autoencoder")] if part == "denoiser" else []
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training.cli",
         part, f"{part}_tiny", "--data", str(folder / "clips" / "clips.csv"), "--out", str(folder / out), *options,
         "--device", "cuda", *values],
        env=os.environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder / out


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("precision", "is_compiled"), [("fp32", False), ("bf16", True)])
def test_two_gpus_do_what_one_does(folder: Path, strategy: str, precision: str, is_compiled: bool) -> None:
    settings = [
        f"loop.distributed={strategy}",
        f"loop.precision={precision}",
        f"loop.compile={str(is_compiled).lower()}",
    ]
    run = train_on_two(folder, f"denoiser-{strategy}-{precision}", "denoiser", *settings)
    bound = 1e-3 if precision == "fp32" else 5e-2
    np.testing.assert_allclose(losses_of(run), losses_of(folder / "denoiser"), rtol=bound)
    ours, theirs = (load_result(made, part="denoiser").about["metrics"] for made in (run, folder / "denoiser"))
    assert ours == pytest.approx(theirs, rel=bound)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_train_an_autoencoder_with_its_discriminator(folder: Path, strategy: str) -> None:
    settings = [f"loop.distributed={strategy}", "loop.precision=bf16", "loop.compile=true", "loop.batch_size=4",
                "autoencoder_loss.adversarial=0.1"]  # fmt: skip
    run = train_on_two(folder, f"autoencoder-{strategy}", "autoencoder", *settings)
    assert np.isfinite(losses_of(run)).all()
    assert losses_of(run)[-1] < losses_of(run)[0]
