"""What is fetched from a registry, in threads of its own, so that whoever waits for it can end it at any time.

Owns these threads, and that none goes on when the wait is over, whatever the registry does. `registry` makes the
requests. Must not decide what is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TypeVar

from .registry import Blob, Manifest, Registry
from .room import PAUSE, Full, Room

T = TypeVar("T")
NAME = "pull"  # of the threads
AT_ONCE = 6  # blobs
GRACE = 1.0  # seconds for threads whose connections were ended; one that still looks up a name finds it out later


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
            raise Full(why, sum(entry.stat().st_size for entry in os.scandir(directory)), single=False)

    _done(source, [partial(one, blob) for blob in blobs], look_at_room)


def _done(source: Registry, jobs: Sequence[Callable[[], T]], look: Callable[[], None]) -> list[T]:
    """The results of jobs that ask a registry. It is not asked any more afterwards."""
    pool = ThreadPoolExecutor(AT_ONCE, NAME)
    futures = [pool.submit(job) for job in jobs]
    try:
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, PAUSE, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if waiting:
                look()
        return [future.result() for future in futures]
    finally:
        source.hang_up()
        pool.shutdown(wait=False, cancel_futures=True)
        wait([future for future in futures if not future.done()], GRACE)
