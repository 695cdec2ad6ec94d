"""Near-duplicates between clips: the same footage under two names, re-encoded, resized or trimmed. Torch-free.

Each clip gives up to 64 frames, each as a perceptual hash (signs of its 8x8 lowest frequencies) and as the details of a
16x16 picture, without its three lowest frequencies. Hashes find candidates; details must then correlate. Measured on
real clips: details of the same frame after a resize and compression at CRF 30 correlate by 0.98 or more, those of
different patients by less than 0.93 (docs/training-data.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.fft import dctn

from training.prepare.cuts import SIDE

__all__ = ["Duplicate", "Signature", "find_duplicates", "signature_of"]

FREQUENCIES, BITS = 8, 63
MAX_DISTANCE = 0.2
"""Share of hash bits that may differ."""
GRID, COARSE = 16, 3
LEAST_CORRELATION = 0.96
LEAST_FRAMES, LEAST_SHARE = 2, 0.1
"""Matching frames that make two clips duplicates: so many, and so large a share of the shorter clip's."""
LEAST_DEVIATION, LEAST_DETAIL = 4.0, 1.0
"""Frames with less contrast (grey levels), or less in their details, look all alike, and do not count."""
CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Signature:
    """Some frames of a clip, made small."""

    hashes: np.ndarray
    """(frames, 8) uint8: 63 bits each, packed."""
    details: np.ndarray
    """(frames, 256) int8: frequencies of the 16x16 picture, scaled to a norm of 256."""

    def __len__(self) -> int:
        return len(self.hashes)


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """Two clips that show the same."""

    first: int
    second: int
    frames: int
    """Matching frames of those looked at."""
    share: float
    """Of the frames of the shorter clip that were looked at."""


def signature_of(greys: Sequence[np.ndarray]) -> Signature:
    """Signature of a clip.

    Args:
        greys: Some of its frames as :func:`training.prepare.cuts.small_grey` gives them.
    """
    useful = [grey for grey in greys if float(grey.std()) >= LEAST_DEVIATION]
    if not useful:
        return Signature(np.zeros((0, 8), np.uint8), np.zeros((0, GRID * GRID), np.int8))
    stack = np.stack(useful).astype(np.float64)
    low = dctn(stack, axes=(1, 2), norm="ortho")[:, :FREQUENCIES, :FREQUENCIES].reshape(len(stack), -1)[:, 1:]
    bits = low > np.median(low, axis=1, keepdims=True)
    factor = SIDE // GRID
    small = stack.reshape(len(stack), GRID, factor, GRID, factor).mean(axis=(2, 4))
    details = dctn(small, axes=(1, 2), norm="ortho")
    details[:, :COARSE, :COARSE] = 0
    details = details.reshape(len(stack), -1)
    norms = np.linalg.norm(details, axis=1, keepdims=True)
    has_detail = norms[:, 0] >= LEAST_DETAIL * GRID
    scaled = (details[has_detail] * (256 / norms[has_detail])).round().clip(-127, 127).astype(np.int8)
    return Signature(np.packbits(bits[has_detail], axis=1), scaled)


def find_duplicates(signatures: Sequence[Signature], groups: Sequence[str]) -> list[Duplicate]:
    """Pairs of clips of different groups that show the same footage.

    Args:
        groups: Of each clip; clips of one group may resemble each other as they like.
    """
    owner = np.repeat(np.arange(len(signatures)), [len(signature) for signature in signatures])
    if not len(owner):
        return []
    codes = {group: code for code, group in enumerate(dict.fromkeys(groups))}
    group_of = np.array([codes[group] for group in groups])[owner]
    # bits as +-1: a matrix product counts those that agree
    bits = np.unpackbits(np.concatenate([signature.hashes for signature in signatures]), axis=1)[:, :BITS]
    signs = bits.astype(np.float32) * 2 - 1
    details = np.concatenate([signature.details for signature in signatures]).astype(np.float32)
    details /= np.maximum(np.linalg.norm(details, axis=1, keepdims=True), 1e-6)
    matches: dict[tuple[int, int], tuple[set[int], set[int]]] = {}
    for start in range(0, len(owner), CHUNK):
        rows = slice(start, start + CHUNK)
        for other in range(start, len(owner), CHUNK):
            columns = slice(other, other + CHUNK)
            distance = (BITS - signs[rows] @ signs[columns].T) / (2 * BITS)
            is_candidate = (distance <= MAX_DISTANCE) & (group_of[rows, None] != group_of[None, columns])
            here, there = np.nonzero(is_candidate)
            here, there = here + start, there + other
            is_before = here < there
            here, there = here[is_before], there[is_before]
            is_same = (details[here] * details[there]).sum(axis=1) >= LEAST_CORRELATION
            for a, b in zip(here[is_same].tolist(), there[is_same].tolist(), strict=True):
                first, second = matches.setdefault((int(owner[a]), int(owner[b])), (set(), set()))
                first.add(a)
                second.add(b)
    found = []
    for (one, two), (first, second) in sorted(matches.items()):
        count = min(len(first), len(second))
        share = count / min(len(signatures[one]), len(signatures[two]))
        if count >= LEAST_FRAMES and share >= LEAST_SHARE:
            found.append(Duplicate(first=one, second=two, frames=count, share=round(share, 3)))
    return found
