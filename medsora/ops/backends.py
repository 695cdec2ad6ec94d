"""Which back end of an operator runs: names, what this machine can run, and the measured table behind ``auto``.

``auto_backends.json`` holds runs of ``benchmarks/ssd.py``: for each operator and device, a grid of measured lengths
and batches with the back ends ranked, the fastest first. ``auto`` rounds length and batch up to the nearest measured
ones (beyond the grid: down to its edge) and takes the first back end of that row that can run here. A GPU that was
not measured goes by the rows of the first one that was; any other device by those of the CPU.
"""

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

import torch

from medsora.errors import BackendError

__all__ = [
    "INSTALL_KERNELS",
    "OPERATORS",
    "TABLE_FILE",
    "TableRow",
    "kernels_problem",
    "load_kernels",
    "not_traced",
    "resolve_backend",
]

TABLE_FILE = Path(__file__).with_name("auto_backends.json")
INSTALL_KERNELS = "pip install --no-build-isolation 'medsora[kernels]'"
OPERATORS = {
    "ssd": ("reference", "dual", "chunked", "mamba_ssm"),
    "selective_scan": ("reference", "chunked", "mamba_ssm"),
    "mixer": ("reference", "dual", "chunked", "mamba_ssm", "fused"),
}
"""Back ends of each operator by name; all but the last of ``mixer`` are those of the ``ssd`` inside it."""

# In float32 the SSD kernels multiply in tf32 (10 bits): whoever asks for float32 must ask for that by name.
KERNEL_DTYPES = {
    "ssd": (torch.bfloat16, torch.float16),
    "selective_scan": (torch.bfloat16, torch.float16, torch.float32),
    "mixer": (torch.bfloat16, torch.float16),
}
CPU = torch.device("cpu")

logger = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])


def not_traced(function: Function) -> Function:
    """Decorate a function of CUDA tensors that a compiler must call as it is, between two graphs."""
    # where it cannot run, it is left as it is: the decorator loads the compiler, which takes 2 s
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return function
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def constant_when_traced(function: Function) -> Function:
    """Decorate a function that a compiler calls while tracing, and whose answer it takes for a constant."""
    # all that torch.compiler.assume_constant_result does, after it has loaded the compiler
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class TableRow:
    """Back ends at one measured length and batch, the fastest first."""

    length: int
    batch: int
    backends: tuple[str, ...]


def read_table(path: Path) -> dict[tuple[str, str], dict[str, tuple[TableRow, ...]]]:
    """Rows in order of length and batch, by (operator, device type) and then by name of the device."""
    table: dict[tuple[str, str], dict[str, tuple[TableRow, ...]]] = {}
    for run in json.loads(path.read_text())["runs"]:
        rows = [TableRow(row["length"], row["batch"], tuple(row["backends"])) for row in run["rows"]]
        rows.sort(key=lambda row: (row.length, row.batch))
        table.setdefault((run["operator"], run["device"]), {})[run["name"]] = tuple(rows)
    return table


_TABLE = read_table(TABLE_FILE)


@constant_when_traced
def _measured(operator: str, device_type: str, device_index: int | None) -> tuple[tuple[int, int], ...]:
    """Length and batch of the rows that ``auto`` goes by on a device, in order."""
    return tuple((row.length, row.batch) for row in _rows(operator, device_type, device_index))


@cache
def _rows(operator: str, device_type: str, device_index: int | None) -> tuple[TableRow, ...]:
    by_name = _TABLE.get((operator, device_type))
    if by_name is None and operator == "mixer":
        return _rows("ssd", device_type, device_index)  # a mixer is as fast as the scan inside it
    by_name = by_name or _TABLE[operator, "cpu"]
    if device_type == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device_index)
        if name in by_name:
            return by_name[name]
    return next(iter(by_name.values()))


def resolve_backend(
    name: str,
    *,
    length: int,
    batch: int = 1,
    operator: str = "ssd",
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Name of the back end that runs: ``auto`` is decided by the measured table, any other is checked.

    Pure Python on shapes, so that a compiler evaluates it while tracing; it guards on ranges, not on exact sizes.

    Args:
        name: ``auto``, or one of the operator's back ends.
        length: Steps of a sequence.
        batch: Number of sequences.
        operator: A key of :data:`OPERATORS`.
        device: Where the operands are.
        dtype: Of the operator's inputs. In float32 ``auto`` takes no kernel that computes in less.

    Raises:
        BackendError: No such back end (the message lists them), or mamba-ssm is asked for and not installed.
    """
    if name != "auto":
        if name not in OPERATORS[operator]:
            raise BackendError(f"back end must be one of auto, {', '.join(OPERATORS[operator])}; got {name!r}")
        if name == "mamba_ssm":
            _require_kernels()
        return name
    measured = _measured(operator, device.type, device.index)
    return _first_usable(operator, device.type, device.index, _nearest(measured, length, batch), dtype)


def _nearest(measured: tuple[tuple[int, int], ...], length: int, batch: int) -> int:
    """Index of the row: the smallest measured length that is enough, then batch; else the largest."""
    row_length = measured[-1][0]
    for candidate, _ in measured:
        if length <= candidate:
            row_length = candidate
            break
    nearest = 0
    for index, (candidate, row_batch) in enumerate(measured):
        if candidate == row_length:
            nearest = index
            if batch <= row_batch:
                break
    return nearest


@constant_when_traced
def _first_usable(operator: str, device_type: str, device_index: int | None, row_index: int, dtype: torch.dtype) -> str:
    return _pick(operator, device_type, device_index, row_index, dtype)


@cache  # also: says what it picked once for each row
def _pick(operator: str, device_type: str, device_index: int | None, row_index: int, dtype: torch.dtype) -> str:
    row = _rows(operator, device_type, device_index)[row_index]
    can_take_kernels = device_type == "cuda" and dtype in KERNEL_DTYPES[operator]
    for backend in row.backends:
        if backend != "mamba_ssm" or (can_take_kernels and kernels_problem() is None):
            place = f"{device_type} length {row.length} batch {row.batch}"
            logger.info("%s: back end %s by the measured row %s", operator, backend, place)
            return backend
    raise BackendError(f"{TABLE_FILE.name} has no back end of {operator} that runs here: {row}")


def load_kernels(module: str) -> ModuleType:
    """Import a module of mamba-ssm, without what it warns of.

    Raises:
        BackendError: It is not installed, or cannot be imported here; with the command that installs it.
    """
    _require_kernels()
    return _import_quietly(module)


@constant_when_traced
def _require_kernels() -> bool:
    problem = kernels_problem()
    if problem is not None:
        raise BackendError(f"back end mamba_ssm cannot run here: {problem}; to install it: {INSTALL_KERNELS}")
    return True


@cache
def kernels_problem() -> str | None:
    """Why the kernels of mamba-ssm cannot be used on this machine; None if they can."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    try:
        _import_quietly("mamba_ssm")
    except ModuleNotFoundError as error:
        return f"the package {error.name} is not installed"
    except Exception as error:  # a build for another torch or driver fails in many ways
        return f"mamba-ssm cannot be imported ({type(error).__name__}: {error})"
    return None


def _import_quietly(module: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(module)
