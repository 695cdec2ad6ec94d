"""How long a call takes on a device. Needs nothing but torch."""

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["median_seconds"]


def median_seconds(function: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 2) -> float:
    """Median time of a call, by CUDA events on a GPU and by the wall clock elsewhere."""
    for _ in range(warmup):
        function()
    if device.type != "cuda":
        return statistics.median(_wall_seconds(function) for _ in range(repeats))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        seconds: list[float] = []
        for _ in range(repeats):
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            started.record()
            function()
            ended.record()
            torch.cuda.synchronize()
            seconds.append(started.elapsed_time(ended) / 1000)
    return statistics.median(seconds)


def _wall_seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
