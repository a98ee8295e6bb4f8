"""Workspaces and secrets: whose they are, what is on the disk, and what a session's own token may."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from beaker_sessions import model, wire
from beaker_sessions.errors import Error
from beaker_sessions.ids import ulid
from beaker_sessions.server import tables
from beaker_sessions.server.main import main
from beaker_sessions.server.seal import Seal

ANY_BYTES = bytes(range(256)) * 3


def refused(call: Any, *arguments: Any) -> str:
    with pytest.raises(Error) as caught:
        call(*arguments)
    return caught.value.code


def test_a_secret_comes_back_byte_for_byte(server: SimpleNamespace) -> None:
    ann = server.client(server.ann)
    assert ann.list_secrets("default")["data"] == []
    for value in (b"", b"one", ANY_BYTES, b"x" * (64 << 10)):
        written = ann.write_secret("default", "TOKEN", value)
        assert ann.read_secret("ann/default", "TOKEN") == value
    assert [secret["name"] for secret in ann.list_secrets("default")["data"]] == ["TOKEN"]
    assert ann.get_secret("default", "TOKEN") == written
    assert written["updated"] >= written["created"]
    ann.delete_secret("default", "TOKEN")
    assert refused(ann.read_secret, "default", "TOKEN") == "not_found"


def test_an_account_has_a_thousand_secrets(server: SimpleNamespace) -> None:
    ann, bob = server.client(server.ann), server.client(server.bob)
    ann.write_secret("default", "FIRST", b"x")
    ann.write_secret("git", "OTHER", b"x")
    with server.service.store.write() as rows:
        (row,) = rows.all(tables.secrets, name="FIRST")
        for number in range(998):
            rows.insert(tables.secrets, **{**row._asdict(), "name": f"S{number}"})
    with pytest.raises(Error, match="1000"):
        ann.write_secret("git", "MORE", b"x")
    ann.write_secret("git", "OTHER", b"a new value")
    bob.write_secret("default", "FIRST", b"x")
    ann.delete_secret("default", "FIRST")
    ann.write_secret("git", "MORE", b"x")


def test_what_cannot_be_a_secret(server: SimpleNamespace) -> None:
    ann = server.client(server.ann)
    assert refused(ann.write_secret, "default", "TOKEN", b"x" * (64 << 10) + b"x") == "invalid"
    assert refused(ann.write_secret, "default", "two words", b"x") == "invalid"
    assert refused(ann.write_secret, "missing", "TOKEN", b"x") == "not_found"


def test_everybody_has_a_default_workspace_of_their_own(server: SimpleNamespace) -> None:
    ann, bob = server.client(server.ann), server.client(server.bob)
    assert [one["fullName"] for one in ann.list_workspaces()["data"]] == ["ann/default", "ann/git"]
    ann.write_secret("default", "TOKEN", b"ann's")
    bob.write_secret("default", "TOKEN", b"bob's")
    assert ann.read_secret("default", "TOKEN") == b"ann's"
    assert refused(bob.read_secret, "ann/default", "TOKEN") != ""
    assert refused(bob.create_workspace, {"name": "ann/default"}) == "forbidden"


def test_a_workspace_of_an_organization_is_its_authors(server: SimpleNamespace) -> None:
    ann, bob = server.client(server.ann), server.client(server.bob)
    made = ann.create_workspace({"name": "vision", "org": "lab"})
    assert (made["fullName"], made["name"], made["author"]["name"]) == ("lab/vision", "vision", "ann")
    assert ann.get_workspace(made["id"]) == made
    assert refused(bob.create_workspace, {"name": "lab/vision"}) == "conflict"
    assert refused(bob.list_secrets, "lab/vision") == "forbidden"
    for name in ("lab/secrets", ulid()):
        assert refused(ann.create_workspace, {"name": name}) == "invalid"


def test_an_archived_workspace_is_read_and_not_written(server: SimpleNamespace) -> None:
    ann = server.client(server.ann)
    ann.write_secret("default", "TOKEN", b"x")
    assert ann.update_workspace("default", {"archive": True})["archived"] is True
    assert refused(ann.write_secret, "default", "TOKEN", b"y") == "conflict"
    assert ann.read_secret("default", "TOKEN") == b"x"
    ann.update_workspace("default", {"archive": False})
    ann.write_secret("default", "TOKEN", b"y")


def test_neither_the_database_nor_the_audit_holds_a_value(server: SimpleNamespace, tmp_path: Path) -> None:
    canary = b"canary-6f1c9a5e77"
    server.client(server.ann).write_secret("default", "TOKEN", canary)
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert {"server.db", "server.key"} <= {path.name for path in files}
    assert all(canary not in path.read_bytes() for path in files)


def test_a_sealed_value_opens_in_its_own_place_only(server: SimpleNamespace) -> None:
    """Who can write the database, and has no key, cannot put one secret in place of another."""
    ann, bob = server.client(server.ann), server.client(server.bob)
    ann.write_secret("default", "TOKEN", b"ann's")
    bob.write_secret("default", "TOKEN", b"bob's")
    bob.write_secret("default", "OTHER", b"bob's other")
    with server.service.store.write() as rows:
        stolen = next(row for row in rows.all(tables.secrets) if server.service.seal.open(
            row.sealed, f"{row.workspace_id}/{row.name}") == b"ann's")  # fmt: skip
        place = bob.get_workspace("default")["id"]
        rows.keep_secret(place, "TOKEN", stolen.sealed, None)
    assert refused(bob.read_secret, "default", "TOKEN") == "unavailable"
    assert bob.read_secret("default", "OTHER") == b"bob's other"


def test_another_key_opens_nothing(tmp_path: Path) -> None:
    one, two = Seal(tmp_path / "one"), Seal(tmp_path / "two")
    sealed = one.close(b"value", "place")
    assert Seal(tmp_path / "one").open(sealed, "place") == b"value"
    assert sealed != one.close(b"value", "place")
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600
    for seal, text, place in ((two, sealed, "place"), (one, sealed, "other"), (one, sealed[:-1], "place")):
        assert refused(seal.open, text, place) == "unavailable"


def test_a_lost_key_is_not_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    init = ["--storage-path", str(state), "init", "--account", "root"]
    init += ["--token-file", str(tmp_path / "token"), "--executor-token-file", str(tmp_path / "executor")]
    assert main(init) == 0
    assert main(init) == 0
    from beaker_sessions.server.service import Service
    from beaker_sessions.server.store import Store, sqlite_url

    service = Service(Store(sqlite_url(state / "server.db")), Seal(state / "server.key"))
    service.write_secret(service.authenticate((tmp_path / "token").read_text().strip()), "default", "TOKEN", b"x")
    service.store.close()
    (state / "server.key").unlink()
    assert main(init) == 69
    assert "server.key is missing" in capfd.readouterr().err
    assert not (state / "server.key").exists()


def test_a_sessions_token(server: SimpleNamespace, node: SimpleNamespace) -> None:
    ann, bob = server.client(server.ann), server.client(server.bob)
    id, other = ulid(), ulid()
    token = ann.create_token({"scope": "session", "session": id})
    inside = server.client(token["token"])
    assert inside.whoami()["name"] == "ann"  # before the node has reported the session, too
    for each in (id, other):
        node.executor.report_job(each, wire.job(model.Session(each, "ann", node.id, model.Request(), revision=1)))
    ann.write_secret("default", "TOKEN", b"value")
    assert inside.read_secret("default", "TOKEN") == b"value"
    inside.write_secret("git", "github.com", b"credentials")
    assert refused(inside.write_secret, "default", "TOKEN", b"new") == "forbidden"
    assert refused(inside.create_token, {"name": "more"}) == "forbidden"
    assert refused(inside.create_token) == "forbidden"
    assert refused(inside.update_job, other, {"status": {"canceled": True}}) == "forbidden"
    assert "canceled" in inside.update_job(id, {"status": {"canceled": True}})["status"]
    assert refused(bob.create_token, {"scope": "session", "session": id}) == "forbidden"
    assert refused(ann.create_token, {"scope": "session"}) == "invalid"

    session = node.executor.get_job(id) | {"revision": 2}
    session["status"]["finalized"] = session["status"].get("created") or "2026-01-01T00:00:00Z"
    node.executor.report_job(id, session)
    assert refused(inside.whoami) == "unauthorized"


def test_a_sessions_token_ends_with_the_one_that_it_was_made_with(
    server: SimpleNamespace, node: SimpleNamespace
) -> None:
    """Not with another one of its account, and a token that is replaced hands its sessions on."""
    ann = server.client(server.ann)
    laptop, script = (ann.create_token({"name": name}) for name in ("laptop", "script"))
    sessions = [ulid(), ulid()]
    inside = [
        server.client(server.client(each["token"]).create_token({"scope": "session", "session": id})["token"])
        for each, id in zip((laptop, script), sessions, strict=True)
    ]
    ann.revoke_token(script["id"])
    assert refused(inside[1].whoami) == "unauthorized"
    assert inside[0].whoami()["name"] == "ann"
    successor = server.client(laptop["token"]).create_token()
    assert inside[0].whoami()["name"] == "ann"
    handed = ann.create_job({"session": {"node": "gpu-1"}})["id"]
    (job,) = node.beat()["jobs"]
    assert job["id"] == handed
    given = server.client(job["token"])
    assert given.whoami()["name"] == "ann"
    server.client(server.admin).revoke_token(successor["id"])
    assert refused(inside[0].whoami) == "unauthorized"
    assert refused(given.whoami) == "unauthorized"


def test_a_session_that_is_handed_on_brings_its_token(server: SimpleNamespace, node: SimpleNamespace) -> None:
    """The same each time, until the session ends; it may what its author's session may."""
    ann = server.client(server.ann)
    ann.write_secret("default", "TOKEN", b"value")
    id = ann.create_job({"session": {"node": "gpu-1", "envVars": [{"name": "A", "secret": "TOKEN"}]}})["id"]
    (job,) = node.beat()["jobs"]
    (again,) = node.beat()["jobs"]
    assert (job["id"], job["token"]) == (id, again["token"])
    inside = server.client(job["token"])
    assert inside.read_secret("default", "TOKEN") == b"value"
    assert refused(inside.create_token, {"name": "more"}) == "forbidden"
    assert "token" not in ann.get_job(id)
    ann.update_job(id, {"status": {"canceled": True}})
