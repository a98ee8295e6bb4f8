"""The console in a real Chromium, on a server and three executors with real sessions in them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from beaker_sessions.client import Client
from tests.fleet import Fleet
from tests.stack import User

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
expect = playwright.expect
Open = Callable[..., playwright.Page]
FOREVER = ("--", "sleep", "1000")
EVIL = "<img src=x onerror=alert(1)>\u202e\u2066"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it starts executors")
    root = Path(tempfile.mkdtemp(prefix="bf-"))
    root.chmod(0o755)
    fleet = Fleet(root)
    try:
        new, old = "example.com/gpu", "old.example/gpu"
        fleet.start(("gpu-1.lab", 2, new), ("gpu-2.lab", 2, new), ("old-1.lab", 1, old))
        for name in ("ann", "bob"):
            fleet.user(name)
        yield fleet
    finally:
        fleet.close()


@pytest.fixture(autouse=True)
def nothing_left(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.settle()


@pytest.fixture
def ann(fleet: Fleet) -> User:
    return fleet.users[0]


@pytest.fixture
def bob(fleet: Fleet) -> User:
    return fleet.users[1]


@pytest.fixture
def visit(browse: Open, fleet: Fleet) -> Open:
    """`visit(who, path)`: a page in a browser of its own. No page may say anything to its console."""
    tokens = {"root": fleet.admin.token, "ann": fleet.users[0].token, "bob": fleet.users[1].token}
    return partial(browse, fleet.address, tokens)


def live(page: playwright.Page) -> playwright.Page:
    """The page, once it hears of changes; what is loaded again would lose the mark."""
    expect(page.locator("#pulse")).to_have_text("Live")
    page.evaluate("window.same = true")
    return page


def test_three_clicks_to_a_hostname(visit: Open, fleet: Fleet) -> None:
    page = visit("ann")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=fleet.address)
    expect(page.locator(".card")).to_contain_text("4 free of 4")
    expect(page.locator(".card")).to_contain_text("1 free of 1")
    page.get_by_role("link", name="lab/main").click()
    page.get_by_role("link", name="gpu-2.lab").click()
    page.get_by_role("button", name="Copy ssh line").click()
    expect(page.get_by_role("button", name="Copy ssh line")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "ssh gpu-2.lab"
    expect(page.get_by_role("heading", level=1)).to_contain_text("gpu-2.lab")


def test_pages_follow_what_happens_elsewhere(visit: Open, fleet: Fleet, ann: User, bob: User) -> None:
    """A session starts, another waits for it, both end; and nobody loads a page again."""
    here = fleet.nodes[1]
    pages = [live(visit("ann", path)) for path in ("/clusters", "/cl/lab/main", f"/node/{here.id}")]
    start, cluster, node = pages
    row = cluster.get_by_role("row").filter(has_text="gpu-2.lab")
    expect(row.locator(".gpu.free")).to_have_count(2)

    first = here.session(bob, "--gpus", "2", "--name", "fresh", *FOREVER)
    expect(row.locator(".gpu.held")).to_have_count(2)
    expect(row).to_contain_text(bob.name)
    expect(start.locator(".card")).to_contain_text("2 free of 4")
    expect(node.get_by_role("table", name="hold something")).to_contain_text("fresh")

    second = here.session(ann, "--gpus", "1", "--name", "patient", *FOREVER)
    expect(node.get_by_role("table", name="wait")).to_contain_text("needs 1 GPU, 0 free")
    expect(row).to_contain_text("1", use_inner_text=True)
    expect(start.get_by_role("table", name="Your sessions")).to_contain_text("pending")

    assert here.beaker(bob, "session", "stop", first).returncode == 0
    expect(start.get_by_role("table", name="Your sessions")).to_contain_text("running")
    expect(row.locator(".gpu.mine")).to_have_count(1)
    expect(node.get_by_role("table", name="wait")).to_have_count(0)

    assert here.beaker(ann, "session", "stop", second).returncode == 0
    expect(row.locator(".gpu.free")).to_have_count(2)
    expect(start.get_by_role("table", name="Your sessions")).to_have_count(0)
    expect(node.locator("#news")).to_contain_text("2 GPUs free, 0 waiting")
    for page in pages:
        assert page.evaluate("window.same") is True


def test_a_stopped_executor_is_not_reporting_and_its_session_unknown(visit: Open, fleet: Fleet, bob: User) -> None:
    silent = fleet.nodes[2]
    id = silent.session(bob, "--gpus", "1", *FOREVER)
    cluster, job = live(visit("ann", "/cl/lab/main")), live(visit("bob", f"/job/{id}"))
    row = cluster.get_by_role("row").filter(has_text="old-1.lab")
    expect(row.locator(".gpu.held")).to_have_count(1)
    expect(job.locator("#job")).to_contain_text("running")
    silent.executor.kill()
    expect(row).to_contain_text("not reporting", timeout=45000)
    expect(row.locator(".gpu.unknown")).to_have_count(1)
    expect(row.locator(".gpu.free")).to_have_count(0)
    expect(job.locator("#job")).to_contain_text("what the session does now is not known")
    silent.start()
    expect(row.locator(".gpu.held")).to_have_count(1)
    expect(job.locator("#job")).to_contain_text("running")
    for page in (cluster, job):
        assert page.evaluate("window.same") is True


def test_a_session_is_its_authors(visit: Open, fleet: Fleet, ann: User) -> None:
    """Stages and output while it runs; for others, administrators included, no output, and who may not has no stop."""
    words = "echo a secret; until test -e go; do usleep 50000; done; echo more; sleep 1000"
    id = fleet.nodes[0].session(ann, "--gpus", "1", "--name", "train", "--", "sh", "-c", words)
    pages = {who: live(visit(who, f"/job/{id}")) for who in ("ann", "bob", "root")}
    output = pages["ann"].get_by_role("region", name="Recent output")
    expect(output).to_have_text("a secret")
    for stage in ("Queued", "Image", "Create", "Start"):
        expect(pages["ann"].locator(".stages li", has_text=stage).first).to_contain_text(re.compile(r"\d+ m?s"))
    expect(pages["ann"].locator(".stages li", has_text="Running")).to_contain_text("so far")
    (ann.home / "go").touch()
    expect(output).to_contain_text("more")
    for who, stops, command in (("ann", 1, 1), ("bob", 0, 0), ("root", 1, 1)):
        expect(pages[who].get_by_text("Stop this session")).to_have_count(stops)
        expect(pages[who].get_by_text(words)).to_have_count(command)
        if who != "ann":
            assert "a secret" not in pages[who].content().replace(words, "")
            assert "Recent output" not in pages[who].content()
    page = pages["ann"]
    page.get_by_text("Stop this session").click()
    page.get_by_label("Reason").fill("done with it")
    page.get_by_role("button", name="Stop it").click()
    expect(page.locator("#job")).to_contain_text("failed", timeout=20000)
    expect(page.locator("#job")).to_contain_text("done with it")
    expect(page.get_by_role("region", name="Recent output")).to_contain_text("more")
    expect(page.get_by_text("Stop this session")).to_have_count(0)


def test_focus_stays_where_it_is_when_the_page_changes(visit: Open, fleet: Fleet, bob: User) -> None:
    page = live(visit("ann", "/cl/lab/main"))
    link = page.get_by_role("link", name="old-1.lab")
    link.focus()
    fleet.nodes[1].session(bob, "--gpus", "1", *FOREVER)
    expect(page.get_by_role("row").filter(has_text="gpu-2.lab").locator(".gpu.held")).to_have_count(1)
    expect(link).to_be_focused()


def test_signing_out_and_in_again(visit: Open) -> None:
    page = visit("ann", "/user")
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/sign-in")
    page.go_back()
    page.wait_for_url("**/sign-in?next=/user")
    expect(page.get_by_label("Token")).to_be_focused()


def test_a_link_of_the_command_line_signs_in(visit: Open, fleet: Fleet, ann: User) -> None:
    done = fleet.nodes[0].beaker(ann, "login")
    [link] = re.findall(rf"{fleet.address}(\S+)", (done.stdout + done.stderr).decode())
    page = visit("", link)
    page.get_by_role("button", name=f"Sign in as {ann.name}").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Machines")


def test_an_open_page_ends_with_its_token(browse: Open, fleet: Fleet, ann: User) -> None:
    client = Client(fleet.endpoint, ann.token)
    token = client.create_token({"name": "to revoke"})
    page = live(browse(fleet.address, {"ann": token["token"]}))
    client.revoke_token(token["id"])
    client.close()
    page.wait_for_url("**/sign-in**", timeout=20000)


def test_everything_by_keyboard(visit: Open, fleet: Fleet, ann: User) -> None:
    page = visit("", "/clusters")
    page.keyboard.type(ann.token)
    page.keyboard.press("Enter")
    page.wait_for_url(fleet.address + "/clusters")
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


def test_a_phone_and_a_screen_reader(visit: Open, fleet: Fleet, ann: User, bob: User) -> None:
    """360 px without scrolling sideways, and nothing serious that axe-core finds, where much is going on."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    node = fleet.nodes[0]
    name = "x" * 63
    id = node.session(ann, "--gpus", "2", "--name", name, "--", "sh", "-c", f"echo {'y' * 300}; sleep 1000")
    node.session(bob, "--gpus", "1", *FOREVER)
    fleet.admin.update_node(fleet.nodes[1].id, {"cordoned": True, "cordonReason": "fan broken"})
    page = visit("ann", f"/job/{id}", width=360)
    expect(page.get_by_role("region", name="Recent output")).to_contain_text("yyy")
    for path in (f"/job/{id}", "/clusters", "/cl/lab/main", f"/node/{node.id}", f"/node/{fleet.nodes[1].id}", "/user"):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        found = axe.run(page).response["violations"]
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == [], path


