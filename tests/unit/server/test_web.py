"""Floods, half requests and slow readers against the server's real sockets, with deadlines of a second."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from beaker_sessions import ids
from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from beaker_sessions.executor import doctor
from beaker_sessions.server import gate, tables, web
from beaker_sessions.server.failures import FREE, MOST, Failures
from beaker_sessions.server.routes import api
from beaker_sessions.server.subordinate import Subordinate
from beaker_sessions.settings import ExecutorSettings, ServerSettings
from beaker_sessions.transport import Endpoint
from setup import services
from tests.stack import wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it acts as several users")
WHOLE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = b"GET /healthz HTTP/1.1\r\nX: "
NO_BODY = b"POST /sign-in HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
ANN, BEN, EVE = 1501, 1502, 1503  # uids
# Opens so many connections to a port, says the start of a request on each, and waits.
FLOOD = """
import socket, sys
held = []
for number in range(int(sys.argv[2])):
    held.append(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
    held[-1].sendall(sys.argv[3].encode())
print("held", flush=True)
sys.stdin.read()
"""
# Whether the server answers a whole request of this user.
ASK = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=20)
connection.request("GET", "/healthz")
print(connection.getresponse().status)
"""


@contextmanager
def serving(app: Any, directory: Path, each: int, all: int, port: int = 0) -> Iterator[SimpleNamespace]:
    """port, endpoint (the Unix socket), and the gate."""
    directory.chmod(0o755)
    sockets, awaited = web.listen(ServerSettings(port=port, sockets=str(directory)))
    port = port or sockets[0].getsockname()[1]
    server = web.Server(app, gate.Gate(each, all), awaited)
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    while not server.started:
        time.sleep(0.005)
    address = f"http://127.0.0.1:{port}"
    try:
        yield SimpleNamespace(port=port, address=address, endpoint=Endpoint(address, str(directory)), gate=server.gate)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def real(server: SimpleNamespace, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """The service of `server`, served as beaker-server does, with few places."""
    sockets = tmp_path / "run"
    sockets.mkdir()
    with serving(api(server.service), sockets, 20, 80) as at:
        yield at


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADER", "BODY", "REST", "READ", "IDLE"):
        monkeypatch.setattr(web, name, 1.0)
    monkeypatch.setattr(web, "LOOK", 0.1)


@contextmanager
def flooding(port: int, uid: int, count: int, text: bytes = HALF) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", FLOOD, str(port), str(count), text.decode()]
    with subprocess.Popen(command, user=uid, group=uid, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        yield process
        process.stdin.close()


def answered(port: int, uid: int) -> bool:
    done = subprocess.run([sys.executable, "-c", ASK, str(port)], user=uid, group=uid, capture_output=True, text=True)
    return done.stdout == "200\n"


def begun(port: int, text: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(text)
    return connection


def test_half_requests_of_some_keep_nobody_out(real: SimpleNamespace, server: SimpleNamespace) -> None:
    with flooding(real.port, EVE, 300), flooding(real.port, BEN, 300):
        assert answered(real.port, ANN)
        assert answered(real.port, EVE)  # in place of what she holds
        assert len(real.gate.connections[f"uid {EVE}"]) <= 20
        client = Client(real.endpoint, server.admin)  # root's programs have places of their own
        assert client.whoami()["name"] == "root"
        client.close()


def test_many_users_together_leave_room_too(real: SimpleNamespace) -> None:
    with ExitStack() as floods:
        for uid in range(2000, 2006):
            floods.enter_context(flooding(real.port, uid, 20))
        assert sum(map(len, real.gate.connections.values())) <= 60
        assert answered(real.port, ANN)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        HALF,
        WHOLE + HALF,
        WHOLE + NO_BODY,
        WHOLE + WHOLE + NO_BODY + b"half",
        b"POST /sign-in HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\nhalf",
        b"POST /sign-in HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"POST /sign-in HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\nhalf",
    ],
)
@pytest.mark.usefixtures("hasty")
def test_half_a_request_ends(real: SimpleNamespace, text: bytes) -> None:
    with begun(real.port, text) as connection:
        try:
            while connection.recv(65536):
                pass
        except ConnectionResetError:
            pass


def test_requests_behind_others_keep_nobody_out(real: SimpleNamespace) -> None:
    with ExitStack() as floods:
        for uid in range(2000, 2003):
            floods.enter_context(flooding(real.port, uid, 20, WHOLE + NO_BODY))
        assert answered(real.port, ANN)


@pytest.mark.usefixtures("hasty")
def test_who_is_answered_early_and_sends_the_rest_is_not_kept_for_ever(real: SimpleNamespace) -> None:
    with begun(real.port, b"POST /sign-in HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n") as connection:
        assert b"413" in connection.recv(65536)
        connection.sendall(b"x" * 99999)
        while connection.recv(65536):
            pass


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_request_that_drips_ends(real: SimpleNamespace, before: bytes) -> None:
    with begun(real.port, before + b"GET /healthz HTTP/1.1\r\n") as connection:
        for _ in range(200):
            try:
                connection.sendall(b"X")
            except OSError:
                return
            time.sleep(0.1)
    raise AssertionError("it was listened to")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
def test_who_does_not_read_is_cut_off(tmp_path: Path, more: bytes) -> None:
    async def app(scope: Any, _receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x" * (64 << 20)})

    with (
        serving(app, tmp_path, 20, 80) as at,
        begun(at.port, b"GET / HTTP/1.1\r\nHost: x\r\n" + more + b"\r\n") as reader,
    ):
        reader.recv(1)
        deadline = time.monotonic() + 30
        while at.gate.connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not at.gate.connections


@pytest.mark.usefixtures("hasty")
def test_events_go_on_past_every_deadline(
    real: SimpleNamespace, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beaker_sessions.server.console.events.LOOK", 0.5)
    cookie = server.service.sign_in(server.ann)
    request = f"GET /events?on=* HTTP/1.1\r\nHost: x\r\nCookie: beaker={cookie}\r\n\r\n".encode()
    with begun(real.port, request) as connection, connection.makefile("rb") as stream:
        for _ in range(8):
            while b"still here" not in (line := stream.readline()):
                assert line, "the stream has ended"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("path", "size"), [("/api/v3/jobs", 3 << 20), ("/sign-in", 100 << 10), ("/healthz", 8)])
def test_a_body_that_is_too_long(
    real: SimpleNamespace, server: SimpleNamespace, path: str, size: int, chunked: bool
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", real.port, timeout=20)
    body: Any = (b"x" * (size // 8) for _ in range(8)) if chunked else b"x" * size
    headers = {"Authorization": f"Bearer {server.ann}"}
    connection.request("POST", path, body, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["code"]) == (413, 413)
    connection.close()


def test_a_body_in_chunks_is_taken(real: SimpleNamespace, server: SimpleNamespace) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", real.port, timeout=20)
    headers = {"Authorization": f"Bearer {server.ann}", "Content-Type": "application/json"}
    connection.request("POST", "/api/v3/workspaces", iter([b'{"na', b'me": "mine"}']), headers, encode_chunked=True)
    assert connection.getresponse().status == 201
    connection.close()


@pytest.mark.parametrize("path", ["/api/v3/jobs?limit=1000", "/node/gpu-1"])
def test_an_executor_does_not_wait_for_a_flood_of_work(
    real: SimpleNamespace, server: SimpleNamespace, node: SimpleNamespace, path: str
) -> None:
    ann = server.client(server.ann)
    made = ann.create_job({"session": {"node": node.id, "command": ["true"]}})
    with server.service.store.write() as rows:
        row = rows.one(tables.jobs, id=made["id"])._asdict()
        for _ in range(1000):
            rows.insert(tables.jobs, **{**row, "id": ids.ulid()})
    cookie = server.service.sign_in(server.ann)
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.ann}\r\nCookie: beaker={cookie}\r\n"
    os.seteuid(EVE)  # connections of this machine are told by who holds them
    try:
        flood = [begun(real.port, f"{head}Connection: close\r\n\r\n".encode()) for _ in range(20)]
    finally:
        os.seteuid(0)
    assert flood[0].recv(12) == b"HTTP/1.1 200"
    client = Client(real.endpoint, server.executor)
    client.whoami()
    client.close()
    unanswered = 0
    for one in flood[1:]:
        one.setblocking(False)
        try:
            one.recv(1)
        except BlockingIOError:
            unanswered += 1
    assert unanswered > 10
    for one in flood:
        one.close()


def test_whoever_holds_the_port_keeps_the_machines_own_programs_from_nothing(
    server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(web, "AGAIN", 0.2)
    directory = tmp_path / "run"
    directory.mkdir()
    os.seteuid(EVE)
    try:
        held = socket.create_server(("127.0.0.1", 0))
    finally:
        os.seteuid(0)
    port = held.getsockname()[1]
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(server.executor)
    address = f"http://127.0.0.1:{port}"
    node = ExecutorSettings(address=address, socket=str(directory / "executor.sock"), token_path=str(token))
    with serving(api(server.service), directory, 20, 80, port) as at:
        client = Client(at.endpoint, server.ann)
        assert client.whoami()["name"] == "ann"
        client.close()
        wait_for("a line in the log", lambda: f"uid {EVE}" in caplog.text)
        assert [one.level for one in doctor._server(node) if f"uid {EVE}" in one.what] == ["warning"]
        held.close()
        wait_for("the port", lambda: answered(port, ANN))
        assert [one.level for one in doctor._server(node)] == ["ok"]


def test_two_servers_do_not_take_a_socket_from_each_other(real: SimpleNamespace, tmp_path: Path) -> None:
    second = f"""
from beaker_sessions.server import web
from beaker_sessions.server.subordinate import Subordinate
from beaker_sessions.settings import ExecutorSettings, ServerSettings
web.listen(ServerSettings(port={real.port}, sockets={str(tmp_path / "run")!r}))
"""
    done = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True)
    assert "another server serves" in done.stderr
    assert answered(real.port, ANN)


def test_whose_a_connection_of_this_machine_is() -> None:
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.create_server((host, 0), family=family) as listening:
            os.seteuid(EVE)
            try:
                eves = socket.create_connection(listening.getsockname()[:2])
            finally:
                os.seteuid(0)
            accepted, theirs = listening.accept()
            with accepted:
                assert web.owner(theirs, accepted.getsockname()) == EVE
                eves.close()  # which the kernel then lists as root's
                assert web.owner(theirs, accepted.getsockname()) is None


def test_the_subordinate_ids_of_one_person_are_one_peer(
    real: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "subuid"
    monkeypatch.setattr(web, "subordinate_ids", Subordinate(file), raising=False)
    file.write_text("eve:100000:65536\nnonsense\n1501:300000:65536\n")
    with ExitStack() as floods:
        for uid in range(100000, 100006):
            floods.enter_context(flooding(real.port, uid, 20))
        wait_for("all to be let in", lambda: sum(map(len, real.gate.connections.values())) >= 20)
        held = {peer: len(some) for peer, some in real.gate.connections.items()}
        assert held == {"uids of eve": 20}


def test_setup_asks_the_server_of_this_machine(
    real: SimpleNamespace, server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "SETTINGS", tmp_path / "config.yml")
    services.SETTINGS.write_text(f"beaker:\n  address: {real.address}\nserver:\n  sockets: {tmp_path / 'run'}\n")
    assert [services.ask("/api/v3/user", token) for token in (server.ann, "nonsense")] == [200, 401]
    for address, why in (("http://127.0.0.1:1", "No such file"), ("http://10.0.0.1:8420", "not encrypted")):
        services.SETTINGS.write_text(f"beaker:\n  address: {address}\n")
        with pytest.raises(OSError, match=why):
            services.ask("/api/v3/user", server.ann)


def test_whose_subordinate_id_it_is(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    known = Subordinate(file)
    assert known.owner(100000) == ""
    file.write_text("ann:100000:65536\nroot:0:10\n1501:300000:65536\nno range\n")
    asked = (0, 99999, 100000, 165535, 165536, 365535)
    assert [known.owner(uid) for uid in asked] == ["", "", "ann", "ann", "", "1501"]
    file.write_text("ben:100000:1\n")
    assert [known.owner(uid) for uid in asked] == ["", "", "ben", "", "", ""]


def test_wrong_tokens_wait_and_right_ones_never(
    real: SimpleNamespace, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []
    monkeypatch.setattr(Failures, "wait", lambda _self, peer, _now: waited.append(peer) or 0.0)
    endpoint = Endpoint(real.address, insecure=[real.address])
    wrong = server.ann[:-1] + ("a" if server.ann[-1] != "a" else "b")

    def ask(token: str) -> int:
        os.seteuid(EVE)
        try:
            client = Client(endpoint, token)
            client.whoami()
        except Error as error:
            return error.status
        finally:
            os.seteuid(0)
            client.close()
        return 200

    assert [ask(token) for token in (wrong, "nonsense", "", server.ann)] == [401, 401, 401, 200]
    assert waited == [f"uid {EVE}"] * 2
    server.client(server.admin).revoke_token(server.client(server.ann).list_tokens()["data"][0]["id"])
    assert ask(server.ann) == 401
    assert waited == [f"uid {EVE}"] * 3


def test_waits_grow_to_a_bound_and_end() -> None:
    failures = Failures()
    assert [failures.wait("a", 0.0) for _ in range(FREE)] == [0.0] * FREE
    waits = [failures.wait("a", 0.0) for _ in range(100)]
    assert waits == sorted(waits)
    assert 0 < waits[0] < waits[-1] == MOST < 3.0
    assert failures.wait("b", 0.0) == 0.0
    assert failures.wait("a", 10.0) == 0.0
    for number in range(10_000):
        failures.wait(f"peer {number}", 0.0)
    assert len(failures._due) < 5000


class Held:
    def __init__(self, peer: str, waiting: float | None) -> None:
        self.peer, self.waiting = peer, waiting


@pytest.fixture
def come() -> tuple[gate.Gate, Callable[..., Any]]:
    door = gate.Gate(each=3, all=8)

    def come(peer: str, waiting: float | None = None) -> Any:
        one = Held(peer, waiting)
        stays, victim = door.admit(one)
        if victim:
            door.remove(victim)
        if stays:
            door.add(one)
        return victim.waiting if victim else stays

    return door, come


def test_executors_have_places_of_their_own(come: tuple[gate.Gate, Callable[..., Any]]) -> None:
    door, arrive = come
    door.executor("10.0.0.1")
    assert [arrive(f"10.1.0.{number}") for number in range(8)] == [True] * 6 + [False] * 2
    assert arrive("10.0.0.1") is True
    assert arrive(gate.ROOT) is True


def test_who_has_most_makes_room_for_who_has_less(come: tuple[gate.Gate, Callable[..., Any]]) -> None:
    _, arrive = come
    assert [arrive("a", 5.0), arrive("a", 3.0), arrive("a"), arrive("b", 1.0), arrive("c"), arrive("d")] == [True] * 6
    assert arrive("e") == 3.0
    assert arrive("a") is False  # has most, and nobody has more
    assert arrive("f") == 5.0


def test_ones_own_half_requests_make_room(come: tuple[gate.Gate, Callable[..., Any]]) -> None:
    _, arrive = come
    assert [arrive("a", 2.0), arrive("a"), arrive("a", 1.0)] == [True] * 3
    assert arrive("a") == 1.0
    assert arrive("a") == 2.0
    assert arrive("a") is False


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_peers(address: str, peer: str) -> None:
    assert gate.network(address) == peer
