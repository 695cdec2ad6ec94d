"""The errors that the training module raises for its callers.

MedsoraError (medsora.errors)
  TrainingError        a run that cannot start or go on; the message says what to do
    DataError          a manifest or clip that cannot be used; names file, row and column
    NonFiniteError     a loss or gradient that is not finite; names the step and its clips
"""

from collections.abc import Sequence

from medsora.errors import MedsoraError

__all__ = ["DataError", "NonFiniteError", "TrainingError"]

NAMED = 8
"""Clips that a message names before it says how many more there are."""


class TrainingError(MedsoraError):
    """A training run that cannot start or cannot go on."""


class DataError(TrainingError):
    """A clip manifest or a clip that cannot be used for training."""


class NonFiniteError(TrainingError):
    """A loss or gradient norm that became NaN or infinite.

    Args:
        step: First step (from 0) at which it happened.
        batch: Clips and frames of that step's batch; of the processes whose loss it was, if not of all.
    """

    def __init__(self, step: int, batch: Sequence[str] = ()) -> None:
        self.step, self.batch = step, tuple(batch)
        named = "; ".join(self.batch[:NAMED])
        rest = f" and {len(self.batch) - NAMED} more, which log.jsonl lists" if len(self.batch) > NAMED else ""
        super().__init__(
            f"loss or gradient norm is not finite at step {step}, on {named or 'an unnamed batch'}{rest}; the newest "
            "saved checkpoint is from before that step: look at these clips, lower optimizer.learning_rate, or train "
            "with loop.precision=fp32"
        )
