"""Registries: an image's manifest and blobs, fetched as root from a server that somebody named.

Owns every request to a registry. A user chooses the registry, and it chooses where its token service (`realm`) and its
blobs are. So nothing is fetched from elsewhere than the registry, unless by https from a public address, to which the
connection then is, or from a host that the settings name. Credentials go to the registry, and to
a token service only when that is the registry's host, one that it is a part of, or named. Of what comes back nothing
but the image reaches anybody: errors say a status, never a text. Longer than 400 lines, so that every way out of this
machine that a registry could choose is in one place.

Sources: https://github.com/opencontainers/distribution-spec, image-spec's `manifest.md` and `image-index.md`, Docker's
token authentication, and the layout of https://github.com/containers/image's `dir:`.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import errno
import hashlib
import http.client
import ipaddress
import json
import platform
import re
import socket
import ssl
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import Error
from .reference import HUB, Reference

HUB_HOST, HUB_REALM = "registry-1.docker.io", "auth.docker.io"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
INDEXES = (
    "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
)  # fmt: skip
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
PARAMETER = re.compile(r'([a-zA-Z_]+)="([^"\\]{0,2000})"')
CERTIFICATES = ("/etc/containers/certs.d", "/etc/docker/certs.d")  # directories HOST of authorities, *.crt
TIMEOUT = 20.0  # seconds, of a small answer as a whole, and of silence in a large one
WINDOW, LEAST = 60.0, 1024  # seconds, in which a large answer brings so many bytes per second at least
MANIFEST, TOKEN = 4 << 20, 64 << 10  # bytes
LAYERS = 512
REDIRECTS = 5
CHUNK = 1 << 20


@dataclass(frozen=True)
class Blob:
    """digest: `sha256:…`. size: bytes."""

    digest: str
    size: int

    @property
    def file(self) -> str:
        return self.digest.removeprefix("sha256:")


@dataclass(frozen=True)
class Manifest:
    """raw: its text, whose digest is the image's. blobs: the configuration, then the layers."""

    raw: bytes
    blobs: tuple[Blob, ...]


class _Status(Exception):
    """An answer that is no success."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class _Refused(Exception):
    """The registry sends us where we do not go."""


class _Answer:
    """An answer, and its connection, which is hung up when too little comes.

    A server that sends a byte now and then would be waited for without end, wherever in its answer it does so.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._came, self.slow = sock, 0, False
        self.response: http.client.HTTPResponse | None = None
        self._watch(TIMEOUT, 1 << 62)

    @property
    def status(self) -> int:
        return self.head.status

    @property
    def head(self) -> http.client.HTTPResponse:
        assert self.response
        return self.response

    def some(self, most: int) -> bytes:
        """What has come, b"" at the end."""
        chunk = self.head.read1(most)
        self._came += len(chunk)
        return chunk

    def patient(self) -> None:
        """It may take longer than TIMEOUT from here on."""
        self._timer.cancel()
        self._watch(WINDOW, int(WINDOW * LEAST))

    def close(self) -> None:
        self._timer.cancel()
        self._sock.close()

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            self._sock.shutdown(socket.SHUT_RDWR)

    def _watch(self, seconds: float, least: int) -> None:
        self._timer = threading.Timer(seconds, self._judge, (seconds, self._came + least))
        self._timer.daemon = True
        self._timer.start()

    def _judge(self, seconds: float, least: int) -> None:
        if self._came < least:
            self.slow = True
            self.hang_up()
        else:
            self._watch(seconds, int(WINDOW * LEAST))


