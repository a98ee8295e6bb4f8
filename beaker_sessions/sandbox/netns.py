"""Calls in another network namespace of this machine."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

CLONE_NEWNET = 0x40000000  # sched.h

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def inside(namespace: Path | None, call: Callable[[], T]) -> T:
    """Call in a network namespace, None for the caller's own; programs started by it are in it too."""
    if namespace is None:
        return call()

    def entered() -> T:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(fd, CLONE_NEWNET))
        finally:
            os.close(fd)
        return call()

    return _apart(entered)


def new(call: Callable[[], T]) -> T:
    """Call in a network namespace that is made for it."""

    def entered() -> T:
        _check(_libc.unshare(CLONE_NEWNET))
        return call()

    return _apart(entered)


def _apart(call: Callable[[], T]) -> T:
    """Call in a thread of its own: a thread can change its network namespace alone, and is of no use afterwards."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return future.result()


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
