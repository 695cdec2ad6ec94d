"""The one place that loads TorchScript: networks that are published in no other form, from a path that the user gives.

An archive holds tensors, and the network's code in TorchScript's own small language. Loading one runs no Python, but
calling it runs torch's operators, a few of which can read and write files: take archives from a source that you trust.
The report names the hash of each.
"""

import warnings
from pathlib import Path

import torch

from training.errors import TrainingError

__all__ = ["argument_names", "load_torchscript"]


def load_torchscript(path: Path, *, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """Load an archive, in evaluation mode.

    Raises:
        TrainingError: Missing, or no TorchScript.
    """
    if not path.is_file():
        raise TrainingError(f"{path} is no file")
    try:
        with warnings.catch_warnings():
            # torch advises exporting such networks anew: these are others', and this is the form they have
            warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
            module: torch.jit.ScriptModule = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
    except Exception as error:  # torch raises several unrelated types for a damaged file
        reason = str(error).strip().splitlines()[0].partition(". ")[0]  # then advice for users of torch.load
        raise TrainingError(f"{path} is no TorchScript archive that this torch can read: {reason}") from error
    module.eval()
    return module


def argument_names(module: torch.jit.ScriptModule) -> list[str]:
    """Names of the arguments of the network's ``forward``, but for itself."""
    schema = getattr(module.forward, "schema")  # noqa: B009 - typed as a plain function
    return [str(argument.name) for argument in schema.arguments][1:]
