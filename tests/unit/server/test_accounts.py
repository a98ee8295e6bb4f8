"""Accounts and tokens, over HTTP."""

from __future__ import annotations

import http.client
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from beaker_sessions import ids
from beaker_sessions.errors import Error


def code(call: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(Error) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    assert caught.value.message
    return caught.value.code


def test_whoami(server: SimpleNamespace) -> None:
    me = server.client(server.ann).whoami()
    assert (me["name"], me["role"], me["scope"]) == ("ann", "user", "user")
    assert server.client(server.bob).get_account(me["id"]) == {key: me[key] for key in me if key != "scope"}
    assert {one["name"] for one in server.client(server.ann).list_members("lab")["data"]} == {"root", "ann", "bob"}
    assert [org["name"] for org in server.client(server.ann).list_organizations()["data"]] == ["lab"]


def test_wrong_tokens(server: SimpleNamespace) -> None:
    for token in ("", "password", server.ann[:-1], server.ann[:-1] + "~", ids.mint_token()):
        assert code(server.client(token).whoami) == "unauthorized"


def test_revoked_token(server: SimpleNamespace) -> None:
    ann = server.client(server.ann)
    made = ann.create_token({"name": "laptop"})
    assert server.client(made["token"]).whoami()["name"] == "ann"
    assert made["id"] in [token["id"] for token in ann.list_tokens()["data"]]
    assert code(server.client(server.bob).revoke_token, made["id"]) == "not_found"
    ann.revoke_token(made["id"])
    assert code(server.client(made["token"]).whoami) == "unauthorized"
    assert made["id"] not in [token["id"] for token in ann.list_tokens()["data"]]
    ann.revoke_token(made["id"])


def test_expired_token(server: SimpleNamespace) -> None:
    made = server.client(server.ann).create_token({"name": "short", "expiry": "1s"})
    short = server.client(made["token"])
    child = short.create_token({"name": "would like to live longer"})
    assert child["expiry"] == made["expiry"]
    while datetime.now(UTC) <= datetime.fromisoformat(made["expiry"]):
        time.sleep(0.05)
    for token in (made["token"], child["token"]):
        with pytest.raises(Error, match="expired") as caught:
            server.client(token).whoami()
        assert caught.value.code == "unauthorized"


def test_a_new_token_replaces_the_old_one(server: SimpleNamespace) -> None:
    new = server.client(server.ann).create_token()
    assert code(server.client(server.ann).whoami) == "unauthorized"
    assert server.client(new["token"]).whoami()["name"] == "ann"


def test_administrator_helps_who_lost_a_token(server: SimpleNamespace) -> None:
    root, ann = server.client(server.admin), server.client(server.ann)
    for mere in (ann.list_tokens, lambda account: ann.create_token({"account": account})):
        assert code(mere, account="bob") == "forbidden"
    [lost] = root.list_tokens(account="ann")["data"]
    root.revoke_token(lost["id"])
    assert code(ann.whoami) == "unauthorized"
    new = root.create_token({"account": "ann", "name": "again"}, key="k")
    me = server.client(new["token"]).whoami()
    assert (me["name"], me["scope"]) == ("ann", "user")
    assert root.create_token({"account": "ann", "name": "again"}, key="k") == new
    assert code(root.create_token, {"account": "nobody"}) == "not_found"


def test_tokens_are_not_in_the_database(server: SimpleNamespace, tmp_path: Path) -> None:
    made = server.client(server.admin).create_account({"name": "carl"}, key="k")["token"]
    server.service.store.close()
    kept = b"".join(file.read_bytes() for file in tmp_path.glob("server.db*"))
    assert b"carl" in kept
    for token in (made, server.ann, server.admin):
        assert token.encode() not in kept
        assert token[4:20].encode() not in kept


def test_repeated_account_gets_the_same_token(server: SimpleNamespace) -> None:
    root = server.client(server.admin)
    first = root.create_account({"name": "carl"}, key="abc")
    assert root.create_account({"name": "carl"}, key="abc") == first
    assert server.client(first["token"]).whoami()["name"] == "carl"
    assert code(root.create_account, {"name": "dora"}, key="abc") == "conflict"
    assert code(root.create_account, {"name": "carl"}) == "conflict"
    other = server.client(root.create_token({"name": "other", "scope": "admin"})["token"])
    assert code(other.create_account, {"name": "carl"}, key="abc") == "conflict"


@pytest.mark.parametrize(
    "name", ["", "a b", "-x", "a/b", "x" * 64, "a\n", "Ω", None, 3, pytest.param(ids.ulid(), id="an id")]
)
def test_bad_names(server: SimpleNamespace, name: object) -> None:
    assert code(server.client(server.admin).create_account, {"name": name}) == "invalid"


def test_a_cookie_only_where_clients_of_the_original_take_it(server: SimpleNamespace) -> None:
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=10)
    headers = {"Authorization": f"Bearer {server.ann}", "Content-Type": "application/json"}
    connection.request("POST", "/api/v3/auth/tokens", json.dumps({"name": "another"}), headers)
    answer = connection.getresponse()
    assert json.loads(answer.read())["token"]
    assert answer.getheader("Set-Cookie") is None
    connection.request("POST", "/api/v3/auth/tokens", None, headers)
    answer = connection.getresponse()
    name, *flags = answer.getheader("Set-Cookie", "").split("; ")
    assert name == f"User-Token={json.loads(answer.read())['token']}"
    assert {"Secure", "HttpOnly", "SameSite=strict"} <= set(flags)
    connection.close()
