"""The selective scan's back ends against the float64 loop: values and all gradients."""

import pytest
import torch
from torch import Tensor

from medsora.errors import BackendError
from medsora.ops import OPERATORS, selective_scan
from medsora.ops.selective_scan import SCAN_BACKENDS, selective_scan_chunked, selective_scan_mamba_ssm

NAMES = ("x", "dt", "A", "B", "C", "D")


def operands(length: int, *, batch: int = 3, channels: int = 6, d_state: int = 4) -> list[Tensor]:
    return [
        torch.randn(batch, length, channels, dtype=torch.float64),
        torch.rand(batch, length, channels, dtype=torch.float64) * 0.5 + 0.01,
        -torch.rand(channels, d_state, dtype=torch.float64) * 4 - 0.1,
        torch.randn(batch, length, d_state, dtype=torch.float64),
        torch.randn(batch, length, d_state, dtype=torch.float64),
        torch.randn(channels, dtype=torch.float64),
    ]


def outputs_and_gradients(inputs: list[Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    leaves = [value.to(dtype).requires_grad_() for value in inputs]
    y = selective_scan(*leaves, backend=backend)
    weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), leaves)]


def test_the_loop_is_the_recurrence_written_by_hand() -> None:
    x, dt, A, B, C, D = operands(3, batch=1, channels=1, d_state=2)
    state, expected = [0.0, 0.0], []
    for i in range(3):
        step, value = dt[0, i, 0].item(), x[0, i, 0].item()
        for s in range(2):
            state[s] = torch.exp(dt[0, i, 0] * A[0, s]).item() * state[s] + step * value * B[0, i, s].item()
        expected.append(sum(state[s] * C[0, i, s].item() for s in range(2)) + D[0].item() * value)
    y = selective_scan(x, dt, A, B, C, D, backend="reference")
    assert torch.allclose(y.flatten(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
def test_chunks_equal_the_loop_in_values_and_gradients(length: int) -> None:
    inputs = operands(length)
    expected = outputs_and_gradients(inputs, "reference", torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        got = outputs_and_gradients(inputs, "chunked", dtype)
        for name, ours, theirs in zip(("y", *NAMES), got, expected, strict=True):
            error = (ours.double() - theirs).norm()
            assert error <= tolerance * theirs.norm(), f"{name} in {dtype}: error {error:.1e}"


def test_gradients_are_the_slopes() -> None:
    inputs = [value.requires_grad_() for value in operands(5, batch=1, channels=2, d_state=2)]
    assert torch.autograd.gradcheck(lambda *leaves: selective_scan_chunked(*leaves, chunk_size=2), inputs)


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 100])
def test_chunk_size_does_not_change_the_result(chunk_size: int) -> None:
    inputs = operands(50)
    whole = selective_scan(*inputs, backend="reference")
    assert torch.allclose(selective_scan_chunked(*inputs, chunk_size=chunk_size), whole, atol=1e-12)


def test_strong_decay_neither_overflows_nor_loses_the_present() -> None:
    x, dt, A, B, C, D = operands(200)
    inputs = (x, dt * 1000, A, B, C, D)
    expected = selective_scan(*inputs, backend="reference")
    got = selective_scan(*(value.float() for value in inputs), backend="chunked")
    assert torch.isfinite(got).all()
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_output_never_depends_on_later_inputs_or_on_other_sequences(backend: str) -> None:
    inputs = operands(80)
    before = selective_scan(*inputs, backend=backend)
    inputs[0][:, 70:] += 100
    inputs[0][1:] += 1
    after = selective_scan(*inputs, backend=backend)
    assert torch.equal(before[:1, :70], after[:1, :70])
    assert not torch.allclose(before[:1, 70:], after[:1, 70:])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_keeps_the_dtype_of_its_input_and_adds_nothing_without_skip_weights(backend: str) -> None:
    x, dt, A, B, C, D = operands(8)
    half = selective_scan(x.bfloat16(), dt.float(), A.float(), B.bfloat16(), C.bfloat16(), backend=backend)
    assert half.dtype == torch.bfloat16
    difference = selective_scan(x, dt, A, B, C, D, backend=backend) - selective_scan(x, dt, A, B, C, backend=backend)
    assert torch.allclose(difference, D * x)


def test_training_keeps_the_states_of_one_chunk_at_a_time() -> None:
    """What the backward pass holds on to grows with the inputs, not with the states, which are d_state times that."""
    kept: list[int] = []
    inputs = [value.requires_grad_() for value in operands(320, batch=1, channels=4, d_state=64)]
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.numel()) or value, lambda v: v):
        selective_scan(*inputs, backend="chunked")
    assert sum(kept) < 320 * 4 * 64


def test_the_kernel_refuses_what_it_cannot_take_and_names_are_checked() -> None:
    assert tuple(SCAN_BACKENDS) == OPERATORS["selective_scan"]
    with pytest.raises(BackendError, match="needs tensors on a CUDA device, got cpu"):
        selective_scan_mamba_ssm(*operands(4))
    with pytest.raises(BackendError, match="one of auto, reference, chunked, mamba_ssm; got 'dual'"):
        selective_scan(*operands(4), backend="dual")
