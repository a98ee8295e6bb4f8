"""How a server is reached so that nobody else can answer in its place.

Owns the rule: a server on this machine through a Unix socket that only root can have made, because anybody may listen
on a TCP port; another machine's by https; in the clear only where the settings name that very address. Never one in
place of the other. Must import nothing but the standard library and `errors`, and must run on Python 3.9.
"""

from __future__ import annotations

import http.client
import os
import socket
import stat
import struct
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from .errors import Error

SOCKETS = "/run/beaker"  # where the servers of a machine have their sockets
EXAMPLE = "for example http://127.0.0.1:8420, on this machine, or https://beaker.example.com"


def socket_path(directory: str, port: int) -> str:
    """Of the server whose TCP port this is."""
    return os.path.join(directory, f"server-{port}.sock")


def holder(port: int) -> int | None:
    """The uid of a program that listens on that TCP port of this machine, root's if there are several.

    None when nobody is known to: a port can be taken without listening. By /proc/net/tcp (proc_net(5)).
    """
    found = []
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/net/{name}") as table:
                lines = [line.split() for line in table][1:]
        except OSError:
            continue
        found += [int(line[7]) for line in lines if line[3] == "0A" and int(line[1].rpartition(":")[2], 16) == port]
    return min(found, default=None)


class Endpoint:
    """A server's address, and how it is reached.

    address: for example `http://127.0.0.1:8420`. sockets: the directory with this machine's servers' sockets. insecure:
    addresses that may be reached over plain TCP. Raises Error invalid for what is no address, or none that is safe.
    """

    def __init__(self, address: str, sockets: str = SOCKETS, insecure: Collection[str] = ()) -> None:
        parts = _split(address)
        self.address = address.rstrip("/")
        self.path = parts.path.rstrip("/")
        self._https = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._https else 80)
        named = self._https or any(_same(parts, each) for each in insecure)
        self._socket = "" if named else socket_path(sockets, self._port)
        if not named and not _loopback(self._host):
            raise Error(
                "invalid",
                f"{address}: your token would go to another machine for all to read on the way",
                "use https; or, where the network is trusted, name the address in insecure_addresses of "
                "~/.beaker/config.yml (BEAKER_INSECURE_ADDRESSES), for an executor in beaker.insecureAddresses",
            )

    def taken_by(self) -> int | None:
        """The uid of whoever holds this machine's server's TCP port in its place; None when nobody is known to."""
        return (holder(self._port) or None) if self._socket else None

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        """One that connects at its first request, which may raise Error unavailable beside OSError."""
        if self._socket:
            return _RootsSocket(self._socket, self.address, timeout)
        if not self._https:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        import ssl

        context = ssl.create_default_context()
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=context)


class _RootsSocket(http.client.HTTPConnection):
    """HTTP through a Unix socket, if nobody but root can have put it there."""

    def __init__(self, path: str, address: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path, self._address = path, address

    def connect(self) -> None:
        directory = os.path.dirname(self._path)
        try:
            folder, file = os.lstat(directory), os.lstat(self._path)
        except OSError as error:
            raise self._away(os.strerror(error.errno or 0)) from error
        if not stat.S_ISDIR(folder.st_mode) or folder.st_uid != 0 or folder.st_mode & 0o022:
            raise self._away(f"not only root can write to {directory}")
        if not stat.S_ISSOCK(file.st_mode) or file.st_uid != 0:
            raise self._away("it is no socket of root's")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # With `settimeout`, connecting would fail at once, instead of waiting, while many others connect.
            limit = struct.pack("@ll", int(self.timeout or 0), int((self.timeout or 0) % 1 * 1e6))  # struct timeval
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            connection.connect(self._path)
            connection.settimeout(self.timeout)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", credentials)[1] != 0:  # who listens
                raise self._away("whoever listens there is not root")
        except OSError as error:
            connection.close()
            raise self._away(error.strerror or str(error)) from error
        except BaseException:
            connection.close()
            raise
        self.sock = connection

    def _away(self, reason: str) -> Error:
        return Error(
            "unavailable",
            f"no server answers at {self._address}: {self._path}: {reason}",
            "is beaker-server running, as root? If the address is that of a tunnel or of a server of your own, name it "
            "in insecure_addresses of ~/.beaker/config.yml, or in BEAKER_INSECURE_ADDRESSES",
        )


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address if "://" in address else f"https://{address}")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise Error("invalid", f"{address!r} is not the address of a server", EXAMPLE)


def _same(parts: SplitResult, named: str) -> bool:
    """Whether an address that the settings name is this one; plain HTTP is what they name one for."""
    other = _split(named if "://" in named else f"http://{named}")
    return (other.scheme, other.hostname, other.port or 80) == (parts.scheme, parts.hostname, parts.port or 80)


def _loopback(host: str) -> bool:
    """As written: another name may lead here today and elsewhere tomorrow."""
    if host in ("localhost", "::1"):
        return True
    numbers = host.split(".")
    return numbers[0] == "127" and len(numbers) == 4 and all(n.isdecimal() and int(n) < 256 for n in numbers)
