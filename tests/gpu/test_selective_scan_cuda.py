"""The selective scan on a GPU: values and all gradients of every back end against the loop in float64.

As in test_ssd_cuda.py, operands are rounded first and errors are norms relative to the reference's. Neither back end
has matrix products that round to tf32, and torch's form has at most 3e-7 in float32 on a CPU: 2e-5 leaves room for the
kernel's faster exponential. In bfloat16 the step sizes stay in float32, so everything is computed in float32, and
only the result and the gradients of x, B and C are rounded (2e-3 in norm): 6e-3.
"""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from medsora.errors import BackendError
from medsora.ops import selective_scan

pytestmark = pytest.mark.gpu

NAMES = ("y", "x", "dt", "A", "B", "C", "D")
HAS_KERNELS = importlib.util.find_spec("mamba_ssm") is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="needs the package mamba-ssm")
BACKENDS = ["chunked", pytest.param("mamba_ssm", marks=needs_kernels)]
LENGTHS = [4, 6, 48, 64, 100, 256, 1000, 2100]
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def operands(length: int, dtype: torch.dtype, *, batch: int = 3, channels: int = 96, d_state: int = 16) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cuda")

    return [
        normal(batch, length, channels).to(dtype),
        uniform(batch, length, channels) * 0.1 + 0.001,
        -uniform(channels, d_state) * 15 - 1,
        normal(batch, length, d_state).to(dtype),
        normal(batch, length, d_state).to(dtype),
        normal(channels),
    ]


def values_and_gradients(inputs: list[Tensor], backend: str, weight: Tensor) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    y = selective_scan(*leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight.to(y.dtype))]


def compare(inputs: list[Tensor], backend: str, bound: float) -> None:
    """Hold ``backend`` to the reference on the same, already rounded, numbers."""
    generator = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(inputs[0].shape, generator=generator, device="cuda").to(inputs[0].dtype)
    expected = values_and_gradients([value.double() for value in inputs], "reference", weight.double())
    got = values_and_gradients(inputs, backend, weight)
    errors = {
        name: ((ours.double() - theirs).norm() / theirs.norm()).item()
        for name, ours, theirs in zip(NAMES, got, expected, strict=True)
    }
    print(backend, inputs[0].dtype, tuple(inputs[0].shape), {name: f"{error:.1e}" for name, error in errors.items()})
    assert {name: error for name, error in errors.items() if not error <= bound} == {}
    assert got[0].dtype == inputs[0].dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_equal_the_reference(backend: str, length: int, dtype: torch.dtype) -> None:
    compare(operands(length, dtype), backend, BOUNDS[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_width_of_base(backend: str) -> None:
    compare(operands(64, torch.bfloat16, batch=5, channels=1024), backend, BOUNDS[torch.bfloat16])


@needs_kernels
def test_all_in_bfloat16_with_step_sizes_too() -> None:
    """The kernel takes its inputs as they are and sums in float32."""
    inputs = operands(100, torch.bfloat16)
    inputs[1] = inputs[1].bfloat16()
    compare(inputs, "mamba_ssm", 3e-2)


@needs_kernels
def test_without_skip_weights_and_without_gradients() -> None:
    inputs = operands(70, torch.float32)[:5]
    with torch.inference_mode():
        y = selective_scan(*inputs, backend="mamba_ssm")
        expected = selective_scan(*inputs, backend="reference")
    assert (y - expected).norm() <= 1e-4 * expected.norm()


@needs_kernels
def test_the_kernel_refuses_what_it_cannot_take() -> None:
    with pytest.raises(BackendError, match=r"got torch\.float64"):
        selective_scan(*(value.double() for value in operands(8, torch.float32)), backend="mamba_ssm")
    with pytest.raises(BackendError, match="a state of at most 256, got 300"):
        selective_scan(*operands(8, torch.float32, d_state=300), backend="mamba_ssm")


@pytest.mark.parametrize("length", [4, 1000])
def test_auto_runs(length: int) -> None:
    inputs = operands(length, torch.bfloat16)
    expected = selective_scan(*inputs, backend="reference").double()
    assert (selective_scan(*inputs).double() - expected).norm() <= 2e-2 * expected.norm()


def test_training_keeps_little_memory() -> None:
    """Long and wide: all states at once would be 2 GiB in float32, several times over in the backward pass."""
    inputs = [value.requires_grad_() for value in operands(8192, torch.float32, batch=1, channels=4096, d_state=16)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = selective_scan(*inputs, backend="chunked")
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    inputs_bytes = sum(value.numel() for value in inputs) * 4
    assert torch.cuda.max_memory_allocated() - before < 6 * inputs_bytes + 2 * 2**30
