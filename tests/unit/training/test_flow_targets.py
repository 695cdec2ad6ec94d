"""Targets of alignment: every pair once, the right pairs for each latent frame, a cache that knows what it is of."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from medsora.video_io import from_uint8
from training.data.clips import ClipSet
from training.flow_targets import FlowTargets, load_or_measure, measure_windows, pairs_of_windows

CPU = torch.device("cpu")


def clip_set() -> ClipSet:
    """Two clips, one of them taken at every second frame: windows of 8 frames, 8x8 pixels."""
    generator = torch.Generator().manual_seed(0)
    return ClipSet(
        records=(),
        num_frames=8,
        frames=torch.randint(0, 256, (30, 8, 8, 3), dtype=torch.uint8, generator=generator),
        starts=torch.tensor([0, 1, 2, 12, 13, 14]),
        strides=torch.tensor([1, 1, 1, 2, 2, 2]),
        clips=torch.tensor([0, 0, 0, 1, 1, 1]),
        conditions=torch.zeros(6, 1, dtype=torch.int64),
    )


def left_half_change(first: Tensor, second: Tensor) -> Tensor:
    """Stands in for a network: what changes in the left and the right half. (n 3 1 2)"""
    return (second - first).unflatten(3, (2, 4)).mean(dim=(2, 4))[:, :, None]


def test_pairs_that_windows_share_are_one() -> None:
    clips = clip_set()
    different, of_windows = pairs_of_windows(clips)
    assert len(different) == 9 + 15  # begin at 0 to 8, and at 12 to 26
    assert of_windows.shape == (6, 7)
    assert different[of_windows[0]].tolist() == [[n, n + 1] for n in range(7)]
    assert different[of_windows[4]].tolist() == [[n, n + 2] for n in range(13, 27, 2)]
    assert torch.equal(of_windows[0, 1:], of_windows[1, :-1])


def test_a_latent_frame_has_the_mean_of_the_pairs_that_begin_in_it() -> None:
    clips, seen = clip_set(), []

    def measure(first: Tensor, second: Tensor) -> Tensor:
        seen.append(len(first))
        return left_half_change(first, second)

    targets = measure_windows(clips, measure, has_flips=True, is_standardised=False, batch_size=5)
    assert sum(seen) == 2 * 24
    assert max(seen) == 5
    assert len(targets) == 12
    indices = torch.tensor([0, 4, 7])  # two windows, and the second one mirrored
    found = targets.gather(indices)
    assert found.shape == (3, 3, 2, 1, 2)
    for row, (window, is_flipped) in enumerate([(0, False), (4, False), (1, True)]):
        video = from_uint8(clips.gather(torch.tensor([window]), torch.tensor([is_flipped])))[0].transpose(0, 1)
        changes = left_half_change(video[:-1], video[1:])
        expected = torch.stack([changes[:4].mean(0), changes[4:].mean(0)], dim=1)
        torch.testing.assert_close(found[row], expected, atol=2e-3, rtol=2e-3)
    mirrored, plain = targets.gather(torch.tensor([6])), targets.gather(torch.tensor([0]))
    torch.testing.assert_close(mirrored.flip(-1), plain, atol=2e-3, rtol=2e-3)


def test_standardised_channels_have_mean_0_and_deviation_1() -> None:
    def measure(first: Tensor, second: Tensor) -> Tensor:
        return left_half_change(first, second) * torch.tensor([1.0, 50.0, 0.01])[:, None, None] + 7.0

    features = measure_windows(
        clip_set(), measure, has_flips=False, is_standardised=True, batch_size=4
    ).features.float()
    torch.testing.assert_close(features.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(features.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-2, rtol=0)


def test_the_cache_is_used_only_for_what_it_was_made_from(tmp_path: Path) -> None:
    made: list[str] = []

    def load(key: str) -> FlowTargets:
        def make() -> FlowTargets:
            made.append(key)
            return FlowTargets(
                features=torch.full((3, 2, 1, 1), len(made), dtype=torch.float16), pairs=torch.tensor([[0, 2]])
            )

        return load_or_measure(tmp_path / "run" / "flow.safetensors", key=key, device=CPU, make=make)

    assert load("a").features.mean() == 1
    again = load("a")
    assert made == ["a"]
    assert again.features.mean() == 1
    assert again.pairs.tolist() == [[0, 2]]
    assert load("b").features.mean() == 2
    (tmp_path / "run" / "flow.safetensors").write_bytes(b"damaged")
    assert load("b").features.mean() == 3
    assert made == ["a", "b", "b"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["flow.safetensors"]


@pytest.mark.parametrize("num_frames", [8, 16])
def test_there_is_a_target_for_every_latent_frame(num_frames: int) -> None:
    targets = FlowTargets(
        features=torch.randn(20, 4, 2, 2).half(), pairs=torch.arange(num_frames - 1)[None].expand(3, -1)
    )
    assert targets.gather(torch.tensor([0, 2])).shape == (2, 4, num_frames // 4, 2, 2)
