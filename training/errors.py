"""The errors that the training module raises for its callers.

MedsoraError (medsora.errors)
  TrainingError        a run that cannot start or go on; the message says what to do
    DataError          a manifest or clip that cannot be used; names file, row and column
    NonFiniteError     a loss or gradient that is not finite; names the step
"""

from medsora.errors import MedsoraError

__all__ = ["DataError", "NonFiniteError", "TrainingError"]


class TrainingError(MedsoraError):
    """A training run that cannot start or cannot go on."""


class DataError(TrainingError):
    """A clip manifest or a clip that cannot be used for training."""


class NonFiniteError(TrainingError):
    """A loss or gradient norm that became NaN or infinite.

    Args:
        step: First step (from 0) at which it happened.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(
            f"loss or gradient norm is not finite at step {step}; the newest saved checkpoint is from before "
            "that step: lower optimizer.learning_rate, or train with loop.precision=fp32"
        )
