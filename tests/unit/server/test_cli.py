"""The console script: help without the parts, and errors as one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app

ROOT = Path(__file__).parents[3]
runner = CliRunner()


def test_help_lists_the_parts() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("serve", "api", "worker", "reaper"):
        assert command in result.output


def test_help_loads_none_of_the_parts() -> None:
    code = (
        "import sys; from server.cli import app\n"
        "try: app(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'fastapi', 'celery', 'sqlalchemy', 'torch', 'uvicorn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", ["api", "worker", "reaper"])
def test_parts_ask_for_their_broker(command: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSORA_CHECKPOINTS", str(tiny_checkpoint))
    result = runner.invoke(app, [command])
    assert result.exit_code == 2
    assert "MEDSORA_REDIS_URL is not set" in result.output


@pytest.mark.parametrize("command", ["serve", "api", "worker", "reaper"])
def test_unknown_setting_stops_every_part(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSORA_PROT", "8000")
    result = runner.invoke(app, [command])
    assert result.exit_code == 2
    assert "MEDSORA_PROT (did you mean MEDSORA_PORT?)" in result.output


def test_unknown_checkpoint_is_told(tmp_path: Path) -> None:
    result = runner.invoke(app, ["serve", "--checkpoint", "nothing", "--data-dir", str(tmp_path / "data")])
    assert result.exit_code == 2
    assert "no checkpoint 'nothing'" in result.output
