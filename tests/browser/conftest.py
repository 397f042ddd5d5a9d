"""Headless Chromium under the production policy, and a watch over what it says and where it goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.browser.engine import Served, served

CHROMIUM = Path("/usr/bin/chromium")
# Without these Chromium itself asks its maker for updates and lists; what is watched here is what our pages do.
QUIET = (
    "--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
    "--disable-domain-reliability", "--disable-sync", "--no-first-run", "--no-pings",
)


@dataclass
class Watched:
    """A page, with everything that it has said on its console and every address that it has asked for."""

    page: Page
    context: BrowserContext
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    refusals: int = 0           # answers of 4xx and 5xx that a test expects, each of which Chromium logs

    def assert_clean(self, origin: str) -> None:
        """Nothing was refused by the policy, no script failed, and nobody else was asked for anything."""
        refused = [line for line in self.said if "Failed to load resource: the server responded" in line]
        assert [line for line in self.said if line not in refused and "Cleared data types" not in line] == []
        assert len(refused) <= self.refusals, refused
        elsewhere = {urlsplit(address)[:2] for address in self.asked} - {urlsplit(origin)[:2]}
        assert elsewhere == set()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail("Debian's chromium is not installed: make system-dev")
    expect.set_options(timeout=30_000)      # a machine that is busy gets its time
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def room() -> Iterator[Served]:
    """The pages over a real queue and vault, with an engine that draws without a model and can be held between steps."""
    with served() as here:
        yield here


@contextmanager
def visit(
    chromium: Browser, *, width: int = 1280, height: int = 860, dark: bool = True, script: bool = True, touch: bool = False,
    still: bool = False,
) -> Iterator[Watched]:
    """Open a window of a browser that nobody has used before."""
    context = chromium.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", java_script_enabled=script,
        has_touch=touch, is_mobile=touch, accept_downloads=True, reduced_motion="reduce" if still else "no-preference",
    )
    context.set_default_timeout(30_000)
    watched = Watched(context.new_page(), context)

    def listen(page: Page) -> None:
        page.on("console", lambda message: watched.said.append(message.text))
        page.on("pageerror", lambda error: watched.said.append(f"page error: {error}"))
        page.on("request", lambda request: watched.asked.append(request.url))

    listen(watched.page)
    context.on("page", listen)
    try:
        yield watched
    finally:
        context.close()


@pytest.fixture
def desk(chromium: Browser, room: Served) -> Iterator[Watched]:
    """A desktop window on the first page; at the end nothing may have been complained of and nobody else been asked."""
    with visit(chromium) as watched:
        watched.page.goto(room.url)
        yield watched
        watched.assert_clean(room.url)
