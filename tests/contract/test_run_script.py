"""The parts of ./run that go wrong on other people's machines: no Python, a moved checkout, a stale process id."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a checkout as set-up looks at."""
    for name in ("run", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(
        [checkout / "run", *arguments], capture_output=True, text=True, check=False, env=environment, timeout=60
    )


def pretend_installed(checkout: Path) -> None:
    """What a finished set-up leaves behind, as far as the script looks."""
    binaries = checkout / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    sums = subprocess.run(
        ["cksum", "pyproject.toml", "constraints.txt"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout
    (checkout / ".venv" / "installed").write_text(f"{checkout}\n{sums}\n")


def test_without_a_usable_python_it_says_so(checkout: Path) -> None:
    result = run(checkout, "setup", PYTHON="no-such-python")
    assert result.returncode == 1
    assert "no usable Python 3.11, 3.12 or 3.13" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_that_is_too_old_or_broken_is_passed_over(checkout: Path) -> None:
    for name, code in (("old", "exit 1"), ("broken", "exec /no/such/program")):
        (checkout / name).write_text(f"#!/bin/sh\n{code}\n")
        (checkout / name).chmod(0o755)
    result = run(checkout, "setup", PYTHON=f"{checkout}/old {checkout}/broken")
    assert result.returncode == 1
    assert "no usable Python" in result.stderr


def test_nothing_is_installed_twice(checkout: Path) -> None:
    pretend_installed(checkout)
    started = time.monotonic()
    # set-up would fail if it looked for a Python
    assert run(checkout, "setup", PYTHON="no-such-python").returncode == 0
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("change", ["pyproject.toml", "constraints.txt", "index", "moved", "python gone"])
def test_what_was_changed_is_installed_anew(checkout: Path, change: str) -> None:
    pretend_installed(checkout)
    variables = {"PYTHON": "no-such-python"}
    if change == "index":
        variables["TORCH_INDEX_URL"] = "https://example.invalid/cpu"
    elif change == "moved":
        stamp = checkout / ".venv" / "installed"
        stamp.write_text("/somewhere/else\n" + stamp.read_text().partition("\n")[2])
    elif change == "python gone":
        (checkout / ".venv" / "bin" / "python").unlink()
    else:
        with (checkout / change).open("a") as file:
            file.write("\n# changed\n")
    assert run(checkout, "setup", **variables).returncode == 1


def test_stop_spares_a_process_that_only_has_the_servers_old_number(checkout: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (checkout / "demo").mkdir()
        (checkout / "demo" / "server.pid").write_text(f"{bystander.pid}\n")
        result = run(checkout, "stop")
        assert (result.returncode, result.stdout) == (0, "No demo server is running.\n")
        assert bystander.poll() is None
        assert not (checkout / "demo" / "server.pid").exists()
    finally:
        bystander.kill()
        bystander.wait()
