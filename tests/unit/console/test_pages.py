"""The pages of a session, of an account and of administration, over HTTP."""

from __future__ import annotations

import re
import threading
from urllib.parse import quote

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.ids import looks_like_token, ulid
from beaker_sessions.model import State
from tests.browser import Browser
from tests.lab import Lab


def shown_token(html: str) -> str:
    [token] = re.findall(r'class="secret">(bkr_\w+)<', html)
    assert looks_like_token(token)
    return token


def test_a_session_that_runs(lab: Lab, ann: Browser, bob: Browser, root: Browser) -> None:
    node = lab.node("gpu-1.lab", 2)
    id = node.session("ann", (1,), age=7200, name="train", command=("python3", "train.py"))
    node.beat()
    html = ann.get(f"/job/{id}").text
    assert re.search(r"running</span>", html)
    stages = re.findall(r"<span>([^<]+)</span> <span class=\"num\">([^<]+)</span>", html)
    assert stages[:4] == [("Queued", "3.0 s"), ("Image", "2.0 s"), ("Create", "750 ms"), ("Start", "250 ms")]
    assert stages[4][0] == "Running"
    assert "1 h 59 min so far" in html
    assert "nvidia.com/gpu=1" in html
    assert "python3 train.py" in html
    assert "python3 train.py" not in bob.get(f"/job/{id}").text, "another account's command"
    for browser, may in ((ann, True), (bob, False), (root, True)):
        assert ("Stop this session" in browser.get(f"/job/{id}").text) == may
    assert bob.post(f"/job/{id}/stop").status == 403
    assert ann.post(f"/job/{id}/stop", {"reason": "wrong data"}).status == 303
    assert node.beat()["cancel"] == [id]
    html = ann.get(f"/job/{id}").text
    assert "asked to stop" in html
    assert "wrong data" in html


def test_a_session_that_waits(lab: Lab, ann: Browser) -> None:
    node = lab.node("gpu-1.lab", 2)
    first = node.session("bob", (), State.CREATED, age=60, gpus=2)
    second = node.session("ann", (), State.CREATED, age=30, gpus=1)
    node.session("ann", (0, 1), age=90)
    node.beat()
    assert re.search(r"Place <strong>2</strong> in the queue .*: after 1 other\.", ann.get(f"/job/{second}").text)
    assert "needs 2 GPUs, 0 free" in ann.get(f"/job/{first}").text


def test_a_session_of_a_silent_node_is_unknown(lab: Lab, ann: Browser) -> None:
    node = lab.node("gpu-1.lab", 1)
    id = node.session("ann", (0,))
    node.silent()
    for path in (f"/job/{id}", "/user", "/clusters", f"/node/{node.id}"):
        html = ann.get(path).text
        assert '<span class="lamp unknown">unknown</span>' in html, path
        assert "running</span>" not in html, path


def test_output_is_its_authors_and_text(lab: Lab, ann: Browser, bob: Browser, root: Browser) -> None:
    node = lab.node("gpu-1.lab", 1)
    id = node.session("ann", (0,), State.FINALIZED)
    node.client.put_logs(id, b"10%\r50%\r100%\r\n\x1b[31m<b>red</b>\x1b]0;title\x07\x00\xff \xe2\x80\xae\r\n")
    html = ann.get(f"/job/{id}").text
    assert "100%\n" in html
    assert "50%" not in html
    assert "&lt;b&gt;red&lt;/b&gt;\\x00\N{REPLACEMENT CHARACTER} \\u202e\n" in html
    assert "title\\" not in html
    assert "succeeded, exit code 0" in html
    for other in (bob, root):
        assert "Recent output" not in other.get(f"/job/{id}").text


