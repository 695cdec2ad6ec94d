"""Spiral scan orders over a plane of tokens (frame x width, or frame x height).

A spiral walks the rim of the grid inwards, so that each token visited is a 4-neighbour of the one before.
Eight spirals (four corners, two turning directions), each walked both ways, are the 16 orders of MedSora;
block i uses pair i mod 8. Torch-free.
"""

__all__ = ["NUM_SPIRALS", "inverse_order", "spiral_order"]

NUM_SPIRALS = 8


def _inward_spiral(rows: int, columns: int) -> list[tuple[int, int]]:
    """Cells from (0, 0) inwards, first along the top row (clockwise)."""
    top, bottom, left, right = 0, rows - 1, 0, columns - 1
    cells: list[tuple[int, int]] = []
    while top <= bottom and left <= right:
        cells += [(top, column) for column in range(left, right + 1)]
        cells += [(row, right) for row in range(top + 1, bottom + 1)]
        if top < bottom and left < right:
            cells += [(bottom, column) for column in range(right - 1, left - 1, -1)]
            cells += [(row, left) for row in range(bottom - 1, top, -1)]
        top, bottom, left, right = top + 1, bottom - 1, left + 1, right - 1
    return cells


def spiral_order(rows: int, columns: int, index: int) -> tuple[int, ...]:
    """Flat positions (row * columns + column) in the order a spiral visits them.

    Args:
        index: 0 to 7: bit 0 mirrors the columns, bit 1 the rows, bit 2 turns counter-clockwise.

    Returns:
        A permutation of ``range(rows * columns)``; walk it backwards for the spiral's other direction.

    >>> spiral_order(3, 3, 0)
    (0, 1, 2, 5, 8, 7, 6, 3, 4)
    """
    if not 0 <= index < NUM_SPIRALS:
        raise ValueError(f"index must be 0 to {NUM_SPIRALS - 1}, got {index}")
    if index & 4:  # down the first column instead of along the first row
        cells = [(row, column) for column, row in _inward_spiral(columns, rows)]
    else:
        cells = _inward_spiral(rows, columns)
    if index & 1:
        cells = [(row, columns - 1 - column) for row, column in cells]
    if index & 2:
        cells = [(rows - 1 - row, column) for row, column in cells]
    return tuple(row * columns + column for row, column in cells)


def inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    """The rank of each position: where in ``order`` it stands.

    >>> inverse_order((2, 0, 1))
    (1, 2, 0)
    """
    ranks = [0] * len(order)
    for rank, position in enumerate(order):
        ranks[position] = rank
    return tuple(ranks)
