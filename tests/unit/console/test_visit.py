"""The console over HTTP: who gets in, what protects its forms, and what pages say and do not say."""

from __future__ import annotations

import http.client
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from beaker_sessions.model import State
from tests.browser import Browser
from tests.lab import Lab


def test_every_page_asks_to_sign_in_first(lab: Lab) -> None:
    for path in ("/", "/clusters", "/cl/lab/main?q=x", "/node/none", "/nothing"):
        answer = Browser(lab).get(path)
        assert (answer.status, answer.headers["Location"].split("?")[0]) == (303, "/sign-in")
    assert Browser(lab).get("/cl/lab/main?q=x").headers["Location"] == "/sign-in?next=/cl/lab/main%3Fq%3Dx"


@pytest.mark.parametrize("next", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)"])
def test_signing_in_leads_nowhere_else(lab: Lab, next: str) -> None:
    browser = Browser(lab)
    browser.get("/sign-in")
    answer = browser.post("/sign-in", {"token": lab.tokens["ann"], "next": next})
    assert (answer.status, answer.headers["Location"]) == (303, "/clusters")


def test_the_cookie(lab: Lab) -> None:
    browser = Browser(lab)
    before = browser.get("/sign-in").headers["Set-Cookie"]
    after = browser.post("/sign-in", {"token": lab.tokens["ann"], "next": "/cl/lab/main"}).headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(after.split("; "))
    assert before.split(";")[0] != after.split(";")[0]
    assert lab.tokens["ann"] not in after
    secret = after.split(";")[0].partition("=")[2]
    assert secret.encode() not in Path(lab.service.store.engine.url.database or "").read_bytes()


def test_the_cookie_under_tls(lab: Lab) -> None:
    answer = Browser(lab).get("/sign-in", X_Forwarded_Proto="https")
    assert answer.headers["Set-Cookie"].startswith("__Host-beaker=")
    assert "Secure" in answer.headers["Set-Cookie"]
    assert answer.headers["Strict-Transport-Security"]


@pytest.mark.parametrize("token", ["", "nonsense", "bkr_" + "0" * 49])
def test_a_wrong_token_is_refused(lab: Lab, token: str) -> None:
    browser = Browser(lab)
    browser.get("/sign-in")
    answer = browser.post("/sign-in", {"token": token})
    assert answer.status == 401
    assert 'role="alert"' in answer.text
    assert browser.get("/clusters").status == 303


def test_an_executor_is_nobody_to_sign_in(lab: Lab) -> None:
    token = lab.root.create_token({"name": "x", "scope": "executor"})["token"]
    browser = Browser(lab)
    browser.get("/sign-in")
    assert browser.post("/sign-in", {"token": token}).status == 403


def test_signing_out_ends_the_cookie(ann: Browser) -> None:
    kept = ann.cookie
    assert ann.post("/sign-out").status == 303
    ann.cookie = kept
    assert ann.get("/clusters").status == 303


def test_a_revoked_token_signs_its_browsers_out(lab: Lab, ann: Browser) -> None:
    assert ann.get("/clusters").status == 200
    client = lab.client(lab.tokens["ann"])
    client.revoke_token(client.list_tokens()["data"][0]["id"])
    assert ann.get("/clusters").status == 303


def test_a_link_signs_in_once(lab: Lab) -> None:
    path = lab.client(lab.tokens["ann"]).create_link()["path"]
    browser, other = Browser(lab), Browser(lab)
    assert "Sign in as ann" in browser.get(path).text
    assert "Sign in as ann" in other.get(path).text, "looking at a link does not use it up"
    link = {"link": path.partition("=")[2]}
    assert browser.post("/sign-in", link).status == 303
    assert browser.get("/clusters").status == 200
    assert other.post("/sign-in", link).status == 401
    assert other.get(path).status == 401
    assert other.get("/clusters").status == 303


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": ""}, {"Origin": "http://127.0.0.1:1"}],
)
def test_a_form_from_elsewhere_is_refused(root: Browser, lab: Lab, headers: dict[str, str]) -> None:
    node = lab.node("gpu-1", 1)
    answer = root.post(f"/node/{node.id}/cordon", {"cordoned": "yes"}, **headers)
    assert answer.status == 403
    assert not lab.root.get_node("gpu-1")["cordoned"]