def test_output_of_a_running_session_is_sent_while_its_author_looks(
    lab: Lab, ann: Browser, bob: Browser, root: Browser
) -> None:
    node = lab.node("gpu-1.lab", 1)
    id = node.session("ann", (0,))
    assert node.beat()["output"] == {}
    for other in (bob, root):
        assert "Recent output" not in other.get(f"/job/{id}").text
    assert node.beat()["output"] == {}, "nobody who may see it looks"
    assert "Nothing yet" in ann.get(f"/job/{id}").text
    assert set(node.beat()["output"]) == {id}
    node.client.put_logs(id, b"loss 0.25\x08\x089\r\n")
    assert ">loss 0.9\n" in ann.get(f"/job/{id}").text
    for other in (bob, root):
        assert "loss" not in other.get(f"/job/{id}").text
    before = len(lab.root.list_audit()["data"])
    node.client.put_logs(id, b"loss 0.1\n")
    assert len(lab.root.list_audit()["data"]) == before, "what is looked at is no change that lasts"
    node.change(id, State.FINALIZED, exit_code=0)
    assert node.beat()["output"] == {}


def test_output_of_a_running_session_over_rest(lab: Lab) -> None:
    """The answer waits until the node has been asked, and answers."""
    node = lab.node("gpu-1.lab", 1)
    node.beat()
    id = node.session("ann", (0,))
    node.client.put_logs(id, b"old")
    found: list[bytes] = []
    client = lab.client(lab.tokens["ann"])
    asking = threading.Thread(target=lambda: found.append(client.get_logs(id)))
    asking.start()
    while not node.beat()["output"]:
        assert asking.is_alive()
    node.client.put_logs(id, b"new")
    asking.join()
    assert found == [b"new"]
    with pytest.raises(Error):
        lab.root.get_logs(id)


def test_what_is_not_there(ann: Browser) -> None:
    for path in ("/job/none", "/node/none", "/cl/lab/none", "/cl/x/y", "/none", "/job/%00"):
        answer = ann.get(path)
        assert answer.status == 404, path
        assert "<h1>404</h1>" in answer.text


def test_tokens_are_shown_once_and_revoked(lab: Lab, ann: Browser) -> None:
    token = shown_token(ann.post("/user/tokens", {"name": "laptop", "scope": "user", "expiry": "7d"}).text)
    assert lab.client(token).whoami()["name"] == "ann"
    html = ann.get("/user").text
    assert token not in html
    assert re.search(r"laptop</th><td[^>]*>user</td><td[^>]*>\d s ago</td><td[^>]*>in 6 d 23 h", html)
    id = next(one["id"] for one in lab.client(token).list_tokens()["data"] if one["name"] == "laptop")
    assert ann.post(f"/user/tokens/{id}/revoke").status == 303
    with pytest.raises(Error):
        lab.client(token).whoami()


def test_tokens_of_other_accounts_and_scopes_are_out_of_reach(lab: Lab, ann: Browser, root: Browser) -> None:
    [theirs] = lab.client(lab.tokens["bob"]).list_tokens()["data"]
    assert ann.post(f"/user/tokens/{theirs['id']}/revoke").status == 404
    assert ann.post("/user/tokens", {"name": "x", "scope": "admin"}).status == 403
    assert ann.post("/user/tokens", {"name": "x", "scope": "user", "expiry": "soon"}).status == 400
    made = root.post("/user/tokens", {"name": "gpu-7", "scope": "executor"})
    assert lab.client(shown_token(made.text)).whoami()["scope"] == "executor"


def test_a_form_that_is_sent_again_makes_nothing_new(lab: Lab, ann: Browser, root: Browser) -> None:
    form = {"name": "laptop", "scope": "user", "key": ulid()}
    before = len(lab.client(lab.tokens["ann"]).list_tokens()["data"])
    tokens = {shown_token(ann.post("/user/tokens", form).text) for _ in range(2)}
    assert (len(tokens), len(lab.client(lab.tokens["ann"]).list_tokens()["data"])) == (1, before + 1)
    form = {"name": "dora", "key": ulid()}
    assert len({shown_token(root.post("/admin/accounts", form).text) for _ in range(2)}) == 1
    for path, home in (("/user/tokens", "/user"), ("/admin/accounts", "/admin"), ("/admin/clusters", "/admin")):
        answer = root.get(path)
        assert (answer.status, answer.headers["location"]) == (303, home)


