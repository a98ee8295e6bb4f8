"""The `beaker` command in a session: it needs no login, and can do there what a session may."""

from __future__ import annotations

import json
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from tests.stack import Stack, User, wait_for


@pytest.fixture
def session(ada: User) -> str:
    words = ["session", "create", "--gpus", "0", "--detach", "--name", "mine", "--", "sleep", "1000"]
    id = ada.beaker(*words).stdout.decode().strip()
    wait_for("the session", lambda: ada.json("session", "get", id)[0]["status"].get("started"))
    return id


def inside(user: User, id: str, *words: str | Path) -> subprocess.CompletedProcess:
    """What a command prints in a session, without the user's configuration."""
    return user.beaker("session", "exec", id, "--env", "HOME=/tmp", "--", *map(str, words))


def test_a_session_knows_whose_it_is(ada: User, bob: User, session: str, command: Path):
    assert inside(ada, session, command, "account", "whoami", "--quiet").stdout == f"{ada.name}\n".encode()
    other = ada.beaker("session", "create", "--gpus", "0", "--detach", "--", "sleep", "1000").stdout.decode().strip()
    (job,) = json.loads(inside(ada, session, command, "session", "list", "--format", "json").stdout)
    assert (job["id"], job["name"]) == (session, "mine")
    assert b"mine" in inside(ada, session, command, "session", "describe").stdout
    assert inside(ada, session, command, "session", "stop", other).returncode == 77

    for user in (ada, bob):
        user.beaker("secret", "write", "KEY", input=b"value")
    assert inside(ada, session, command, "secret", "read", "KEY").stdout == b"value"
    assert inside(ada, session, command, "secret", "write", "KEY", "new").returncode == 77
    assert inside(ada, session, command, "secret", "read", "-w", f"{bob.name}/default", "KEY").returncode == 77
    for refused in (("account", "list"), ("account", "generate-token"), ("session", "create", "--gpus", "0")):
        assert inside(ada, session, command, *refused).returncode == 77, refused


def test_a_session_stops_itself(ada: User, session: str, command: Path):
    inside(ada, session, command, "session", "stop")
    wait_for("its end", lambda: ada.json("session", "get", session)[0]["status"].get("finalized"))


def test_it_outlives_the_executor_and_ends_with_the_session(stack: Stack, ada: User, session: str, command: Path):
    assert inside(ada, session, command, "account", "whoami").returncode == 0
    token = (stack.root / "sessions" / f"{session}.token").read_text()
    assert token not in inside(ada, session, "bash", "-c", "env; cat /run/beaker/* 2>/dev/null").stdout.decode()
    stack.executor.kill()
    stack.start_executor()
    wait_for("its socket", lambda: inside(ada, session, command, "account", "whoami").returncode == 0)
    assert inside(ada, session, command, "session", "list", "--quiet").stdout.decode().strip() == session
    ada.beaker("session", "stop", session)
    wait_for("the end", lambda: not stack.live() and not list((stack.root / "sessions").iterdir()))

    client = Client(stack.endpoint, token)

    def refused() -> bool:
        try:
            client.whoami()
        except Error as error:
            return error.code == "unauthorized"
        return False

    wait_for("the end of its token", refused)
    client.close()


def test_a_revoked_token_takes_those_of_its_sessions_along(stack: Stack, ada: User, command: Path):
    """Refused at once, and in order again when its author comes back with a valid one. Replacing it changes nothing."""
    with closing(Client(stack.endpoint, ada.token)) as client:
        second = client.create_token({"name": "second"})
    with closing(Client(stack.endpoint, second["token"])) as replaced:
        third = replaced.create_token()
    create = ("session", "create", "--gpus", "0", "--detach", "--", "sleep", "1000")
    id = ada.beaker(*create, env={"BEAKER_TOKEN": third["token"]}).stdout.decode().strip()
    wait_for("the session", lambda: ada.json("session", "get", id)[0]["status"].get("started"))
    asking = Client(stack.endpoint, third["token"])

    def whoami(token: str) -> subprocess.CompletedProcess:
        words = ["session", "exec", id, "--env", "HOME=/tmp", "--", str(command), "account", "whoami", "--quiet"]
        return ada.beaker(*words, env={"BEAKER_TOKEN": token})

    assert whoami(third["token"]).returncode == 0
    fourth = asking.create_token()
    asking.close()
    assert whoami(fourth["token"]).returncode == 0  # the session was handed on
    token = (stack.root / "sessions" / f"{id}.token").read_text()
    stack.admin.revoke_token(fourth["id"])
    with closing(Client(stack.endpoint, token)) as session, pytest.raises(Error) as refused:
        session.whoami()
    assert refused.value.code == "unauthorized"
    first = whoami(ada.token)  # notices
    assert (first.returncode, b"attach to the session once from outside" in first.stderr) == (77, True), first.stderr
    assert whoami(ada.token).stdout == f"{ada.name}\n".encode()


def test_nobody_else_reaches_a_sessions_socket(stack: Stack, ada: User, bob: User, session: str):
    path = stack.root / "sessions" / session / "session.sock"
    assert path.is_socket()
    for user in (ada, bob):
        assert user.run("ls", str(path)).returncode != 0
