"""The program that serves published ports, between this machine and a network namespace of the test's own."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from beaker_sessions.executor import forwarder, forwarding, ports
from beaker_sessions.model import Claim, Request
from tests.stack import wait_for

INSIDE = 8000  # the port inside
ADDRESS = "10.99.0.2"


class Served:
    """A namespace with a first process, and its published port."""

    def __init__(self, id: str) -> None:
        self.id = id
        script = (
            "ip link set lo up; ip link add eth0 type veth peer name peer; ip link set peer up; ip link set eth0 up;"
            f"ip addr add {ADDRESS}/24 dev eth0; ip route add default dev eth0; echo up; exec sleep 600"
        )
        self.init = subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdout=subprocess.PIPE)
        assert self.init.stdout
        self.init.stdout.readline()
        self.processes = [self.init]
        self.port = 0

    def publish(self) -> None:
        choice = ports.Ports(range(20000, 30000))
        request = Request("image", ports=((INSIDE, 0),))
        mapped = choice.pick(self.id, request, [])
        mapped, sockets = choice.take(self.id, request, Claim(ports=mapped), [])
        self.port = mapped[0][1]
        pidfd = os.pidfd_open(self.init.pid)
        forwarding.start(self.id, pidfd, sockets)
        os.close(pidfd)
        for sock, _ in sockets:
            sock.close()

    def serve(self, script: str) -> None:
        """Run Python inside, until it says something."""
        command = ["nsenter", f"--net=/proc/{self.init.pid}/ns/net", "python3", "-c", script]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.processes.append(process)
        assert process.stdout
        process.stdout.readline()

    @property
    def pid(self) -> int:
        return forwarding.running().get(self.id, 0)

    def call(self, host: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection((host, self.port), 10)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        wait_for("its end", lambda: not self.pid)


@pytest.fixture
def served() -> Iterator[Served]:
    if os.geteuid() != 0:
        pytest.skip("needs root to make a network namespace")
    result = Served(f"TEST{os.getpid()}F{time.monotonic_ns()}")
    result.publish()
    yield result
    result.close()


ECHO = """
import socket, threading
def echo(c):
    while data := c.recv(1 << 16): c.sendall(data)
    c.close()
s = socket.create_server(({!r}, 8000), family=socket.{}, backlog=1000)
print(flush=True)
while True: threading.Thread(target=echo, args=[s.accept()[0]], daemon=True).start()
"""


def echoed(call: Callable[[], socket.socket], data: bytes = b"hello") -> bytes:
    with call() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)  # what comes afterwards must still arrive
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.mark.parametrize(
    ("address", "family"), [("127.0.0.1", "AF_INET"), ("::1", "AF_INET6"), (ADDRESS, "AF_INET"), ("", "AF_INET")]
)
def test_wherever_a_server_listens_inside_it_is_reached_from_every_address(served: Served, address: str, family: str):
    served.serve(ECHO.format(address, family))
    for host in ("127.0.0.1", "::1"):
        assert echoed(lambda host=host: served.call(host)) == b"hello"


def test_a_port_that_nobody_serves_is_refused_and_served_later(served: Served):
    with pytest.raises(ConnectionError):
        echoed(served.call)
    served.serve(ECHO.format("127.0.0.1", "AF_INET"))
    assert echoed(served.call) == b"hello"


def test_nobody_else_gets_the_port(served: Served):
    for address in ("127.0.0.1", ""):
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                thief.bind((address, served.port))


def test_every_byte_arrives_however_slowly_it_is_read(served: Served):
    served.serve(ECHO.format("127.0.0.1", "AF_INET"))
    data, got = os.urandom(1 << 20) * 24, hashlib.sha256()
    with served.call() as connection:
        sender = threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
        sender.start()
        size = 0
        while chunk := connection.recv(1 << 20):
            got.update(chunk)
            size += len(chunk)
            if size < 4 << 20:
                time.sleep(0.01)
        sender.join()
    assert (size, got.digest()) == (len(data), hashlib.sha256(data).digest())


def test_it_has_no_privileges_and_ends_with_the_session(served: Served):
    pid = served.pid
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(forwarder.NOBODY)}
    assert not status["Groups"].split()
    assert {status[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert Path(f"/proc/{pid}/fd").stat().st_uid == 0, "others of its user may look into it"
    assert int(status["VmRSS"].split()[0]) < 12 << 10
    assert int(status["PPid"]) != os.getpid()
    served.init.kill()
    wait_for("its end", lambda: not served.pid)
    with pytest.raises(ConnectionRefusedError):
        served.call()


def test_too_many_connections_are_refused_and_those_that_are_there_go_on(served: Served):
    served.serve(ECHO.format("127.0.0.1", "AF_INET"))
    most = forwarder.SHARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        first = stack.enter_context(served.call())
        first.sendall(b"a")
        assert first.recv(1) == b"a"
        flood = [stack.enter_context(socket.socket()) for _ in range(most + 20)]
        refused = 0
        for connection in flood:
            try:
                connection.connect(("127.0.0.1", served.port))
                connection.sendall(b"b")
                refused += connection.recv(1) != b"b"
            except ConnectionError:
                refused += 1
        assert refused == 21
        first.sendall(b"c")
        assert first.recv(1) == b"c"
        with pytest.raises(ConnectionError):
            echoed(lambda: served.call("::1"))
        found = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
        if own := next(iter(found), ""):
            assert echoed(lambda: served.call(own)) == b"hello", "another address has its own share"
        for connection in flood:
            connection.close()
        wait_for("room", lambda: echoed(served.call) == b"hello")


def limit(pid: int, files: int) -> None:
    # As its own user: root of a container may lack the right to do it to others.
    user = ["setpriv", f"--reuid={forwarder.NOBODY}", f"--regid={forwarder.NOBODY}", "--clear-groups"]
    subprocess.run([*user, "prlimit", "--pid", str(pid), f"--nofile={files}:"], check=True)


def test_without_descriptors_it_waits_and_goes_on(served: Served):
    served.serve(ECHO.format("127.0.0.1", "AF_INET"))
    assert echoed(served.call) == b"hello"
    limit(served.pid, 3)
    with served.call() as waiting:
        waiting.settimeout(0.5)
        waiting.sendall(b"hello")
        with pytest.raises(TimeoutError):
            waiting.recv(5)
        limit(served.pid, 1024)
        waiting.settimeout(30)
        assert waiting.recv(5) == b"hello"
    assert echoed(served.call) == b"hello"
