"""Shares of a batch, and layers that see the whole of it. What several processes do together is tested with real
ones in ``tests/integration/test_training_processes.py``; here a group of one process is enough."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.distributed import Processes, Share, SharedDropout, SyncedBatchNorm, _buckets, _replace, join
from training.errors import TrainingError

CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone, which needs no port."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_shares_are_rows_in_order_and_make_up_the_batch() -> None:
    batch = torch.arange(12).reshape(6, 2)
    shares = [Share(rank, 3).of(batch) for rank in range(3)]
    assert torch.equal(torch.cat(shares), batch)
    assert all(len(share) == 2 for share in shares)
    assert torch.equal(Share().of(batch), batch)


@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 3, 4), (8, 5, 2, 3, 4)])
def test_synced_batch_norm_is_batch_norm(group: None, shape: tuple[int, ...]) -> None:
    kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    theirs = nn.Sequential(kind(5, momentum=0.3))
    nn.init.normal_(theirs[0].weight)
    nn.init.normal_(theirs[0].bias)
    ours = nn.Sequential(kind(5, momentum=0.3))
    ours.load_state_dict(theirs.state_dict())
    _replace(ours, Processes(CPU))
    assert isinstance(ours[0], SyncedBatchNorm)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for _ in range(2):
        x = (torch.randn(shape) * 3 + 7).requires_grad_()
        pull = torch.randn(shape)
        results = []
        for network in (ours, theirs):
            network.zero_grad()
            y = network(x)
            (gradient,) = torch.autograd.grad((y * pull).sum(), x, retain_graph=True)
            (y * pull).sum().backward()
            results.append((y, gradient, network[0].weight.grad, network[0].bias.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name])
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shares_of_dropout_are_the_dropout_of_the_batch(layout: torch.memory_format) -> None:
    batch = torch.randn(6, 4, 5, 3).contiguous(memory_format=layout)
    torch.manual_seed(3)
    expected = nn.Dropout(0.4)(batch)
    found = []
    for rank in range(3):
        layer = SharedDropout(0.4)
        layer.processes = Processes(CPU, share=Share(rank, 3))
        torch.manual_seed(3)
        found.append(layer(layer.processes.share.of(batch)))
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-6, atol=0)
    assert 0.2 < (expected == 0).float().mean() < 0.6
    layer.eval()
    assert torch.equal(layer(batch), batch)


def test_buckets_keep_the_order_the_type_and_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.distributed.BUCKET_BYTES", 100)
    tensors: list[Tensor] = [torch.zeros(size, dtype=dtype) for size, dtype in (
        (10, torch.float32), (15, torch.float32), (1, torch.float32), (1, torch.float64), (50, torch.float64),
        (1, torch.float64)
    )]  # fmt: skip
    assert [[len(tensor) for tensor in bucket] for bucket in _buckets(tensors)] == [[10, 15], [1], [1], [50], [1]]
    assert list(_buckets([])) == []


def test_alone_is_a_matter_of_course_and_strategies_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with join(CPU, "auto") as processes:
        assert (processes.count, processes.is_first) == (1, True)
        assert processes.agree(1.5, 15) == (1.5, 15)
        assert processes.gather("a") == ["a"]
    for strategy in ("ddp", "fsdp"):
        with pytest.raises(TrainingError, match="torchrun"), join(CPU, strategy):
            pass
