"""What is fetched from a registry, in threads of its own, so that whoever waits for it can end it at any time.

Owns these threads, and that none goes on when the wait is over, whatever the registry does; whose turn it is to fetch
an image, and the directory of what came of it. `registry` makes the requests. Must not decide what is fetched.
"""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from ...errors import Error
from .. import Progress
from .documents import Blob, Manifest
from .registry import Registry
from .room import PAUSE, Full, Room

T = TypeVar("T")
NAME = "pull"  # of the threads
AT_ONCE = 6  # blobs
GRACE = 1.0  # seconds for threads whose connections were ended; one that still looks up a name finds it out later


class Turn:
    """To fetch one image. directory: of what has come, which is there while somebody fetches it or waits to."""

    def __init__(self, root: Path) -> None:
        self._root, self.lock, self.users = root, threading.Lock(), 0
        self._directory: Path | None = None

    @property
    def directory(self) -> Path:
        self._directory = self._directory or Path(tempfile.mkdtemp(dir=self._root, prefix="pull-"))
        return self._directory

    def clear(self) -> None:
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)  # a thread that was left may be at it
            self._directory = None


class Turns:
    """root: the directory of images."""

    def __init__(self, root: Path) -> None:
        self._root, self._lock = root, threading.Lock()
        self._turns: dict[str, Turn] = {}

    @contextmanager
    def of(self, name: str, look: Callable[[], None]) -> Iterator[Turn]:
        """While nobody else fetches an image. Who comes next goes on with what one who was stopped has fetched.

        look: called while others are waited for; may raise to end that.
        """
        with self._lock:
            turn = self._turns.setdefault(name, Turn(self._root))
            turn.users += 1
        try:
            while not turn.lock.acquire(timeout=PAUSE):
                look()
            try:
                yield turn
            finally:
                turn.lock.release()
        finally:
            with self._lock:
                turn.users -= 1
                if last := not turn.users:
                    del self._turns[name]
            if last:
                turn.clear()


def manifest(source: Registry, look: Callable[[], None]) -> Manifest:
    """As `Registry.manifest`. look: called meanwhile; may raise to end it."""
    return _done(source, [source.manifest], look)[0]


def fetch(source: Registry, blobs: list[Blob], directory: Path, room: Room, look: Callable[[], None]) -> None:
    """Fetch blobs, several at once, into files of a directory; what is there already stays. look: as of `manifest`."""
    source = source.again()

    def one(blob: Blob) -> None:
        if not (directory / blob.file).exists():
            source.fetch(blob, directory / blob.file)

    def look_at_room() -> None:
        look()
        if why := room.lacks():
            raise Full(why, sum(_sizes(directory).values()), single=False)

    _done(source, [partial(one, blob) for blob in blobs], look_at_room)


def progress(manifest: Manifest, directory: Path) -> Progress:
    """How much of an image has come into a directory."""
    sizes, layers = _sizes(directory), {blob.file for blob in manifest.blobs[1:]}
    parts = {blob.file: blob.size for blob in manifest.blobs}
    total, done = sum(parts.values()), sum(size for name, size in sizes.items() if name.partition(".")[0] in parts)
    return Progress(min(done, total), total, (sum(name in layers for name in sizes), len(layers)))


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of its files, which come and go."""
    found = {}
    for entry in os.scandir(directory):
        with suppress(FileNotFoundError):
            found[entry.name] = entry.stat().st_size
    return found


def _done(source: Registry, jobs: Sequence[Callable[[], T]], look: Callable[[], None]) -> list[T]:
    """The results of jobs that ask a registry. It is not asked any more afterwards."""
    left = deque(enumerate(jobs))
    came: queue.SimpleQueue[tuple[int, T] | BaseException] = queue.SimpleQueue()

    def work() -> None:
        with suppress(IndexError):  # another thread has taken the last
            while left:
                number, job = left.popleft()
                try:
                    came.put((number, job()))
                except BaseException as error:
                    came.put(error)

    # Not a pool's threads: Python waits for those when it ends, and an executor that is to stop would not.
    threads = [threading.Thread(target=work, name=NAME, daemon=True) for _ in jobs[:AT_ONCE]]
    try:
        _start(threads)
        results: dict[int, T] = {}
        looked = time.monotonic()
        while len(results) < len(jobs):
            with suppress(queue.Empty):
                one = came.get(timeout=PAUSE)
                if isinstance(one, BaseException):
                    raise one
                results[one[0]] = one[1]
            if time.monotonic() - looked >= PAUSE:
                look()
                looked = time.monotonic()
        return [results[number] for number in range(len(jobs))]
    finally:
        left.clear()
        source.hang_up()
        until = time.monotonic() + GRACE
        for thread in threads:
            if thread.ident:
                thread.join(max(0.0, until - time.monotonic()))


def _start(threads: Sequence[threading.Thread]) -> None:
    for number, thread in enumerate(threads):
        try:
            thread.start()
        except RuntimeError:
            if not number:
                raise Error("unavailable", "the machine has no thread left", "try again later") from None
            return  # the others do it all
