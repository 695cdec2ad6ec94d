"""The fused mixer kernel on a GPU against the loop in float64, on the walks that the network has.

Errors are norms relative to the reference's, on operands that are rounded first. In float32 the kernel multiplies in
float32 (not tf32) and its exponentials are good to a few units in the last place, in sums over up to 128 steps: 2e-5.
In bfloat16 the operands of each matrix product and the result are rounded (4e-3 each): 1e-2.
"""

import pytest
import torch

from medsora.config import DenoiserConfig
from medsora.errors import BackendError
from medsora.models.blocks import SpatialMamba, TemporalMamba
from medsora.ops import MixerWeights, Walks, mix
from medsora.ops.mixer import mix_torch

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def weights_of(d_inner: int, d_state: int, headdim: int, taps: int = 4) -> MixerWeights:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    heads, channels = d_inner // headdim, d_inner + 2 * d_state
    return MixerWeights(
        conv_weight=normal(channels, taps) / 2,
        conv_bias=normal(channels) / 10,
        dt_bias=normal(heads) - 3,
        A_log=torch.rand(heads, generator=generator, device="cuda") * 2.77,
        D=normal(heads),
        norm_gain=1 + normal(d_inner) / 10,
    )


def to_dtype(weights: MixerWeights, dtype: torch.dtype) -> MixerWeights:
    names = ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_gain")
    return MixerWeights(**{name: getattr(weights, name).to(dtype) for name in names})


def compare(walks: Walks, weights: MixerWeights, dtype: torch.dtype, *, batch: int = 3) -> None:
    width = 2 * weights.d_inner + 2 * weights.d_state + len(weights.A_log)
    generator = torch.Generator("cuda").manual_seed(1)
    projected = torch.randn(batch, walks.num_tokens, width, generator=generator, device="cuda").to(dtype)
    weights = to_dtype(weights, dtype)
    expected = mix_torch(projected.double(), walks, to_dtype(weights, torch.float64), backend="reference")
    with torch.no_grad():
        got = mix(projected, walks, weights, backend="fused")
    error = ((got.double() - expected).norm() / expected.norm()).item()
    print(dtype, tuple(walks.visits.shape), f"{error:.1e}")
    assert got.dtype == dtype
    assert error <= BOUNDS[dtype]


@pytest.mark.parametrize(
    ("shape", "scan_order", "frames", "dtype"),
    [
        # every combination compiles kernels of its own
        ("small", "spiral", 4, torch.float32),
        ("small", "released", 4, torch.bfloat16),
        ("small", "spiral", 6, torch.float32),
        ("small", "spiral", 16, torch.float32),
        ("base", "spiral", 4, torch.bfloat16),
        ("base", "spiral", 6, torch.bfloat16),
        ("base", "spiral", 16, torch.bfloat16),
    ],
)
def test_planes_and_frames_equal_the_reference(shape: str, scan_order: str, frames: int, dtype: torch.dtype) -> None:
    d_inner, d_state = {"small": (512, 64), "base": (1024, 128)}[shape]
    config = DenoiserConfig(hidden_size=64, depth=1, scan_order=scan_order, temporal_directions=2)
    weights = weights_of(d_inner, d_state, 64)
    device = torch.device("cuda")
    planes = SpatialMamba(config, index=5).walks(frames, 8, 8, device)
    for walks in (*planes, *TemporalMamba(config).walks(frames, 8, 8, device)):
        compare(walks, weights, dtype)


@pytest.mark.parametrize(("d_state", "headdim", "taps"), [(16, 16, 4), (32, 64, 2), (64, 32, 3)])
def test_other_sizes(d_state: int, headdim: int, taps: int) -> None:
    config = DenoiserConfig(hidden_size=64, depth=1)
    (one_way,) = TemporalMamba(config).walks(5, 3, 7, torch.device("cuda"))  # tiles of sequences that do not fill them
    compare(one_way, weights_of(128, d_state, headdim, taps), torch.float32)


def test_every_output_is_written_whatever_was_there() -> None:
    config = DenoiserConfig(hidden_size=64, depth=1)
    walks = SpatialMamba(config, index=0).walks(6, 8, 8, torch.device("cuda"))[0]
    weights = weights_of(128, 32, 32)
    projected = torch.randn(2, walks.num_tokens, 2 * 128 + 2 * 32 + 4, device="cuda")
    torch.cuda.empty_cache()
    poison = torch.full((64 * 2**20,), float("nan"), device="cuda")
    del poison  # the allocator hands this memory out again
    with torch.no_grad():
        assert torch.isfinite(mix(projected, walks, weights, backend="fused")).all()


def test_what_it_cannot_take_is_refused_by_name_and_done_otherwise_by_auto() -> None:
    long_walk = Walks(torch.arange(300)[None, None]).to(torch.device("cuda"))
    weights = weights_of(128, 32, 32)
    projected = torch.randn(1, 300, 2 * 128 + 2 * 32 + 4, device="cuda")
    with torch.no_grad():
        with pytest.raises(BackendError, match="sequences of at most 128, got 300"):
            mix(projected, long_walk, weights, backend="fused")
        assert torch.isfinite(mix(projected, long_walk, weights)).all()
    with pytest.raises(BackendError, match="no gradients"):
        mix(projected.requires_grad_(), long_walk, weights, backend="fused")
    mix(projected, long_walk, weights).sum().backward()
    assert projected.grad is not None
