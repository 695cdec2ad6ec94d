"""A short run of schemathesis over the whole API; ``./run fuzz`` is the long one."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).parents[1] / "fuzz_api.py"


def test_every_endpoint_is_as_its_document_says() -> None:
    options = ["--max-examples", "5", "--continue-on-failure", "--no-color", "--seed", "20261125"]
    run = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "No issues found" in run.stdout
    for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
        assert f"✅ {phase}" in run.stdout, run.stdout[-2000:]
