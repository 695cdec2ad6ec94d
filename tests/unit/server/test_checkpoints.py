"""What the server offers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from medsora.checkpoint import load_checkpoint, save_checkpoint
from medsora.errors import CheckpointError
from server.checkpoints import Catalogue


def test_a_checkpoint_that_makes_no_video_is_not_served(tiny_checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(tiny_checkpoint)
    save_checkpoint(
        tmp_path,
        config=replace(loaded.config, autoencoder=None),
        autoencoder=None,
        denoiser=loaded.denoiser.state_dict(),
        manifest=loaded.manifest,
    )
    assert Catalogue.load([str(tiny_checkpoint)]).names == ("tiny",)
    with pytest.raises(CheckpointError, match="has no autoencoder: it makes latents"):
        Catalogue.load([str(tmp_path)])
