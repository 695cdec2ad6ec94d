"""Every example in a docstring is run; modules with examples are found by reading the source."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def examples() -> dict[str, list[tuple[str, int, str]]]:
    """Name, line and text of each docstring with examples, by module."""
    found: dict[str, list[tuple[str, int, str]]] = {}
    for package in ("medsora", "server", "training"):
        for path in sorted((ROOT / package).rglob("*.py")):
            source = path.read_text()
            if ">>> " not in source:
                continue
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text and ">>> " in text:
                        name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                        line = 0 if isinstance(node, ast.Module) else node.lineno
                        found.setdefault(module, []).append((name, line, text))
    return found


EXAMPLES = examples()


def test_the_modules_with_examples_are_found() -> None:
    assert {"medsora.geometry", "medsora.models.scans", "medsora.diffusion.schedule"} <= set(EXAMPLES)


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_are_true(module: str) -> None:
    namespace = vars(importlib.import_module(module))
    said: list[str] = []
    for name, line, text in EXAMPLES[module]:
        test = doctest.DocTestParser().get_doctest(text, dict(namespace), name, module, line)
        result = doctest.DocTestRunner().run(test, out=said.append)
        assert result.attempted > 0
        assert result.failed == 0, "".join(said)
