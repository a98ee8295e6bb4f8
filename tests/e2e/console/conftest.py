"""A real Chromium, in which nothing may go wrong unnoticed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")

CHROMIUM = Path("/usr/bin/chromium")
# What a container without a user for it needs, and nothing that talks to anybody.
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
           "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
Open = Callable[..., playwright.Page]


@pytest.fixture(autouse=True)
def recorder() -> None:
    """These tests do not start the stack of the others, so there is none to look after."""


@pytest.fixture(scope="session")
def chromium() -> Iterator[playwright.Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}")
    with playwright.sync_playwright() as started:
        # Its profile is below TMPDIR, and its processes carry this environment's mark.
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=OPTIONS, env=dict(os.environ))
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium: playwright.Browser) -> Iterator[Open]:
    """`browse(address, tokens, who, path)`: a page in a browser of its own, signed in as `who` with their token.

    No page may say anything to its console; with `refusals`, but that an address was answered by an error.
    """
    contexts, said = [], []

    def open(
        address: str, tokens: Mapping[str, str], who: str = "ann", path: str = "/clusters", width: int = 1280,
        refusals: bool = False, **options: object,
    ) -> playwright.Page:  # fmt: skip
        context = chromium.new_context(viewport={"width": width, "height": 800}, base_url=address, **options)
        context.set_default_timeout(10000)
        contexts.append(context)
        page = context.new_page()

        def heard(message: playwright.ConsoleMessage) -> None:
            refused = message.text.startswith("Failed to load resource: the server responded")
            if message.type in ("error", "warning") and not (refusals and refused):
                said.append(message.text)

        page.on("console", heard)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}") or dialog.dismiss())
        page.goto(path)
        if who:
            page.get_by_label("Token").fill(tokens[who])
            page.get_by_role("button", name="Sign in", exact=True).click()
            page.wait_for_url(address + path)
        return page

    yield open
    for context in contexts:
        context.close()
    assert said == []
