"""Frame consistency of features with known angles."""

import pytest
import torch

from training.evaluation.consistency import frame_consistency


def test_consistency_is_the_cosine_between_neighbours() -> None:
    still = torch.rand(1, 1, 9).expand(1, 5, 9)
    turning = torch.eye(9)[:5][None]
    half = torch.stack([torch.eye(4)[0], torch.eye(4)[0] + torch.eye(4)[1]])[None] * torch.tensor([[[3.0]]])
    assert frame_consistency(still).item() == pytest.approx(1)
    assert frame_consistency(turning).item() == pytest.approx(0)
    assert frame_consistency(half).item() == pytest.approx(0.5**0.5)
    both = torch.cat([still, turning])[:, [0, 1, 1]]
    assert frame_consistency(both).tolist() == pytest.approx([1, 0.5])


def test_one_frame_has_no_neighbour() -> None:
    with pytest.raises(ValueError, match="at least 2 frames"):
        frame_consistency(torch.rand(2, 1, 4))