@pytest.mark.parametrize("csrf", ["", "0" * 64, "\udcff"])
def test_a_form_without_our_token_is_refused(root: Browser, lab: Lab, csrf: str) -> None:
    node = lab.node("gpu-1", 1)
    answer = root.post(f"/node/{node.id}/cordon", {"cordoned": "yes", "csrf": csrf.encode("utf-8", "replace").decode()})
    assert answer.status == 403
    assert not lab.root.get_node("gpu-1")["cordoned"]


def test_another_browsers_csrf_token_is_refused(root: Browser, ann: Browser, lab: Lab) -> None:
    node = lab.node("gpu-1", 1)
    assert root.post(f"/node/{node.id}/cordon", {"cordoned": "yes", "csrf": ann.csrf}).status == 403


def test_a_form_that_is_too_long_is_refused(ann: Browser) -> None:
    assert ann.post("/sign-in", {"token": "x" * (65 << 10)}).status == 413


def test_every_answer_has_the_headers_that_protect_it(ann: Browser, lab: Lab) -> None:
    for answer in (ann.get("/clusters"), ann.get("/node/none"), Browser(lab).get("/clusters"), Browser(lab).get("/x")):
        policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


class Inline(HTMLParser):
    """Collects what a Content-Security-Policy without unsafe-inline would block, and forms without a CSRF token."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.posts = self.tokens = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "style" or (tag == "script" and not given.get("src")):
            self.found.append(tag)
        self.found += [name for name, _ in attrs if name == "style" or name.startswith("on")]
        self.posts += tag == "form" and given.get("method") == "post"
        self.tokens += given.get("name") == "csrf"


def pages(lab: Lab, browser: Browser) -> list[str]:
    """Every page, with something on it."""
    node = lab.node("gpu-1.lab", 4)
    node.session("ann", (0,), name="train")
    node.session("bob", (), State.CREATED, gpus=4)
    node.beat()
    return [browser.get(path).text for path in ("/clusters", "/cl/lab/main", f"/node/{node.id}", "/node/none")]


def test_nothing_is_inline_and_every_form_has_its_token(lab: Lab, root: Browser) -> None:
    for html in pages(lab, root):
        page = Inline(html)
        assert page.found == []
        assert page.posts == page.tokens > 0


def test_hostile_text_is_harmless(lab: Lab, root: Browser) -> None:
    evil = "<script>alert(1)</script>\u202e"
    node = lab.node("gpu-1", 1, type=evil)
    lab.root.update_node(node.id, {"cordoned": True, "cordonReason": '"><img src=x onerror=alert(1)>\u2066'})
    node.beat()
    for path in ("/clusters", "/cl/lab/main", f"/node/{node.id}", "/cl/lab/main?q=%3Cscript%3E%E2%80%AE"):
        html = root.get(path).text
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", html)
        assert Inline(html).found == []
        assert "<img src=x" not in html
        assert "<script>" not in html


def test_only_administrators_cordon(lab: Lab, ann: Browser, root: Browser) -> None:
    node = lab.node("gpu-1", 2)
    assert "Cordon" not in ann.get(f"/node/{node.id}").text
    assert ann.post(f"/node/{node.id}/cordon", {"cordoned": "yes"}).status == 403
    assert root.post(f"/node/{node.id}/cordon", {"cordoned": "yes", "reason": "fan"}).status == 303
    assert lab.root.get_node("gpu-1")["cordonReason"] == "fan"
    assert "fan" in ann.get("/cl/lab/main").text
    assert root.post(f"/node/{node.id}/cordon", {"cordoned": "no"}).status == 303
    assert lab.root.get_node("gpu-1")["status"] == "ok"


def test_pages_say_who_holds_what_and_what_is_free(lab: Lab, ann: Browser) -> None:
    node = lab.node("gpu-1.lab", 4)
    node.session("ann", (0, 1), age=7300)
    node.session("bob", (2,), age=60)
    node.session("bob", (), State.CREATED, gpus=3)
    node.beat()
    assert re.search(r'some">1</strong> free of 4', ann.get("/clusters").text)
    html = ann.get("/cl/lab/main").text
    assert "0: held by you for 2 h 1 min, utilisation unknown" in html
    assert "2: held by bob for 57 s, utilisation unknown" in html
    assert "3: free" in html
    html = ann.get("/node/gpu-1.lab").text
    assert "<code>ssh gpu-1.lab</code>" in html
    assert "needs 3 GPUs, 1 free" in html


def test_a_silent_node_is_neither_free_nor_idle(lab: Lab, ann: Browser) -> None:
    node = lab.node("gpu-1.lab", 2)
    node.session("bob", (0,))
    node.beat()
    node.silent(600)
    assert re.search(r'zero">0</strong> free of 2, <span class="unsure">2 not reporting', ann.get("/clusters").text)
    html = ann.get("/cl/lab/main").text
    assert html.count('<li class="gpu unknown">') == 2
    assert "gpu free" not in html.partition("</table>")[0]
    assert "last held by bob" in html
    assert "unknown</span>" in ann.get(f"/node/{node.id}").text


def test_filter_sort_and_pages(lab: Lab, ann: Browser) -> None:
    for number in range(1, 12):
        node = lab.node(f"gpu-{number}", number % 3)
        node.beat()
    rows = lambda html: re.findall(r'<a href="/node/\w+">([^<]+)</a></th>', html)  # noqa: E731
    assert rows(ann.get("/cl/lab/main").text) == [f"gpu-{number}" for number in range(1, 12)]
    assert rows(ann.get("/cl/lab/main?q=gpu-1&sort=free").text) == ["gpu-11", "gpu-1", "gpu-10"]
    assert "gpu-3" not in rows(ann.get("/cl/lab/main?show=free").text)
    assert rows(ann.get("/cl/lab/main?page=99999999999999").text), "a page that is too far is the last"
    assert "Show all 11" in ann.get("/cl/lab/main?q=none").text
    for odd in ("page=-1", "page=%F0%9F%98%80", "sort=x&show=y", "q=%00"):
        assert ann.get(f"/cl/lab/main?{odd}").status == 200


def test_a_link_on_another_site_finds_the_cookie_by_loading_again(ann: Browser, lab: Lab) -> None:
    answer = Browser(lab).get("/clusters", Sec_Fetch_Site="cross-site")
    assert (answer.status, answer.headers["Set-Cookie"]) == (200, None)
    assert 'http-equiv="refresh"' in answer.text
    assert ann.get("/clusters", Sec_Fetch_Site="same-origin").status == 200


def test_static_files_never_change_under_their_address(ann: Browser) -> None:
    paths = re.findall(r'(?:href|src)="(/static/[^"]+)"', ann.get("/clusters").text)
    assert {path.rpartition(".")[2] for path in paths} == {"css", "js", "svg"}
    for path in paths:
        answer = ann.get(path)
        assert answer.status == 200
        assert "immutable" in answer.headers["Cache-Control"]
        hash = path.split("/")[2]
        assert ann.get(path.replace(hash, "0" * 12)).status == 404
    assert ann.get("/static/x/../pages.py").status == 404


def test_events_tell_of_a_change_and_end_with_the_server(lab: Lab, ann: Browser) -> None:
    node, other = lab.node("gpu-1", 2), lab.node("gpu-2", 2)
    connection = http.client.HTTPConnection(lab.address.removeprefix("http://"), timeout=10)
    connection.request("GET", f"/events?on={node.id}", headers={"Cookie": ann.cookie})
    stream = connection.getresponse()
    assert stream.headers["Content-Type"].startswith("text/event-stream")
    assert stream.readline() == b"retry: 3000\n"
    other.session("ann", (0,))
    node.session("ann", (0,))
    while not (line := stream.readline()).startswith(b"event"):
        pass
    assert line == b"event: changed\n"
    lab.app.state.changes.close()
    assert b"event" not in stream.read()
    connection.close()


def test_events_need_a_cookie_that_works(lab: Lab) -> None:
    answer = Browser(lab).get("/events?on=*")
    assert (answer.status, answer.text) == (204, "")
