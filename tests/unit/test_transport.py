"""Which way a token takes to a server, against programs that wait for it where the server should be."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from beaker_sessions.transport import Endpoint, socket_path

TOKEN = "bkr_of-ann"
OK = b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"name":"ann"}'
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, whose socket it is about")


@contextmanager
def listening(server: socket.socket) -> Iterator[list[bytes]]:
    """Whatever comes is answered, and kept."""
    heard: list[bytes] = []

    def run() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                heard.append(connection.recv(65536))
                connection.sendall(OK)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield heard
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


@root
def test_many_who_connect_at_once_are_let_in_one_after_the_other(sockets: Path) -> None:
    server = unix(socket_path(str(sockets), 8420))
    server.listen(0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as before:
        before.connect(socket_path(str(sockets), 8420))  # and now the queue is full
        later = threading.Timer(0.3, lambda: server.accept()[0].close())
        later.start()
        connection = Endpoint("http://127.0.0.1:8420", str(sockets)).connection(20.0)
        connection.connect()
        connection.close()
        later.join()
    server.close()


@pytest.fixture
def sockets(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


def ask(address: str, sockets: Path, *insecure: str) -> object:
    with closing(Client(Endpoint(address, str(sockets), insecure), TOKEN)) as client:
        return client.whoami()


def refused(address: str, sockets: Path, *insecure: str) -> Error:
    with pytest.raises(Error) as caught:
        ask(address, sockets, *insecure)
    assert caught.value.hint
    return caught.value


def unix(path: str, uid: int = 0) -> socket.socket:
    """A socket that a user made and listens on."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(path)
    os.chmod(path, 0o666)
    os.setegid(uid)
    os.seteuid(uid)
    try:
        server.listen()
    finally:
        os.seteuid(0)
        os.setegid(0)
    return server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.1.2.3"])
def test_whoever_listens_on_the_servers_port_hears_nothing(host: str, sockets: Path) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.create_server((host.strip("[]"), 0), family=family)
    address = f"http://{host}:{server.getsockname()[1]}"
    with listening(server) as heard:
        assert refused(address, sockets).code == "unavailable"
    assert heard == []


@root
def test_the_servers_own_socket_is_used_and_never_its_port(sockets: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as thief:
        port = thief.getsockname()[1]
        with listening(unix(socket_path(str(sockets), port))) as heard:
            assert ask(f"http://127.0.0.1:{port}", sockets) == {"name": "ann"}
        assert TOKEN.encode() in heard[0]
        assert refused(f"http://127.0.0.1:{port}", sockets).code == "unavailable"  # it refuses now, and that is all
        thief.setblocking(False)
        with pytest.raises(BlockingIOError):
            thief.accept()


@root
@pytest.mark.parametrize("wrong", ["directory", "open directory", "link", "socket", "listener"])
def test_a_socket_that_others_can_have_made_gets_no_token(wrong: str, sockets: Path) -> None:
    path = socket_path(str(sockets), 80)
    server = unix(path, 1500 if wrong == "listener" else 0)
    if wrong == "directory":
        os.chown(sockets, 1500, 0)
    elif wrong == "open directory":
        sockets.chmod(0o777)
    elif wrong == "socket":
        os.chown(path, 1500, 0)
    elif wrong == "link":
        os.rename(path, path + ".real")
        os.symlink(path + ".real", path)
    with listening(server) as heard:
        assert refused("http://127.0.0.1", sockets).code == "unavailable"
    assert heard in ([], [b""])


@pytest.mark.parametrize(
    "address", ["http://10.1.2.3:8420", "http://beaker.lab", "http://0.0.0.0:80", "http://[::]:80", "http://127.1:80"]
)
def test_a_token_goes_to_another_machine_in_the_clear_only_where_that_is_named(address: str) -> None:
    with pytest.raises(Error) as caught:
        Endpoint(address, insecure=["http://other.lab"])
    assert caught.value.code == "invalid"
    assert address in caught.value.message
    Endpoint(address, insecure=["http://other.lab", address + "/"])
    Endpoint(address, insecure=[address.removeprefix("http://")])
    Endpoint(address.replace("http:", "https:"))


def test_an_address_that_is_named_is_reached_by_its_port(sockets: Path) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    with listening(server) as heard:
        assert ask(address, sockets, "http://127.0.0.1:1", address) == {"name": "ann"}
    assert TOKEN.encode() in heard[0]


def test_a_name_that_is_like_the_loopback_is_none() -> None:
    for host in ("127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.999"):
        with pytest.raises(Error):
            Endpoint(f"http://{host}:8420")
