"""Descriptors that callers pass: how the executor reads, takes and drops them without ever closing one last.

Owns the process that does it (`receiver`). Whoever sends a descriptor decides how long its last close takes, and the
kernel also closes what waits unread in a socket: in the process that reads it, or that closes the socket.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Hashable
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import Error
from . import receiver

if TYPE_CHECKING:
    from .loop import Loop

SO_PASSRIGHTS = 83  # asm-generic/socket.h, Linux 6.16
PATIENCE = 10.0  # seconds
EACH = 4  # processes that take for one user at the same time
TURN = 0.005  # seconds between looks whether there is one


def read(connection: socket.socket, limit: int) -> tuple[bytes, bool] | None:
    """What has come, and whether it is cut at `limit` bytes; None, and nothing is read, if descriptors came with it.

    A look alone closes none: they stay in the queue. Raises BlockingIOError when nothing has come.
    """
    found, _, flags, _ = connection.recvmsg(limit, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    if flags & socket.MSG_CTRUNC:
        return None
    connection.recv(max(1, len(found)), socket.MSG_DONTWAIT)
    return found, bool(flags & socket.MSG_TRUNC)


def refuse(connection: socket.socket) -> None:
    """Have the kernel refuse descriptors that are sent to it, where it can."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


class Passing:
    """To be used in the loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        with theirs:
            command = [sys.executable, "-I", "-S", receiver.__file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/")
        self._sending = asyncio.Lock()
        self._busy: Counter[Hashable] = Counter()
        self._dropped: list[int] = []
        self._dropping = False

    def stop(self) -> None:
        """End the process. The loop must have ended."""
        self._control.close()
        self._process.wait()

    def kill(self) -> None:
        """End the process before this one ends, lest whoever started both find it left over."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a file that it has does not let it
            self._process.wait(1)

    async def take(self, connection: socket.socket, key: Hashable) -> tuple[bytes, bool, int]:
        """As `read`, with the first descriptor, -1 for one that we do not take.

        key: whose it is; one whose files are never closed makes themselves wait. Raises Error unavailable.
        """
        deadline = time.monotonic() + PATIENCE
        while self._busy[key] >= EACH:
            if time.monotonic() > deadline:
                what = "files that you passed to the executor before are not closed yet"
                raise Error("unavailable", what, "end what keeps them, or try without an SSH agent")
            await asyncio.sleep(TURN)
        answer, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        answer.setblocking(False)
        self._busy[key] += 1
        try:
            with theirs:
                await self._send(b"take", [connection.fileno(), theirs.fileno()])
            await self._loop.ready(answer.fileno(), PATIENCE)
            packet, descriptors, _, _ = socket.recv_fds(answer, 1 + receiver.FRAME, 1, socket.MSG_CMSG_CLOEXEC)
            if not packet:
                raise Error("unavailable", "the file that you passed cannot be taken", "try without it")
            return packet[1:], packet[:1] == b"T", (descriptors or [-1])[0]
        finally:
            self._loop.spawn(self._ended(answer, key))

    async def _ended(self, answer: socket.socket, key: Hashable) -> None:
        """Wait for the end of a process that takes, however late."""
        with answer:
            packet = b"F"
            while packet:
                await self._loop.ready(answer.fileno())
                packet, late, _, _ = socket.recv_fds(answer, 1 + receiver.FRAME, 1, socket.MSG_CMSG_CLOEXEC)
                for descriptor in late:
                    self.drop(descriptor)
        self._busy[key] -= 1
        if not self._busy[key]:
            del self._busy[key]

    def close(self, connection: socket.socket) -> None:
        """Close a caller's connection, with what waits in it. The caller hears of the end at once."""
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # from now on nothing comes any more
        if connection.type == socket.SOCK_SEQPACKET and _is_empty(connection):
            connection.close()
        else:
            self.drop(connection.detach())

    def drop(self, descriptor: int) -> None:
        """Close a descriptor, a little later."""
        self._dropped.append(descriptor)
        if not self._dropping:
            self._dropping = True
            self._loop.spawn(self._drop())

    async def _drop(self) -> None:
        while self._dropped:
            some = self._dropped[: receiver.MOST - 1]
            ours, theirs = socket.socketpair()
            with ours, theirs:
                await self._send(b"drop", [*some, theirs.fileno()])
                for descriptor in some:
                    os.close(descriptor)  # not the last: the process that has them waits for the end of `ours`
            del self._dropped[: len(some)]
        self._dropping = False

    async def _send(self, job: bytes, descriptors: list[int]) -> None:
        async with self._sending:
            while True:
                try:
                    socket.send_fds(self._control, [job], descriptors)
                    return
                except BlockingIOError:
                    await self._loop.ready(self._control.fileno(), to_write=True)
                except OSError as error:
                    self._loop.fail(error)  # without that process, nothing could be closed
                    raise


def _is_empty(connection: socket.socket) -> bool:
    """Whether a connection of packets that was shut down has none. An empty packet looks like the end, but has an
    author."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    try:
        found, _, flags, _ = connection.recvmsg(1, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError as error:
        return isinstance(error, (BlockingIOError, ConnectionError))
    return not found and not flags & socket.MSG_CTRUNC
