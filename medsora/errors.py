"""The errors that MedSora raises for its callers.

MedsoraError
  RequestError         a generation request the loaded checkpoint cannot honour
  CheckpointError      a checkpoint that is damaged, altered or of another format
  BackendError         an operator back end that was asked for and is not available here
  VideoError           a video file that cannot be read or written
  GenerationCanceled   raised by an ``on_step`` callback to stop a running generation
"""

from collections.abc import Sequence


class MedsoraError(Exception):
    """Base of everything below: catch it to catch all of MedSora's own errors."""


class RequestError(MedsoraError, ValueError):
    """A request field that the checkpoint cannot honour; nothing is ever adjusted silently.

    Args:
        field: Name of the offending field, as in :class:`medsora.request.GenerationRequest`.
        problem: What was given and why it does not do, as a sentence without a final stop.
        allowed: The allowed values, in words, or empty when they cannot be listed.
    """

    def __init__(self, field: str, problem: str, allowed: Sequence[object] = ()) -> None:
        self.field = field
        self.allowed = tuple(str(value) for value in allowed)
        self.message = f"{field}: {problem}"
        if self.allowed:
            self.message += f"; allowed: {', '.join(self.allowed)}"
        super().__init__(self.message)


class CheckpointError(MedsoraError):
    """A checkpoint directory that is damaged, altered, incomplete or of another format."""


class BackendError(MedsoraError):
    """An operator back end that is unknown, or not available on this machine."""


class VideoError(MedsoraError):
    """A video file that cannot be read or written; the message names the path."""


class GenerationCanceled(MedsoraError):  # noqa: N818 - it is a decision, not a failure
    """Raise it from ``on_step`` to stop a generation at once; it reaches the caller unchanged."""
