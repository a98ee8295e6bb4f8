"""A list of steps, each done only when missing, each shown in one line with its time.

Owns: the display, and running each step as the user it needs: root's through sudo, the checkout's as its owner.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from . import host

Report = Callable[[str], None]  # takes what is being done right now


class Failed(Exception):
    """A step that cannot be done: what failed, and the last lines that it printed."""

    def __init__(self, message: str, lines: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.lines = tuple(lines)


@dataclass(frozen=True)
class Step:
    """One thing that must be there.

    missing: asked each time, as any user, so it takes milliseconds. do: brings it about and says in a word what it did.
    as_owner: belongs to the checkout's owner; otherwise it is root's.
    """

    name: str
    missing: Callable[[], bool]
    do: Callable[[Report], str]
    as_owner: bool = False


def run(steps: Iterable[Step]) -> None:
    """Do what is missing, in order. Raises Failed, or SystemExit if another user's step has told of its failure."""
    for step in steps:
        if not step.missing():
            continue
        uid = host.owner().pw_uid if step.as_owner else 0
        if uid == os.geteuid():
            do(step)
        else:
            again = [sys.executable, "-B", "-m", "setup", "step", step.name]
            status = subprocess.run(**as_user(uid, again), cwd=host.ROOT).returncode
            if status:
                raise SystemExit(status)


def as_user(uid: int, argv: list[str]) -> dict[str, Any]:
    """The arguments of `subprocess.run` that run a command as another user."""
    if os.geteuid() == 0:
        user = pwd.getpwuid(uid)
        groups = os.getgrouplist(user.pw_name, user.pw_gid)
        return {
            "args": argv,
            "env": host.home_environment(user),
            "user": uid,
            "group": user.pw_gid,
            "extra_groups": groups,
        }
    if not host.which("sudo"):
        raise Failed(f"{shlex.join(argv)} needs another user's rights, and there is no sudo: run make as root")
    kept = ",".join(name for name in host.KEPT if name in os.environ)
    return {"args": ["sudo", "-u", f"#{uid}", *([f"--preserve-env={kept}"] if kept else []), *argv]}


def command(argv: list[str], report: Report, **options: Any) -> None:
    """Run a command to its end, reporting each line that it prints. Raises Failed with the last of them."""
    lines: deque[str] = deque(maxlen=20)
    options |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(argv, text=True, errors="replace", **options) as process:
        assert process.stdout
        for line in process.stdout:
            if line.strip():
                lines.append(line.rstrip())
                report(line.strip())
    if process.returncode:
        raise Failed(f"`{shlex.join(argv)}` ended with {process.returncode}", lines)


def wait(what: str, ready: Callable[[], bool], alive: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something answers. Raises Failed when it is no longer alive, or takes too long."""
    end = time.monotonic() + seconds
    while not ready():
        if not alive():
            raise Failed(f"{what} ended as soon as it was started")
        if time.monotonic() > end:
            raise Failed(f"{what} does not answer after {seconds:.0f} s")
        time.sleep(0.05)


def do(step: Step) -> None:
    """Do one step and show it."""
    began = time.monotonic()
    terminal = sys.stderr.isatty()

    def show(text: str, end: str) -> None:
        line = f"{step.name} … {text}  {time.monotonic() - began:.1f} s"
        if terminal:
            line = "\r\x1b[K" + line
        print(line, end=end, file=sys.stderr, flush=True)

    def report(text: str) -> None:
        if terminal:
            room = shutil.get_terminal_size().columns - len(step.name) - 14
            show("".join(c for c in text if c.isprintable())[: max(room, 0)], "")

    report("")
    try:
        done = step.do(report)
    except BaseException:
        show("failed", "\n")
        raise
    show(done, "\n")
