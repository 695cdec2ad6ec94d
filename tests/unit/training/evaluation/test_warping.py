"""Warping error of clips whose motion is known: shifts, a step in brightness, a square that hides what is behind it."""

import math

import pytest
import torch

from training.evaluation.warping import Flow, visible_pixels, warp, warping_statistics


def constant_flow(right: float, down: float) -> Flow:
    """Flow of clips that move so far from the first to the second image; sees which way by the order of a marker."""

    def flow(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        # the corner pixel counts frames: it tells in which order the two are
        sign = torch.sign(second[:, 0, 0, 0] - first[:, 0, 0, 0])[:, None, None, None]
        return sign * torch.tensor([right, down])[:, None, None].expand(len(first), 2, *first.shape[2:])

    return flow


def drifting(frames: int, *, step: int = 2, rise: int = 0) -> torch.Tensor:
    """A clip that moves right by ``step`` and gets brighter by ``rise`` a frame: (1 f 24 24 3) uint8."""
    texture = torch.randint(20, 150, (24, 64, 3), generator=torch.Generator().manual_seed(0))
    clip = torch.stack([texture[:, 40 - step * i : 64 - step * i] + rise * i for i in range(frames)])
    clip[:, 0, 0] = torch.arange(frames)[:, None]
    return clip[None].to(torch.uint8)


def test_warp_reads_where_the_flow_points() -> None:
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4)
    flow[:, 0] = 1
    assert torch.allclose(warp(image, flow)[0, 0, 1], torch.tensor([5.0, 6.0, 7.0, 7.0]))  # the border goes on
    flow[:, 0], flow[:, 1] = 0.5, 1
    assert torch.allclose(warp(image, flow)[0, 0, 0, :3], torch.tensor([4.5, 5.5, 6.5]))


def test_motion_alone_has_no_error() -> None:
    found = warping_statistics(constant_flow(2, 0), drifting(5))
    # the marker's own pixel, read at its new place, is all that differs
    assert found["warping_error"].item() < 0.4
    assert found["flow_px"].item() == pytest.approx(2)
    assert found["visible_share"].item() == pytest.approx(22 / 24, abs=1e-6)
    still = warping_statistics(constant_flow(0, 0), drifting(5))
    assert still["warping_error"].item() > 20  # the same clip without its flow


def test_what_motion_does_not_explain_is_counted_in_grey_levels() -> None:
    found = warping_statistics(constant_flow(2, 0), drifting(4, rise=7))
    assert found["warping_error"].item() == pytest.approx(7, abs=0.4)


def test_hidden_pixels_are_left_out() -> None:
    # a square moves right by 4 over a still ground; the flow is known both ways
    forward, backward = torch.zeros(1, 2, 20, 20), torch.zeros(1, 2, 20, 20)
    forward[:, 0, 6:12, 4:10] = 4
    backward[:, 0, 6:12, 8:14] = -4
    visible = visible_pixels(forward, backward)[0]
    assert visible[6:12, 4:10].all()  # the square itself
    assert not visible[6:12, 10:14].any()  # ground that it comes to hide
    assert visible[:6].all()
    assert visible[12:].all()
    assert not visible_pixels(torch.full((1, 2, 4, 4), 9.0), torch.full((1, 2, 4, 4), -9.0)).any()  # out of the image


def test_a_clip_without_a_visible_pixel_has_no_error() -> None:
    found = warping_statistics(constant_flow(30, 0), torch.cat([drifting(3), drifting(3)]))
    assert all(math.isnan(value) for value in found["warping_error"].tolist())
    assert found["visible_share"].tolist() == [0, 0]
