"""Published ports capture nothing of the machine's, and sessions reach nothing of it that is not theirs to reach."""

from __future__ import annotations

import json
import socket
import threading
from urllib.parse import urlsplit

import pytest

from tests.stack import Stack, User, wait_for

THIEF = """
import http.server, json
class Thief(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(json.dumps({"stolen": self.headers.get("Authorization")}).encode())
http.server.HTTPServer(("", 8000), Thief).serve_forever()
"""


def answers(listener: socket.socket) -> None:
    """Say `mine` to whoever calls, until it is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.recv(1 << 16)
        connection.sendall(b"mine")
        connection.close()


def heard(port: int, host: str = "127.0.0.1") -> bytes:
    with socket.create_connection((host, port), 10) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_a_session_cannot_be_the_server(stack: Stack, ada: User):
    """Not even while that is away, when its port is free."""
    port = urlsplit(stack.address).port
    ada.json("session", "list")  # whom the executor has seen lately, it knows without the server
    stack.server.kill()
    words = ["session", "create", "--gpus", "0", "--detach", "--port", f"{port}:8000", "--", "python3", "-c", THIEF]
    done = ada.beaker(*words)
    stack.server.start()
    wait_for("the server", lambda: heard(port or 0))
    assert stack.admin.whoami()["name"] == "root"
    assert done.returncode == 73, done.stderr
    assert b"is used by the server" in done.stderr


def test_a_program_that_listens_on_loopback_keeps_its_port(ada: User):
    """Whether it was there before the session, or came while the session waited in the queue."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answers, args=[listener], daemon=True).start()
        port = listener.getsockname()[1]
        words = ["session", "create", "--gpus", "0", "--detach", "--port", f"{port}:8000"]
        done = ada.beaker(*words, "--", "python3", "-c", THIEF)
        assert done.returncode == 73, done.stderr
        assert b"used by another program" in done.stderr
        assert heard(port) == b"mine"
        listener.shutdown(socket.SHUT_RDWR)
    holder = ada.beaker("session", "create", "--gpus", "2", "--detach", "--", "sleep", "600").stdout.decode().strip()
    words[3] = "1"
    waiting = ada.beaker(*words, "--", "python3", "-c", THIEF).stdout.decode().strip()
    with socket.create_server(("127.0.0.1", port)) as listener:
        threading.Thread(target=answers, args=[listener], daemon=True).start()
        ada.beaker("session", "stop", holder)
        wait_for("the start's end", lambda: ada.json("session", "get", waiting)[0]["status"].get("finalized"))
        told = json.dumps(ada.json("session", "get", waiting))
        assert f"port {port} of this node is used by another program" in told
        assert heard(port) == b"mine"
        listener.shutdown(socket.SHUT_RDWR)


def test_a_program_that_comes_later_is_told(ada: User):
    words = ["session", "create", "--gpus", "0", "--detach", "--port", "8000", "--", "python3", "-c", THIEF]
    id = ada.beaker(*words).stdout.decode().strip()
    port = ada.json("session", "get", id)[0]["portMappings"]["8000"]
    wait_for("the session", lambda: b"stolen" in heard(port))
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", port))
