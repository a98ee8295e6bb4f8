"""An executor that dies at one event of its work: `python -m tests.soak.events --config FILE`.

Owns what an event is: a commit of the ledger, a program started, a file or directory made, renamed or removed, a frame
to a caller. Each has two moments, before and after. A place is the lines of the product that led to it, so the same
line reached on two ways is two places. Nothing of this is in the product: it is started with these functions replaced.

    SOAK_TRACE   a file to which a line is added for each moment: `MOMENT KIND PLACE`
    SOAK_KILL    a file; while it exists, the process dies at the moment in it, the Nth time: `N MOMENT KIND PLACE`
"""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beaker_sessions
from beaker_sessions.executor import main

PACKAGE = str(Path(beaker_sessions.__file__).parent) + os.sep
FILES = ("mkdir", "rename", "replace", "unlink", "rmdir", "link")


class Events:
    """Counts the moments of this process, and ends it at one of them."""

    def __init__(self, trace: str, kill: str) -> None:
        self.trace = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.kill, self.wanted = kill, ""
        self.pid = os.getpid()
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def moment(self, side: str, kind: str) -> None:
        if os.getpid() != self.pid or not (place := _place()):
            return  # a child that is about to be another program, or not the product
        if kind == "send" and place.startswith("executor/loop:"):
            return  # a thread wakes the loop
        name = f"{side} {kind} {place}"
        with self.lock:
            os.write(self.trace, f"{name}\n".encode())
            try:
                with open(self.kill) as file:
                    wanted = file.read()
            except FileNotFoundError:
                return
            if wanted != self.wanted:
                self.wanted = wanted
                self.counts.clear()
            self.counts[name] += 1
            if wanted == f"{self.counts[name]} {name}":
                os.kill(self.pid, signal.SIGKILL)
                threading.Event().wait()  # the signal ends all threads, this one at its next step

    def around(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.moment("before", kind)
            result = call(*args, **kwargs)
            self.moment("after", kind)
            return result

        return wrapped


def _place() -> str:
    """The product's lines on the stack, innermost first, "" for none."""
    lines = []
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE):
            lines.append(f"{path.removeprefix(PACKAGE).removesuffix('.py')}:{frame.f_lineno}")
    return "<".join(lines)


def replace(events: Events) -> None:
    """Put the events around the functions that the product calls."""

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql != "COMMIT":
                return super().execute(sql, *values)
            commit: Callable[[], sqlite3.Cursor] = events.around(
                "commit", lambda: sqlite3.Connection.execute(self, sql)
            )
            return commit()

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **kwargs: connect(*args, factory=Connection, **kwargs)  # type: ignore[assignment]
    for name in FILES:
        setattr(os, name, events.around(name, getattr(os, name)))
    subprocess.Popen.__init__ = events.around("spawn", subprocess.Popen.__init__)  # type: ignore[method-assign]
    socket.socket.send = events.around("send", socket.socket.send)  # type: ignore[method-assign]
    socket.send_fds = events.around("send", socket.send_fds)  # type: ignore[assignment]
    Path.write_text = events.around("write", Path.write_text)  # type: ignore[method-assign]
    Path.touch = events.around("touch", Path.touch)  # type: ignore[method-assign]


if __name__ == "__main__":
    replace(Events(os.environ["SOAK_TRACE"], os.environ["SOAK_KILL"]))
    sys.exit(main.main())
