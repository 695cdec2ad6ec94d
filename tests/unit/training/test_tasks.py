"""What both tasks say and show of themselves: the clips of a batch by name, and videos to look at."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from medsora.models.autoencoder import VideoAutoencoder
from medsora.models.denoiser import Denoiser
from medsora.video_io import read_video
from training.config import override
from training.data.clips import ClipSet
from training.data.latents import LatentSet
from training.distributed import Share
from training.recipes import recipe
from training.runs import load_split
from training.tasks import AutoencoderTask, DenoiserTask, Task

CPU = torch.device("cpu")
SETTINGS = ["loop.batch_size=6"]
NAME = re.compile(r"(?P<file>\S+) frames (?P<first>\d+) to (?P<last>\d+)(?: by (?P<stride>\d+))?(?P<flip>, mirrored)?")


def autoencoder_task(table: Path) -> AutoencoderTask:
    config = override(recipe("autoencoder_tiny"), SETTINGS)
    splits = [load_split(table, config.data, config.model, name, device=CPU) for name in ("train", "test")]
    torch.manual_seed(0)
    return AutoencoderTask(config, VideoAutoencoder(config.model.require_autoencoder()), splits[0], splits[1], None)


def denoiser_task(table: Path) -> DenoiserTask:
    config = override(recipe("denoiser_tiny"), SETTINGS)
    clips = load_split(table, config.data, config.model, "train", device=CPU)
    torch.manual_seed(0)
    model, coder = Denoiser(config.model.denoiser), VideoAutoencoder(config.model.require_autoencoder()).eval()
    both = LatentSet(
        latents=torch.randn(2 * len(clips), 4, 4, 4, 4).half(), conditions=clips.conditions.repeat(2, 1)
    )  # mirrored windows after the others
    return DenoiserTask(config, model, both, both, clips=clips, autoencoder=coder)


def pixels_of(name: str, root: Path) -> np.ndarray:
    """The window that a name speaks of, read from its file."""
    found = NAME.fullmatch(name)
    assert found is not None, name
    frames, _ = read_video(root / found["file"])
    window = frames[int(found["first"]) : int(found["last"]) + 1 : int(found["stride"] or 1)]
    return window[:, :, ::-1] if found["flip"] else window


def test_an_autoencoder_names_the_windows_that_it_is_given(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = autoencoder_task(table)
    given: list[Tensor] = []
    gather = ClipSet.gather
    monkeypatch.setattr(ClipSet, "gather", lambda *args: given.append(gather(*args)) or given[-1])
    task.loss(torch.Generator().manual_seed(4), 0)
    names = task.describe(torch.Generator().manual_seed(4))
    assert len(names) == 6
    assert len(given) == 1
    assert {", mirrored" in name for name in names} == {True, False}
    for name, window in zip(names, given[0].numpy(), strict=True):
        np.testing.assert_array_equal(pixels_of(name, table.parent), window)


def test_a_denoiser_names_the_windows_that_its_latents_are_of(table: Path) -> None:
    task = denoiser_task(table)
    names = task.describe(torch.Generator().manual_seed(4))
    indices = task._draw(torch.Generator().manual_seed(4)).tolist()
    assert {", mirrored" in name for name in names} == {True, False}
    for name, index in zip(names, indices, strict=True):
        windows = len(task.clips)
        window = task.clips.gather(torch.tensor([index % windows]), torch.tensor([index >= windows]))[0]
        np.testing.assert_array_equal(pixels_of(name, table.parent), window.numpy())


@pytest.mark.parametrize("make", [autoencoder_task, denoiser_task])
def test_shares_name_their_part_of_the_batch(make: type[Task], table: Path) -> None:
    task = make(table)
    whole = task.describe(torch.Generator().manual_seed(9))
    parts = []
    for rank in range(3):
        task.take_share(Share(rank, 3))
        parts.append(task.describe(torch.Generator().manual_seed(9)))
    assert [len(part) for part in parts] == [2, 2, 2]
    assert [name for part in parts for name in part] == whole


@pytest.mark.parametrize(("make", "width"), [(autoencoder_task, 64), (denoiser_task, 32)])
def test_what_is_shown_are_the_same_videos_every_time(make: type[Task], width: int, table: Path) -> None:
    task = make(table)
    shown = [task.show(task.model.eval()) for _ in range(2)]
    assert len(shown[0]) in (2, 4)  # the test split has two windows, the latents many
    for name, video in shown[0].items():
        assert video.shape == (16, 32, width, 3)
        assert video.dtype == np.uint8
        np.testing.assert_array_equal(video, shown[1][name])


def test_a_reconstruction_stands_beside_what_it_is_of(table: Path) -> None:
    task = autoencoder_task(table)
    first = task.show(task.model.eval())["real and reconstructed 0"]
    real = task.test.gather(torch.tensor([0]), torch.tensor([False]))[0].numpy()
    np.testing.assert_allclose(first[:, :, :32].astype(int), real, atol=1)


def test_a_denoiser_without_an_autoencoder_shows_nothing(table: Path) -> None:
    task = denoiser_task(table)
    task.autoencoder = None
    assert task.show(task.model.eval()) == {}
