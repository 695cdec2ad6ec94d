"""CUDA graphs: a step of the sampler, or a decode, recorded once a shape and then replayed as one launch.

Every graph reads and writes buffers of its own shape, and all of them share one pool of memory: only one runs at a
time, and nothing that one leaves in the pool is read after another has run. Whoever calls holds a lock.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medsora.diffusion.guidance import guided
from medsora.diffusion.path import data_between, held
from medsora.diffusion.samplers import OnStep, Step, Watch

__all__ = ["GraphedFunction", "GraphedMap", "GraphedSampler"]

WARM_UP_RUNS = 2
"""Runs before the recording: kernels are compiled and tuned, and workspaces allocated, in them."""

PredictFn = Callable[..., Tensor]


@cache
def _side_stream(device: int) -> Any:
    """The one stream of a GPU that is recorded on: memory of a pool is used again on the same stream alone.

    Torch has one of its own, but for all GPUs: it is on the one that was recorded on first.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class GraphedFunction:
    """``function()`` on buffers that stay where they are, recorded; :meth:`replay` runs it again."""

    def __init__(self, function: Callable[[], Any], *, pool: Any) -> None:
        side = _side_stream(torch.cuda.current_device())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                function()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=side):
            self.output = function()  # overwritten by every replay, of this graph or of another in its pool

    def replay(self) -> Any:
        """Run it on what the buffers hold now; returns what it returned, without waiting for it."""
        self._graph.replay()
        return self.output


class GraphedMap:
    """A function of one tensor by graphs, one for each shape; made when first needed."""

    def __init__(self, function: Callable[[Tensor], Any], *, pool: Any) -> None:
        self._function, self._pool = function, pool
        self._graphs: dict[torch.Size, tuple[GraphedFunction, Tensor]] = {}

    def __call__(self, value: Tensor) -> Any:
        """``function(value)``; copy what it returns, or be done with it before the next call."""
        if value.shape not in self._graphs:
            buffer = value.clone()
            graph = GraphedFunction(lambda: self._function(buffer), pool=self._pool)
            self._graphs[value.shape] = (graph, buffer)
        graph, buffer = self._graphs[value.shape]
        buffer.copy_(value)
        return graph.replay()


class _Buffers:
    """What the steps of one shape read and write."""

    def __init__(self, noise: Tensor, condition: Tensor) -> None:
        self.x, self.fresh_noise = torch.empty_like(noise), torch.zeros_like(noise)
        self.condition = torch.empty_like(condition)
        self.guidance_scale = torch.ones((), dtype=noise.dtype, device=noise.device)
        self.is_known = torch.zeros(noise.shape[0], noise.shape[2], dtype=torch.bool, device=noise.device)


class GraphedSampler:
    """Runs plans of steps by graphs, one for each kind of step and shape; made when first needed."""

    def __init__(self, predict: PredictFn, null_condition: Int[Tensor, " k"], *, pool: Any) -> None:
        """
        Args:
            predict: ``(x, t, condition) -> prediction``, or with the size of the step as well; times are 0-d tensors,
                or one of each frame (b f).
        """
        self._predict, self._null_condition, self._pool = predict, null_condition, pool
        self._buffers: dict[tuple[Any, ...], _Buffers] = {}
        self._graphs: dict[tuple[Any, ...], tuple[GraphedFunction, Tensor]] = {}

    def sample(
        self,
        steps: Sequence[Step],
        noise: Float[Tensor, "b c f h w"],
        condition: Int[Tensor, "b k"],
        guidance_scale: float,
        *,
        is_known: Bool[Tensor, "b f"] | None = None,
        draw_noise: Callable[[int], Tensor] | None = None,
        on_step: OnStep | None = None,
        watch: Watch | None = None,
    ) -> Float[Tensor, "b c f h w"]:
        """Carry noise through a plan; as :func:`medsora.diffusion.samplers.sample`, with guidance built in.

        The host stays one step ahead of the device, so ``on_step`` is called while the next step runs; an exception
        raised in it lets that step run out.

        Args:
            is_known: Frames that ``noise`` holds clean, which stay as they are. A recording of its own serves any of
                them; without it nothing of this is computed.

        Returns:
            The buffer of this shape: copy it, or be done with it before the next call.
        """
        is_guided = guidance_scale != 1
        key = (tuple(noise.shape), is_known is not None, is_guided)
        if key not in self._buffers:
            self._buffers[key] = _Buffers(noise, condition)
        buffers = self._buffers[key]
        graphs = [self._graph(step, key) for step in steps]
        width = max(len(step.values) for step in steps)
        padded = [(*step.values, *[0.0] * (width - len(step.values))) for step in steps]
        rows = torch.tensor(padded, dtype=noise.dtype)
        plan = rows.pin_memory().to(noise.device, non_blocking=True)
        buffers.x.copy_(noise)
        buffers.condition.copy_(condition)
        buffers.guidance_scale.fill_(guidance_scale)
        if is_known is not None:
            buffers.is_known.copy_(is_known)
        finished: list[torch.cuda.Event] = []
        # an event that is not told its stream looks for the current one at every step
        stream = torch.cuda.current_stream() if on_step is not None else None
        for number, (step, (graph, values)) in enumerate(zip(steps, graphs, strict=True)):
            values.copy_(plan[number, : len(values)])
            if step.draws_noise:
                if draw_noise is None:
                    raise ValueError("this sampler draws noise at every step: draw_noise must be given")
                buffers.fresh_noise.copy_(draw_noise(number), non_blocking=True)
            times = step.times if watch is not None and step.times is not None and watch.wanted() else None
            before = buffers.x if times is None else buffers.x.clone()
            graph.replay()
            if watch is not None and times is not None:
                watch.show(data_between(before, buffers.x, *times))
            if on_step is not None:
                finished.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
                finished[-1].record(stream)
                if number:
                    finished[number - 1].synchronize()
                    on_step(number, len(steps))
        if on_step is not None:
            finished[-1].synchronize()
            on_step(len(steps), len(steps))
        return buffers.x

    def _graph(self, step: Step, key: tuple[Any, ...]) -> tuple[GraphedFunction, Tensor]:
        """The recorded step of this kind and shape, and the buffer of its values."""
        graph_key = (step.function, *key)
        if graph_key not in self._graphs:
            buffers, (has_known, is_guided) = self._buffers[key], key[-2:]
            values = torch.tensor(step.values, dtype=buffers.x.dtype, device=buffers.x.device)
            scale = buffers.guidance_scale if is_guided else 1.0
            predict = guided(self._predict, buffers.condition, self._null_condition, scale)
            if has_known:
                predict = held(predict, buffers.is_known)
            fresh = {"noise": buffers.fresh_noise} if step.draws_noise else {}
            buffers.x.zero_()
            buffers.condition.copy_(self._null_condition.expand_as(buffers.condition))

            def run() -> None:
                buffers.x.copy_(step.function(predict, buffers.x, *values.unbind(), **fresh))

            self._graphs[graph_key] = (GraphedFunction(run, pool=self._pool), values)
        return self._graphs[graph_key]