def test_what_was_typed_is_kept_when_it_was_refused(root: Browser) -> None:
    refused = root.post("/admin/accounts", {"name": "bad name", "display": "A <b>", "email": "a@b"})
    assert refused.status == 400
    assert all(f'value="{text}"' in refused.text for text in ("bad name", "A &lt;b&gt;", "a@b"))


def test_whoever_waits_on_a_cordoned_node_is_told(lab: Lab, ann: Browser) -> None:
    node = lab.node("gpu-1.lab", 2)
    job = lab.client(lab.tokens["ann"]).create_job({"session": {"node": "gpu-1.lab"}})
    lab.root.update_node(node.id, {"cordoned": True, "cordonReason": "fan broken"})
    for path in (f"/job/{job['id']}", f"/node/{node.id}"):
        assert "its node is cordoned: fan broken" in ann.get(path).text


def test_addresses_that_no_page_sends(ann: Browser) -> None:
    assert ann.get("/cl/lab/main?page=" + "9" * 5000).status == 200
    assert ann.post("/user/tokens", {"name": "x"}, Origin="http://[::1").status == 403
    answer = ann._ask("PUT", "/clusters", None, {})
    assert (answer.status, set(answer.headers["allow"].split(", "))) == (405, {"GET", "HEAD"})


def test_administration_is_for_administrators(lab: Lab, ann: Browser, root: Browser) -> None:
    assert ann.get("/admin").status == 403
    assert ann.post("/admin/accounts", {"name": "eve", "admin": "yes"}).status == 403
    assert ann.post("/admin/clusters", {"org": "lab", "name": "x"}).status == 403
    token = shown_token(root.post("/admin/accounts", {"name": "dora", "email": "dora@lab.example"}).text)
    assert lab.client(token).whoami()["email"] == "dora@lab.example"
    again = root.post("/admin/accounts", {"name": "dora"})
    assert again.status == 409
    assert "There is an account &#39;dora&#39; already" in again.text
    assert root.post("/admin/clusters", {"org": "lab", "name": "second"}).status == 303
    assert lab.root.get_cluster("lab/second")
    lab.node("gpu-1.lab", cluster="lab/second")
    assert re.search(r"lab/second</a>.*>1<span class=\"unit\"> node</span>", root.get("/admin").text)
    assert root.post("/admin/clusters", {"org": "lab", "name": "a/b"}).status == 400


def test_the_audit_log_is_searched(lab: Lab, root: Browser) -> None:
    for number in range(60):
        lab.root.create_cluster("lab", {"name": f"c{number}"})
    html = root.get("/admin?q=create_cluster").text
    assert html.count(">create_cluster</td>") == 50
    assert "sign_in</td>" not in html
    older = re.search(r'href="(\?[^"]+)#audit">Older', html)
    assert older
    assert root.get("/admin" + older[1].replace("&amp;", "&")).text.count(">create_cluster</td>") == 10
    assert root.get("/admin?q=lab%2Fc7").text.count(">create_cluster</td>") == 1
    assert root.get("/admin?q=%20lab/c7%20%20create_cluster%20").text.count(">create_cluster</td>") == 1
    node = lab.node("gpu-1.lab", 2)
    lab.root.update_node(node.id, {"cordoned": True, "cordonReason": 'a "quoted" \u05d0'})
    for words in ("cordoned true", "\u05d0", '"quoted"', "gpu-1.lab cordonReason"):
        assert ">update_node</td>" in root.get("/admin?q=" + quote(words)).text, words
    assert "Nothing like that" in root.get("/admin?q=%25").text
    assert "Nothing like that" in root.get("/admin?q=nobody").text
