"""How torch's CPU threads wait."""

import os
import subprocess
import sys

import pytest

from medsora.threads import let_idle_threads_sleep


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    let_idle_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == after


def test_openmp_takes_it_when_torch_is_imported_afterwards() -> None:
    program = "from medsora.threads import let_idle_threads_sleep as s; s(); import torch; torch.zeros(9).sum()"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"}
    shown = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown
