"""Secrets in sessions: they arrive whole, are gone afterwards, and are found nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.client import Client
from tests.stack import Stack, User, wait_for

ANY_BYTES = bytes(range(1, 256)) + b"'\\''\"$(id)`\n\n"
SHOW = "import os, sys; sys.stdout.buffer.write(os.environb[sys.argv[1].encode()])"


@pytest.fixture
def secrets(ada: User) -> Iterator[None]:
    assert ada.beaker("secret", "write", "KEY", input=ANY_BYTES).returncode == 0
    yield
    ada.beaker("secret", "delete", "KEY")


def create(user: User, *words: str) -> subprocess.CompletedProcess:
    return user.beaker("session", "create", "--gpus", "0", *words)


def test_write_list_read_delete(ada: User, bob: User):
    assert ada.beaker("secret", "write", "NOTE", input=ANY_BYTES).stdout == b"Wrote secret NOTE\n"
    assert b"NOTE" in ada.beaker("secret", "list").stdout
    assert ada.beaker("secret", "read", "NOTE").stdout == ANY_BYTES
    assert bob.beaker("secret", "read", "-w", f"{ada.name}/default", "NOTE").returncode == 77
    assert b"NOTE" not in bob.beaker("secret", "list", "--quiet").stdout
    assert ada.beaker("secret", "delete", "NOTE").returncode == 0
    assert ada.beaker("secret", "read", "NOTE").returncode == 66
    assert ada.beaker("workspace", "create", "lab/notes").returncode == 0
    assert b"lab/notes" in ada.beaker("workspace", "list").stdout


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("name", ["KEY", "found", "gate", "IFS", "PATH_TO_KEY"])
def test_a_variable_holds_the_secret_byte_for_byte(ada: User, name: str):
    done = create(ada, "--secret-env", f"{name}=KEY", "--", "python3", "-c", SHOW, name)
    assert (done.returncode, done.stdout) == (0, ANY_BYTES), done.stderr


@pytest.mark.usefixtures("secrets")
def test_a_file_holds_the_secret_for_its_user_alone(ada: User):
    script = "stat -c '%a %U' /secrets/key; stat -f -c %T /secrets/key; touch /secrets/key 2>&1; cat /secrets/key"
    done = create(ada, "--secret-mount", "KEY=/secrets/key", "--", "bash", "-c", script)
    mode, kind, refused, value = done.stdout.split(b"\n", 3)
    assert (mode, kind, value) == (f"400 {ada.name}".encode(), b"tmpfs", ANY_BYTES)
    assert refused.startswith(b"touch:")


@pytest.mark.usefixtures("secrets")
def test_a_second_terminal_has_the_variables_too(ada: User):
    id = create(ada, "--detach", "--secret-env", "TOKEN=KEY", "--", "sleep", "1000").stdout.decode().strip()
    wait_for("the session", lambda: ada.json("session", "get", id)[0]["status"].get("started"))
    assert ada.beaker("session", "exec", id, "--", "python3", "-c", SHOW, "TOKEN").stdout == ANY_BYTES


def test_a_session_created_at_the_server_has_them_too(stack: Stack, ada: User):
    ada.beaker("secret", "write", "KEY", input=b"from afar")
    client = Client(stack.endpoint, ada.token)
    wanted = {"node": "node-1.lab", "requests": {"gpuCount": 0}, "envVars": [{"name": "TOKEN", "secret": "KEY"}]}
    id = client.create_job({"session": {**wanted, "command": ["sh", "-c", "echo got $TOKEN"]}})["id"]
    client.close()
    wait_for("its end", lambda: ada.json("session", "get", id)[0]["status"].get("finalized"))
    wait_for("its output", lambda: ada.beaker("session", "logs", id).stdout.strip() == b"got from afar")


def test_what_cannot_be_had_is_said(ada: User, bob: User):
    bob.beaker("secret", "write", "BOBS", input=b"x")
    done = create(ada, "--secret-env", "A=BOBS", "--", "true")
    assert (done.returncode, b"'BOBS'" in done.stderr) == (66, True), done.stderr
    done = create(ada, "--workspace", f"{bob.name}/default", "--secret-env", "A=BOBS", "--", "true")
    assert done.returncode == 77, done.stderr
    for path in (f"{ada.home}/.netrc", "/proc/self/x", "/run/beaker/x", "relative", "/a/../etc/passwd"):
        assert create(ada, "--secret-mount", f"KEY={path}", "--", "true").returncode == 64, path
    assert not (ada.home / ".netrc").exists()
    ada.beaker("secret", "write", "NUL", input=b"a\0b")
    done = create(ada, "--secret-env", "A=NUL", "--", "true")
    assert (done.returncode, b"--secret-mount" in done.stderr) == (64, True), done.stderr


def test_canaries_are_found_nowhere(stack: Stack, ada: User):
    """Values are neither in files of server, executor and engine, nor in what the engine tells, nor in any argv."""
    canaries = [b"canary-in-variable-1f0c2b", b"canary-in-file-77ad90"]
    for name, canary in zip(("VARIABLE", "FILE"), canaries, strict=True):
        assert ada.beaker("secret", "write", name, input=canary).returncode == 0
    flags = ["--secret-env", "TOKEN=VARIABLE", "--secret-mount", "FILE=/secrets/key"]
    script = 'test "$TOKEN" && test -r /secrets/key && echo ready; sleep 1000'
    id = create(ada, "--detach", *flags, "--", "bash", "-c", script).stdout.decode().strip()
    wait_for("the secrets", lambda: b"ready" in ada.beaker("session", "logs", id).stdout)

    argv = b"".join(path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    told = stack.docker_cli("inspect", *stack.containers()).stdout.encode() if stack.containers() else b""
    told += ada.beaker("session", "describe", id, "--format", "json").stdout
    wait_for("the report of the session", lambda: stack.admin.get_job(id))
    told += b"".join(os.fsencode(word) for word in stack.admin.get_job(id).items().__repr__().split())
    for canary in canaries:
        assert canary not in argv + told
        assert _files_with(canary, stack.root) == []

    ada.beaker("session", "stop", id)
    wait_for("the end", lambda: not stack.live())
    assert [path for path in (stack.root / "sessions").iterdir() if path.name.startswith(id)] == []
    for canary in canaries:
        assert _files_with(canary, stack.root) == []


def _files_with(canary: bytes, root: Path) -> list[str]:
    """Regular files below `root` on its own disk: what is in memory for the session alone is meant to hold it."""
    command = [
        "grep",
        "--recursive",
        "--files-with-matches",
        "--binary-files=text",
        "--devices=skip",
        "--file=-",  # lest it be in an argv that a test beside this one looks at
        str(root),
    ]
    command[0] = shutil.which("grep") or "grep"
    found = subprocess.run(command, input=canary, capture_output=True).stdout.decode()
    on_disk = root.stat().st_dev
    return [name for name in found.splitlines() if os.path.exists(name) and os.stat(name).st_dev == on_disk]


def test_an_executor_that_restarts_leaves_them_there(stack: Stack, ada: User):
    assert ada.beaker("secret", "write", "KEY", input=b"value").returncode == 0
    flags = ["--secret-env", "TOKEN=KEY", "--secret-mount", "KEY=/secrets/key"]
    id = create(ada, "--detach", *flags, "--", "sleep", "1000").stdout.decode().strip()
    wait_for("the session", lambda: ada.json("session", "get", id)[0]["status"].get("started"))
    stack.executor.kill()
    stack.start_executor()
    time.sleep(0.1)
    done = ada.beaker("session", "exec", id, "--", "bash", "-c", "echo $TOKEN; cat /secrets/key")
    assert done.stdout == b"value\nvalue"
