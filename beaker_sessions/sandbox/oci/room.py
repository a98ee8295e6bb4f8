"""How much of the disk images may take, and programs that are stopped when they take more.

Owns: the limits, what is being written right now, and who may change the storage while others do. What a registry or an
archive says of its size is not believed: the kernel tells what a program has written (`write_bytes` in proc(5),
/proc/pid/io), and the file system what is free. Must not choose what is removed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...grammar import format_size
from .. import Limits, free
from ..commands import tied

SHARE = 0.8  # of the file system, for all images together by default
PAUSE = 0.1  # seconds between two looks
COMPLAINT = 64 << 10  # bytes of a program's errors that are read


class Full(Exception):
    """A program was stopped. why: what for people. single: its own image is too large, so that room would not help."""

    def __init__(self, why: str, written: int, single: bool) -> None:
        super().__init__(why)
        self.why, self.written, self.single = why, written, single


class Room:
    """root: the directory of images. stored: bytes of those that are whole."""

    def __init__(self, root: Path, limits: Limits, stored: Callable[[], int]) -> None:
        self.root, self.limits, self._stored = root, limits, stored
        self._changed = threading.Condition()
        self._filling, self._clearing = 0, False
        self._written: dict[int, int] = {}  # bytes, of each program that runs
        self._before = 0  # bytes that were stored when the first of them began
        self._whole = 0  # bytes of those that have ended well since
        self._left = 0  # bytes of those that failed, until somebody clears up

    @contextlib.contextmanager
    def filling(self, look: Callable[[], None] = lambda: None) -> Iterator[None]:
        """While something is added to the storage: others may add too, and nobody removes.

        look: called while others are waited for; what it raises ends that.
        """
        with self._changed:
            self._wait(lambda: not self._clearing, look)
            self._filling += 1
        try:
            yield
        finally:
            with self._changed:
                self._filling -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def clearing(self, look: Callable[[], None] = lambda: None) -> Iterator[None]:
        """While something is removed: nobody adds. Whoever wants to add from now on waits. look: as of `filling`."""
        with self._changed:
            self._wait(lambda: not self._clearing, look)
            self._clearing = True
        try:
            with self._changed:
                self._wait(lambda: not self._filling, look)
            yield
        finally:
            with self._changed:
                self._clearing = False
                self._changed.notify_all()

    def _wait(self, over: Callable[[], bool], look: Callable[[], None]) -> None:
        while not self._changed.wait_for(over, PAUSE):
            self._changed.release()
            try:
                look()
            finally:
                self._changed.acquire()

    def quiet(self) -> bool:
        """Whether nobody adds or removes: a guess, for who would else have to wait."""
        return not self._filling and not self._clearing

    def cleared(self) -> None:
        """What programs that failed had written is gone."""
        self._left = 0

    def lacks(self, more: int = 0) -> str:
        """Why there is no room for so many more bytes, "" where there is."""
        if why := free.lacks(self.root, more):
            return why
        disk = os.statvfs(self.root)
        total = self.limits.total or int(disk.f_blocks * disk.f_frsize * SHARE)
        # An image that is whole counts once, whether or not the program that made it has ended.
        whole = self._before + self._whole if self._written else self._stored()
        if whole + sum(self._written.values()) + self._left + more > total:
            return f"all images together may take {format_size(total)} (imageSpace)"
        return ""

    def too_large(self, size: int) -> str:
        """Why an image of this size is not taken, "" for one that is."""
        limit = self.limits.image
        return f"an image may take {format_size(limit)} (imageSize)" if limit and size > limit else ""

    def run(self, command: Sequence[str], look: Callable[[], None] = lambda: None, *, packed: int = 0) -> None:
        """Run a program that writes below root, to its end, with a temporary directory of its own there.

        look: called again and again meanwhile; what it raises ends the program. packed: bytes that it writes beside the
        unpacked image, for a while. It dies with this thread. Raises Full when it was stopped for want of room, Failed.
        """
        with (
            tempfile.TemporaryDirectory(dir=self.root, prefix="pull-") as scratch,
            tempfile.TemporaryFile(dir=self.root) as errors,
        ):
            process = subprocess.Popen(
                tied(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                start_new_session=True, env={**os.environ, "TMPDIR": scratch},
            )  # fmt: skip
            ended = False
            with self._changed:
                if not self._written:
                    self._before, self._whole = self._stored(), 0
                self._written[process.pid] = 0
            try:
                self._watch(process, look, packed)
                ended = process.returncode == 0
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its children too, which unpack
                    process.wait()
                with self._changed:
                    written = self._written.pop(process.pid)
                    self._whole += max(0, written - packed) if ended else 0
                    self._left += 0 if ended else written
            errors.seek(0)
            complaint = errors.read(COMPLAINT)
        if not ended:
            raise Failed(complaint, process.returncode)

    def _watch(self, process: subprocess.Popen[bytes], look: Callable[[], None], packed: int) -> None:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PAUSE)
                return
            written = max(_written(process.pid), self._written[process.pid])
            self._written[process.pid] = written
            if why := self.too_large(written - packed):
                raise Full(why, written, single=True)
            if why := self.lacks():
                raise Full(why, written, single=False)
            look()


class Failed(Exception):
    """A program ended with an error. complaint: what it said, for the log: it may quote what a registry answered.

    status: as `Popen.returncode`.
    """

    def __init__(self, complaint: bytes, status: int) -> None:
        super().__init__("it failed")
        self.complaint, self.status = complaint, status


def _written(pid: int) -> int:
    """Bytes that a process and its children have written to disks; those of children that have ended are its own."""
    total = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            if line.startswith("write_bytes: "):
                total += int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(_written(int(child)) for child in (task / "children").read_text().split())
    return total
