"""Published ports: a server in a session is reached on its node, by nobody else's port."""

from __future__ import annotations

import re
import socket
import subprocess

import pytest

from tests.stack import Stack, User, wait_for

SERVER = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port={})"


def serving(user: User, *flags: str, port: int = 8000) -> str:
    """The id of a session with a web server of its own directory, /etc."""
    words = ["session", "create", "--gpus", "0", "--detach", "--workdir", "/etc", *flags]
    done = user.beaker(*words, "--", "python3", "-c", SERVER.format(port))
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def fetch(stack: Stack, address: str, port: int) -> str:
    """What the node itself gets there; Docker Engine of the stack has a network of its own."""
    script = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"
    network = ["nsenter", "--net", "--target", str(stack.docker.pid)] if stack.driver == "docker" else []
    command = [*network, "python3", "-c", script, f"http://{address}:{port}/hostname"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()


def mapped(user: User, id: str) -> dict[str, int]:
    found: dict[str, int] = user.json("session", "get", id)[0]["portMappings"]  # type: ignore[index]
    return found


def gateway(stack: Stack) -> str:
    """An address of the node that is not its loopback."""
    if stack.driver == "docker":
        return "172.17.0.1"
    shown = subprocess.run(["ip", "-4", "-o", "address", "show", "dev", stack.bridge], capture_output=True, text=True)
    return shown.stdout.split()[3].split("/")[0]


def test_a_server_inside_is_reached_on_the_node(stack: Stack, ada: User, bob: User):
    first, second = serving(ada, "--port", "8000"), serving(bob, "--port", "8000", "--hostname", "second")
    one, two = mapped(ada, first)["8000"], mapped(bob, second)["8000"]
    assert one != two
    for port, name in ((one, rf".+-{first[-4:].lower()}"), (two, "second")):
        for address in ("127.0.0.1", gateway(stack)):
            if stack.driver == "docker" and address == "127.0.0.1":
                continue  # the loopback of that network is down
            wait_for(f"{address}:{port}", lambda address=address, port=port: fetch(stack, address, port))
            assert re.fullmatch(name, fetch(stack, address, port))
    described = ada.beaker("session", "describe", first).stdout.decode()
    assert f"node-1.lab:{one}->8000/tcp" in described


def test_what_is_said_and_what_is_left(stack: Stack, ada: User):
    done = ada.beaker("session", "create", "--gpus", "0", "--port", "8000", "--port", "8001", "--", "true")
    assert re.search(rb"^Exposed Ports: 0.0.0.0:\d+->8000/tcp, 0.0.0.0:\d+->8001/tcp$", done.stderr, re.M), done.stderr
    if stack.driver == "oci":
        wait_for("the rules' end", lambda: not rules(stack))


def rules(stack: Stack) -> list[str]:
    listed = subprocess.run(["iptables", "-w", "-t", "nat", "-S", stack.bridge], capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if line.startswith("-A")]


def test_a_port_of_the_node_is_one_sessions(stack: Stack, ada: User, bob: User):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = ada.beaker("session", "create", "--gpus", "0", "--port", f"{port}:80", "--", "true")
        assert done.returncode == 73, done.stderr
        assert b"another program" in done.stderr
    id = serving(ada, "--port", f"{port}:8080", port=8080)
    done = bob.beaker("session", "create", "--gpus", "0", "--port", f"{port}:80", "--", "true")
    assert id.encode() in done.stderr
    wait_for("the server", lambda: fetch(stack, gateway(stack), port))
    ada.beaker("session", "stop", id)
    assert not fetch(stack, gateway(stack), port)
    done = bob.beaker("session", "create", "--gpus", "0", "--port", f"{port}:80", "--", "true")
    assert done.returncode == 0, done.stderr


def test_an_executor_that_died_finds_its_ports_again(stack: Stack, ada: User):
    if stack.driver != "oci":
        pytest.skip("the ports of Docker Engine are its own")
    id = serving(ada, "--port", "8000")
    port = mapped(ada, id)["8000"]
    stack.executor.kill()
    for rule in rules(stack):  # as a firewall that is set up anew
        subprocess.run(["iptables", "-w", "-t", "nat", *rule.replace("-A", "-D", 1).split()], check=True)
    stray = ["-A", stack.bridge, "-p", "tcp", "--dport", "1", "-m", "comment", "--comment", "GONE", "-j", "RETURN"]
    subprocess.run(["iptables", "-w", "-t", "nat", *stray], check=True)
    stack.start_executor()
    wait_for("the server", lambda: fetch(stack, "127.0.0.1", port))
    assert all(id in rule for rule in rules(stack))
    done = ada.beaker("session", "create", "--gpus", "0", "--port", f"{port}:80", "--", "true")
    assert id.encode() in done.stderr
