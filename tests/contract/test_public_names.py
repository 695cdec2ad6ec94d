"""What others may rely on, and how the tree is laid out."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import subprocess
from pathlib import Path

import pytest

import medsora
import server
import training

ROOT = Path(__file__).parents[2]
# Alembic runs its own modules; importing them outside a migration fails.
MODULES = sorted(
    module.name
    for package in (medsora, server, training)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if ".migrations." not in module.name
)
# Comes with torch for CUDA alone.
NEEDS_TRITON = {"medsora.kernels.mixer"}
PUBLIC_NAMES = [
    "BackendError",
    "CheckpointError",
    "GenerationCanceled",
    "GenerationRequest",
    "Manifest",
    "MedsoraError",
    "RequestError",
    "VideoError",
    "VideoPipeline",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "read_manifest",
    "resolve_request",
    "save_checkpoint",
]


def test_public_names_of_medsora() -> None:
    assert medsora.__all__ == PUBLIC_NAMES
    for name in medsora.__all__:
        assert getattr(medsora, name).__module__.startswith("medsora.")
    assert set(medsora.__all__) <= set(dir(medsora))


def test_the_version_is_the_packages() -> None:
    assert importlib.metadata.version("medsora") == medsora.__version__


@pytest.mark.parametrize("name", MODULES)
def test_every_listed_name_is_there(name: str) -> None:
    if name in NEEDS_TRITON and importlib.util.find_spec("triton") is None:
        listed, there = names_in_source(ROOT / f"{name.replace('.', '/')}.py")
        assert listed != []
    else:
        module = importlib.import_module(name)
        listed = getattr(module, "__all__", [])
        there = {entry for entry in listed if hasattr(module, entry)}
    assert len(set(listed)) == len(listed)
    assert [entry for entry in listed if entry not in there] == []


def names_in_source(path: Path) -> tuple[list[str], set[str]]:
    """What ``__all__`` lists, and what is defined or assigned, of a module that cannot be imported here."""
    listed: list[str] = []
    there: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            there.add(node.name)
        elif isinstance(node, ast.Assign):
            targets = {target.id for target in node.targets if isinstance(target, ast.Name)}
            there |= targets
            if "__all__" in targets:
                listed = ast.literal_eval(node.value)
    return listed, there


def tracked_files() -> list[Path]:
    result = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git checkout")
    return [Path(name) for name in result.stdout.splitlines()]


def test_file_names_say_what_is_inside() -> None:
    vague = {"common.py", "helpers.py", "misc.py", "util.py", "utils.py"}
    assert [path for path in tracked_files() if path.name in vague] == []


def test_folders_beside_the_packages_are_no_packages() -> None:
    """With an __init__.py, anything started from the root would import our docker/ or docs/ as a package."""
    tops = {path.parts[0] for path in tracked_files() if path.name == "__init__.py"}
    assert tops == {"medsora", "server", "training"}


def test_sources_are_ascii() -> None:
    """Look-alike letters and invisible spaces have no place in code; tests may need some."""
    sources = [path for path in tracked_files() if path.suffix == ".py" and path.parts[0] != "tests"]
    assert sources != []
    assert [path for path in sources if not (ROOT / path).read_bytes().isascii()] == []
