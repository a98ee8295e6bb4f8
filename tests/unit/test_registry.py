"""A registry that somebody chose: where it can send root, what it learns, and what of its answers comes back."""

from __future__ import annotations

import base64
import contextlib
import copy
import http.server
import json
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beaker_sessions.errors import Error
from beaker_sessions.sandbox import Limits
from beaker_sessions.sandbox.oci import documents, fetching, registry
from beaker_sessions.sandbox.oci.reference import parse
from beaker_sessions.sandbox.oci.registry import Registry, public
from beaker_sessions.sandbox.oci.room import Room
from tests.dripping import CONFIG, LAYER, MANIFEST, Answer, Drip, Server, described

SECRET = "token-of-the-machine"


@pytest.fixture
def machine() -> Iterator[Server]:
    """A service of the machine that only root reaches."""
    with Server(lambda *_: (200, {}, json.dumps({"token": SECRET}).encode())) as server:
        yield server


def failing(server: Server, known: tuple[str, str] | None = None) -> Error:
    with pytest.raises(Error) as error:
        Registry(parse(f"{server.address}/a/b:1"), known).manifest()
    assert SECRET not in f"{error.value.message} {error.value.hint}"
    return error.value


@pytest.mark.parametrize("realm", ["http://{}/token", "https://{}/token", "//{}/token", "http://user:x@{}/token"])
def test_a_realm_is_no_service_of_the_machine(machine: Server, realm: str) -> None:
    """Root fetched what it named, and sent the token in the answer to the registry."""
    challenge = {"WWW-Authenticate": f'Bearer realm="{realm.format(machine.address)}",service="x"'}
    with Server(lambda *_: (401, challenge, b"")) as evil:
        failing(evil, ("ada", "correct horse"))
        assert machine.asked == []
        assert all(SECRET not in str(headers) for _, headers in evil.asked)
        assert all("Authorization" not in headers for _, headers in evil.asked)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_leads_to_no_service_of_the_machine(machine: Server, status: int) -> None:
    for where in (f"http://{machine.address}/latest", "http://169.254.169.254/latest", "file:///etc/shadow", "gopher:"):
        with Server(lambda *_, where=where: (status, {"Location": where}, b"")) as evil:
            assert failing(evil).code in ("unavailable", "invalid")
    assert machine.asked == []


def test_what_a_blob_redirects_to_is_checked_too(machine: Server, tmp_path: Path) -> None:
    def answer(path: str, _: dict[str, str]) -> Answer:
        if "/blobs/" in path:
            return 302, {"Location": f"http://{machine.address}/x"}, b""
        return 200, {}, MANIFEST

    with Server(answer) as evil:
        source = Registry(parse(f"{evil.address}/a/b:1"))
        with pytest.raises(Error):
            source.fetch(source.manifest().blobs[1], tmp_path / "blob")
    assert machine.asked == []


def test_a_token_service_on_the_registry_itself_gets_the_login(tmp_path: Path) -> None:
    basic = "Basic " + base64.b64encode(b"ada:correct horse").decode()

    def answer(path: str, headers: dict[str, str]) -> Answer:
        if path.startswith("/token?"):
            given = headers.get("Authorization") == basic and "scope=repository%3Aa%2Fb%3Apull" in path
            return (200, {}, b'{"access_token": "granted"}') if given else (401, {}, b"")
        if headers.get("Authorization") != "Bearer granted":
            fields = f'realm="http://{headers["Host"]}/token",service="lab",scope="repository:a/b:pull"'
            return 401, {"WWW-Authenticate": f"Bearer {fields}"}, b""
        blobs = {described(content)["digest"]: content for content in (CONFIG, LAYER)}
        return 200, {}, MANIFEST if "/manifests/" in path else blobs[path.rpartition("/")[2]]

    with Server(answer) as server:
        wanted = parse(f"{server.address}/a/b:1")
        source = Registry(wanted, ("ada", "correct horse"))
        for blob in source.manifest().blobs:
            source.fetch(blob, tmp_path / blob.file)
            assert (tmp_path / blob.file).read_bytes() in (CONFIG, LAYER)
        with pytest.raises(Error) as error:
            Registry(wanted, ("ada", "wrong")).manifest()
        assert error.value.code == "unauthorized"


