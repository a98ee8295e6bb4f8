"""A unix socket that a session finds in its own directory. Owns the socket and the threads that serve it."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

log = logging.getLogger(__name__)

AT_ONCE = 8  # callers that are served at once


class Listener:
    """A unix socket `name` in a session's directory, at which each caller gets a thread, a few at once.

    A session that asks too much at once makes itself wait, and nobody else.
    """

    def __init__(self, directory: str, name: str, kind: int, serve: Callable[[socket.socket], None]) -> None:
        self._serve, self._name, self._closed = serve, name, False
        self._socket = socket.socket(socket.AF_UNIX, kind)
        folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            path = f"/proc/self/fd/{folder}/{name}"  # short: a unix socket's path has at most 107 bytes
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._socket.bind(path)
            os.chmod(path, 0o666)  # root of the session is nobody in particular outside
            self._socket.listen(AT_ONCE)
        except BaseException:
            self._socket.close()
            raise
        finally:
            os.close(folder)
        threading.Thread(target=self._accept, name=name, daemon=True).start()

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in accept
        self._socket.close()

    def _accept(self) -> None:
        free = threading.BoundedSemaphore(AT_ONCE)

        def serve(connection: socket.socket) -> None:
            try:
                self._serve(connection)
            finally:
                free.release()

        while True:
            free.acquire()
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                log.exception("%s cannot accept", self._name)
                time.sleep(0.5)
                free.release()
                continue
            threading.Thread(target=serve, args=(connection,), name=self._name, daemon=True).start()
