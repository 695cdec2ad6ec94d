"""What is shipped: the wheel holds the three packages, whole, and nothing else."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"medsora", "server", "training"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content as pip would lay it out."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_of(wheel: Path) -> list[PurePosixPath]:
    with zipfile.ZipFile(wheel) as archive:
        return [PurePosixPath(name) for name in archive.namelist()]


def test_top_level_is_exactly_the_three_packages(wheel: Path) -> None:
    top = {path.parts[0] for path in files_of(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES


def test_every_source_file_and_checkpoint_is_in_it(wheel: Path) -> None:
    shipped = {str(path) for path in files_of(wheel)}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources - shipped == set()
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped


def test_the_shipped_checkpoint_is_whole_and_small(wheel: Path) -> None:
    folder = "medsora/checkpoints/lung-ultrasound-small"
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist() if entry.filename.startswith(folder)}
    names = {"config.json", "manifest.json", "autoencoder.safetensors", "denoiser.safetensors", "fingerprints.bin"}
    assert {PurePosixPath(name).name for name in sizes} == names
    assert sum(sizes.values()) <= 24 * 2**20


def test_licence_and_notice_are_in_it(wheel: Path) -> None:
    assert {"LICENSE", "NOTICE"} <= {path.name for path in files_of(wheel)}


def test_console_scripts_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    (metadata,) = installed.glob("*.dist-info/entry_points.txt")
    entries = configparser.ConfigParser()
    entries.read(metadata)
    scripts = dict(entries["console_scripts"])
    assert set(scripts) == {"medsora", "medsora-server", "medsora-train"}
    for name, target in scripts.items():
        module, function = target.split(":")
        code = (
            f"import sys, {module}\n"
            f"assert {module}.__file__.startswith({str(installed)!r}), {module}.__file__\n"
            f"sys.argv = [{name!r}, '--help']\n"
            f"{module}.{function}()"
        )
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "usage" in result.stdout.lower()
