"""The documentation as a site: it builds strictly, asks nobody else for anything, and tells what the code is now."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "docs" / "tools"


@pytest.fixture(scope="module")
def tools() -> Iterator[dict[str, ModuleType]]:
    """The scripts that make pictures and pages."""
    sys.path.insert(0, str(TOOLS))
    try:
        import figures
        import rest_reference

        yield {"figures": figures, "rest_reference": rest_reference}
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; strict: every page in the navigation, every link and anchor leads somewhere."""
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser asks for by itself when it shows a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get("href") if tag == "link" else values.get("src")
        if tag != "a" and address:
            self.addresses.append(address)


def test_pages_ask_nobody_else_for_anything(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        html = page.read_text(encoding="utf-8")
        addresses = Fetched(html).addresses
        assert [one for one in addresses if "://" in one or one.startswith("//")] == [], page.name
        assert 'class="mermaid"' not in html, f"{page.name}: the theme would fetch what draws it from elsewhere"
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert "url(http" not in styles
    assert "@import" not in styles


def test_pages_of_other_folders_and_linked_files_are_in_it(site: Path) -> None:
    for name in ("benchmarks.html", "contributing.html", "changelog.html", "rest.html"):
        assert (site / name).is_file()
    assert (site / "source" / "examples" / "webhook_receiver.py").read_bytes() == (
        ROOT / "examples" / "webhook_receiver.py"
    ).read_bytes()
    assert 'href="architecture.html"' in (site / "contributing.html").read_text(encoding="utf-8")


def test_every_decision_is_in_the_navigation(site: Path) -> None:
    index = (site / "index.html").read_text(encoding="utf-8")
    for decision in (ROOT / "docs" / "decisions").glob("*.md"):
        assert f"decisions/{decision.stem}.html" in index


def test_the_rest_reference_has_every_operation_and_field(site: Path, tools: dict[str, ModuleType]) -> None:
    document: dict[str, Any] = tools["rest_reference"].document()
    page = (site / "rest.html").read_text(encoding="utf-8")
    assert len(document["paths"]) > 20
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert f"<code>{method.upper()} {path}</code>" in page
            for parameter in operation.get("parameters", []):
                assert f"<code>{parameter['name']}</code>" in page
            for body in operation.get("requestBody", {}).get("content", {}).values():
                for field in body["schema"].get("properties", {}):
                    assert f"<code>{field}</code>" in page
    for name, schema in document["components"]["schemas"].items():
        assert f'id="{name.lower()}"' in page
        for field in schema.get("properties", {}):
            assert f"<code>{field}</code>" in page


def test_pictures_are_what_the_code_would_draw_now(tools: dict[str, ModuleType]) -> None:
    for name, draw in tools["figures"].FIGURES.items():
        drawn = (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == draw().render(), "draw them again: python docs/tools/figures.py"


def test_the_walk_through_the_code_goes_past_functions_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    steps = re.findall(r"\| `([\w/]+\.py)` \| `(\w+)` \|", page)
    assert len(steps) > 10
    for file, function in steps:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert function in names, f"{function} in {file}"


def test_the_picture_of_the_first_page_is_small_and_loops() -> None:
    from PIL import Image

    path = ROOT / "docs" / "images" / "loop.webp"
    assert path.stat().st_size < 1_500_000
    with Image.open(path) as picture:
        assert picture.n_frames == 16
        assert picture.info["loop"] == 0
