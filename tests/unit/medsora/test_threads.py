"""How threads wait."""

import os
import subprocess
import sys

import pytest

from medsora.threads import let_idle_threads_sleep, take_short_turns


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_waiting_threads_sleep_soon_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: dict[str, str]
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    monkeypatch.setattr(os, "environ", before.copy())
    let_idle_threads_sleep()
    assert {name: os.environ[name] for name in names if name in os.environ} == after


def test_openmp_takes_it_when_torch_is_imported_afterwards() -> None:
    program = "from medsora.threads import let_idle_threads_sleep as s; s(); import torch; torch.zeros(9).sum()"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"}
    shown = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stderr
    assert "GOMP_SPINCOUNT = '1000'" in shown


def test_a_thread_that_calls_out_of_python_has_the_interpreter_back_soon() -> None:
    before = sys.getswitchinterval()
    try:
        take_short_turns()
        assert sys.getswitchinterval() <= 0.001
    finally:
        sys.setswitchinterval(before)
