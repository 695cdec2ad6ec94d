"""Milliseconds of the operators' back ends by length and batch: the table that ``auto`` goes by.

    python benchmarks/ssd.py [--operator ssd] [--device auto] [--quick] [--forward-only] [--write-table]

Every back end that runs here is timed at each length and batch (number of sequences), forward and forward with
backward, as the sum over the shapes of the ``small`` and the ``base`` denoiser; in bfloat16 on a GPU, in float32 on a
CPU. ``mixer`` is the scan with convolution, gate and norm, in one walk. The ranking is by the forward time, since a
clip takes many steps; of back ends within 5 per cent the simplest comes first. --write-table puts the run into
medsora/ops/auto_backends.json, in place of an earlier one of the same operator and device.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medsora.errors import BackendError
from medsora.ops import OPERATORS, MixerWeights, Walks, mix, resolve_backend, selective_scan, ssd
from medsora.ops.backends import TABLE_FILE
from medsora.ops.mixer import MAX_FUSED_LENGTH
from medsora.ops.ssd import CHUNK_SIZE
from medsora.timing import median_seconds

# heads, width of a head, state; and channels, state
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "ssd": ((8, 64, 64), (16, 64, 128)),
    "mixer": ((8, 64, 64), (16, 64, 128)),
    "selective_scan": ((512, 16), (1024, 16)),
}
LENGTHS = {"ssd": (4, 32, 64, 128, 256, 1024), "mixer": (4, 32, 64, 128, 256), "selective_scan": (64, 512, 4096)}
BATCHES = {"ssd": (16, 512, 16384), "mixer": (16, 512, 16384), "selective_scan": (1, 16, 256)}
MAX_TOKENS = {"ssd": 2**19, "mixer": 2**19, "selective_scan": 2**17}
CPU_LENGTHS = {
    "ssd": (4, 32, 64, 128, 256, 512, 1024),
    "mixer": (4, 32, 64, 128, 256, 512),
    "selective_scan": (64, 512, 2048),
}
SEQUENCES = 64
"""Sequences of a clip, at most: as the temporal scans of 128x128 pixels have."""
MAX_MASK_BYTES = 8 * 2**30
SPREAD = 1.05


def main() -> None:
    options = parse_options()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device = torch.device(name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backends = available(options.operator, device)
    print(f"{options.operator} on {device_name(device)}, {dtype}: {', '.join(backends)}; forward / with backward, ms")
    run: dict[str, Any] = {
        "operator": options.operator,
        "device": device.type,
        "name": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "shapes": [list(shape) for shape in SHAPES[options.operator]],
        "rows": [],
    }
    for length, batch in grid(options.operator, device, quick=options.quick):
        row = measured_row(
            options.operator,
            backends,
            length,
            batch,
            device,
            dtype,
            repeats=3 if options.quick else 11,
            forward_only=options.forward_only,
        )
        times = "  ".join(
            f"{backend} {' / '.join(f'{value:.3f}' for value in row['milliseconds'][backend].values())}"
            for backend in row["backends"]
        )
        print(f"length {length:5d} batch {batch:6d}   {times}", flush=True)
        run["rows"].append(row)
        if options.write_table:  # row by row: what was measured stays, should the time run out
            write_table(run)
    if options.write_table:
        print(f"written: {TABLE_FILE}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", choices=tuple(OPERATORS), default="ssd")
    parser.add_argument("--device", default="auto", help="default: a GPU when there is one")
    parser.add_argument("--quick", action="store_true", help="few lengths and repeats: shows that it works")
    parser.add_argument("--write-table", action="store_true", help=f"update {TABLE_FILE.name}")
    parser.add_argument("--forward-only", action="store_true", help="leave out the backward pass")
    options = parser.parse_args()
    if options.quick and options.write_table:
        parser.error("--quick measures too little for --write-table")
    return options


def available(operator: str, device: torch.device) -> list[str]:
    """Back ends that run here, the simplest first; not the reference, which is no choice of ``auto``."""
    found = []
    for backend in OPERATORS[operator]:
        try:
            resolve_backend(backend, length=1, operator=operator)
        except BackendError as error:
            print(f"left out: {error}")
        else:
            found.append(backend)
    left_out = {"reference"} if device.type == "cuda" else {"reference", "mamba_ssm", "fused"}
    return [backend for backend in found if backend not in left_out]


def grid(operator: str, device: torch.device, *, quick: bool) -> list[tuple[int, int]]:
    """Lengths and batches to measure. On a CPU every row has the same number of tokens: what counts there."""
    if device.type == "cpu":
        tokens = 512 if quick else 2048
        lengths = CPU_LENGTHS[operator][::2] if quick else CPU_LENGTHS[operator]
        return [(length, max(1, tokens // length)) for length in lengths]
    lengths = LENGTHS[operator][::3] if quick else LENGTHS[operator]
    cells = [(length, batch) for length in lengths for batch in BATCHES[operator]]
    return [(length, batch) for length, batch in cells if length * batch <= MAX_TOKENS[operator]]


def measured_row(
    operator: str,
    backends: list[str],
    length: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int,
    forward_only: bool,
) -> dict[str, Any]:
    milliseconds: dict[str, dict[str, float]] = {}
    for backend in backends:
        if not is_worth_measuring(operator, backend, length, batch):
            continue
        forward = backward = 0.0
        for shape in SHAPES[operator]:
            run, leaves = operation(operator, backend, shape, length, batch, device, dtype)
            with torch.no_grad():
                forward += median_seconds(run, device, repeats=repeats)
            if not forward_only and backend != "fused":
                backward += median_seconds(partial(with_backward, run, leaves), device, repeats=repeats)
        milliseconds[backend] = {"forward": round(1000 * forward, 4)}
        if not forward_only and backend != "fused":
            milliseconds[backend]["forward_backward"] = round(1000 * backward, 4)
    return {"length": length, "batch": batch, "backends": ranking(milliseconds), "milliseconds": milliseconds}


def with_backward(run: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    y = run()
    # a gradient of its own memory, as the next layer gives; that of y.sum() is one number for all, and slow to multiply
    return torch.autograd.grad(y, leaves, torch.ones_like(y))


def is_worth_measuring(operator: str, backend: str, length: int, batch: int) -> bool:
    if operator == "selective_scan":
        return True
    if backend == "fused":
        return length <= MAX_FUSED_LENGTH
    if backend == "chunked" and length <= CHUNK_SIZE:
        return False  # one chunk is the dual form itself
    # the mask is float32, and the backward pass keeps several of its size
    return backend != "dual" or 4 * batch * max(shape[0] for shape in SHAPES["ssd"]) * length**2 <= MAX_MASK_BYTES


def operation(
    operator: str,
    backend: str,
    shape: tuple[int, ...],
    length: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    def inputs(*sizes: int) -> Tensor:
        return torch.randn(batch, length, *sizes, device=device).to(dtype)

    def steps(*sizes: int) -> Tensor:
        return torch.rand(batch, length, *sizes, device=device) * 0.1

    if operator == "mixer":
        heads, headdim, state = shape
        sequences = min(batch, SEQUENCES)
        walks = Walks(torch.arange(sequences * length).reshape(1, sequences, length)).to(device)
        channels = heads * headdim + 2 * state
        weights = [
            torch.randn(size, device=device).to(dtype)
            for size in ((channels, 4), (channels,), (heads,), (heads,), (heads,), (heads * headdim,))
        ]
        projected = inputs(2 * heads * headdim + 2 * state + heads).reshape(batch // sequences, walks.num_tokens, -1)
        leaves = [projected.requires_grad_(), *(weight.requires_grad_() for weight in weights)]
        return lambda: mix(projected, walks, MixerWeights(*weights), backend=backend), leaves
    if operator == "ssd":
        heads, headdim, state = shape
        decay, skip = -torch.rand(heads, device=device) - 0.1, torch.randn(heads, device=device)
        leaves = [inputs(heads, headdim), steps(heads), decay, inputs(1, state), inputs(1, state), skip]
    else:
        channels, state = shape
        decay, skip = -torch.rand(channels, state, device=device) - 0.1, torch.randn(channels, device=device)
        leaves = [inputs(channels), steps(channels), decay, inputs(state), inputs(state), skip]
    for leaf in leaves:
        leaf.requires_grad_()
    function = ssd if operator == "ssd" else selective_scan
    return lambda: function(*leaves, backend=backend), leaves


def ranking(milliseconds: dict[str, dict[str, float]]) -> list[str]:
    """Back ends by forward time; among those within the spread of the fastest left, the simplest (first given)."""
    left = {backend: times["forward"] for backend, times in milliseconds.items()}
    ranked = []
    while left:
        fastest = min(left.values())
        chosen = next(backend for backend, value in left.items() if value <= SPREAD * fastest)
        ranked.append(chosen)
        del left[chosen]
    return ranked


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"


def write_table(run: dict[str, Any]) -> None:
    runs = json.loads(TABLE_FILE.read_text())["runs"]

    def is_replaced(old: dict[str, Any]) -> bool:
        # one run stands for all CPUs; of GPUs, each has its own
        same_kind = (old["operator"], old["device"]) == (run["operator"], run["device"])
        return same_kind and (run["device"] == "cpu" or old["name"] == run["name"])

    TABLE_FILE.write_text(format_table([old for old in runs if not is_replaced(old)] + [run]))


def format_table(runs: list[dict[str, Any]]) -> str:
    """JSON with one line a row, so that a change of the table can be read."""
    texts = []
    for run in runs:
        head = "".join(f'      "{key}": {json.dumps(value)},\n' for key, value in run.items() if key != "rows")
        rows = ",\n".join(f"        {json.dumps(row)}" for row in run["rows"])
        texts.append(f'    {{\n{head}      "rows": [\n{rows}\n      ]\n    }}')
    return '{\n  "runs": [\n' + ",\n".join(texts) + "\n  ]\n}\n"


if __name__ == "__main__":
    main()
