"""A packet that is sent as a session's would be, out of this machine and back: what shows that rules let it pass.

The world is an interface of this process's own (tun), so nothing leaves the machine. Owns nothing that is left
afterwards.

Sources: https://docs.kernel.org/networking/tuntap.html, linux/if_tun.h; the headers of RFC 791 and RFC 768, in which
sums stay right when sender and receiver change places.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from . import Finding, netns

DEVICE = "/dev/net/tun"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
# Of the range for tests of networks (RFC 2544), which no route of a machine should have.
OURS, THEIRS = ipaddress.IPv4Address("198.19.213.1"), ipaddress.IPv4Address("198.19.213.2")
PORT, WORD = 9, b"beaker doctor"
SECONDS = 2.0  # in which a packet must have come
# What a rule answers, or a packet that no answer came to; anything else says nothing of ports.
CLOSED = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM)
GUIDE = "see Network and firewall in docs/administration.md"


def findings(
    name: str, session: Path, gateway: str, machine: Path | None = None, mend: str = GUIDE
) -> Iterator[Finding]:
    """What becomes of packets of a session.

    name: for the interface. session: a network namespace as sessions have. gateway: the bridge's address. machine: the
    namespace of the bridge, None for the caller's own. mend: where rules of others are missing.
    """
    try:
        yield netns.inside(machine, lambda: _out_and_back(name, session, mend))
        yield netns.inside(machine, lambda: _closed(session, gateway))
    except (OSError, subprocess.CalledProcessError) as error:
        yield Finding("warning", f"whether sessions reach the world could not be tried: {error}", "modprobe tun")


def _out_and_back(name: str, session: Path, mend: str) -> Finding:
    with _world(name) as world, netns.inside(session, lambda: socket.socket(type=socket.SOCK_DGRAM)) as sender:
        sender.settimeout(SECONDS)
        try:
            sender.sendto(WORD, (str(THEIRS), PORT))
            packet = _received(world)
        except OSError as error:
            return Finding("error", f"packets of sessions do not leave this machine: {error.strerror or error}", mend)
        if not packet:
            return Finding("error", "packets of sessions do not leave this machine: a rule or setting drops them", mend)
        start = 4 * (packet[0] & 15)  # of UDP's header, behind IP's
        source = ipaddress.IPv4Address(packet[12:16])
        if source != OURS:
            return Finding(
                "error", f"packets of sessions leave with the address {source}, so nobody answers them", mend
            )
        back = packet[:12] + packet[16:20] + packet[12:16] + packet[20:start]
        os.write(world, back + packet[start + 2 : start + 4] + packet[start : start + 2] + packet[start + 4 :])
        try:
            sender.recv(len(WORD))
        except TimeoutError:
            return Finding("error", "answers from the world do not reach sessions: a rule drops them", mend)
    return Finding("ok", "a packet of a session leaves this machine with its address, and the answer comes back")


def _closed(session: Path, gateway: str) -> Finding:
    with socket.create_server((gateway, 0)) as service:
        try:
            where = service.getsockname()
            netns.inside(session, lambda: socket.create_connection(where, SECONDS).close())
        except OSError as error:
            if error.errno not in CLOSED and not isinstance(error, TimeoutError):
                raise
            return Finding("ok", "the machine's own ports are closed to sessions")
    return Finding("error", "the machine's own ports are open to sessions", GUIDE)


@contextlib.contextmanager
def _world(name: str) -> Iterator[int]:
    """An interface whose packets are read and written by a descriptor."""
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        for command in (f"ip address add {OURS} peer {THEIRS} dev {name}", f"ip link set {name} up"):
            subprocess.run(command.split(), check=True, capture_output=True)
        yield fd
    finally:
        os.close(fd)


def _received(world: int) -> bytes:
    """The next packet with our word, or nothing."""
    poll = select.poll()
    poll.register(world, select.POLLIN)
    while poll.poll(SECONDS * 1000):
        if (packet := os.read(world, 1 << 16)).endswith(WORD):
            return packet
    return b""
