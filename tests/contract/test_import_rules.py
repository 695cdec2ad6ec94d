"""Who may import whom, and who must not load torch: checked on the source and on running processes."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What the HTTP process, the supervisor and the quick commands import.
TORCH_FREE = [
    "medsora",
    "medsora.cli",
    "medsora.manifest",
    "medsora.request",
    "medsora.video_io",
    "server",
    "server.api",
    "server.app",
    "server.batch_runner",
    "server.cli",
    "server.jobs",
    "server.settings",
    "server.worker.encoder",
    "training",
    "training.cli",
    "training.prepare.pipeline",
]


def test_import_contracts_hold() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_contracts_are_the_designs() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers, medsora, http = contracts
    assert layers["layers"] == ["server | training", "medsora"]
    assert {"fastapi", "celery", "redis", "sqlalchemy"} <= set(medsora["forbidden_modules"])
    assert set(http["source_modules"]) == {
        "server.api", "server.app", "server.batch_runner", "server.batches", "server.conversion",
        "server.dataset_runner", "server.datasets", "server.events", "server.files",
        "server.idempotency", "server.jobs", "server.keys", "server.settings", "server.webhooks",
    }  # fmt: skip
    assert {"torch", "server.worker"} <= set(http["forbidden_modules"])


@pytest.mark.parametrize("module", TORCH_FREE)
def test_import_leaves_torch_alone(module: str) -> None:
    run_and_expect_no_torch(f"import {module}")


def test_no_module_of_the_http_process_loads_torch() -> None:
    run_and_expect_no_torch(
        "import importlib, pkgutil, server.api, server.jobs\n"
        "for package in (server.api, server.jobs):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        # Alembic runs this one itself; importing it would start a migration.
        "        if not module.name.endswith('migrations.env'):\n"
        "            importlib.import_module(module.name)\n"
    )


def run_and_expect_no_torch(code: str) -> None:
    code += "\nimport sys\nprint(sorted(name for name in sys.modules if name.partition('.')[0] == 'torch')[:1])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "[]"
