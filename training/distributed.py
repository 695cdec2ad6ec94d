"""One run in several processes: which share of a batch is whose."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Share"]


@dataclass(frozen=True)
class Share:
    """The part of every batch that one process computes."""

    rank: int = 0
    count: int = 1
    """Processes in all."""

    def of(self, batch: Tensor) -> Tensor:
        """This process's rows of a tensor whose first axis is the whole batch's."""
        return batch.chunk(self.count)[self.rank]
