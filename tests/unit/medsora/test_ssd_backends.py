"""The table behind ``auto``, and what is said where the kernels are not."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from medsora.errors import BackendError
from medsora.ops import OPERATORS, backends, resolve_backend
from medsora.ops.backends import TABLE_FILE, read_table

CUDA = torch.device("cuda", 0)
RUNS = [
    {
        "operator": "ssd",
        "device": "cpu",
        "name": "some cores",
        "rows": [{"length": 64, "batch": 8, "backends": ["dual"]}],
    },
    {
        "operator": "ssd",
        "device": "cuda",
        "name": "First GPU",
        "rows": [
            {"length": 512, "batch": 64, "backends": ["mamba_ssm", "chunked", "dual"]},
            {"length": 64, "batch": 64, "backends": ["dual", "mamba_ssm"]},
            {"length": 512, "batch": 4, "backends": ["chunked", "dual"]},
        ],
    },
    {
        "operator": "ssd",
        "device": "cuda",
        "name": "Second GPU",
        "rows": [{"length": 64, "batch": 64, "backends": ["chunked"]}],
    },
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str | None]]:
    """A machine with a GPU as far as the table is concerned; the dictionary says which, and what ails the kernels."""
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"runs": RUNS}))
    machine: dict[str, str | None] = {"name": "First GPU", "problem": None}
    monkeypatch.setattr(backends, "_TABLE", read_table(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: machine["name"])
    monkeypatch.setattr(backends, "kernels_problem", lambda: machine["problem"])
    forget_choices()
    yield machine
    forget_choices()


def forget_choices() -> None:
    backends._rows.cache_clear()
    backends._pick.cache_clear()


def auto(length: int, batch: int, *, device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16) -> str:
    forget_choices()
    return resolve_backend("auto", length=length, batch=batch, device=device, dtype=dtype)


def test_on_a_cpu_auto_changes_where_it_was_measured_to_be_faster() -> None:
    assert resolve_backend("auto", length=1) == "dual"
    assert resolve_backend("auto", length=128, batch=1000) == "dual"
    assert resolve_backend("auto", length=129) == "chunked"
    assert resolve_backend("auto", length=100_000) == "chunked"
    assert resolve_backend("auto", operator="selective_scan", length=7) == "chunked"


def test_names_are_checked() -> None:
    for name in ("reference", "dual", "chunked"):
        assert resolve_backend(name, length=4) == name
    with pytest.raises(BackendError, match="one of auto, reference, dual, chunked, mamba_ssm; got 'fast'"):
        resolve_backend("fast", length=4)
    with pytest.raises(BackendError, match="one of auto, reference, chunked, mamba_ssm; got 'dual'"):
        resolve_backend("dual", operator="selective_scan", length=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_kernels_asked_for_where_they_cannot_run_are_refused_with_the_command() -> None:
    with pytest.raises(BackendError, match=r"needs a CUDA device; to install it: pip install .*'medsora\[kernels\]'"):
        resolve_backend("mamba_ssm", length=4)


def test_length_and_batch_are_rounded_up_and_held_at_the_edge(gpu: dict[str, str | None]) -> None:
    assert auto(1, 1) == auto(64, 64) == auto(64, 10_000) == "dual"
    assert auto(65, 4) == auto(512, 1) == "chunked"
    assert auto(65, 5) == auto(512, 64) == auto(9999, 9999) == "mamba_ssm"


def test_without_the_kernels_the_next_best_runs(gpu: dict[str, str | None]) -> None:
    gpu["problem"] = "the package mamba_ssm is not installed"
    assert auto(512, 64) == "chunked"
    with pytest.raises(BackendError, match="not installed; to install it: pip install"):
        resolve_backend("mamba_ssm", length=512)
    gpu["problem"] = None
    assert resolve_backend("mamba_ssm", length=512) == "mamba_ssm"


def test_float32_keeps_its_bits_unless_asked_otherwise(gpu: dict[str, str | None]) -> None:
    assert auto(512, 64, dtype=torch.float32) == auto(512, 64, dtype=torch.float64) == "chunked"
    assert auto(512, 64, dtype=torch.float16) == "mamba_ssm"


def test_a_gpu_goes_by_its_own_rows_else_by_the_first(gpu: dict[str, str | None]) -> None:
    gpu["name"] = "Second GPU"
    assert auto(4, 1) == "chunked"
    gpu["name"] = "Unknown GPU"
    assert auto(4, 1) == "dual"


def test_what_was_not_measured_goes_by_the_cpu(gpu: dict[str, str | None]) -> None:
    assert auto(4, 1, device=torch.device("mps")) == "dual"
    assert auto(4, 1, device=torch.device("cpu")) == "dual"


def test_a_row_of_nothing_that_runs_is_an_error(gpu: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (backends.TableRow(4, 1, ("mamba_ssm",)),)
    monkeypatch.setattr(backends, "_TABLE", {("ssd", "cpu"): {"here": rows}})
    with pytest.raises(BackendError, match="no back end of ssd"):
        auto(4, 1, device=torch.device("cpu"))


def test_the_choice_is_said_once(gpu: dict[str, str | None], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="medsora.ops.backends"):
        for length in (300, 301, 512):
            resolve_backend("auto", length=length, batch=64, device=CUDA, dtype=torch.bfloat16)
    assert [record.getMessage() for record in caplog.records] == [
        "ssd: back end mamba_ssm by the measured row cuda length 512 batch 64"
    ]


def test_a_broken_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for error, said in (
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "package triton is not installed"),
        (ImportError("undefined symbol"), r"cannot be imported \(ImportError: undefined symbol\)"),
        (RuntimeError("no driver"), r"cannot be imported \(RuntimeError: no driver\)"),
    ):
        monkeypatch.setattr(backends, "import_module", lambda name, error=error: fail(error))
        backends.kernels_problem.cache_clear()
        with pytest.raises(BackendError, match=said):
            backends.load_kernels("mamba_ssm.ops.triton.ssd_combined")
    backends.kernels_problem.cache_clear()


def test_the_committed_table_is_whole() -> None:
    """Every operator has rows for the CPU, every row a ranking of known back ends that ends with one that runs."""
    table = read_table(TABLE_FILE)
    assert {operator for operator, device in table if device == "cpu"} == set(OPERATORS)
    for (operator, device), by_name in table.items():
        assert device in ("cpu", "cuda")
        for name, rows in by_name.items():
            assert name
            assert rows
            for row in rows:
                assert len(set(row.backends)) == len(row.backends)
                assert set(row.backends) < set(OPERATORS[operator])
                assert set(row.backends) - {"mamba_ssm"}
                assert device == "cuda" or "mamba_ssm" not in row.backends


def test_the_committed_rankings_are_the_measured_ones() -> None:
    for run in json.loads(TABLE_FILE.read_text())["runs"]:
        for row in run["rows"]:
            forward = {name: times["forward"] for name, times in row["milliseconds"].items()}
            assert set(forward) == set(row["backends"])
            # a simpler form may stand before one that is faster by no more than the spread of a measurement
            assert forward[row["backends"][0]] <= 1.1 * min(forward.values())


COMPILES = """
import torch
from torch._dynamo.testing import CompileCounter
from medsora.ops import selective_scan, ssd

def operands(batch, length):
    return [torch.randn(batch, length, 2, 4), torch.rand(batch, length, 2), -torch.rand(2),
            torch.randn(batch, length, 1, 3), torch.randn(batch, length, 1, 3)]

counter = CompileCounter()
compiled = torch.compile(ssd, fullgraph=True, backend=counter)
for batch in range(2, 8):
    inputs = operands(batch, 20)
    assert torch.equal(compiled(*inputs), ssd(*inputs, backend="dual"))
assert counter.frame_count <= 2, "a graph for every batch"
inputs = operands(3, 200)
assert torch.equal(compiled(*inputs), ssd(*inputs, backend="chunked"))

x, dt, A, B, C = operands(2, 40)
inputs = [x[:, :, 0], dt[:, :, :1].expand(-1, -1, 4).contiguous(), -torch.rand(4, 3), B[:, :, 0], C[:, :, 0]]
inputs = [value.requires_grad_() for value in inputs]
compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
assert torch.allclose(compiled(*inputs), selective_scan(*inputs))
"""


def test_compiled_without_a_break_and_not_again_for_every_batch() -> None:
    # in a process of its own: the checks of shapes that the tests run with cannot be compiled
    command = [sys.executable, "-W", "error", "-c", COMPILES]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
