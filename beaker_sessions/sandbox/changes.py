"""Word of the kernel that somebody changed the firewall or an interface, so that what is gone is made again at once.

Owns two sockets of netlink, and the thread that reads them. What changed it does not say: who is called looks anew, as
they do from time to time anyway.

Sources: netlink(7), rtnetlink(7); numbers from linux/rtnetlink.h and linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from . import netns

NETLINK_NETFILTER = 12
SOL_NETLINK, ADD_MEMBERSHIP = 270, 1
RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, NFNLGRP_NFTABLES = 1, 5, 7
NEWLINK, DELLINK, DELADDR = 16, 17, 21
UP = 1  # IFF_UP, netdevice(7)
GATHER = 0.05  # seconds in which more is likely to come
PAUSE = 1.0  # seconds between two looks, as some programs change their rules all the time

log = logging.getLogger(__name__)


class Changes:
    """Calls `look` when rules of nftables changed, or the interface went, lost an address or was set down.

    namespace: the network namespace to listen in, None for the caller's own. Raises OSError where that cannot be.
    """

    def __init__(self, interface: str, look: Callable[[], None], namespace: Path | None = None) -> None:
        self.interface, self.look = interface.encode() + b"\0", look
        self.rules, self.links = netns.inside(namespace, _sockets)
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._follow, name="changes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; a look that is under way ends first."""
        os.eventfd_write(self._ended, 1)
        self._thread.join()
        os.close(self._ended)

    def _follow(self) -> None:
        ended, poll = select.poll(), select.poll()  # select(2) takes no descriptors above 1023
        ended.register(self._ended, select.POLLIN)
        with self.rules, self.links:
            for fd in (self._ended, self.rules.fileno(), self.links.fileno()):
                poll.register(fd, select.POLLIN)
            while not ended.poll(0):
                poll.poll()
                if not self._changed() or ended.poll(GATHER * 1000):
                    continue
                self._changed()  # what comes from now on is seen by the next look
                try:
                    self.look()
                except Exception as error:
                    log.warning("a change of the firewall could not be looked at: %s", error)
                ended.poll(PAUSE * 1000)

    def _changed(self) -> bool:
        rules = any(True for _ in _messages(self.rules))
        links = [self._concerns(message) for message in _messages(self.links)]
        return rules or any(links)

    def _concerns(self, message: bytes) -> bool:
        """Whether a message of rtnetlink is bad news of the interface; one without a type tells of lost messages."""
        kind = struct.unpack_from("=H", message, 4)[0] if len(message) > 16 else DELADDR
        if kind == NEWLINK and struct.unpack_from("=I", message, 16 + 8)[0] & UP:  # of struct ifinfomsg
            return False
        return not message or (kind in (NEWLINK, DELLINK, DELADDR) and self.interface in message)


@contextlib.contextmanager
def followed(interface: str, look: Callable[[], None], namespace: Path | None = None) -> Iterator[None]:
    """While this lasts, `look` is called as by `Changes`; where the kernel does not tell of changes, it is not."""
    try:
        changes = Changes(interface, look, namespace)
    except OSError as error:
        log.warning("the kernel does not tell of changes of the firewall: %s", error)
        yield
        return
    try:
        yield
    finally:
        changes.close()


def _sockets() -> tuple[socket.socket, socket.socket]:
    made = []
    try:
        for family, groups in (
            (NETLINK_NETFILTER, [NFNLGRP_NFTABLES]),
            (socket.NETLINK_ROUTE, [RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR]),
        ):
            made.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, family))
            made[-1].bind((0, 0))
            for group in groups:
                made[-1].setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, group)
    except BaseException:
        for each in made:
            each.close()
        raise
    return made[0], made[1]


def _messages(receiver: socket.socket) -> Iterator[bytes]:
    """All that has come, one at a time; an empty one where some were lost."""
    while True:
        try:
            data = receiver.recv(1 << 17)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS
            yield b""
            continue
        while len(data) >= 16:
            length = max(16, struct.unpack_from("=I", data)[0])  # of struct nlmsghdr, all included
            yield data[:length]
            data = data[(length + 3) & ~3 :]
