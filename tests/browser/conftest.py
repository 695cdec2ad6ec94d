"""A browser, a server whose clips are made in under a second, and pages that may talk to that server alone.

The browser is Debian's Chromium; without it these tests skip (tests/system_packages.sh).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

    from tests.integration.conftest import RunningServer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""The sandbox does not start for root; what else would look for its maker's hosts stays silent."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests of a module."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path
) -> Iterator[RunningServer]:
    """A server with two checkpoints: ``tiny`` refuses start images, ``tiny-long`` goes on from given frames."""
    from medsora.checkpoint import write_tiny_checkpoint
    from tests.integration.conftest import RunningServer

    folder = tmp_path_factory.mktemp("playground")
    long = write_tiny_checkpoint(folder / "long", max_frames=64)
    manifest = json.loads((long / "manifest.json").read_text())
    (long / "manifest.json").write_text(json.dumps({**manifest, "name": "tiny-long"}))
    running = RunningServer(
        folder / "data",
        tiny_checkpoint,
        MEDSORA_CHECKPOINTS=f"{tiny_checkpoint},{long}",
        MEDSORA_PREVIEW_INTERVAL_S="0.05",
        MEDSORA_EVENTS_INTERVAL_S="0.05",
    )
    yield running
    assert running.stop() == 0, "\n".join(running.lines[-40:])
    assert running.remaining_processes() == []


@pytest.fixture
def context(browser: Browser, server: RunningServer) -> Iterator[BrowserContext]:
    """A browser session of its own. Whatever it asks of another host than the server fails the test."""
    origin = str(server.http.base_url).rstrip("/")
    made = browser.new_context(
        base_url=origin, viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
    )
    made.set_default_timeout(60_000)
    foreign: list[str] = []
    made.on(
        "request",
        lambda request: (
            None if request.url.startswith((f"{origin}/", "data:", f"blob:{origin}/")) else foreign.append(request.url)
        ),
    )
    yield made
    made.close()
    assert foreign == []


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """An empty page. Errors of scripts, and what the content security policy stops, fail the test."""
    made = context.new_page()
    wrong: list[str] = []
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on(
        "console",
        lambda message: wrong.append(message.text) if "Content Security Policy" in message.text else None,
    )
    yield made
    assert wrong == []
