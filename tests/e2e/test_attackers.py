"""A poller, a port thief, a flooder and a rogue executor, all at once, while others work: nobody else notices.

The attackers' programs are `tests/attackers.py`. Here is what must not come of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.client import Client
from tests import attackers
from tests.e2e.conftest import Tty
from tests.stack import BIN, Stack, User, wait_for

PROGRAM = Path(attackers.__file__)
CONNECTIONS = 400  # of a flooder, which has 3,000 file descriptors
ROUNDS = 6


class Attacker:
    """A program of `tests/attackers.py`, which runs until `end`."""

    def __init__(self, user: dict, *words: str) -> None:
        command = ["prlimit", "--nofile=3000:3000", sys.executable, "-I", str(PROGRAM), *words]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **user
        )

    def end(self) -> dict:
        """What it says at its end."""
        out, err = self.popen.communicate(timeout=60)
        assert self.popen.returncode == 0, err.decode()
        return json.loads(out)


@pytest.fixture
def mallory(stack: Stack) -> Iterator[dict]:
    """A Unix user without an account: keyword arguments that make `subprocess` run something as them."""
    name = f"mallory-{stack.root.name[-8:].strip('_').lower()}"
    subprocess.run(["useradd", "--shell", "/bin/bash", "--user-group", name], check=True)
    entry = pwd.getpwnam(name)
    yield {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": [], "cwd": "/"}
    subprocess.run(["userdel", "--force", name], check=True, capture_output=True)


@pytest.fixture
def rogue_token(stack: Stack) -> str:
    """A good token of an executor, made by an administrator for another machine."""
    return executor_token(stack.admin, "node-9.lab")


def executor_token(admin: Client, hostname: str) -> str:
    return admin.create_token({"name": hostname, "scope": "executor", "hostname": hostname})["token"]


def test_nobody_notices_four_attackers(
    stack: Stack, ada: User, bob: User, mallory: dict, rogue_token: str, tty: type[Tty]
) -> None:
    canary = secrets.token_hex(16)
    wrote = ada.beaker("secret", "write", "canary", input=canary.encode())
    assert wrote.returncode == 0, wrote.stderr
    port = stack.address.rpartition(":")[2]
    terminal = tty(ada, "session", "create", "--gpus", "1", "--name", "shell")
    terminal.run("mark=kept")
    node = stack.admin.get_node("node-1.lab")["id"]
    victim = ada.json("session", "get", "shell")[0]["id"]  # type: ignore[index]

    thief = bob.beaker("session", "create", "--gpus", "0", "--port", f"{port}:80", "--", "true")
    assert thief.returncode == 73, thief.stderr  # the server's port is nobody's to publish

    started = []
    try:
        started.append(Attacker(mallory, "poll", canary, "/run/beaker"))
        started.append(Attacker(mallory, "poll", canary, str(stack.root)))
        started.append(Attacker(mallory, "poll_processes", canary))
        started.append(Attacker(mallory, "flood_door", str(stack.socket), str(CONNECTIONS)))
        started.append(Attacker(mallory, "flood_server", "127.0.0.1", port, str(CONNECTIONS)))
        started.append(Attacker(mallory, "rogue", stack.address, rogue_token, "node-1.lab", node, victim))
        for number in range(ROUNDS):
            script = f"printenv SECRET > /tmp/canary; cat /tmp/canary; exit {number}"
            words = ("session", "create", "--gpus", "0", "--secret-env", "SECRET=canary", "--", "sh", "-c", script)
            done = ada.beaker(*words)
            assert (done.returncode, done.stdout.decode()) == (number, f"{canary}\n"), done.stderr
            done = ada.beaker("session", "exec", "shell", "--", "echo", "here")
            assert (done.returncode, done.stdout) == (0, b"here\n"), done.stderr
        assert terminal.run("echo $mark") == "kept\n"
        status = subprocess.run(_doctor(stack), capture_output=True, text=True, timeout=60)
        assert "executor" in status.stdout + status.stderr
    finally:
        said = [attacker.end() for attacker in started]

    run, files, seen, door, server, spoke = said
    assert run["rounds"] > ROUNDS
    assert run["found"] + files["found"] == []
    assert seen["found"] == []
    assert door["made"] > CONNECTIONS
    assert server["made"] > CONNECTIONS
    refused = {name: status for name, status in spoke.items() if status < 400}
    assert refused == {}, "the rogue executor was answered"
    assert stack.admin.get_node("node-1.lab")["id"] == node
    job = stack.admin.get_job(victim)
    assert not job["status"].get("canceled")
    assert not job["status"].get("finalized")
    wait_for("the node's next heartbeat", lambda: not stack.admin.get_node("node-1.lab").get("cordoned"))
    terminal.sendline("exit 5")
    assert terminal.end() == 5


def _doctor(stack: Stack) -> list[str]:
    return ["env", f"BEAKER_SOCKET={stack.socket}", str(BIN / "beaker"), "executor", "doctor"]


def test_a_thief_hears_nobody(stack: Stack, ada: User, bob: User) -> None:
    """A session publishes whatever ports it can get; nothing that others send to the machine's services arrives."""
    port = stack.address.rpartition(":")[2]
    for wanted in (port, "22", "80"):
        done = bob.beaker("session", "create", "--gpus", "0", "--port", f"{wanted}:8000", "--", "true")
        assert done.returncode in (64, 73), f"port {wanted} of the machine was given to a session"
    inside = bob.beaker("session", "create", "--gpus", "0", "--detach", "--port", "8000", "--", "sleep", "1000")
    id = inside.stdout.decode().strip()
    program = bob.home / "attackers.py"
    program.write_bytes(PROGRAM.read_bytes())
    os.chown(program, bob.uid, bob.gid)
    thief = subprocess.Popen(
        [str(BIN / "beaker"), "session", "exec", id, "--", "python3", str(program), "steal_ports", "8000", port],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, **bob.process(),
    )  # fmt: skip
    try:
        for _ in range(ROUNDS):
            assert ada.beaker("session", "create", "--gpus", "0", "--", "true").returncode == 0
            assert ada.beaker("account", "whoami").returncode == 0
    finally:
        out, _ = thief.communicate(timeout=60)
        with contextlib.suppress(OSError):
            program.unlink()
    assert json.loads(out)["heard"] == []
