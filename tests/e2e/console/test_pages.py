"""The console in a real Chromium, in every state that nodes can be in: they say what executors would say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from beaker_sessions.model import State
from beaker_sessions.server import oidc
from beaker_sessions.settings import ServerSettings
from tests.lab import FakeNode, Lab
from tests.provider import CLIENT, SECRET, Provider

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
expect = playwright.expect
Open = Callable[..., playwright.Page]

WIDER = "[...document.querySelectorAll('section')].filter((one) => one.scrollWidth > one.clientWidth).length"
LINES = "(one) => { const text = new Range(); text.selectNodeContents(one); return text.getClientRects().length; }"
EVIL = "<img src=x onerror=alert(1)>\u202e\u2066"


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


@pytest.fixture
def visit(lab: Lab, browse: Open) -> Open:  # in this order: pages are closed before their server
    """`visit(who, path)`: a page in a browser of its own. No page may say anything to its console."""
    return partial(browse, lab.address, lab.tokens)


def test_without_events_the_page_polls(visit: Open, nodes: list[FakeNode]) -> None:
    page = visit("ann")
    page.context.route("**/events*", lambda route: route.fulfill(status=204))
    page.goto("/cl/lab/main")
    page.wait_for_timeout(200)
    nodes[1].session("bob", (0,))
    expect(page.get_by_role("row").filter(has_text="gpu-2.lab").locator(".gpu.held")).to_have_count(1, timeout=15000)


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


@pytest.mark.parametrize("width", [360, 768, 1280, 1920])
def test_no_word_makes_a_page_wider_than_its_window(visit: Open, lab: Lab, width: int) -> None:
    """Neither a page, nor a table beyond its section; and short names stay in one piece beside long ones."""
    long, short = "W" * 63, "carla.schmidt"
    lab.account(long, displayName="D" * 200, email=f"{'m' * 64}@{'d' * 63}.example")
    lab.account(short)
    lab.root.create_cluster("lab", {"name": "c" * 63})
    nodes = [lab.node("h" * 64, 16, "T" * 53), lab.node("gpu-1.lab.example.org", 16, "T" * 53)]
    ids = [node.session(long, (0, 1), name="s" * 63) for node in nodes]
    nodes[0].session(long, (), State.CREATED, gpus=16)
    lab.root.update_node(nodes[1].id, {"cordoned": True, "cordonReason": "r" * 150 + " broke"})
    for node in nodes:
        node.beat()
    pages = {"root": ["/clusters", "/admin", f"/{'x' * 200}"], long: ["/cl/lab/main", "/user", f"/job/{ids[0]}"]}
    pages[long] += [f"/node/{node.id}" for node in nodes]
    for who, paths in pages.items():
        page = visit(who, width=width, refusals=True)
        for path in paths:
            page.goto(path)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
            assert page.evaluate(WIDER) == 0, path
            for name in (short, "gpu-1.lab.example.org"):
                for cell in page.locator("tbody th").get_by_text(name, exact=True).all():
                    assert cell.evaluate(LINES) == 1, (path, name)


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


def test_a_page_that_answered_a_form_is_loaded_again_and_goes_on(visit: Open, lab: Lab, nodes: list[FakeNode]) -> None:
    page = visit("ann", "/user")
    page.locator("form[action='/user/tokens']").get_by_label("Name").fill("laptop")
    page.get_by_role("button", name="Make a token").click()
    expect(page.get_by_text("The new token")).to_be_visible()
    page.wait_for_url("**/user")
    nodes[1].session("ann", (0,), name="meanwhile")
    expect(page.get_by_role("link", name="meanwhile")).to_be_visible()
    expect(page.get_by_text("The new token")).to_be_visible()
    page.reload()
    expect(page.get_by_text("The new token")).to_have_count(0)
    assert [one["name"] for one in lab.client(lab.tokens["ann"]).list_tokens()["data"]].count("laptop") == 1


def test_the_form_to_cordon_follows_what_others_do(visit: Open, lab: Lab, nodes: list[FakeNode]) -> None:
    page = visit("root", f"/node/{nodes[0].id}")
    page.wait_for_timeout(300)
    lab.root.update_node(nodes[0].id, {"cordoned": True, "cordonReason": "fan"})
    expect(page.get_by_role("button", name="Uncordon")).to_be_visible()


def test_updates_leave_what_somebody_copies(visit: Open, nodes: list[FakeNode]) -> None:
    id = nodes[1].session("ann", (0,), State.FINALIZED)
    nodes[1].client.put_logs(id, b"one\n")
    page = visit("ann", f"/job/{id}")
    page.wait_for_timeout(300)
    page.get_by_role("region", name="Recent output").focus()
    nodes[1].client.put_logs(id, b"one\ntwo\n")
    expect(page.get_by_text("two")).to_be_visible()
    expect(page.get_by_role("region", name="Recent output")).to_be_focused()
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.output pre'))")
    nodes[1].client.put_logs(id, b"one\ntwo\nthree\n")
    page.wait_for_timeout(2500)
    assert page.evaluate("getSelection().toString()").strip() == "one\ntwo"
    page.evaluate("getSelection().removeAllRanges()")
    nodes[1].client.put_logs(id, b"one\ntwo\nthree\nfour\n")
    expect(page.get_by_text("four")).to_be_visible()


def test_signing_in_through_a_provider(browse: Open, tmp_path: Path) -> None:
    """The provider is another site, so that the browser keeps what is SameSite=Strict to itself on the way back."""
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text(SECRET)
    with Provider() as provider:
        settings = ServerSettings(
            oidc_issuer=provider.issuer, oidc_client_id=CLIENT, oidc_client_secret_file=str(secret), oidc_name="Uni"
        )
        with Lab(tmp_path, oidc.provider(settings)) as lab:
            lab.account("ann")
            provider.back = {f"{lab.address}/sign-in/back"}
            page = browse(lab.address, {}, "", "/user", refusals=True)
            page.get_by_role("link", name="Sign in with Uni").click()
            page.wait_for_url(f"{provider.issuer}/authorize**")
            page.get_by_role("link", name="Continue").click()
            page.wait_for_url(f"{lab.address}/user")
            expect(page.get_by_role("heading", level=1)).to_have_text("ann")
            page.goto(f"{provider.issuer}/authorize")  # elsewhere, and back by a link from there
            page.evaluate(f"location.href = '{lab.address}/clusters'")
            expect(page.get_by_role("heading", level=1)).to_have_text("Machines")
            page.get_by_role("link", name="ann").click()
            page.get_by_role("button", name="Revoke browser, through Uni").click()
            page.wait_for_url("**/sign-in**")
            provider.claims["preferred_username"] = "nobody"
            page.get_by_role("link", name="Sign in with Uni").click()
            page.get_by_role("link", name="Continue").click()
            expect(page.get_by_role("alert")).to_contain_text("There is no account here for 'nobody' of Uni")
