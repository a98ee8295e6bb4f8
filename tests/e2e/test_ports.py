"""Published ports: a server in a session is reached on its node, by nobody else's port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest

from beaker_sessions.executor import forwarding
from tests.stack import Stack, User, wait_for

SERVER = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port={})"
ECHO = """
import socket, threading
def echo(c):
    while data := c.recv(100): c.sendall(data)
s = socket.create_server(("127.0.0.1", 8000))
while 1: threading.Thread(target=echo, args=[s.accept()[0]]).start()
"""
ONCE = """
import socket
s = socket.create_server(("", 8000)).accept()[0].sendall(b"bye")
"""
FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"


def echoed(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"hello")
        return connection.recv(100) == b"hello"


def said(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        return connection.recv(100)


def serving(user: User, *flags: str, port: int = 8000, script: str = SERVER) -> str:
    """The id of a session with a web server of its own directory, /etc, or another script."""
    words = ["session", "create", "--gpus", "0", "--detach", "--workdir", "/etc", *flags]
    done = user.beaker(*words, "--", "python3", "-c", script.replace("{}", str(port)))
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def fetch(address: str, port: int) -> str:
    """What whoever is on the node gets there."""
    with urllib.request.urlopen(f"http://{address}:{port}/hostname", timeout=5) as answer:
        return str(answer.read().decode().strip())


@contextlib.contextmanager
def address(stack: Stack) -> Iterator[str]:
    """One of the node's; the stack's Docker Engine, with a network of its own, gets a way there."""
    if stack.driver == "oci":
        show = ["ip", "-4", "-o", "address", "show", "dev", stack.bridge]
        yield subprocess.run(show, capture_output=True, text=True, check=True).stdout.split()[3].split("/")[0]
        return
    name = f"x{stack.bridge}"
    there = ["nsenter", "--net", "--target", str(stack.docker.pid), "ip"]
    add = ["ip", "link", "add", name, "type", "veth", "peer", "name", "way", "netns", str(stack.docker.pid)]
    for command in (
        add, ["ip", "address", "add", "10.97.2.1/24", "dev", name], ["ip", "link", "set", name, "up"],
        [*there, "address", "add", "10.97.2.2/24", "dev", "way"], [*there, "link", "set", "way", "up"],
        [*there, "route", "add", "default", "via", "10.97.2.1"],  # as the way out that it is
    ):  # fmt: skip
        subprocess.run(command, check=True)
    yield "10.97.2.1"
    subprocess.run(["ip", "link", "delete", name], check=True)


def mapped(user: User, id: str) -> dict[str, int]:
    found: dict[str, int] = user.json("session", "get", id)[0]["portMappings"]  # type: ignore[index]
    return found


@pytest.mark.parametrize("bind", ["", "127.0.0.1", "::1"])
def test_a_server_inside_is_reached_on_the_node(stack: Stack, ada: User, bob: User, bind: str):
    """Also one that listens on the session's loopback alone, as Jupyter does."""
    if bind == "::1" and stack.driver == "docker":
        pytest.skip("Docker Engine gives no IPv6 to containers unless told to")
    words = SERVER.replace("port=", f"bind={bind!r}, port=") if bind else SERVER
    first = serving(ada, "--port", "8000", script=words)
    second = serving(bob, "--port", "8000", "--hostname", "second", script=words)
    one, two = mapped(ada, first)["8000"], mapped(bob, second)["8000"]
    assert one != two
    assert {one, two} < set(range(20000, 30000))
    for port, name in ((one, rf".+-{first[-4:].lower()}"), (two, "second")):
        for address in ("127.0.0.1", "[::1]"):
            wait_for(f"{address}:{port}", lambda address=address, port=port: fetch(address, port))
            assert re.fullmatch(name, fetch(address, port))
    described = ada.beaker("session", "describe", first).stdout.decode()
    assert f"node-1.lab:{one}->8000/tcp" in described


def test_another_session_reaches_a_published_port_by_the_nodes_address(stack: Stack, ada: User, bob: User):
    port = mapped(ada, serving(ada, "--port", "8000", "--hostname", "first"))["8000"]
    wait_for("the server", lambda: fetch("127.0.0.1", port))
    with address(stack) as node:
        words = ["session", "create", "--gpus", "0", "--", "python3", "-c", FETCH, f"http://{node}:{port}/hostname"]
        done = bob.beaker(*words)
    assert done.stdout.strip() == b"first", done.stderr


def test_what_is_said_and_what_is_left(ada: User):
    done = ada.beaker("session", "create", "--gpus", "0", "--port", "8000", "--port", "8001", "--", "true")
    assert re.search(rb"^Exposed Ports: 0.0.0.0:\d+->8000/tcp, 0.0.0.0:\d+->8001/tcp$", done.stderr, re.M), done.stderr
    for port in re.findall(rb":(\d+)->", done.stderr):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", int(port)), 5)


def test_a_port_of_the_node_is_one_sessions(ada: User, bob: User):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = ada.beaker("session", "create", "--gpus", "0", "--port", f"{port}:80", "--", "true")
        assert done.returncode == 73, done.stderr
        assert b"another program" in done.stderr
    id = serving(ada, "--port", f"{port}:8080", port=8080)
    done = bob.beaker("session", "create", "--gpus", "0", "--port", f"{port}:80", "--", "true")
    assert id.encode() in done.stderr
    wait_for("the server", lambda: fetch("127.0.0.1", port))
    ada.beaker("session", "stop", id)
    with pytest.raises(OSError, match="refused"):
        fetch("127.0.0.1", port)
    done = bob.beaker("session", "create", "--gpus", "0", "--port", f"{port}:80", "--", "true")
    assert done.returncode == 0, done.stderr
    done = bob.beaker("session", "create", "--gpus", "0", "--port", "80:80", "--", "true")
    assert b"below 1024" in done.stderr


def test_an_open_connection_outlives_the_executor_and_a_killed_forwarder_comes_back(stack: Stack, ada: User):
    id = serving(ada, "--port", "8000", script=ECHO)
    port = mapped(ada, id)["8000"]
    wait_for("the echo", lambda: echoed(port))
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"before")
        assert connection.recv(100) == b"before"
        stack.executor.kill()
        connection.sendall(b"without")
        assert connection.recv(100) == b"without"
        assert echoed(port)
        stack.start_executor()
        connection.sendall(b"after")
        assert connection.recv(100) == b"after"
    pid = forwarding.running()[id]
    os.kill(pid, signal.SIGKILL)
    wait_for("another forwarder", lambda: echoed(port))
    stack.executor.kill()
    os.kill(forwarding.running()[id], signal.SIGKILL)
    stack.start_executor()
    wait_for("another forwarder", lambda: echoed(port))
    ada.beaker("session", "stop", id)
    assert id not in forwarding.running()


def test_a_session_that_ends_while_the_executor_is_away_leaves_no_forwarder(stack: Stack, ada: User):
    id = serving(ada, "--port", "8000", script=ONCE)
    port = mapped(ada, id)["8000"]
    wait_for("the server", lambda: forwarding.running()[id])
    stack.executor.kill()
    wait_for("the answer", lambda: said(port) == b"bye")
    wait_for("the forwarder's end", lambda: id not in forwarding.running())
    stack.start_executor()
