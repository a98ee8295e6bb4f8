"""Sandboxes in memory, for tests and demonstrations: they run nothing and echo what is typed.

Owns: the life of a sandbox as the other drivers have it, so that an executor cannot tell. A session ends when it is
stopped, when its standard input is closed, or at the line `exit [CODE]`; with the command `true` or `false`, at once.
"""

from __future__ import annotations

import itertools
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from ..errors import Error
from ..model import Identity, Pull
from . import LABEL, Finding, Found, Framing, Image, Login, Progress, Spec, Status, Terminal
from . import framed as frame

CODES = {"true": 0, "false": 1}


@dataclass
class _Process:
    """Something that echoes: every attached end, what was said, and the exit code once it is known."""

    command: tuple[str, ...]
    ended: Callable[[], None]
    tty: bool
    size: tuple[int, int] | None = None
    ends: list[socket.socket] = field(default_factory=list)
    said: bytes = b""
    code: int | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def connect(self) -> int:
        ours, theirs = socket.socketpair()
        with self.lock:
            if self.code is None:
                self.ends.append(ours)
                threading.Thread(target=self._echo, args=(ours,), daemon=True).start()
            else:
                ours.close()
        return theirs.detach()

    def end(self, code: int) -> None:
        with self.lock:
            if self.code is not None:
                return
            self.code = code
            for end in self.ends:
                end.shutdown(socket.SHUT_RDWR)  # its thread closes it
        self.ended()

    def _echo(self, end: socket.socket) -> None:
        line = b""
        try:
            while data := end.recv(4096):
                with self.lock:
                    self.said += data
                    for other in self.ends:
                        other.sendall(data)
                line += data
                *lines, line = line.replace(b"\r", b"\n").split(b"\n")
                for words in (text.split() for text in lines):
                    if words[:1] == [b"exit"]:
                        self.end(int(words[1]) if words[1:] and words[1].isdigit() else 0)
            if not self.tty:
                self.end(0)
        except OSError:
            pass  # the other side is gone, as a terminal may go
        finally:
            with self.lock:
                self.ends.remove(end)
                end.close()


class FakeSandboxes:
    """`Sandboxes` without containers. images: what the registry has; a reference that is not in it is not found."""

    name = "fake"
    root = False

    def __init__(self, images: tuple[str, ...] = ("base",)) -> None:
        self.images = images
        self._found: dict[str, Found] = {}
        self._processes: dict[str, _Process] = {}
        self._execs: dict[tuple[str, str], _Process] = {}
        self._numbers = itertools.count()
        self._watchers: list[queue.SimpleQueue[str]] = []

    def image(
        self, reference: str, pull: Pull, progress: Callable[[Progress], None], login: Login = lambda _: None,
        going: Callable[[], None] = lambda: None,
    ) -> Image:  # fmt: skip
        del login, going
        if reference not in self.images:
            raise Error("not_found", f"there is no image {reference}", f"one of {', '.join(self.images)}")
        if pull is Pull.ALWAYS:
            progress(Progress(1, 1, (1, 1)))
        return Image(f"fake:{reference}", reference)

    def create(self, spec: Spec) -> None:
        if spec.id in self._found:
            raise Error("conflict", f"the sandbox {spec.id} exists already")
        self._found[spec.id] = Found(spec.id, {**spec.labels, LABEL: spec.id}, Status.CREATED)
        self._processes[spec.id] = _Process(spec.command, lambda: self._ended(spec.id), spec.tty)

    def attach(self, id: str, *, replay: bool, whole: bool = False) -> Terminal:
        process = self._process(id)
        said = self.logs(id, 1 << 30, framed=not process.tty) if whole else process.said[-65536:]
        return Terminal(process.connect(), Framing.RAW, said if replay else b"")

    def start(self, id: str, size: tuple[int, int] | None) -> None:
        process = self._process(id)
        process.size = size
        if self._found[id].status is not Status.CREATED:
            return
        self._found[id] = replace(self._found[id], status=Status.RUNNING, pid=1, started=datetime.now(UTC))
        self._tell(id)
        if process.command and process.command[0] in CODES:
            process.end(CODES[process.command[0]])

    def resize(self, id: str, size: tuple[int, int], process: str = "") -> None:
        (self._exec(id, process) if process else self._process(id)).size = size

    def exec(
        self, id: str, command: tuple[str, ...], *, env: Mapping[str, str], identity: Identity, workdir: str,
        size: tuple[int, int] | None, stdin: bool,
    ) -> tuple[str, Terminal]:  # fmt: skip
        del env, identity, workdir, stdin
        if self._process(id).code is not None:
            raise Error("conflict", f"the session {id} does not run")
        process = _Process(command, lambda: None, size is not None, size)
        handle = f"exec-{next(self._numbers)}"
        self._execs[id, handle] = process
        terminal = Terminal(process.connect(), Framing.RAW)
        if command and command[0] in CODES:
            process.end(CODES[command[0]])
        return handle, terminal

    def exec_running(self, id: str, handle: str) -> bool:
        return self._exec(id, handle).code is None

    def execs(self, id: str) -> list[str]:
        self._process(id)
        return [handle for (one, handle), process in [*self._execs.items()] if one == id and process.code is None]

    def exec_exit(self, id: str, handle: str) -> int:
        process = self._exec(id, handle)
        process.end(0)
        return process.code or 0

    def signal(self, id: str, signal: int) -> None:
        self._process(id).end(128 + signal)

    def init(self, id: str) -> int | None:
        self._process(id)
        return None

    def stop(self, id: str, grace: float) -> None:
        del grace
        self._process(id).end(129)

    def remove(self, id: str) -> None:
        if process := self._processes.pop(id, None):
            process.end(137)
            del self._found[id]
            self._tell(id)

    def watch(self) -> Iterator[str]:
        changes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._watchers.append(changes)
        yield ""
        while True:
            yield changes.get()

    def logs(self, id: str, limit: int, *, framed: bool = False) -> bytes:
        said = self._process(id).said[-limit:]
        return frame(1, said) if framed and said else said

    def disk(self, id: str) -> int | None:
        return len(self._process(id).said)

    def guard(self) -> None:
        pass

    def weigh(self, cpus: float) -> None:
        pass

    def check(self) -> list[Finding]:
        return [Finding("warning", "the fake driver runs nothing", "set driver: docker")]

    def find(self, id: str) -> Found | None:
        return self._found.get(id)

    def list(self) -> list[Found]:  # last: its name hides the type from what follows
        return [*self._found.values()]

    def _process(self, id: str) -> _Process:
        if id not in self._processes:
            raise Error("not_found", f"there is no sandbox {id}")
        return self._processes[id]

    def _exec(self, id: str, handle: str) -> _Process:
        if (id, handle) not in self._execs:
            raise Error("not_found", f"the session {id} has no process {handle}")
        return self._execs[id, handle]

    def _ended(self, id: str) -> None:
        for process in [process for (session, _), process in self._execs.items() if session == id]:
            process.end(137)
        code = self._processes[id].code if id in self._processes else 137
        if id in self._found:
            now = datetime.now(UTC)
            self._found[id] = replace(self._found[id], status=Status.EXITED, pid=0, exit_code=code, finished=now)
        self._tell(id)

    def _tell(self, id: str) -> None:
        for changes in self._watchers:
            changes.put(id)
