"""The console in a real Chromium, against a real server and nodes that say what executors would say."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from beaker_sessions.model import State
from tests.lab import FakeNode, Lab

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
Page, expect = playwright.Page, playwright.expect

CHROMIUM = Path("/usr/bin/chromium")
# What a container without a user for it needs, and nothing that talks to anybody.
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
           "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
EVIL = "<img src=x onerror=alert(1)>\u202e\u2066"


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """These tests start no stack, so there is none to look after."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[playwright.Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}")
    with playwright.sync_playwright() as started:
        # Its profile is below TMPDIR, and its processes carry this environment's mark.
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=OPTIONS, env=dict(os.environ))
        yield browser
        browser.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as lab:
        for name in ("ann", "bob"):
            lab.account(name)
        yield lab


@pytest.fixture
def nodes(lab: Lab) -> list[FakeNode]:
    """Three nodes with two kinds of GPUs; ann has one GPU of the first, bob's session waits there."""
    made = [lab.node("gpu-1.lab", 2), lab.node("gpu-2.lab", 2), lab.node("old-1.lab", 1, "NVIDIA V100")]
    made[0].session("ann", (0,), name="train")
    made[0].session("bob", (), State.CREATED, gpus=2, name="patient")
    for node in made:
        node.beat()
    return made


Open = Callable[..., playwright.Page]


