"""docs/faults.md and docs/security.md name a test for every promise: each of them is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("faults", "security")}
NAMED = {name: re.findall(r"`([a-z_/]+\.py)::(\w+)`", page) for name, page in PAGES.items()}


def names_in(path: Path) -> set[str]:
    """Tests at the top of a file: functions, and classes or the names that they are given."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in found if name.startswith(("test_", "Test"))}


@pytest.mark.parametrize(("page", "least"), [("faults", 80), ("security", 40)])
def test_every_named_test_is_there(page: str, least: int) -> None:
    assert len(NAMED[page]) >= least
    files = {file: names_in(ROOT / "tests" / file) for file, _ in NAMED[page]}
    assert [f"{file}::{name}" for file, name in NAMED[page] if name not in files[file]] == []


@pytest.mark.parametrize(("page", "column", "least"), [("faults", "fault", 40), ("security", "threat", 20)])
def test_every_row_names_a_test(page: str, column: str, least: int) -> None:
    tables = re.findall(rf"^\| {column} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGES[page], flags=re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) >= least
    assert [row for row in rows if "::" not in row.split("|")[3]] == []


def test_every_test_of_the_files_of_faults_is_named() -> None:
    """A fault that is tried is a promise."""
    of_faults = ("integration/test_faults.py", "integration/test_broker_link.py", "integration/test_clients_gone.py")
    for file in of_faults:
        assert names_in(ROOT / "tests" / file) - {name for where, name in NAMED["faults"] if where == file} == set()
