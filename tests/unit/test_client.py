"""The REST client against servers that misbehave; its ordinary use is in the server's tests."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from beaker_sessions.transport import Endpoint

OK = b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"name":"ann"}'


@contextmanager
def answering(*answers: bytes | None) -> Iterator[tuple[Endpoint, list[bytes]]]:
    """A server with one connection for each of `answers`: it answers all requests with it, or with None never."""
    seen: list[bytes] = []
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)

        def run() -> None:
            for answer in answers:
                connection, _ = listening.accept()
                with connection:
                    seen.append(connection.recv(65536))
                    if answer is None:
                        stop.wait(10)
                    elif answer:
                        connection.sendall(answer)

        thread = threading.Thread(target=run)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Endpoint(address, insecure=[address]), seen
        stop.set()
        thread.join()


def failure(call: Callable[[], object]) -> Error:
    with pytest.raises(Error) as caught:
        call()
    assert caught.value.hint
    return caught.value


def test_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    error = failure(Client(Endpoint(address, insecure=[address])).whoami)
    assert error.code == "unavailable"
    assert f"127.0.0.1:{port}" in error.message


@pytest.mark.parametrize("address", ["", "ftp://x", "http://", "http://x:port", "http://x:99999999"])
def test_no_address(address: str) -> None:
    assert failure(lambda: Client(address)).code == "invalid"


@pytest.mark.parametrize("name", ["a/../b", "..", "", "a/b"])
def test_no_name(name: str) -> None:
    client = Client("http://127.0.0.1:1")
    assert failure(lambda: client.read_secret("default", name)).code == "invalid"
    assert failure(lambda: client.list_secrets(f"lab/{name}/x")).code == "invalid"


def test_token_that_cannot_be_sent() -> None:
    assert failure(lambda: Client("http://127.0.0.1:1", "a\r\nX: y")).code == "unauthorized"


def test_silent_server_has_a_time_limit() -> None:
    with answering(None) as (address, _):
        assert failure(Client(address, timeout=0.1).whoami).code == "unavailable"


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort"])
def test_server_that_is_none(answer: bytes) -> None:
    with answering(answer) as (address, _):
        assert failure(Client(address).whoami).code == "unavailable"


def test_error_page_of_something_else() -> None:
    with answering(b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\n<html>") as (address, _):
        client = Client(address)
        error = failure(client.whoami)
        client.close()
    assert error.code == "not_found"
    assert "404" in error.message


def test_kept_connection_that_was_closed_is_opened_again_with_the_same_key() -> None:
    with answering(OK, OK, OK) as (address, seen):
        client = Client(address)
        assert client.whoami() == {"name": "ann"}
        client.create_job({})
        client.create_job({}, key="mine")
        client.close()
    keys = [line for request in seen for line in request.split(b"\r\n") if line.startswith(b"Idempotency-Key: ")]
    assert len(keys) == len(set(keys)) == 2
    assert keys[1] == b"Idempotency-Key: mine"


def test_only_the_standard_library() -> None:
    code = "import sys; import beaker_sessions.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-Sc", code], check=True, capture_output=True, text=True)
    packages = {module.partition(".")[0] for module in loaded.stdout.split()}
    assert packages - sys.stdlib_module_names == {"__main__", "beaker_sessions"}
