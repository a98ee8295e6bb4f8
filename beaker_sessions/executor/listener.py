"""Connections to a unix socket, as they come: each gets a conversation in the loop, and none of them a thread."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from .loop import Loop
from .passing import refuse

log = logging.getLogger(__name__)

IN_A_ROW = 64  # connections that are taken before the others have their turn again
PAUSE = 0.2  # seconds that new ones wait when the machine has no descriptor or memory for them
SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def bind(directory: str, name: str, kind: int) -> socket.socket:
    """A listening socket `name` in a session's directory, in place of an older one."""
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # first: the session may have ended
    try:
        listening = socket.socket(socket.AF_UNIX, kind)
        try:
            path = f"/proc/self/fd/{folder}/{name}"  # short: a unix socket's path has at most 107 bytes
            with suppress(FileNotFoundError):
                os.unlink(path)
            listening.bind(path)
            os.chmod(path, 0o666)  # root of the session is nobody in particular outside
            refuse(listening)  # and so do the connections that it takes
            listening.listen(8)
        except BaseException:
            listening.close()
            raise
    finally:
        os.close(folder)
    return listening


Serve = Callable[[socket.socket], Coroutine[Any, Any, None] | None]


class Listener:
    """serve(connection): a coroutine that closes it in the end, None where it is closed already.

    at_once: as many are served, and others wait; 0: all. failed(error): nothing is accepted any more. Makes `listening`
    its own. From any thread.
    """

    def __init__(
        self, loop: Loop, listening: socket.socket, serve: Serve,
        failed: Callable[[OSError], None], at_once: int = 0,
    ) -> None:  # fmt: skip
        self._loop, self._socket, self._serve, self._failed, self._at_once = loop, listening, serve, failed, at_once
        self._served: set[asyncio.Task[None]] = set()
        self._closed = False
        listening.setblocking(False)
        loop.soon(self._resume)

    def close(self) -> None:
        """Serve nobody any more, not even who is there. From any thread."""
        self._loop.soon(self._close)

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._pause()
            self._loop.passing.drop(self._socket.detach())  # with what waits in it
            for task in self._served:
                task.cancel()

    def _resume(self) -> None:
        if not self._closed and not (self._at_once and len(self._served) >= self._at_once):
            self._loop.asyncio.add_reader(self._socket.fileno(), self._accept)

    def _pause(self) -> None:
        self._loop.asyncio.remove_reader(self._socket.fileno())

    def _accept(self) -> None:
        for taken in range(IN_A_ROW):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                if not taken and _hung(self._socket):
                    self._pause()
                    self._failed(OSError(errno.EINVAL, "the socket does not listen any more"))
                return
            except OSError as error:
                self._pause()
                if error.errno not in SHORT:
                    self._failed(error)
                    return
                log.warning("nothing is accepted for %g s: %s", PAUSE, error.strerror)
                self._loop.asyncio.call_later(PAUSE, self._resume)
                return
            if (conversation := self._serve(connection)) is None:
                continue
            task = self._loop.spawn(conversation)
            self._served.add(task)
            task.add_done_callback(self._left)
            if self._at_once and len(self._served) >= self._at_once:
                self._pause()
                return

    def _left(self, task: asyncio.Task[None]) -> None:
        self._served.discard(task)
        if self._at_once:
            self._resume()


def _hung(listening: socket.socket) -> bool:
    """Whether it will never accept again, of which accept(2) says only that there is nobody."""
    poll = select.poll()
    poll.register(listening, 0)
    return bool(poll.poll(0))
