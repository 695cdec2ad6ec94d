"""Evenly spaced samples of a stream whose length nobody knows beforehand. Torch-free."""

from typing import Generic, TypeVar

__all__ = ["EvenSampler"]

_T = TypeVar("_T")


class EvenSampler(Generic[_T]):
    """Keeps between ``limit / 2`` and ``limit`` evenly spaced values of a stream, the first among them.

    Every value is kept until there are too many; then every second is dropped, and from there on only every
    second is taken.

    >>> sampler = EvenSampler[int](4)
    >>> for number in range(10):
    ...     if sampler.wants(number):
    ...         sampler.add(number, number)
    >>> sampler.values
    [0, 4, 8]
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._step = limit, 1
        self._kept: list[tuple[int, _T]] = []

    def wants(self, index: int) -> bool:
        """Whether the value at this place of the stream is to be added."""
        return index % self._step == 0

    def add(self, index: int, value: _T) -> None:
        """Keep a value that was wanted."""
        if len(self._kept) == self._limit:
            self._step *= 2
            self._kept = [pair for pair in self._kept if self.wants(pair[0])]
        if self.wants(index):
            self._kept.append((index, value))

    @property
    def indices(self) -> list[int]:
        """Places in the stream of :attr:`values`."""
        return [index for index, _ in self._kept]

    @property
    def values(self) -> list[_T]:
        """What was kept, in order."""
        return [value for _, value in self._kept]