class Registry:
    """The registry of one image. known: the user's name and password for it. realms: by registry, the host (with its
    port, if it has one) of its token service, where that is on neither the registry's host nor a public address.
    """

    def __init__(
        self, wanted: Reference, known: tuple[str, str] | None = None, realms: Mapping[str, str] | None = None
    ) -> None:
        self.wanted, self.known, self.realm = wanted, known, (realms or {}).get(wanted.host, "")
        host = HUB_HOST if wanted.host == HUB else wanted.host
        self.origin = f"{'http' if wanted.loopback else 'https'}://{host}"
        self._authorization = ""
        self._lock = threading.Lock()
        self._addresses: dict[str, list[str]] = {}  # of each host, the same for all requests
        self._answers: set[_Answer] = set()
        self._ended = False

    def again(self) -> Registry:
        """The same, with what it has learned, for work that `hang_up` ends alone."""
        other = copy.copy(self)
        other._answers, other._ended = set(), False
        return other

    def hang_up(self) -> None:
        """End all requests, also those that others wait for just now: they fail soon, and new ones at once."""
        self._ended = True
        for answer in list(self._answers):
            answer.hang_up()

    def manifest(self) -> Manifest:
        """The image of this machine's kind. Raises Error not_found, unauthorized, unavailable or invalid."""
        raw, found = self._document(self.wanted.digest or self.wanted.tag)
        if "manifests" in found:
            machine = ARCHITECTURES.get(platform.machine(), platform.machine())
            fitting = [
                entry
                for entry in _list(found, "manifests")
                if isinstance(p := entry.get("platform"), dict)
                and (p.get("architecture"), p.get("os")) == (machine, "linux")
            ]
            if not fitting:
                what = f"the image {self.wanted.name} is not made for Linux on {machine}"
                raise Error("not_found", what, "use another image")
            raw, found = self._document(_blob(fitting[0]).digest)
        config = found.get("config")
        if not isinstance(config, dict):
            raise _invalid("its manifest is of an old kind, or of no image")
        return Manifest(raw, (_blob(config), *map(_blob, _list(found, "layers"))))

    def fetch(self, blob: Blob, path: Path) -> None:
        """Write a blob to a file, which is there only when it is whole. Raises Error, unavailable after `hang_up`."""
        with self._told():
            partial, digest, left = path.with_suffix(".part"), hashlib.sha256(), blob.size
            with self._open(f"/blobs/{blob.digest}", large=True) as answer, open(partial, "wb") as file:
                while left >= 0 and (chunk := answer.some(min(CHUNK, left + 1))):
                    left -= len(chunk)
                    digest.update(chunk)
                    file.write(chunk)
                if answer.slow or self._ended:
                    raise TimeoutError(errno.ETIMEDOUT, "too little came")
            if left or f"sha256:{digest.hexdigest()}" != blob.digest:
                raise _invalid("a layer that came is not the one that its manifest names")
            partial.rename(path)

    def _document(self, name: str) -> tuple[bytes, dict[str, Any]]:
        with self._told():
            with self._open(f"/manifests/{name}", ", ".join(INDEXES + MANIFESTS)) as answer:
                raw = _bounded(answer, MANIFEST)
            if ":" in name and f"sha256:{hashlib.sha256(raw).hexdigest()}" != name:
                raise _invalid("its manifest is not the one that was asked for")
            return raw, _object(raw)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Failures as people should see them."""
        host, missing = self.wanted.host, f"the image {self.wanted.name} is not on this machine, and"
        try:
            yield
        except _Status as error:
            if error.status in (401, 403):
                hint = f"check the name; a private image needs: docker login {host}, or skopeo login {host}"
                raise Error("unauthorized", f"{missing} {host} does not give it to you", hint) from None
            if error.status == 404:
                raise Error("not_found", f"{missing} {host} does not have it", "check the name and the tag") from None
            raise Error("unavailable", f"{missing} {host} answers {error.status}", "try again later") from None
        except _Refused as error:
            hint = "if that is right, the administrator names it in registryRealms"
            raise Error("unavailable", f"{missing} {host} sends us to {error}", hint) from None
        except (http.client.HTTPException, ssl.SSLError, TimeoutError, socket.gaierror, ConnectionError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            what = f"{missing} its registry {host} cannot be reached: {why}"
            raise Error("unavailable", what, "check the network") from None
        except ValueError:
            raise _invalid("the registry sends what cannot be read") from None

    @contextlib.contextmanager
    def _open(self, path: str, accept: str = "*/*", *, large: bool = False) -> Iterator[_Answer]:
        """The answer to a GET of something of this image, wherever the registry has it. large: as of `_get`."""
        for attempt in (1, 2):
            url, headers = f"{self.origin}/v2/{self.wanted.path}{path}", {"Accept": accept}
            if used := self._authorization:
                headers["Authorization"] = used
            for _ in range(REDIRECTS):
                with self._get(url, headers, large=large) as answer:
                    if answer.status == 200:
                        yield answer
                        return
                    if answer.status not in (301, 302, 303, 307, 308):
                        break
                    url = urllib.parse.urljoin(url, answer.head.headers.get("Location", ""))
                    if not _same(url, self.origin):
                        headers.pop("Authorization", None)
            if answer.status != 401 or attempt == 2 or not self._authorize(answer, used):
                raise _Status(answer.status)

    def _authorize(self, answer: _Answer, used: str) -> bool:
        """Get what the registry demands; whether it is worth another try. used: what was not enough, or is no more."""
        with self._lock:
            if self._authorization != used:  # another thread has
                return True
            kind, _, rest = answer.head.headers.get("WWW-Authenticate", "").partition(" ")
            basic = base64.b64encode(":".join(self.known).encode()).decode() if self.known else ""
            if kind.lower() == "basic" and basic:
                self._authorization = f"Basic {basic}"
            elif kind.lower() == "bearer":
                fields = dict(PARAMETER.findall(rest[:8192]))
                realm = fields.get("realm", "")
                query = urllib.parse.urlencode({k: v for k, v in fields.items() if k in ("service", "scope")})
                trusted = basic and self._trusted(realm)
                headers = {"Authorization": f"Basic {basic}"} if trusted else {}
                with self._get(f"{realm}{'&' if '?' in realm else '?'}{query}", headers) as token:
                    if token.status != 200:
                        raise _Status(401 if token.status in (400, 401, 403) else token.status)
                    found = _object(_bounded(token, TOKEN))
                text = found.get("token") or found.get("access_token")
                if not isinstance(text, str) or not re.fullmatch(r"[\x21-\x7e]+", text):
                    raise _Status(401)
                self._authorization = f"Bearer {text}"
            return self._authorization != used

    def _trusted(self, realm: str) -> bool:
        """Whether a token service may see the user's password: one that could take it from the registry anyway."""
        url, own = urllib.parse.urlsplit(realm), urllib.parse.urlsplit(self.origin)
        host, mine = url.hostname or "", own.hostname or ""
        if _same(realm, self.origin):
            return True
        if url.scheme != "https" or self.wanted.loopback:
            return False
        above = "." in host and mine.endswith(f".{host}") and not _address(mine)
        return host == mine or above or (mine == HUB_HOST and host == HUB_REALM) or _port(url) == self.realm

    @contextlib.contextmanager
    def _get(self, url: str, headers: Mapping[str, str], *, large: bool = False) -> Iterator[_Answer]:
        """One request, without following anything. large: what comes may take longer than TIMEOUT."""
        with contextlib.ExitStack() as ends:
            connection = ends.enter_context(contextlib.closing(self._connection(url)))
            answer = ends.enter_context(contextlib.closing(_Answer(connection.sock)))  # a response may take it over
            self._answers.add(answer)
            ends.callback(self._answers.discard, answer)
            if self._ended:  # what `hang_up` did not see
                raise TimeoutError(errno.ETIMEDOUT, "it was ended")
            parts = urllib.parse.urlsplit(url)
            target = parts._replace(scheme="", netloc="", fragment="", path=parts.path or "/").geturl()
            try:
                connection.request("GET", target, headers={"User-Agent": "beaker-sessions", **headers})
            except http.client.InvalidURL:
                raise _Refused("an address that is none") from None
            answer.response = ends.enter_context(connection.getresponse())
            if large and answer.status == 200:
                answer.patient()
            yield answer

    def _connection(self, url: str) -> http.client.HTTPConnection:
        """Connect to where a URL leads, if we go there. Raises _Refused."""
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            raise _Refused("an address that is none") from None
        own = _same(url, self.origin)
        if not host or not (own or parts.scheme == "https") or parts.username is not None:
            raise _Refused(f"{host or 'nowhere'}, without https")
        same = host == urllib.parse.urlsplit(self.origin).hostname and not self.wanted.loopback
        free = own or same or _port(parts) == self.realm
        proxy = "" if self.wanted.loopback else urllib.request.getproxies().get("https", "")
        if proxy and not urllib.request.proxy_bypass(host):
            if not free and _address(host):
                raise _Refused(f"{host}, which is no name")
            return _through(proxy, host, port, _context(parts.netloc))
        found = self._resolve(host, port)
        if not free and not all(map(public, found)):
            raise _Refused(f"{host}, whose address is not public")
        if own and self.wanted.loopback and not all(ipaddress.ip_address(address).is_loopback for address in found):
            raise _Refused(f"{host}, whose address is not of this machine")
        for number, address in enumerate(found, 1):
            try:
                sock = socket.create_connection((address, port), TIMEOUT)
                break
            except OSError as error:
                if number == len(found):
                    raise ConnectionError(error.errno, error.strerror) from error
        if parts.scheme == "https":
            try:
                sock = _context(parts.netloc).wrap_socket(sock, server_hostname=host)
            except (OSError, ValueError):
                sock.close()
                raise
        connection_ = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
        connection_.sock = sock
        return connection_

    def _resolve(self, host: str, port: int) -> list[str]:
        """A host's addresses, looked up once: else a name could mean another address after it was checked."""
        if host not in self._addresses:
            found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
            self._addresses.setdefault(host, found)  # another thread may have been faster
        return self._addresses[host]