@pytest.fixture
def visit(chromium: playwright.Browser, lab: Lab) -> Iterator[Open]:
    """`visit(who, path)`: a page in a browser of its own. No page may say anything to its console."""
    contexts, said = [], []

    def open(who: str = "ann", path: str = "/clusters", width: int = 1280, **options: object) -> playwright.Page:
        context = chromium.new_context(viewport={"width": width, "height": 800}, base_url=lab.address, **options)
        context.set_default_timeout(10000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}") or dialog.dismiss())
        page.goto(path)
        if who:
            page.get_by_label("Token").fill(lab.tokens[who])
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_url(lab.address + path)
        return page

    yield open
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.usefixtures("nodes")
def test_three_clicks_to_a_hostname(visit: Open, lab: Lab) -> None:
    page = visit("ann")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=lab.address)
    page.get_by_role("link", name="lab/main").click()
    page.get_by_role("link", name="gpu-2.lab").click()
    page.get_by_role("button", name="Copy ssh line").click()
    expect(page.get_by_role("button", name="Copy ssh line")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "ssh gpu-2.lab"
    expect(page.get_by_role("heading", level=1)).to_contain_text("gpu-2.lab")


def test_pages_follow_a_session(visit: Open, nodes: list[FakeNode]) -> None:
    """It starts, waits and ends elsewhere, and nobody loads a page again."""
    cluster, node, start = visit("ann", "/cl/lab/main"), visit("bob", f"/node/{nodes[0].id}"), visit("ann")
    for page in (cluster, node, start):
        expect(page.locator("#pulse")).to_have_text("Live")
        page.evaluate("window.same = true")
    row = cluster.get_by_role("row").filter(has_text="gpu-2.lab")
    expect(row.locator(".gpu.free")).to_have_count(2)

    id = nodes[1].session("bob", (0,), State.SCHEDULED, name="fresh")
    nodes[1].beat()
    expect(row.locator(".gpu.held")).to_have_count(1)
    expect(row).to_contain_text("bob")
    nodes[1].change(id, State.FINALIZED, exit_code=0)
    nodes[1].beat()
    expect(row.locator(".gpu.free")).to_have_count(2)

    expect(node.get_by_role("table", name="wait")).to_contain_text("needs 2 GPUs, 1 free")
    [train] = [one.id for one in nodes[0].sessions.values() if one.request.name == "train"]
    expect(start.get_by_role("table", name="Your sessions")).to_contain_text("running")
    nodes[0].change(train, State.FINALIZED, exit_code=1)
    expect(start.get_by_role("table", name="Your sessions")).to_have_count(0)
    expect(node.locator("#news")).to_contain_text("free")
    for page in (cluster, node, start):
        assert page.evaluate("window.same") is True


def test_a_silent_node_is_seen_to_be_silent(visit: Open, nodes: list[FakeNode]) -> None:
    page = visit("ann", "/cl/lab/main")
    expect(page.locator("#pulse")).to_have_text("Live")
    nodes[1].silent(-1)
    row = page.get_by_role("row").filter(has_text="gpu-2.lab")
    expect(row).to_contain_text("not reporting", timeout=20000)
    expect(row.locator(".gpu.unknown")).to_have_count(2)
    nodes[1].beat()
    expect(row.locator(".gpu.free")).to_have_count(2)


def test_focus_stays_where_it_is_when_the_page_changes(visit: Open, nodes: list[FakeNode]) -> None:
    page = visit("ann", "/cl/lab/main")
    expect(page.locator("#pulse")).to_have_text("Live")
    link = page.get_by_role("link", name="old-1.lab")
    link.focus()
    nodes[1].session("bob", (0,))
    expect(page.get_by_role("row").filter(has_text="gpu-2.lab").locator(".gpu.held")).to_have_count(1)
    expect(link).to_be_focused()


def test_without_events_the_page_polls(visit: Open, nodes: list[FakeNode]) -> None:
    page = visit("ann")
    page.context.route("**/events*", lambda route: route.fulfill(status=204))
    page.goto("/cl/lab/main")
    page.wait_for_timeout(200)
    nodes[1].session("bob", (0,))
    expect(page.get_by_role("row").filter(has_text="gpu-2.lab").locator(".gpu.held")).to_have_count(1, timeout=15000)


def test_signing_out_and_in_again(visit: Open) -> None:
    page = visit("ann", "/user")
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/sign-in")
    page.go_back()
    page.wait_for_url("**/sign-in?next=/user")
    expect(page.get_by_label("Token")).to_be_focused()


def test_an_open_page_ends_with_its_token(visit: Open, lab: Lab) -> None:
    page = visit("ann")
    expect(page.locator("#pulse")).to_have_text("Live")
    client = lab.client(lab.tokens["ann"])
    client.revoke_token(client.list_tokens()["data"][0]["id"])
    page.wait_for_url("**/sign-in**", timeout=20000)


def test_anothers_session_has_no_output_and_no_stop(visit: Open, nodes: list[FakeNode]) -> None:
    done = nodes[1].session("ann", (0,), State.FINALIZED, name="done")
    nodes[1].client.put_logs(done, b"a secret\n")
    [running] = [one.id for one in nodes[0].sessions.values() if one.request.name == "train"]
    for who, may in (("bob", 0), ("ann", 1)):
        page = visit(who, f"/job/{done}")
        expect(page.get_by_role("heading", level=1)).to_have_text("done")
        expect(page.get_by_text("a secret")).to_have_count(may)
        page.goto(f"/job/{running}")
        expect(page.get_by_text("Stop this session")).to_have_count(may)


def test_a_session_is_stopped(visit: Open, nodes: list[FakeNode]) -> None:
    [id] = [one.id for one in nodes[0].sessions.values() if one.request.name == "train"]
    page = visit("ann", f"/job/{id}")
    page.get_by_text("Stop this session").click()
    page.get_by_label("Reason").fill("done with it")
    page.get_by_role("button", name="Stop it").click()
    expect(page.get_by_text("asked to stop")).to_be_visible()
    assert nodes[0].beat()["cancel"] == [id]


def test_everything_by_keyboard(visit: Open, lab: Lab) -> None:
    lab.node("gpu-1.lab", 1).beat()
    page = visit("", "/clusters")
    page.keyboard.type(lab.tokens["ann"])
    page.keyboard.press("Enter")
    page.wait_for_url(lab.address + "/clusters")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="lab/main")).to_be_focused()
    page.keyboard.press("Enter")
    page.wait_for_url("**/cl/lab/main")
    for _ in range(30):
        page.keyboard.press("Tab")
        focused = page.evaluate("document.activeElement.textContent")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"no focus is seen on {focused!r}"
        if focused == "gpu-1.lab":
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/node/*")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_a_phone_and_has_no_serious_finding(
    visit: Open, lab: Lab, nodes: list[FakeNode], scheme: str
) -> None:
    """360 px without scrolling sideways; axe-core's serious and critical findings, colours' contrast included."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    nodes[2].silent()
    lab.root.update_node(nodes[1].id, {"cordoned": True, "cordonReason": "fan broken"})
    done = nodes[1].session("root", (0,), State.FINALIZED, name="d" * 63)
    nodes[1].client.put_logs(done, b"x" * 500)
    [train] = [one.id for one in nodes[0].sessions.values() if one.request.name == "train"]
    paths = ["/clusters", "/cl/lab/main", "/user", "/admin", f"/job/{done}", f"/job/{train}"]
    paths += [f"/node/{node.id}" for node in nodes]
    page = visit("root", width=360, color_scheme=scheme)
    outside = visit("", "/sign-in", width=360, color_scheme=scheme)
    for path in [*paths, "/sign-in"]:
        shown = outside if path == "/sign-in" else page
        shown.goto(path)
        assert shown.evaluate("document.documentElement.scrollWidth") <= 360, path
        found = axe.run(shown).response["violations"]
        serious = [(one["id"], [node["html"] for node in one["nodes"]]) for one in found
                   if one["impact"] in ("serious", "critical")]  # fmt: skip
        assert serious == [], path


def test_hostile_text_runs_nothing(visit: Open, lab: Lab) -> None:
    """A dialog, an error on the console or a loaded image would fail the test."""
    node = lab.node("gpu-1.lab", 1, type=EVIL)
    lab.account("eve", displayName=EVIL)
    id = node.session("eve", (0,), State.FINALIZED, message=EVIL, command=(EVIL, "\x1b]0;x\x07", "\udcff"))
    node.client.put_logs(id, EVIL.encode() + b"\x1b[2J")
    lab.root.update_node(node.id, {"cordoned": True, "cordonReason": EVIL})
    node.beat()
    page = visit("root")
    for path in ("/clusters", "/cl/lab/main", f"/node/{node.id}", f"/job/{id}", "/admin", "/admin?q=<script>"):
        page.goto(path)
        assert page.locator("main img").count() == 0, path
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", page.content()), path


@pytest.mark.usefixtures("nodes")
def test_without_scripts_everything_but_live_works(visit: Open) -> None:
    page = visit("root", java_script_enabled=False)
    page.get_by_role("link", name="lab/main").click()
    page.get_by_label("Find").fill("old")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_role("link", name="old-1.lab").click()
    page.get_by_label("Reason").fill("retired")
    page.get_by_role("button", name="Cordon").click()
    expect(page.get_by_text("retired")).to_be_visible()
    expect(page.get_by_role("button", name="Copy hostname")).to_have_count(0)
