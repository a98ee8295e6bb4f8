"""A port thief, a flooder and a rogue executor, against the server of a node with sessions."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from beaker_sessions import ids
from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from tests.stack import Stack, User, wait_for

# Listens on a port, answers whatever comes as the server would, and prints what it heard.
THIEF = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    print("listening", flush=True)
    while True:
        connection, _ = server.accept()
        print(repr(connection.recv(65536)), flush=True)
        body = b'{"id": "x", "name": "ada", "role": "admin", "scope": "admin"}'
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
        connection.close()
"""
FLOOD = """
import socket, sys, time
held = []
print("flooding", flush=True)
while True:
    try:
        held.append(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
        held[-1].sendall(b"GET /api/v3/user HTTP/1.1\\r\\nX: ")
    except OSError:
        held = held[len(held) // 2:]
    if len(held) > 800:
        held = held[1:]
    time.sleep(0.002)
"""


@contextmanager
def running(user: User, program: str, says: bytes, *arguments: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, **user.process()) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == says + b"\n"
            yield process
        finally:
            process.kill()


def port(stack: Stack) -> str:
    return stack.address.rpartition(":")[2]


def restart(stack: Stack) -> None:
    stack.server.start()
    wait_for("the server", stack.admin.whoami)
    wait_for("a heartbeat", lambda: stack.admin.get_node("node-1.lab")["status"] == "ok", 60)


def test_whoever_takes_the_servers_port_gets_no_token(stack: Stack, ada: User, bob: User):
    with closing(Client(stack.endpoint, ada.token)) as client:
        new = {"BEAKER_TOKEN": client.create_token({"name": "never seen by the executor"})["token"]}
    stack.server.kill()
    try:
        with running(bob, THIEF, b"listening", port(stack)) as thief:
            stack.executor.kill()
            stack.start_executor()
            assert ada.beaker("config", "test").returncode == 69
            assert ada.beaker("session", "list", env=new).returncode == 69  # the executor
            wait_for("an attempt to report", lambda: "cannot report" in stack.executor.log.read_text())
            thief.kill()
            assert thief.stdout
            assert thief.stdout.read() == b""
    finally:
        restart(stack)


def test_a_flood_of_half_requests_holds_nobody_up(stack: Stack, ada: User, bob: User):
    node = stack.admin.get_node("node-1.lab")
    with running(bob, FLOOD, b"flooding", port(stack)):
        done = ada.beaker("session", "create", "--gpus", "0", "--", "echo", "there")
        assert (done.returncode, done.stdout) == (0, b"there\n"), done.stderr
        assert ada.beaker("config", "test").returncode == 0
        wait_for("heartbeats", lambda: stack.admin.get_node("node-1.lab")["expiry"] > node["expiry"])
        with closing(Client(stack.endpoint, bob.token)) as client:
            assert client.whoami()["name"] == bob.name


def test_a_rogue_executor_is_no_node_that_is_there(stack: Stack, ada: User):
    token = stack.admin.create_token({"name": "rogue", "scope": "executor"})["token"]
    body = {"hostname": "node-1.lab", "limits": {}, "instance": ids.ulid()}
    with closing(Client(stack.endpoint, token)) as rogue, pytest.raises(Error) as refused:
        rogue.register_node("lab/main", body)
    assert refused.value.code == "conflict"
    done = ada.beaker("session", "create", "--gpus", "0", "--", "true")
    assert done.returncode == 0, done.stderr
    assert stack.admin.get_node("node-1.lab")["status"] == "ok"


def test_a_token_that_was_revoked_stays_so_when_the_server_goes(stack: Stack, ada: User):
    with closing(Client(stack.endpoint, ada.token)) as client:
        made = client.create_token({"name": "second"})
    env = {"BEAKER_TOKEN": made["token"]}
    assert ada.beaker("session", "list", env=env).returncode == 0
    stack.admin.revoke_token(made["id"])

    def forgotten() -> bool:
        with closing(sqlite3.connect(f"file:{stack.state}/executor/ledger.db?mode=ro", uri=True)) as ledger:
            return not ledger.execute(
                "SELECT 1 FROM accounts WHERE token_hash = ?", (ids.hash_token(made["token"]),)
            ).fetchall()  # fmt: skip

    wait_for("the next heartbeat", forgotten)
    stack.server.kill()
    try:
        assert ada.beaker("session", "list", env=env).returncode in (69, 77)
        assert ada.beaker("session", "list").returncode == 0
    finally:
        restart(stack)
