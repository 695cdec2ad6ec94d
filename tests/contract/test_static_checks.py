"""What `./run lint` runs, and that it sees what it is for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bandit(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bandit", "--quiet", "--configfile", str(ROOT / "pyproject.toml"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_bandit_is_part_of_every_lint() -> None:
    checks = (ROOT / "run").read_text().split("static_checks() {")[1].split("\n}")[0]
    assert '"$BIN/bandit" --quiet --configfile pyproject.toml --recursive medsora server training docker' in checks


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\n\nsubprocess.run(input(), shell=True)\n",
        "import pickle\n\npickle.loads(b'')\n",
        "import hashlib\n\nhashlib.md5(b'')\n",
        "import ssl\n\nssl._create_unverified_context()\n",
    ],
)
def test_bandit_sees_a_fault(source: str, tmp_path: Path) -> None:
    (tmp_path / "fault.py").write_text(source)
    assert bandit(str(tmp_path / "fault.py")).returncode == 1
    (tmp_path / "fault.py").write_text("print(1)\n")
    assert bandit(str(tmp_path / "fault.py")).returncode == 0
