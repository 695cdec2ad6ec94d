"""Files from outside are data: nothing that could run code from a file is used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for package in ("medsora", "server", "training") for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def problems(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (f"line {node.lineno}: import {name}" for name in names if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            yield from call_problems(node)
        if isinstance(node, ast.Constant) and node.value == "pickle":
            yield f"line {node.lineno}: 'pickle' as a name, such as of a serializer"


def call_problems(node: ast.Call) -> Iterator[str]:
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    called = ast.unparse(node.func)
    if called in ("eval", "exec", "torch.save", "torch.jit.load"):
        yield f"line {node.lineno}: {called}"
    if called == "torch.load" and options.get("weights_only") != "True":
        yield f"line {node.lineno}: torch.load without weights_only=True"
    if options.get("allow_pickle", "False") != "False":
        yield f"line {node.lineno}: allow_pickle"


TORCHSCRIPT = ROOT / "training" / "evaluation" / "torchscript.py"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_reads_or_writes_pickles(path: Path) -> None:
    found = [text.partition(": ")[2] for text in problems(ast.parse(path.read_text(encoding="utf-8")))]
    # evaluation alone, never the server: the networks of FVD and FID are published in no other form
    assert found == (["torch.jit.load"] if path == TORCHSCRIPT else [])


def test_only_weights_of_others_are_read_from_pickles() -> None:
    """``torch.load``, of weights alone, has two places: published weights have no other format."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.load", "torch.serialization"))
    }
    assert found == {"medsora/released.py", "training/weights.py"}


def test_released_weights_may_come_with_nothing_but_the_arguments_of_their_training() -> None:
    source = (ROOT / "medsora/released.py").read_text(encoding="utf-8")
    assert source.count("safe_globals") == 1
    assert "safe_globals([argparse.Namespace])" in source  # a bag of values, which does nothing when it is made


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import joblib.memory",
        "torch.save({}, path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "serializer = 'pickle'",
        "eval('1')",
    ],
)
def test_the_check_sees(code: str) -> None:
    assert len(list(problems(ast.parse(code)))) == 1
