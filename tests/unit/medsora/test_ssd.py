"""The SSD operator's back ends against the float64 loop: values and all gradients."""

import pytest
import torch
from torch import Tensor

from medsora.errors import BackendError
from medsora.ops import OPERATORS, ssd
from medsora.ops.ssd import BACKENDS, ssd_chunked, ssd_mamba_ssm

NAMES = ("x", "dt", "A", "B", "C", "D")
HERE = [name for name in BACKENDS if name != "mamba_ssm"]  # tests/gpu holds the kernels to the same


def operands(
    length: int, *, batch: int = 2, heads: int = 4, headdim: int = 5, groups: int = 2, d_state: int = 3
) -> list[Tensor]:
    return [
        torch.randn(batch, length, heads, headdim, dtype=torch.float64),
        torch.rand(batch, length, heads, dtype=torch.float64) * 0.5 + 0.01,
        -torch.rand(heads, dtype=torch.float64) * 4 - 0.1,
        torch.randn(batch, length, groups, d_state, dtype=torch.float64),
        torch.randn(batch, length, groups, d_state, dtype=torch.float64),
        torch.randn(heads, dtype=torch.float64),
    ]


def outputs_and_gradients(inputs: list[Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    leaves = [value.to(dtype).requires_grad_() for value in inputs]
    y = ssd(*leaves, backend=backend)
    weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), leaves)]


@pytest.mark.parametrize("backend", ["dual", "chunked"])
@pytest.mark.parametrize("length", [1, 4, 48, 65, 130])
def test_back_ends_equal_the_loop_in_values_and_gradients(backend: str, length: int) -> None:
    inputs = operands(length)
    expected = outputs_and_gradients(inputs, "reference", torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        got = outputs_and_gradients(inputs, backend, dtype)
        for name, ours, theirs in zip(("y", *NAMES), got, expected, strict=True):
            error = (ours.double() - theirs).norm()
            assert error <= tolerance * theirs.norm(), f"{name} of {backend} in {dtype}: error {error:.1e}"


def test_the_loop_is_the_recurrence_written_by_hand() -> None:
    x, dt, A, B, C, D = operands(3, batch=1, heads=1, headdim=1, groups=1, d_state=1)
    y = ssd(x, dt, A, B, C, D, backend="reference").flatten()
    state, expected = 0.0, []
    for i in range(3):
        step = dt[0, i, 0].item()
        state = torch.exp(dt[0, i, 0] * A[0]).item() * state + step * x[0, i, 0, 0].item() * B[0, i, 0, 0].item()
        expected.append(state * C[0, i, 0, 0].item() + D[0].item() * x[0, i, 0, 0].item())
    assert torch.allclose(y, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 100])
def test_chunk_size_does_not_change_the_result(chunk_size: int) -> None:
    inputs = operands(50)
    whole = ssd(*inputs, backend="reference")
    assert torch.allclose(ssd_chunked(*inputs, chunk_size=chunk_size), whole, atol=1e-5)


@pytest.mark.parametrize("backend", HERE)
def test_output_never_depends_on_later_inputs(backend: str) -> None:
    inputs = operands(80)
    before = ssd(*inputs, backend=backend)
    inputs[0][:, 70:] += 100
    after = ssd(*inputs, backend=backend)
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.allclose(before[:, 70:], after[:, 70:])


@pytest.mark.parametrize("backend", HERE)
def test_strong_decay_neither_overflows_nor_loses_the_present(backend: str) -> None:
    x, dt, A, B, C, _ = operands(200)
    y = ssd(x, dt * 1000, A, B, C, backend=backend)
    assert torch.isfinite(y).all()
    assert torch.allclose(y, ssd(x, dt * 1000, A, B, C, backend="reference"), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("backend", HERE)
def test_keeps_the_dtype_of_its_input(backend: str) -> None:
    x, dt, A, B, C, D = (value.to(torch.bfloat16) for value in operands(8))
    y = ssd(x, dt.float(), A.float(), B, C, D, backend=backend)
    assert y.dtype == torch.bfloat16


def test_without_skip_weights_nothing_is_added() -> None:
    inputs = operands(70)
    for backend in HERE:
        with_skip = ssd(*inputs, backend=backend)
        without = ssd(*inputs[:5], backend=backend)
        assert torch.allclose(with_skip - inputs[5][:, None] * inputs[0], without, atol=1e-9)


def test_the_names_are_those_that_are_resolved() -> None:
    assert tuple(BACKENDS) == OPERATORS["ssd"]


def test_the_kernels_refuse_tensors_that_are_not_on_a_gpu() -> None:
    with pytest.raises(BackendError, match="needs tensors on a CUDA device, got cpu"):
        ssd_mamba_ssm(*operands(4))
