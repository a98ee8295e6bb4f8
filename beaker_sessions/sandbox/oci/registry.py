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
import platform
import re
import secrets
import socket
import ssl
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import Error
from . import documents
from .documents import Blob, Manifest, Wrong
from .reference import HUB, Reference

HUB_HOST, HUB_REALM = "registry-1.docker.io", "auth.docker.io"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
PARAMETER = re.compile(r'([a-zA-Z_]+)="([^"\\]{0,2000})"')
CERTIFICATES = ("/etc/containers/certs.d", "/etc/docker/certs.d")  # directories HOST of authorities, *.crt
TIMEOUT = 20.0  # seconds, of a small answer as a whole, and of silence in a large one
WINDOW, LEAST = 60.0, 1024  # seconds, in which a large answer brings so many bytes per second at least
TOKEN = 64 << 10  # bytes
REDIRECTS = 5
CHUNK = 1 << 20


class _Status(Exception):
    """An answer that is no success."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class _Refused(Exception):
    """The registry sends us where we do not go."""


class _Answer:
    """A request and its answer, whose connection is hung up when too little comes.

    A server that sends a byte now and then would be waited for without end, wherever it does so: before there is a
    connection, in its handshake, its headers or its content.
    """

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._came, self.over = 0, False
        self.response: http.client.HTTPResponse | None = None
        self._watch(TIMEOUT, 1 << 62)

    @property
    def status(self) -> int:
        return self.head.status

    @property
    def head(self) -> http.client.HTTPResponse:
        assert self.response
        return self.response

    def on(self, sock: socket.socket) -> None:
        """This is the socket from now on; also one that is not connected yet."""
        self._sock = sock
        self.check()

    def check(self) -> None:
        """Raises TimeoutError when it was hung up."""
        if self.over:
            self.hang_up()  # the socket may be newer than the word
            raise TimeoutError(errno.ETIMEDOUT, "too little came")

    def some(self, most: int) -> bytes:
        """What has come, b"" at the end."""
        with _network():
            chunk = self.head.read1(most)
        self.check()
        if not chunk and most and self.head.length:  # it promised so much more
            raise ConnectionResetError(errno.ECONNRESET, "it hung up")
        self._came += len(chunk)
        return chunk

    def whole(self, limit: int) -> bytes:
        """Raises Wrong for more bytes than limit."""
        data = b""
        while chunk := self.some(limit + 1 - len(data)):
            data += chunk
            if len(data) > limit:
                raise Wrong(f"more than {limit} bytes where that is too much")
        return data

    def patient(self) -> None:
        """It may take longer than TIMEOUT from here on."""
        self._timer.cancel()
        self._watch(WINDOW, int(WINDOW * LEAST))

    def close(self) -> None:
        self._timer.cancel()
        if self._sock:
            self._sock.close()

    def hang_up(self) -> None:
        self.over = True
        if self._sock:
            with contextlib.suppress(OSError):  # it is closed
                # Not TLS's own, which makes it a plain one while others use it. It ends a connect(2), too.
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _watch(self, seconds: float, least: int) -> None:
        self._timer = threading.Timer(seconds, self._judge, (seconds, self._came + least))
        self._timer.daemon = True
        try:
            self._timer.start()
        except RuntimeError:  # the machine has no thread left, and nobody would watch it
            self.hang_up()

    def _judge(self, seconds: float, least: int) -> None:
        if self._came < least:
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
        with self.told():
            raw = self._document(self.wanted.digest or self.wanted.tag)
            if "manifests" in (index := documents.json_object(raw)):
                machine = ARCHITECTURES.get(platform.machine(), platform.machine())
                blob = documents.fitting(index, machine)
                if not blob:
                    what = f"the image {self.wanted.name} is not made for Linux on {machine}"
                    raise Error("not_found", what, "use another image")
                raw = self._document(blob.digest)
            return documents.manifest(raw)

    def fetch(self, blob: Blob, path: Path) -> None:
        """Write a blob to a file, which is there only when it is whole. Raises Error, unavailable after `hang_up`."""
        # A name of its own: a thread that was left may still write to its own.
        partial = path.with_suffix(f".{secrets.token_hex(4)}")
        digest, left = hashlib.sha256(), blob.size
        try:
            with self.told():
                with self._open(f"/blobs/{blob.digest}", large=True) as answer, open(partial, "xb") as file:
                    while left >= 0 and (chunk := answer.some(min(CHUNK, left + 1))):
                        left -= len(chunk)
                        digest.update(chunk)
                        file.write(chunk)
                if left or f"sha256:{digest.hexdigest()}" != blob.digest:
                    raise Wrong("a part that is not the one which its manifest names")
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    def _document(self, name: str) -> bytes:
        """An index or a manifest, by tag or digest."""
        with self._open(f"/manifests/{name}", ", ".join(documents.INDEXES + documents.MANIFESTS)) as answer:
            raw = answer.whole(documents.LONGEST)
        if ":" in name and f"sha256:{hashlib.sha256(raw).hexdigest()}" != name:
            raise Wrong("a manifest that is not the one which was asked for")
        return raw

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Failures as people should see them, with the names of image and registry."""
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
        except ValueError as error:
            why = str(error) if isinstance(error, Wrong) else "what cannot be read"
            raise Error("invalid", f"{missing} {host} sends {why}", "use another image, or tell who made it") from None

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
                    found = documents.json_object(token.whole(TOKEN))
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
            answer = ends.enter_context(contextlib.closing(_Answer()))
            self._answers.add(answer)
            ends.callback(self._answers.discard, answer)
            if self._ended:  # what `hang_up` did not see
                raise TimeoutError(errno.ETIMEDOUT, "it was ended")
            parts = urllib.parse.urlsplit(url)
            target = parts._replace(scheme="", netloc="", fragment="", path=parts.path or "/").geturl()
            with _network():
                connection = ends.enter_context(contextlib.closing(self._connection(url, answer)))
                try:
                    connection.request("GET", target, headers={"User-Agent": "beaker-sessions", **headers})
                except http.client.InvalidURL:
                    raise _Refused("an address that is none") from None
                answer.response = ends.enter_context(connection.getresponse())
            answer.check()
            if large and answer.status == 200:
                answer.patient()
            yield answer

    def _connection(self, url: str, answer: _Answer) -> http.client.HTTPConnection:
        """Connect to where a URL leads, if we go there. Raises _Refused. answer: which will come."""
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
            connection_ = _through(proxy, host, port, _context(parts.netloc))
            answer.on(connection_.sock)
            return connection_
        found = self._resolve(host, port)
        answer.check()
        if not free and not all(map(public, found)):
            raise _Refused(f"{host}, whose address is not public")
        if own and self.wanted.loopback and not all(ipaddress.ip_address(address).is_loopback for address in found):
            raise _Refused(f"{host}, whose address is not of this machine")
        sock = _dial(found, port, answer)
        if parts.scheme == "https":
            try:
                context = _context(parts.netloc)
                sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
                answer.on(sock)
                sock.do_handshake()
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


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """What goes wrong is the network's or the registry's matter, whatever number it has: no file is touched here."""
    try:
        yield
    except (TimeoutError, ConnectionError, ssl.SSLError, socket.gaierror):
        raise
    except OSError as error:
        raise ConnectionError(error.errno, error.strerror or "it failed") from error


def _dial(addresses: list[str], port: int, answer: _Answer) -> socket.socket:
    """A connection to the first address that takes one."""
    failure: OSError = ConnectionError(errno.EADDRNOTAVAIL, "it has no address")
    for address in addresses:
        with contextlib.ExitStack() as ends:
            try:
                sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
                ends.callback(sock.close)
                sock.settimeout(TIMEOUT)
                answer.on(sock)
                sock.connect((address, port))
                ends.pop_all()
                return sock
            except OSError as error:
                answer.check()
                failure = error
    raise failure


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
