"""What MkDocs does not do by itself: pages from elsewhere in the repository, generated pages, and links to both."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import rest_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the repository -> pages of the site."""
AS_PAGES = {**ELSEWHERE, "README.md": "index.md"}
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Decisions go to the end of the last section, by number."""
    decisions = [f"decisions/{path.name}" for path in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    sections: Any = config.nav
    sections[-1]["Contribute"].append({"Decisions": decisions})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in docs/: pages from elsewhere, the REST reference, and every file that a page links to."""
    for name, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "rest.md", content=rest_reference.render()))
    linked = set()
    for file in files.documentation_pages():
        for _, target in _LINK.findall(file.content_string):
            path = _in_repository(file.src_uri, target)
            if path is not None and _page_of(path) is None and (ROOT / path).is_file():
                linked.add(path)
    for path in sorted(linked):
        files.append(File.generated(config, f"source/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where their targets are in the site; in a browser a raw file is as good as its page."""

    def rewrite(match: re.Match[str]) -> str:
        words, target = match.groups()
        path = _in_repository(page.file.src_uri, target)
        if path is None:
            return match.group()
        to = _page_of(path) or f"source/{path}"
        anchor = target.partition("#")[1] + target.partition("#")[2]
        start = str(PurePosixPath(page.file.src_uri).parent)
        return f"{words}({os.path.relpath(to, start)}{anchor})"

    return _LINK.sub(rewrite, markdown)


def _in_repository(page: str, target: str) -> str | None:
    """The path of a link's target from the root of the repository; None where the link is not to a file of it."""
    path = target.partition("#")[0]
    if not path or "://" in target or target.startswith(("/", "mailto:")):
        return None
    origins = {page: name for name, page in ELSEWHERE.items()}
    folder = PurePosixPath(origins.get(page, f"docs/{page}")).parent
    return os.path.normpath(folder / path)


def _page_of(path: str) -> str | None:
    """The file of the site that shows a file of the repository, if there is one."""
    return path.removeprefix("docs/") if path.startswith("docs/") else AS_PAGES.get(path)
