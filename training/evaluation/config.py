"""How much an evaluation samples, resamples and shows. Torch-free."""

from dataclasses import dataclass

__all__ = ["EvaluationConfig"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How much is sampled, resampled and shown."""

    num_samples: int = 512
    """Labels in proportion to the training windows, so that the whole is comparable with the whole split."""
    batch_size: int = 64
    seed: int = 1_000_000
    """Of the first sample; each has the next one."""
    dtype: str = "float32"
    """Of the sampler; what a CPU uses."""
    num_inference_steps: int | None = None
    """None is the checkpoint's default, as in the two below."""
    guidance_scale: float | None = None
    sampler: str | None = None
    resamples: int = 200
    """Of the bootstrap; 0 leaves the intervals out."""
    windows_of_a_patient: int = 32
    """Real clips of each training patient that are compared with the others', to set the threshold for copies."""
    planted: int = 64
    """Training windows of which copies are planted."""
    sheet_clips: int = 3
    """Clips a label in the report."""
    sheet_columns: int = 8
