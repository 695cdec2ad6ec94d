"""The SSD operator on a GPU: values and all gradients of every back end against the loop in float64.

The operands are rounded to the type under test first, so that what is compared is the back end's own error. Errors are
norms relative to the reference's. Bounds, about three times the worst that torch's forms have on a CPU with these
numbers:

- float32, torch's forms: unit roundoff 6e-8 of cumulative log-decays, which come to 800 over 1000 steps, so that the
  exponents between neighbours are wrong by up to 5e-5: 1e-4.
- float32, mamba_ssm: its matrix products round their inputs to tf32 (10 bits, 5e-4), several in a row: 3e-3.
- bfloat16, torch's forms: 8 bits (4e-3), products and decays each rounded: 1e-2; 2e-2 for the gradients of dt and A,
  sums in which such terms cancel. mamba_ssm, which also keeps the state between chunks in it: twice that.
"""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from medsora.errors import BackendError
from medsora.ops import resolve_backend, ssd
from medsora.ops.ssd import MAX_KERNEL_CHUNKS

pytestmark = pytest.mark.gpu

NAMES = ("y", "x", "dt", "A", "B", "C", "D")
HAS_KERNELS = importlib.util.find_spec("mamba_ssm") is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="needs the package mamba-ssm")
BACKENDS = [
    "dual",
    "chunked",
    pytest.param("mamba_ssm", marks=needs_kernels),
]
LENGTHS = [4, 6, 48, 64, 100, 256, 1000]
SHAPES = {"small": (8, 64, 64), "base": (16, 64, 128)}
SUMS = {"dt", "A"}


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def operands(
    length: int, *, batch: int, heads: int, headdim: int, d_state: int, groups: int = 1, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cuda")

    return [
        normal(batch, length, heads, headdim),
        uniform(batch, length, heads) * 0.1 + 0.001,  # the range that Mamba-2 starts with
        -uniform(heads) * 15 - 1,
        normal(batch, length, groups, d_state),
        normal(batch, length, groups, d_state),
        normal(heads),
    ]


def rounded(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """As the network hands them over: step sizes, decays and skip weights stay in float32."""
    return [
        value.to(dtype) if name in ("x", "B", "C") else value for name, value in zip(NAMES[1:], inputs, strict=True)
    ]


def values_and_gradients(inputs: list[Tensor], backend: str, weight: Tensor) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    y = ssd(*leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight.to(y.dtype))]


def compare(inputs: list[Tensor], backend: str, bounds: dict[str, float]) -> None:
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
    assert {name: error for name, error in errors.items() if not error <= bounds[name]} == {}
    assert got[0].dtype == inputs[0].dtype


def bounds_of(backend: str, dtype: torch.dtype) -> dict[str, float]:
    if dtype == torch.float32:
        return dict.fromkeys(NAMES, 3e-3 if backend == "mamba_ssm" else 1e-4)
    kernels = 2 if backend == "mamba_ssm" else 1
    return {name: kernels * (2e-2 if name in SUMS else 1e-2) for name in NAMES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_equal_the_reference(backend: str, shape: str, length: int, dtype: torch.dtype) -> None:
    heads, headdim, d_state = SHAPES[shape]
    inputs = operands(length, batch=3, heads=heads, headdim=headdim, d_state=d_state, seed=length)
    compare(rounded(inputs, dtype), backend, bounds_of(backend, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_heads_and_strided_operands(backend: str) -> None:
    """As the network slices them: x, B and C are parts of one tensor."""
    x, dt, A, B, C, D = operands(100, batch=3, heads=8, headdim=64, d_state=64, groups=2)
    together = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2)], dim=-1)
    parts = together.split([x[0, 0].numel(), B[0, 0].numel(), C[0, 0].numel()], dim=-1)
    strided = [part.unflatten(-1, whole.shape[2:]) for part, whole in zip(parts, (x, B, C), strict=True)]
    whole = ssd(x, dt, A, B, C, D, backend=backend)
    assert torch.allclose(ssd(strided[0], dt, A, strided[1], strided[2], D, backend=backend), whole, atol=1e-4)
    compare([x, dt, A, B, C, D], backend, bounds_of(backend, torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_sequences_as_the_temporal_scans_have(backend: str) -> None:
    """128 clips of 64 places both ways: 16,384 sequences of four frames."""
    inputs = operands(4, batch=16_384, heads=2, headdim=64, d_state=64)
    compare(rounded(inputs, torch.bfloat16), backend, bounds_of(backend, torch.bfloat16))


@needs_kernels
def test_more_sequences_than_one_launch_takes() -> None:
    batch = MAX_KERNEL_CHUNKS + 3
    inputs = operands(4, batch=batch, heads=2, headdim=16, d_state=16)
    compare(inputs, "mamba_ssm", bounds_of("mamba_ssm", torch.float32))


@needs_kernels
def test_kernels_without_skip_weights_and_without_gradients() -> None:
    inputs = operands(70, batch=3, heads=8, headdim=64, d_state=64)[:5]
    with torch.inference_mode():
        y = ssd(*inputs, backend="mamba_ssm")
        expected = ssd(*inputs, backend="reference")
    assert (y - expected).norm() <= 3e-3 * expected.norm()


@needs_kernels
def test_kernels_refuse_types_that_they_do_not_have() -> None:
    inputs = [value.double() for value in operands(8, batch=1, heads=2, headdim=16, d_state=16)]
    with pytest.raises(BackendError, match=r"takes float32, bfloat16 or float16, got torch\.float64"):
        ssd(*inputs, backend="mamba_ssm")
    with pytest.raises(BackendError, match="needs tensors on a CUDA device, got cpu"):
        ssd(*(value.cpu() for value in inputs), backend="mamba_ssm")


@pytest.mark.skipif(HAS_KERNELS, reason="says what is said without mamba-ssm")
def test_without_mamba_ssm_a_gpu_works_and_says_how_to_install_it() -> None:
    inputs = operands(1000, batch=3, heads=8, headdim=64, d_state=64)
    with pytest.raises(BackendError, match=r"not installed; to install it: pip install .*medsora\[kernels\]"):
        ssd(*inputs, backend="mamba_ssm")
    assert torch.isfinite(ssd(*rounded(inputs, torch.bfloat16))).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_auto_runs_what_the_table_says_and_float32_keeps_its_bits(length: int) -> None:
    inputs = operands(length, batch=3, heads=8, headdim=64, d_state=64)
    device = inputs[0].device
    assert resolve_backend("auto", length=length, batch=3, device=device, dtype=torch.float32) != "mamba_ssm"
    for dtype in (torch.float32, torch.bfloat16):
        chosen = resolve_backend("auto", length=length, batch=3, device=device, dtype=dtype)
        operands_here = rounded(inputs, dtype)
        assert torch.allclose(ssd(*operands_here), ssd(*operands_here, backend=chosen))
