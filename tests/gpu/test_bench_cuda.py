"""`medsora bench` on a GPU: its clock, its memory, and rates that a GPU can have."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    # torch's compiler warns of what it imports; were that an error, nothing would compile
    pytest.mark.filterwarnings(r"ignore:::torch\."),
    pytest.mark.usefixtures("no_shape_checks"),
]


def test_figures_of_small_are_those_of_a_gpu() -> None:
    pytest.importorskip("av", reason="the pipeline needs PyAV")
    from medsora.bench import matrix_rate, measure, preset_pipeline

    pipeline = preset_pipeline("small", batch_sizes=(1, 64))
    assert pipeline.is_compiled
    assert (pipeline.device.type, pipeline.dtype) == ("cuda", torch.bfloat16)
    rate = matrix_rate(pipeline.device, pipeline.dtype)
    assert 1e12 < rate < 1e16
    one, many = (
        measure(pipeline, batch=batch, num_frames=16, height=128, width=128, num_steps=30, rate=rate, repeats=5)
        for batch in (1, 64)
    )
    weights_mib = 2 * sum(weight.numel() for weight in pipeline.denoiser.parameters()) / 2**20
    for row in (one, many):
        assert row.error is None
        assert row.share_of_matrix_rate is not None
        assert 0 < row.share_of_matrix_rate < 1
        assert row.peak_memory_mib is not None
        assert row.peak_memory_mib > weights_mib
    assert one.clips_per_second is not None
    assert many.clips_per_second is not None
    assert many.clips_per_second > one.clips_per_second
