"""One run in several processes, started by torchrun: who computes what, and what they have to agree on.

``ddp``: every process holds everything, and gradients are averaged once all are there. ``fsdp``: weights, gradients,
averages and optimizer are cut over the processes and gathered block by block (torch's ``fully_shard``). Either way
a step is that of one process with the same batch: batch norm sees the whole batch, the norm of the gradient is that
of all weights, and checkpoints hold whole tensors, so that any number of processes may go on with them.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm

from training.errors import TrainingError

__all__ = ["Processes", "Share", "join", "local_part", "part_like", "whole", "whole_like"]

PATIENCE = timedelta(hours=1)
"""How long a process waits for another: the first one evaluates and saves alone."""
LAUNCHED = frozenset(("RANK", "WORLD_SIZE", "MASTER_ADDR"))
"""What torchrun puts into the environment of every process that it starts."""
BUCKET_BYTES = 32 * 2**20
"""Gradients are sent together in pieces of about this size: many small messages cost more than their content."""
ENTRY_POINTS = ("posterior", "decode_z", "encode", "decode")
"""Methods besides ``forward`` through which tasks run a network: cut weights are gathered for these too."""


@dataclass(frozen=True)
class Share:
    """The part of every batch that one process computes."""

    rank: int = 0
    count: int = 1
    """Processes in all."""

    def of(self, batch: Tensor) -> Tensor:
        """This process's rows of a tensor whose first axis is the whole batch's."""
        return batch.chunk(self.count)[self.rank]


class Processes:
    """The processes of a run, seen from one of them. ``Processes(device)`` is a run in one process.

    Args:
        strategy: ``ddp`` or ``fsdp``; of no importance when there is one process.
    """

    def __init__(self, device: torch.device, *, share: Share | None = None, strategy: str = "ddp") -> None:
        self.device, self.share, self.strategy = device, share or Share(), strategy

    @property
    def count(self) -> int:
        return self.share.count

    @property
    def is_first(self) -> bool:
        """Whether this is the one that evaluates and writes."""
        return self.share.rank == 0

    def prepare(self, model: nn.Module, *, is_cut: bool) -> None:
        """Make a network one of several copies that start and stay the same. Call it before its optimizer is made.

        Args:
            is_cut: Cut the weights where the strategy is ``fsdp``.
        """
        if self.count == 1:
            return
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
        _replace(model, self)
        if is_cut and self.strategy == "fsdp":
            # it warns of networks that return views, which nobody may then change in place: nobody does
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            mesh = init_device_mesh(self.device.type, (self.count,))
            lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
            for block in [child for blocks in lists for child in blocks if not isinstance(child, nn.Embedding)]:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            for name in ENTRY_POINTS:
                if hasattr(model, name):
                    register_fsdp_forward_method(model, name)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes; those of cut weights are means already."""
        if self.count == 1:
            return
        gradients = [
            parameter.grad
            for parameter in parameters
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor)
        ]
        sent = []
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in sent:
            assert work is not None  # it was asked for, by async_op
            work.wait()
            pieces = torch.split(flat.div_(self.count), [gradient.numel() for gradient in bucket])
            for gradient, piece in zip(bucket, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a detached tensor over the processes; does not wait for the device."""
        if self.count == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.count

    def agree(self, seconds: float, signal_number: int) -> tuple[float, int]:
        """What all processes act upon: the first one's clock, and a signal that any of them received."""
        if self.count == 1:
            return seconds, signal_number
        both = torch.tensor([seconds if self.is_first else 0.0, signal_number], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return float(both[0]), int(both[1])

    def from_first(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in all of them, in order of rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The others enter the block when the first one has left it, and find the files that it wrote."""
        if not self.is_first:
            self.from_first(None)
        yield
        if self.is_first:
            self.from_first(None)


@contextmanager
def join(device: torch.device, strategy: str) -> Iterator[Processes]:
    """Meet the other processes that torchrun started; alone where it did not start this one.

    Args:
        device: Where this process computes; of several GPUs the one of this process.
        strategy: ``auto`` (ddp where there are several processes), ``ddp`` or ``fsdp``.

    Raises:
        TrainingError: A strategy for several processes is asked for, and this one was started alone.
    """
    if not LAUNCHED.issubset(os.environ):
        if strategy != "auto":
            raise TrainingError(
                f"loop.distributed={strategy} is for several processes: start it by "
                "torchrun --standalone --nproc-per-node N -m training.cli ..., or leave it at auto"
            )
        yield Processes(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        share = Share(dist.get_rank(), dist.get_world_size())
        yield Processes(device, share=share, strategy="ddp" if strategy == "auto" else strategy)
    finally:
        dist.destroy_process_group()


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, unless it is cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is cut all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_like(part: Tensor, like: Tensor) -> Tensor:
    """All of a tensor that is cut like ``like`` and of which this process holds ``part``."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut and placed like ``like``; every process has the whole."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class SyncedBatchNorm(_BatchNorm):
    """Batch norm over the batch of all processes together; torch's own one needs a GPU."""

    processes: Processes

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of axes: the second one holds the channels."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        count = x.numel() // x.shape[1] * self.processes.count
        precise = x.float()
        mean = _sum_of_all(precise.sum(axes)) / count
        centred = precise - mean.view(shape)
        variance = _sum_of_all(centred.square().sum(axes)) / count
        with torch.no_grad():
            assert self.running_mean is not None  # networks here all keep their statistics
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


class SharedDropout(nn.Dropout):
    """Dropout that draws for the whole batch and takes this process's share, as tasks do. For the CPU: it costs
    the whole batch's memory, which a GPU has other uses for."""

    processes: Processes

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        kept = torch.empty(
            (len(x) * self.processes.count, *x.shape[1:]),
            dtype=x.dtype,
            # numbers are drawn in the order of memory
            memory_format=torch.channels_last if is_channels_last else torch.contiguous_format,
        ).bernoulli_(1.0 - self.p)
        return x * self.processes.share.of(kept).div(1.0 - self.p)


class _Sum(torch.autograd.Function):
    """Sum over the processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _sum_of_all(value: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(value)  # type: ignore[no-untyped-call]
    return total


def _replace(module: nn.Module, processes: Processes) -> None:
    """Put layers that look at a whole batch in the place of those that would look at a share."""
    for name, child in module.named_children():
        replacement: SyncedBatchNorm | SharedDropout | None = None
        if isinstance(child, _BatchNorm):
            replacement = SyncedBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            replacement.load_state_dict(child.state_dict())
        elif type(child) is nn.Dropout and processes.device.type == "cpu":
            replacement = SharedDropout(child.p)
        if replacement is None:
            _replace(child, processes)
        else:
            replacement.processes = processes
            setattr(module, name, replacement.to(processes.device).train(child.training))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of one data type and at most about :data:`BUCKET_BYTES`."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