def public(address: str) -> bool:
    """Whether an address is of the internet: none of this machine, of a private network, of a link or of a cloud."""
    parsed = _address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo or (None, None))[1]
        if parsed in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner:
            return public(str(inner))
    return parsed is not None and parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None


def _same(url: str, origin: str) -> bool:
    one, other = urllib.parse.urlsplit(url), urllib.parse.urlsplit(origin)
    default = {"https": 443, "http": 80}
    return (one.scheme, one.hostname, one.port or default.get(one.scheme)) == (
        other.scheme, other.hostname, other.port or default.get(other.scheme),
    )  # fmt: skip


def _port(parts: urllib.parse.SplitResult) -> str:
    """The host, with its port unless that is https's."""
    return f"{parts.hostname}:{parts.port}" if parts.port not in (None, 443) else str(parts.hostname)


def _context(host: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for directory in CERTIFICATES:
        for file in Path(directory, host).glob("*.crt"):
            context.load_verify_locations(file)
    return context


def _through(proxy: str, host: str, port: int, context: ssl.SSLContext) -> http.client.HTTPConnection:
    """Connect by way of an HTTP proxy: `HOST:PORT`, or a URL, with a name and password for it or without."""
    parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port or 80, timeout=TIMEOUT, context=context)
    headers = {}
    if parts.username is not None:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    connection.set_tunnel(host, port, headers)
    try:
        connection.connect()
    except OSError as error:
        if type(error) is not OSError:
            raise
        # Also what `http.client` says of a refusal, which has no number.
        raise ConnectionError(error.errno, error.strerror or "its proxy refuses") from error
    return connection


def _bounded(answer: _Answer, limit: int) -> bytes:
    data = answer.head.read(limit + 1)
    if len(data) > limit:
        raise _invalid(f"the registry sends more than {limit} bytes where that is too much")
    return data


def _object(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _invalid("the registry sends what is no JSON object")
    return found


def _list(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    entries = found.get(name)
    if not isinstance(entries, list) or len(entries) > LAYERS or not all(isinstance(e, dict) for e in entries):
        raise _invalid(f"{name} of its manifest is no list of objects, or too long")
    return entries


def _blob(entry: dict[str, Any]) -> Blob:
    digest, size = entry.get("digest"), entry.get("size")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest) or type(size) is not int or not 0 <= size < 1 << 50:
        raise _invalid("its manifest names a part without a SHA-256 digest and a size")
    return Blob(digest, size)


def _invalid(why: str) -> Error:
    return Error("invalid", f"the image cannot be taken: {why}", "use another image")