def test_hostile_names_and_output_run_nothing(visit: Open, fleet: Fleet, ann: User) -> None:
    """A dialog, an error on the console or a loaded image would fail the test."""
    node = fleet.nodes[0]
    refused = node.beaker(ann, "session", "create", "--detach", "--name", EVIL, *FOREVER)
    assert refused.returncode == 64, "a session has no such name"
    eve = fleet.user("eve", displayName=EVIL)
    words = 'printf \'%s\\033[2J\\033]0;x\\007\\n\' "$0" "$E"; sleep 1000'
    id = node.session(eve, "--env", f"E={EVIL}", "--", "sh", "-c", words, EVIL)
    fleet.admin.update_node(node.id, {"cordoned": True, "cordonReason": EVIL})
    page = visit("", "/sign-in")
    page.get_by_label("Token").fill(eve.token)
    page.keyboard.press("Enter")
    page.wait_for_url("**/clusters")
    page.goto(f"/job/{id}")
    expect(page.get_by_role("region", name="Recent output")).to_contain_text("<img src=x")
    root = visit("root")
    for shown, paths in (
        (page, (f"/job/{id}", "/clusters", "/user", "/cl/lab/main", f"/node/{node.id}")),
        (root, (f"/job/{id}", f"/node/{node.id}", "/admin", "/admin?q=<script>")),
    ):
        for path in paths:
            shown.goto(path)
            assert shown.locator("main img").count() == 0, path
            assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", shown.content()), path
