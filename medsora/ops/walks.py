"""In which orders the sequences of a mixer walk over the tokens of a clip, as index tables.

A mixer scans the tokens of a clip as several sequences of one length (the rows of a plane, the frames of a place), and
walks all of them in one or more orders. Both are one table of token indices, so that any layout is a gather, and the
way back is another.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int, Int32
from torch import Tensor

__all__ = ["Tiles", "Walks"]

MIN_TILE = 32
"""Tokens of a tile at least: short sequences share one, since matrix units take no fewer than 16 rows."""


@dataclass(frozen=True)
class Tiles:
    """The same walks, cut into tiles of whole sequences for a kernel that handles one tile at a time.

    Places of a tile are tokens in the order of the first walk; a place beyond its sequences holds -1.
    """

    size: int
    """Places of a tile, a power of two."""
    length: int
    """Steps of a sequence: place ``p`` belongs to sequence ``p // length`` of its tile."""
    tokens: Int32[Tensor, "tiles size"]
    """Token of the clip at each place."""
    ranks: Int32[Tensor, "k tiles size"]
    """Step at which a walk visits each place, counted in its sequence."""
    previous: Int32[Tensor, "k taps tiles size"]
    """Token visited one step earlier, two, and so on; -1 before the first."""


class Walks:
    """``k`` walks over ``s`` sequences of ``l`` tokens, which together are all tokens of a clip."""

    def __init__(self, visits: Int[Tensor, "k s l"]) -> None:
        """
        Args:
            visits: Token visited by each walk, in each sequence, at each step. In all walks, sequence ``s`` holds
                the same tokens.

        Raises:
            ValueError: A walk does not visit every token once, or a sequence holds others than in the first walk.
        """
        flat = visits.flatten(1)
        # checks on values would break a traced graph, and make the host wait for a device
        if visits.device.type == "cpu" and not torch.compiler.is_compiling():
            _check(visits, flat)
        self.visits = visits
        self.returns: Tensor = flat.argsort(dim=1)
        """(k, tokens): where in the flat visits of each walk a token stands."""
        self._tiles: dict[int, Tiles] = {}

    @property
    def num_walks(self) -> int:
        """Orders in which every sequence is walked."""
        return self.visits.shape[0]

    @property
    def num_sequences(self) -> int:
        """Sequences of a clip."""
        return self.visits.shape[1]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.visits.shape[2]

    @property
    def num_tokens(self) -> int:
        """Tokens of a clip."""
        return self.num_sequences * self.length

    def to(self, device: torch.device) -> "Walks":
        """The same walks with their tables on a device."""
        return Walks(self.visits.to(device))

    def tiles(self, taps: int) -> Tiles:
        """Tables of a kernel whose causal convolution sees ``taps`` steps before the present one; made once."""
        if taps not in self._tiles:
            with torch.inference_mode(False):
                self._tiles[taps] = self._make_tiles(taps)
        return self._tiles[taps]

    def _make_tiles(self, taps: int) -> Tiles:
        size = max(MIN_TILE, 1 << (self.length - 1).bit_length())
        together = max(n for n in range(1, size // self.length + 1) if self.num_sequences % n == 0)
        num_tiles = self.num_sequences // together

        def tiled(values: Tensor) -> Tensor:  # (k tokens) -> (k tiles size), -1 where there is none
            rows = values.reshape(-1, num_tiles, together * self.length)
            return torch.nn.functional.pad(rows, (0, size - rows.shape[2]), value=-1).to(torch.int32).contiguous()

        first = self.visits[0].flatten()
        step = self.returns[:, first] % self.length  # (k, tokens)
        earlier = []
        for tap in range(1, taps + 1):
            at = (self.returns[:, first] - tap).clamp_min(0)
            earlier.append(torch.where(step >= tap, self.visits.flatten(1).gather(1, at), -1))
        previous = torch.stack(earlier, dim=1) if taps else first.new_empty(self.num_walks, 0, self.num_tokens)
        return Tiles(
            size=size,
            length=self.length,
            tokens=tiled(first[None])[0],
            ranks=tiled(step),
            previous=tiled(previous.flatten(0, 1)).reshape(self.num_walks, taps, num_tiles, size),
        )


def _check(visits: Tensor, flat: Tensor) -> None:
    everything = torch.arange(flat.shape[1], device=flat.device)
    if not torch.equal(flat.sort(dim=1).values, everything.expand_as(flat)):
        raise ValueError("each walk must visit every token exactly once")
    members = visits.sort(dim=2).values
    if not torch.equal(members, members[:1].expand_as(members)):
        raise ValueError("a sequence must hold the same tokens in every walk")
