"""Latents in a prepared cache are those that a run would make, and are never taken for those of another autoencoder."""

import dataclasses
from pathlib import Path

import pytest
import torch

from medsora.models.autoencoder import VideoAutoencoder
from training.data.cached_latents import cached_latents, latents_key, store_latents
from training.data.latents import encode_windows
from training.prepare.cache import open_cache
from training.prepare.config import PrepareConfig
from training.prepare.pipeline import prepare
from training.recipes import recipe
from training.runs import load_split

CPU = torch.device("cpu")
TINY = recipe("denoiser_tiny")


@pytest.fixture(scope="module")
def cache(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "cache"
    prepare(table, out, PrepareConfig(height=32, width=32, excluded_labels=("uncertain",)))
    return out


def test_the_same_latents_as_encoded_for_a_run(cache: Path) -> None:
    torch.manual_seed(0)
    coder = VideoAutoencoder(TINY.model.require_autoencoder()).eval().requires_grad_(False)
    data = dataclasses.replace(TINY.data, window_step=9)
    record = store_latents(cache, coder, autoencoder_sha256="one", data=data, device=CPU, batch_size=4)
    assert record.key == latents_key("one", data)
    for split in ("train", "test"):
        clips = load_split(cache, data, TINY.model, split, device=CPU)
        has_flips = split == "train"
        stored = cached_latents(open_cache(cache), clips, autoencoder_sha256="one", data=data, has_flips=has_flips)
        assert stored is not None
        made = encode_windows(coder, clips, has_flips=has_flips, batch_size=64)
        torch.testing.assert_close(stored.latents, made.latents, rtol=1e-2, atol=1e-3)
        assert torch.equal(stored.conditions, made.conditions)
        for digest, changed in (("other", data), ("one", dataclasses.replace(data, target_fps=4.0))):
            assert (
                cached_latents(open_cache(cache), clips, autoencoder_sha256=digest, data=changed, has_flips=has_flips)
                is None
            )