@pytest.mark.parametrize(
    ("host", "realm", "trusted"),
    [
        ("docker.io", "https://auth.docker.io/token", True), ("docker.io", "https://auth.docker.io.evil.com/", False),
        ("docker.io", "http://auth.docker.io/token", False), ("ghcr.io", "https://ghcr.io/token", True),
        ("registry.gitlab.com", "https://gitlab.com/jwt/auth", True), ("gitlab.com", "https://evil.gitlab.com/", False),
        ("evil.com", "https://auth.docker.io/token", False), ("registry.com", "https://com/", False),
        ("registry.lab", "https://sso.corp:8443/", False), ("named.lab", "https://sso.corp:8443/", True),
        ("named.lab", "https://sso.corp/", False), ("named.lab", "http://sso.corp:8443/", False),
        ("10.0.0.1", "https://0.0.1/", False), ("registry.lab", "https://registry.lab@evil.com/", False),
    ],
)  # fmt: skip
def test_who_may_see_a_password(host: str, realm: str, trusted: bool) -> None:
    source = Registry(parse(f"{host}/a/b:1"), ("ada", "x"), {"named.lab": "sso.corp:8443"})
    assert source._trusted(realm) is trusted


@pytest.mark.parametrize(
    ("address", "yes"),
    [
        ("1.1.1.1", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False), ("0.0.0.0", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("192.168.1.1", False), ("224.0.0.1", False),
        ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fd00:ec2::254", False), ("::ffff:127.0.0.1", False),
        ("::ffff:1.1.1.1", True), ("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False),
        ("255.255.255.255", False), ("ff02::1", False), ("::127.0.0.1", False), ("198.18.0.1", False), ("x", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, yes: bool) -> None:
    assert public(address) is yes


def test_a_name_that_leads_inside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several addresses is enough; and what was resolved is what is connected to."""
    tried: list[Any] = []

    def connect(addresses: list[str], port: int, _: Any) -> Any:
        tried.append((addresses[0], port))
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr(registry, "_dial", connect)
    names = {"inside.example": ["1.1.1.1", "10.0.0.1"], "outside.example": ["1.1.1.1"]}
    monkeypatch.setattr(
        registry.socket, "getaddrinfo", lambda host, port, **_: [(0, 0, 0, "", (a, port)) for a in names[host]]
    )
    source = Registry(parse("registry.lab/a/b:1"))
    with pytest.raises(registry._Refused):
        source._connection("https://inside.example/token", registry._Answer())
    assert tried == []
    with pytest.raises(ConnectionError):
        source._connection("https://outside.example/token", registry._Answer())
    assert tried == [("1.1.1.1", 443)]


def but(**changes: Any) -> bytes:
    """A manifest that is right but for this."""
    return json.dumps(json.loads(MANIFEST) | changes).encode()


def layer(**changes: Any) -> bytes:
    return but(layers=[described(LAYER) | changes])


def index(entry: dict[str, Any]) -> bytes:
    return json.dumps({"manifests": [{"platform": {"architecture": MACHINE, "os": "linux"}, **entry}]}).encode()


MACHINE = registry.ARCHITECTURES.get(platform.machine(), platform.machine())
HOSTILE = {
    "empty": b"", "text": b"<html>", "list": b"[]", "deep": b"[" * 100_000, "long": b" " * (5 << 20), "nothing": b"{}",
    "number": b'{"config": ' + b"9" * 5000 + b"}", "bytes": b"\xff\xfe{}",
    "config": b'{"config": 3, "layers": []}', "layers": but(layers={}), "strings": but(layers=["x"]),
    "schema": but(schemaVersion="2"), "kind": but(mediaType="text/html"), "kinds": but(mediaType=["x"]),
    "chart": but(config=described(CONFIG) | {"mediaType": "application/vnd.cncf.helm.config.v1+json"}),
    "untyped": layer(mediaType=None), "encrypted": layer(mediaType=described(LAYER)["mediaType"] + "+encrypted"),
    "size": layer(size=-1), "bool": layer(size=True), "float": layer(size=1e3), "huge": layer(size=1 << 60),
    "path": layer(digest="sha256:../../etc"), "sha1": layer(digest="sha1:" + "0" * 40), "line": layer(digest="x\n"),
    "many": but(layers=[described(LAYER)] * 129), "all": but(layers=[described(LAYER) | {"size": 1 << 49}] * 3),
    "bigconfig": but(config=described(CONFIG, "config.v1+json") | {"size": 1 << 30}),
    "index": b'{"manifests": [1, null, "x"]}', "platform": b'{"manifests": [{"platform": "linux"}]}',
    "digestless": index({}), "itself": index({"digest": "../x", "size": 1}), "other": index(described(b"other")),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_an_error(name: str) -> None:
    """An exception would have had the executor start the session again and again."""
    with Server(lambda *_: (200, {}, HOSTILE[name])) as evil:
        error = failing(evil)
        assert error.code in ("invalid", "not_found")
        assert f"{evil.address}/a/b:1" in error.message


def beside(raw: bytes, key: str, value: object, other: str) -> bytes:
    """A document that has another key with a value, behind the one of this name, which comes last in its object."""
    more = json.dumps({other: value}, ensure_ascii=False)[1:-1]
    return raw.replace(f'"{key}":'.encode(), f"{more}, ".encode() + f'"{key}":'.encode(), 1)


SECRET_FILE = "sha256:../secret"
TWICE = {
    "config": ("manifest", "layers", {"digest": SECRET_FILE}, "Config"),
    "config, first": ("manifest", "config", {"digest": SECRET_FILE}, "CONFIG"),
    "config, the same": ("manifest", "config", {"digest": SECRET_FILE}, "config"),
    "layers": ("manifest", "layers", [{"digest": SECRET_FILE}], "Layers"),
    "layers, long s": ("manifest", "layers", [{"digest": SECRET_FILE}], "layer\u017f"),
    "kind": ("manifest", "layers", "x", "MediaType"), "schema": ("manifest", "layers", 1, "schemaversion"),
    "digest": ("manifest", "digest", SECRET_FILE, "Digest"), "size": ("manifest", "digest", 1, "SIZE"),
    "both": ("manifest", "layers", [], "Manifests"), "unknown": ("manifest", "layers", 1, "schemaversioN"),
    "manifests": ("index", "manifests", [], "Manifests"), "platform": ("index", "platform", {}, "Platform"),
    "os": ("index", "os", "linux", "OS"), "entry": ("index", "digest", SECRET_FILE, "Digest"),
    "variables": ("config", "Env", ["A=c"], "env"), "files": ("config", "rootfs", {}, "RootFS"),
    "inner": ("config", "diff_ids", [], "Diff_IDs"), "about": ("config", "rootfs", {}, "Config"),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_keys_that_differ_in_case_are_refused(name: str) -> None:
    """skopeo's JSON takes no regard to case, and the last: it would read, as root, other files than were looked at."""
    document, key, value, other = TWICE[name]
    raw = beside(json.dumps(GOOD[document]).encode(), key, value, other)
    json.loads(raw)
    with pytest.raises(documents.Wrong):
        READERS[document](raw)


def test_annotations_and_labels_may_have_any_keys() -> None:
    keys = {"Config": "a", "config": "b", "CONFIG": "c", "Digest": "d"}
    READERS["manifest"](json.dumps(GOOD["manifest"] | {"annotations": keys}).encode())
    config = GOOD["config"] | {"config": {"Env": ["A=b"], "Labels": keys}, "container_config": {"env": []}}
    READERS["config"](json.dumps(config).encode())


KEYS = ["config", "Env", "rootfs", "diff_ids", "digest", "size", "x"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3), max_leaves=8,
)  # fmt: skip
GOOD: dict[str, Any] = {
    "manifest": json.loads(MANIFEST), "index": json.loads(index(described(MANIFEST))),
    "config": {"config": {"Env": ["A=b"]}, "rootfs": {"type": "layers", "diff_ids": [described(LAYER)["digest"]]}},
}  # fmt: skip
READERS: dict[str, Callable[[bytes], object]] = {
    "manifest": documents.manifest, "index": lambda raw: documents.fitting(documents.json_object(raw), MACHINE),
    "config": lambda raw: [read(documents.json_object(raw)) for read in (documents.layers, documents.env)],
}  # fmt: skip


def spoiled(draw: st.DrawFn, document: Any) -> Any:
    """The document with one of its values, wherever it is, in another's place."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    if not keys or draw(st.integers(0, 3)) == 0:
        return draw(anything)
    key = draw(st.sampled_from(list(keys)))
    copied = copy.copy(document)
    copied[key] = spoiled(draw, document[key])
    return copied


@given(data=st.data(), name=st.sampled_from(sorted(READERS)), whole=st.booleans())
@settings(deadline=None, max_examples=150)
def test_documents_of_any_shape_are_read_or_refused(data: st.DataObject, name: str, whole: bool) -> None:
    assert READERS[name](json.dumps(GOOD[name]).encode())
    document = data.draw(anything) if whole else spoiled(data.draw, GOOD[name])
    with contextlib.suppress(documents.Wrong):
        READERS[name](json.dumps(document).encode())


@given(raw=st.binary() | st.text().map(str.encode), name=st.sampled_from(sorted(READERS)))
@settings(deadline=None)
def test_documents_of_any_bytes_are_read_or_refused(raw: bytes, name: str) -> None:
    with contextlib.suppress(documents.Wrong):
        READERS[name](raw)


OK, FOUND = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 302 Found\r\nLocation: "
RAW = {
    "nothing": b"", "text": b"SSH-2.0-OpenSSH_9.2\r\n", "status": b"HTTP/1.1 abc\r\n\r\n",
    "torn": OK + b"Content-Length: 100\r\n\r\n{}", "chunk": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "negative": OK + b"Content-Length: -5\r\n\r\n", "headers": OK + b"A: b\r\n" * 200, "line": OK + b"x" * 70000,
    "zip": OK + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b", "odd": b"HTTP/1.1 206 OK\r\n\r\n{}",
    "early": b"HTTP/1.1 103 Early Hints\r\n\r\n", "nowhere": b"HTTP/1.1 302 Found\r\n\r\n",
    "bracket": FOUND + b"http://[\r\n\r\n", "port": FOUND + b"https://a:99999/\r\n\r\n",
    "file": FOUND + b"file:///etc/shadow\r\n\r\n", "latin": FOUND + b"/\xe9\xff\r\n\r\n",
    "label": FOUND + b"https://" + b"a" * 99 + b".b/\r\n\r\n", "loop": FOUND + b"/v2/a/b/manifests/1\r\n\r\n",
}  # fmt: skip


@contextmanager
def talking(say: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that says something, whatever it is asked, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.settimeout(20)
                        connection.recv(1 << 16)
                        say(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("name", RAW)
def test_what_is_hardly_http_is_an_error(name: str) -> None:
    with talking(lambda connection: connection.sendall(RAW[name])) as address, pytest.raises(Error) as error:
        Registry(parse(f"{address}/a/b:1")).manifest()
    assert error.value.code in ("invalid", "unavailable")
    assert f"{address}/a/b:1" in error.value.message


@pytest.mark.parametrize("part", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b""])
def test_an_answer_without_end_is_given_up(part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TIMEOUT", 1.0)
    over = threading.Event()

    def say(connection: socket.socket) -> None:
        while not over.wait(0.05):
            connection.sendall(part)

    with talking(say) as address:
        with pytest.raises(Error) as error:
            Registry(parse(f"{address}/a/b:1")).manifest()
        over.set()
    assert error.value.code == "unavailable"


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"[]", b"{}", b'{"token": ["x"]}', b'{"token": "a\\nb"}', b" " * (1 << 20)]
)
def test_a_hostile_token_is_an_error(content: bytes) -> None:
    def answer(path: str, headers: dict[str, str]) -> Answer:
        if path.startswith("/token"):
            return 200, {}, content
        return 401, {"WWW-Authenticate": f'Bearer realm="http://{headers["Host"]}/token"'}, b""

    with Server(answer) as evil:
        error = failing(evil)
        assert error.code in ("invalid", "unauthorized")
        assert f"{evil.address}/a/b:1" in error.message


@pytest.mark.parametrize("content", [LAYER + b"more", LAYER[:-1], b"x" * len(LAYER)])
def test_a_blob_is_what_its_digest_says(tmp_path: Path, content: bytes) -> None:
    def whole(path: str, _: dict[str, str]) -> Answer:
        return 200, {}, MANIFEST if "/manifests/" in path else content

    with Server(whole) as evil:
        source = Registry(parse(f"{evil.address}/a/b:1"))
        with pytest.raises(Error) as error:
            source.fetch(source.manifest().blobs[1], tmp_path / "blob")
    assert error.value.code == "invalid"
    assert f"{evil.address}/a/b:1" in error.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "challenge", ["Bearer", "Bearer realm=", 'Bearer realm="' + "x" * 9000, 'Basic realm="lab"', "Negotiate", '"' * 900]
)
def test_a_hostile_challenge_is_a_refusal(challenge: str) -> None:
    with Server(lambda *_: (401, {"WWW-Authenticate": challenge}, b"")) as evil:
        assert failing(evil).code in ("unauthorized", "unavailable")


def test_a_registry_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TIMEOUT", 0.5)
    over = threading.Event()

    class Drip(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            while not over.wait(0.1):
                self.wfile.write(b" ")
                self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Drip) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(Error):
            Registry(parse(f"127.0.0.1:{server.server_address[1]}/a/b:1")).manifest()
        over.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("host", "yes"),
    [
        ("127.0.0.1:5000", True), ("127.0.0.1", True), ("127.9.9.9:1", True), ("localhost:5000", True),
        ("[::1]:5000", True), ("[::1]", True), ("127.evil.com", False), ("127.evil.com:80", False),
        ("127.0.0.1.evil.com:80", False), ("localhost.evil.com", False), ("[::2]:80", False), ("10.0.0.1:80", False),
        ("[1:2]:80", False),
    ],
)  # fmt: skip
def test_a_registry_on_this_machine(host: str, yes: bool) -> None:
    assert parse(f"{host}/a/b:1").loopback is yes


def leading(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
    """Every name means these addresses, the last ones from then on."""
    left = list(answers)

    def lookup(_: str, port: int, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, port)) for address in (left.pop(0) if len(left) > 1 else left[0])]

    monkeypatch.setattr(registry.socket, "getaddrinfo", lookup)


def test_a_name_like_an_address_of_this_machine_leads_to_none(machine: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root asked `127.evil.com` by http, wherever that led, and took it for the registry itself."""
    leading(monkeypatch, ["127.0.0.1"])
    with pytest.raises(Error):
        Registry(parse(f"127.evil.com:{machine.address.partition(':')[2]}/a/b:1")).manifest()
    assert machine.asked == []


def test_localhost_is_this_machine_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    leading(monkeypatch, ["127.0.0.1", "10.0.0.1"])
    with pytest.raises(Error) as error:
        Registry(parse("localhost:1/a/b:1")).manifest()
    assert "not of this machine" in error.value.message


def test_a_name_that_changes_between_requests_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def connect(addresses: list[str], port: int, _: Any) -> Any:
        tried.append((addresses[0], port))
        raise ConnectionRefusedError(111, "refused")

    leading(monkeypatch, ["1.1.1.1"], ["10.0.0.1"])
    monkeypatch.setattr(registry, "_dial", connect)
    source = Registry(parse("registry.lab/a/b:1"))
    for url in ("https://registry.lab/v2/", "https://registry.lab:8443/token", "https://registry.lab/v2/"):
        with pytest.raises(ConnectionError):
            source.again()._connection(url, registry._Answer())
    assert {address for address, _ in tried} == {"1.1.1.1"}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_layer_that_drips_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunked: bool) -> None:
    """It was waited for as long as a byte came now and then: of 5000 bytes, 1000 seconds."""
    monkeypatch.setattr(registry, "WINDOW", 1.0)
    with Drip(chunked=chunked) as drip:
        source = Registry(parse(f"{drip.address}/a/b:1"))
        with pytest.raises(Error) as error:
            source.fetch(source.manifest().blobs[1], tmp_path / "blob")
    assert error.value.code == "unavailable"


class Stopped(Exception):
    pass


@pytest.mark.parametrize("manifest", [False, True])
def test_who_waits_for_a_dripping_registry_can_stop(tmp_path: Path, manifest: bool) -> None:
    """A stop waited for a whole MiB of it, and the session kept its GPUs."""
    with Drip(manifest=manifest, pause=30) as drip:
        source = Registry(parse(f"{drip.address}/a/b:1"))

        def look() -> None:
            if drip.begun.is_set():
                raise Stopped

        room = Room(tmp_path, Limits(image=1 << 40, total=1 << 40), lambda: 0)

        def pull() -> None:
            blobs = list(fetching.manifest(source, look).blobs)
            fetching.fetch(source, blobs, tmp_path, room, look)

        with pytest.raises(Stopped):
            pull()
        no_thread_is_left()


def no_thread_is_left() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith(fetching.NAME):
            thread.join(15)  # the server's next byte is further away, and so is a time limit
            assert not thread.is_alive()


@contextmanager
def deaf() -> Iterator[int]:
    """The port of a server that takes no connection: its backlog is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, contextlib.ExitStack() as ends:
        for _ in range(2):
            one = ends.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


@contextmanager
def silent() -> Iterator[int]:
    """The port of a server that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.mark.parametrize("server", [deaf, silent])
@pytest.mark.parametrize("host", ["127.0.0.1", "registry.lab"])
def test_who_waits_for_a_connection_can_stop(
    monkeypatch: pytest.MonkeyPatch, server: Callable[[], contextlib.AbstractContextManager[int]], host: str
) -> None:
    """By http, and by https, whose handshake does not come."""
    leading(monkeypatch, ["127.0.0.1"])
    waits, dial = threading.Event(), registry._Answer.on
    monkeypatch.setattr(registry._Answer, "on", lambda answer, sock: (dial(answer, sock), waits.set()))

    def look() -> None:
        if waits.is_set():
            raise Stopped

    with server() as port:
        with pytest.raises(Stopped):
            fetching.manifest(Registry(parse(f"{host}:{port}/a/b:1")), look)
        no_thread_is_left()


def test_a_look_up_that_does_not_end_holds_nobody_up(machine: Server) -> None:
    """Neither who stops meanwhile, nor the end of the executor, which waited for its threads; and afterwards nobody
    is asked.
    """
    script = f"""
import socket, threading
from beaker_sessions.sandbox.oci import fetching
from beaker_sessions.sandbox.oci.registry import Registry
from beaker_sessions.sandbox.oci.reference import parse
looking = threading.Event()
def lookup(*_, **__):
    looking.set()
    threading.Event().wait()
socket.getaddrinfo = lookup
def look():
    if looking.is_set():
        raise KeyError("stopped")
try:
    fetching.manifest(Registry(parse("{machine.address}/a/b:1")), look)
except KeyError:
    print("stopped", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("stopped\n", 0), done.stderr
    assert machine.asked == []


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_proxy_gets_the_login_that_its_address_has(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    asked: list[tuple[str, str | None]] = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.append((self.path, self.headers["Proxy-Authorization"]))
            self.send_error(407)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("https_proxy", f"{scheme}ada:p%40ss@127.0.0.1:{server.server_address[1]}")
        with pytest.raises(Error):
            Registry(parse("registry.lab/a/b:1")).manifest()
        server.shutdown()
    assert asked == [("registry.lab:443", "Basic " + base64.b64encode(b"ada:p@ss").decode())]
