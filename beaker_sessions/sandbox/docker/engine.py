"""A client of the Docker Engine API over its unix socket.

Owns: connections, time limits, the API version, and the translation of HTTP statuses into `errors.Error`. Must not know
what a session is. Endpoints and shapes: https://docs.docker.com/engine/api/v1.41/.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any
from urllib.parse import quote, urlencode

from ...errors import Error

OLDEST, NEWEST = (1, 41), (1, 47)  # the API versions this is written for: Engine 20.10 to 27
TIMEOUT = 60.0  # seconds; what takes longer says so
PAUSE = 0.2  # seconds between two questions whether a stream shall go on
CODES = {400: "invalid", 401: "unauthorized", 403: "forbidden", 404: "not_found", 409: "conflict", 503: "unavailable"}
START = "systemctl start docker, then beaker executor doctor"


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("docker", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)
        self.raw = self.sock  # stays when a response takes the other over


class Engine:
    """One engine. Every call has a connection of its own, so that threads never wait for one another."""

    def __init__(self, path: str) -> None:
        self.path = path

    @cached_property
    def version(self) -> dict[str, Any]:
        """What `/version` says. Raises Error unavailable when the engine is away or too old."""
        version: dict[str, Any] = json.loads(self._request("GET", "/version"))
        if _number(version["ApiVersion"]) < OLDEST:
            raise Error(
                "unavailable", f"Docker Engine {version['Version']} is too old", "install Docker Engine 20.10 or newer"
            )
        return version

    @cached_property
    def _base(self) -> str:
        chosen = max(min(_number(self.version["ApiVersion"]), NEWEST), _number(self.version["MinAPIVersion"]))
        return "/v{}.{}".format(*chosen)

    def call(
        self, method: str, path: str, query: dict[str, Any] | None = None, body: Any = None, timeout: float = TIMEOUT
    ) -> Any:
        """One call: its JSON answer, or None when that is empty. body: bytes, or anything for JSON."""
        answer = self._request(method, self._base + _path(path, query), body, timeout)
        return json.loads(answer) if answer else None

    def read(self, path: str, query: dict[str, Any] | None = None) -> bytes:
        """The bytes that a GET answers."""
        return self._request("GET", self._base + _path(path, query))

    def exists(self, path: str, query: dict[str, Any] | None = None) -> bool:
        """Whether a HEAD finds something; of the API, only archives and images answer that."""
        try:
            self._request("HEAD", self._base + _path(path, query))
        except Error as error:
            if error.code != "not_found":
                raise
            return False
        return True

    def stat(self, container: str, path: str) -> Any:
        """What a path in a container is, with `linkTarget` for a link, as seen from its root; None for nothing."""
        try:
            target = self._base + _path(f"{container}/archive", {"path": path})
            connection, response = self._open("HEAD", target)
            with contextlib.closing(connection):
                _raise_for(response)
                return json.loads(base64.b64decode(response.headers["X-Docker-Container-Path-Stat"]))
        except Error as error:
            if error.code != "not_found":
                raise
            return None

    def stream(
        self,
        method: str,
        path: str,
        query: dict[str, Any] | None = None,
        timeout: float | None = TIMEOUT,
        headers: dict[str, str] | None = None,
        look: Callable[[], None] | None = None,
    ) -> Iterator[Any]:
        """The JSON objects of an answer that comes line by line; the first item is None, once the engine has agreed.

        timeout: the longest silence. look: called every PAUSE in another thread, from the beginning on. What it raises
        is raised here, and the engine is left, which ends what it does for us. Ends when the engine closes, or goes
        away.
        """
        target, over, why = self._base + _path(path, query), threading.Event(), list[BaseException]()
        connection = self._connect(target, timeout)

        def watch(look: Callable[[], None]) -> None:
            while not why and not over.wait(PAUSE):
                try:
                    look()
                except BaseException as error:
                    why.append(error)
                    with contextlib.suppress(OSError):  # it is over just now
                        connection.raw.shutdown(socket.SHUT_RDWR)

        if look:
            threading.Thread(target=watch, args=[look], name="look", daemon=True).start()
        try:
            response = self._ask(connection, method, target, headers=headers)
            _raise_for(response)
            yield None
            while line := response.readline():
                yield json.loads(line)
        except (Error, OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, Error) and not why:
                raise
            if isinstance(error, TimeoutError) and not why:
                raise self._silent(path, timeout) from error
            # else torn off in the middle: the engine went away
        finally:
            over.set()
            connection.close()
        if why:
            raise why[0]

    def hijack(self, path: str, query: dict[str, Any] | None = None, body: Any = None) -> socket.socket:
        """The connection itself after a POST that attaches to streams; not one byte of the stream has been read.

        The caller owns the socket; it blocks, without a time limit.
        """
        connection = _Connection(self.path, TIMEOUT)
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"POST {self._base}{_path(path, query)} HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        try:
            connection.connect()
            sock = connection.sock
            sock.sendall(head.encode() + content)
            if not _skip_headers(sock):
                with http.client.HTTPResponse(sock, method="POST") as response:
                    response.begin()
                    _raise_for(response)
                raise Error("internal", f"the engine answered {path} with {response.status}, which is no stream")
            sock.settimeout(None)
            return sock
        except BaseException as error:
            connection.close()
            if isinstance(error, TimeoutError):
                raise self._silent(path, TIMEOUT) from error
            if isinstance(error, OSError | http.client.HTTPException):
                raise self._away(error) from error
            raise

    def _request(self, method: str, target: str, body: Any = None, timeout: float = TIMEOUT) -> bytes:
        connection, response = self._open(method, target, body, timeout)
        try:
            _raise_for(response)
            return response.read()
        except TimeoutError as error:
            raise self._silent(target, timeout) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._away(error) from error
        finally:
            connection.close()

    def _open(
        self,
        method: str,
        target: str,
        body: Any = None,
        timeout: float | None = TIMEOUT,
        headers: dict[str, str] | None = None,
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        connection = self._connect(target, timeout)
        try:
            return connection, self._ask(connection, method, target, body, headers)
        except BaseException:
            connection.close()
            raise

    def _connect(self, target: str, timeout: float | None) -> _Connection:
        connection = _Connection(self.path, timeout)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise (self._silent(target, timeout) if isinstance(error, TimeoutError) else self._away(error)) from error
        return connection

    def _ask(
        self,
        connection: _Connection,
        method: str,
        target: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        headers = headers or {}
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        try:
            connection.request(method, target, body, headers)
            return connection.getresponse()
        except TimeoutError as error:
            raise self._silent(target, connection.timeout) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._away(error) from error

    def _away(self, error: Exception) -> Error:
        return Error("unavailable", f"Docker Engine does not answer at {self.path}: {error}", START)

    def _silent(self, target: str, timeout: float | None) -> Error:
        return Error("unavailable", f"Docker Engine did not answer {target} within {timeout} s", START)


def _number(version: str) -> tuple[int, int]:
    major, _, minor = version.partition(".")
    return int(major), int(minor)


def _path(path: str, query: dict[str, Any] | None) -> str:
    """The target of a request; lists and maps among the query's values become JSON, as the API wants filters."""
    pairs = {
        key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in (query or {}).items()
    }
    return quote(path, safe="/:@") + ("?" + urlencode(pairs) if pairs else "")


def _raise_for(response: http.client.HTTPResponse) -> None:
    """Error for a status that is none of success; 304 says that what was asked for is so already."""
    if response.status < 400:
        return
    content = response.read()
    try:
        message = json.loads(content)["message"]
    except (ValueError, KeyError, TypeError):
        message = response.reason
    raise Error(CODES.get(response.status, "internal"), f"Docker Engine: {' '.join(str(message).split())}")


def _skip_headers(sock: socket.socket) -> bool:
    """Read exactly the headers if they announce a stream (101, or 200 from old engines); else leave all to be read."""
    head = b""
    while b"\r\n\r\n" not in head:
        chunk = sock.recv(65536, socket.MSG_PEEK)
        if not chunk:
            raise ConnectionResetError("it closed the connection")
        if len(head) == 0 and chunk[9:12] not in (b"101", b"200") and len(chunk) >= 12:
            return False
        end = (head + chunk).find(b"\r\n\r\n")
        head += sock.recv(len(chunk) if end < 0 else end + 4 - len(head))
    return True
