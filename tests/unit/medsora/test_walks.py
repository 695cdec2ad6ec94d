"""Walks and the tables that kernels read, against loops over the visits."""

import pytest
import torch
from torch import Tensor

from medsora.config import DenoiserConfig
from medsora.models.blocks import SpatialMamba, TemporalMamba
from medsora.ops import Walks

CPU = torch.device("cpu")
TAPS = 3


def plane_walks(scan_order: str, index: int, latent: tuple[int, int, int]) -> list[Walks]:
    config = DenoiserConfig(hidden_size=16, depth=1, headdim=16, scan_order=scan_order)
    return list(SpatialMamba(config, index).walks(*latent, CPU))


def frame_walks(directions: int, latent: tuple[int, int, int]) -> list[Walks]:
    config = DenoiserConfig(hidden_size=16, depth=1, headdim=16, temporal_directions=directions)
    return list(TemporalMamba(config).walks(*latent, CPU))


# (frames, rows, columns): sequences of 1 to 130 steps, several a tile and one a tile, few tiles of which are full
WALKS = {
    f"{kind} {'x'.join(map(str, latent))} {number}": walks
    for kind, made in (
        ("spiral", lambda latent: plane_walks("spiral", 0, latent)),
        ("released", lambda latent: plane_walks("released", 5, latent)),
        ("frames", lambda latent: frame_walks(1, latent)),
        ("frames both ways", lambda latent: frame_walks(2, latent)),
    )
    for latent in ((1, 2, 2), (4, 4, 4), (5, 3, 7), (6, 2, 3), (13, 2, 10))
    for number, walks in enumerate(made(latent))
}
every_walk = pytest.mark.parametrize("walks", WALKS.values(), ids=WALKS.keys())


def test_sizes_are_those_of_the_visits() -> None:
    walks = Walks(torch.arange(12).reshape(1, 3, 4).expand(2, -1, -1))
    assert (walks.num_walks, walks.num_sequences, walks.length, walks.num_tokens) == (2, 3, 4, 12)


@every_walk
def test_returns_undo_visits(walks: Walks) -> None:
    tokens = torch.randn(walks.num_tokens)
    for visits, returns in zip(walks.visits, walks.returns, strict=True):
        assert torch.equal(tokens[visits.flatten()][returns], tokens)


@every_walk
def test_tiles_hold_every_token_once_in_whole_sequences(walks: Walks) -> None:
    tiles = walks.tiles(TAPS)
    assert tiles.size >= 32  # matrix units take no fewer than 16 rows, and the kernels' ranges are powers of two
    assert tiles.size & (tiles.size - 1) == 0
    sequences = []
    for tile in tiles.tokens.tolist():
        held = [token for token in tile if token >= 0]
        assert tile == held + [-1] * (tiles.size - len(held))
        assert len(held) % walks.length == 0
        sequences += [held[start : start + walks.length] for start in range(0, len(held), walks.length)]
    assert sequences == walks.visits[0].tolist()
    assert tiles.length == walks.length


@every_walk
def test_ranks_and_earlier_tokens_are_those_of_a_loop_over_the_visits(walks: Walks) -> None:
    tiles = walks.tiles(TAPS)
    for walk, visits in enumerate(walks.visits.tolist()):
        ranks, previous = {-1: -1}, {-1: [-1] * TAPS}
        for sequence in visits:
            for step, token in enumerate(sequence):
                ranks[token] = step
                previous[token] = [sequence[step - tap] if step >= tap else -1 for tap in range(1, TAPS + 1)]
        flat = tiles.tokens.flatten().tolist()
        assert tiles.ranks[walk].flatten().tolist() == [ranks[token] for token in flat]
        assert tiles.previous[walk].flatten(1).T.tolist() == [previous[token] for token in flat]


@pytest.mark.parametrize(
    ("latent", "tiles"),
    [
        ((4, 4, 4), (2, 32)),  # 16 sequences of 4, eight a tile
        ((5, 3, 7), (7, 32)),  # 21 of 5: three a tile, since no larger number that fits divides them
        ((33, 1, 2), (2, 64)),
        ((64, 1, 2), (2, 64)),
        ((65, 1, 2), (2, 128)),
    ],
)
def test_short_sequences_share_a_tile_and_long_ones_have_their_own(
    latent: tuple[int, int, int], tiles: tuple[int, int]
) -> None:
    (walks,) = frame_walks(1, latent)
    assert walks.tiles(TAPS).tokens.shape == tiles


def test_a_convolution_of_one_tap_needs_no_earlier_tokens() -> None:
    (walks,) = frame_walks(2, (4, 2, 2))
    assert walks.tiles(0).previous.shape == (2, 0, 1, 32)


def test_walks_move_to_a_device_with_all_their_tables() -> None:
    (walks,) = frame_walks(2, (4, 2, 2))
    moved = walks.to(torch.device("meta"))
    tiles = moved.tiles(TAPS)
    tables = (moved.visits, moved.returns, tiles.tokens, tiles.ranks, tiles.previous)
    assert {table.device.type for table in tables} == {"meta"}


def test_tiles_are_made_once_for_each_number_of_taps() -> None:
    (walks,) = frame_walks(1, (4, 2, 2))
    with torch.inference_mode():
        made = walks.tiles(TAPS)
    assert walks.tiles(TAPS) is made
    assert not made.tokens.is_inference()  # such a tensor could not be saved for a backward pass
    assert walks.tiles(1).previous.shape[1] == 1


@pytest.mark.parametrize(
    ("visits", "message"),
    [
        (torch.tensor([[[0, 1], [2, 4]]]), "every token exactly once"),
        (torch.tensor([[[0, 1], [1, 3]]]), "every token exactly once"),
        (torch.tensor([[[0, 1], [2, 3]], [[0, 1], [3, 3]]]), "every token exactly once"),
        (torch.tensor([[[0, 1], [2, 3]], [[0, 2], [1, 3]]]), "the same tokens in every walk"),
        (torch.tensor([[[0, 1], [2, 3]], [[2, 3], [0, 1]]]), "the same tokens in every walk"),
    ],
    ids=["a token is missing", "a token is twice", "in the second walk", "members differ", "sequences change places"],
)
def test_what_is_no_walk_is_refused(visits: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Walks(visits)
