"""The systematic part: the executor killed at every event of an operation, and what its successor makes of it.

An operation is done once to learn its events, and then once for each of them: the executor dies there, another is
started, and the operation must come to its right end. Owns the operations and what their right end is. A little
longer than 400 lines: five operations, each of which is a few lines on what all of them share.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests import images
from tests.stack import BIN, REPOSITORY, Process, User, wait_for

from .node import Node

HALF = 0.1  # seconds for which a command is at work, so that what its start brings with it has happened
QUIET = 0.7  # seconds without an event after which an operation is over
TAKES = ("unlink", "rename")
PATIENCE = 60.0  # seconds in which what was interrupted must come to its end, on a busy machine


class Wrong(AssertionError):
    """What an operation came to, and should not have."""


def expect(what: str, found: object, *right: object) -> None:
    if found not in right:
        raise Wrong(f"{what}: {found!r}, not {' or '.join(map(repr, right))}")


@dataclass
class Command:
    """A `beaker` of a user that runs beside the test."""

    popen: subprocess.Popen

    def end(self) -> tuple[int, bytes, bytes]:
        try:
            out, err = self.popen.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            out, err = self.popen.communicate()
            raise Wrong(f"the command line does not end; it has said {out!r} {err!r}") from None
        return self.popen.returncode, out, err


class Swept:
    """A node whose executor dies at events."""

    def __init__(self, node: Node, user: User) -> None:
        self.node, self.user = node, user
        self.trace, self.kill = node.root / "trace", node.root / "kill"
        env = {"SOAK_TRACE": str(self.trace), "SOAK_KILL": str(self.kill), "PYTHONPATH": str(REPOSITORY)}
        node.executor.kill(signal.SIGTERM)
        log = node.root / "log/executor"
        command = [sys.executable, "-m", "tests.soak.events", "--config", str(node.config)]
        node.executor = Process(log, *command, env=env)
        self.number = 0
        node.start_executor()

    def events(self) -> list[str]:
        return self.trace.read_text().splitlines()

    def quiet(self) -> None:
        """Wait until nothing happens any more."""
        size, since = -1, 0.0
        while size != (now := self.trace.stat().st_size) or time.monotonic() - since < QUIET:
            if size != now:
                size, since = now, time.monotonic()
            time.sleep(0.05)

    def arm(self, moment: str) -> None:
        temporary = self.kill.with_name("kill.new")
        temporary.write_text(moment)
        temporary.replace(self.kill)

    def dies(self, operation: Operation, command: Command | None) -> bool:
        """Wait until the executor has died, or for a moment after the operation is over: whether it died."""
        assert self.node.executor.popen
        over = 0.0
        while self.node.executor.popen.poll() is None:
            operation.go_on()
            with contextlib.suppress(OSError, ValueError):  # it dies while it answers
                if not over and (self.node.answers() if command is None else command.popen.poll() is not None):
                    over = time.monotonic()
            if over and time.monotonic() - over > QUIET:
                return False
            time.sleep(0.01)
        return True

    def again(self) -> None:
        """A new executor in place of the one that died."""
        self.kill.unlink(missing_ok=True)
        if self.node.executor.popen and self.node.executor.popen.poll() is not None:
            self.node.start_executor()

    def beaker(self, *words: str) -> Command:
        command = [BIN / "beaker", *words]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return Command(subprocess.Popen(command, **pipes, **self.user.process()))  # type: ignore[call-overload]

    def counter(self) -> str:
        """The name of a file in the user's home to which a command writes a line each time it runs."""
        self.number += 1
        return f"ran-{self.number}"

    def ran(self, counter: str) -> int:
        path = self.user.home / counter
        return len(path.read_text().splitlines()) if path.exists() else 0

    def settle(self) -> None:
        """Wait until the server has been told of everything; nobody tells it without an executor."""
        if self.node.executor.popen is None or self.node.executor.popen.poll() is not None:
            return
        query = "SELECT count(*) FROM sessions WHERE reported < revision"
        wait_for("the reports", lambda: self.node.ledger(query) == [(0,)], PATIENCE)
        outputs = self.node.state / "executor/output"  # those for who comes back stay for five minutes
        wait_for("the outputs", lambda: all(path.suffix for path in outputs.iterdir()), PATIENCE)

    def nothing_left(self, live: int = 0) -> None:
        try:
            wait_for("the end", lambda: len(self.node.live()) == live and not self.node.left(), PATIENCE)
        except TimeoutError:
            raise Wrong(f"left: {self.node.left()}, live: {self.node.live()}") from None


class Operation:
    """One thing that users do. `begin` starts it, `check` waits for its right end."""

    live = 0  # sessions that go on meanwhile

    def __init__(self, swept: Swept) -> None:
        self.swept = swept

    def prepare(self) -> None:
        """What each round needs before it."""

    def begin(self) -> Command | None:
        raise NotImplementedError

    def go_on(self) -> None:
        """Asked again and again while the executor lives: lets the operation come to its end, once it is half-way."""

    def check(self, command: Command | None) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Take back what was made for all rounds."""


class Create(Operation):
    """Its command waits for a file, so that a successor finds it at work."""

    image: tuple[str, ...] = ()
    half = 0.0

    def begin(self) -> Command:
        self.counter, self.half = self.swept.counter(), 0.0
        self.go = self.swept.user.home / f"go-{self.counter}"
        wait = f"until test -e ~/{self.go.name}; do usleep 10000; done"
        script = f"echo x >> ~/{self.counter}; echo begun; {wait}; echo said; exit 7"
        return self.swept.beaker("session", "create", "--gpus", "1", *self.image, "--", "sh", "-c", script)

    def go_on(self) -> None:
        if not self.half and self.swept.ran(self.counter):
            self.half = time.monotonic()
        elif self.half and time.monotonic() - self.half > HALF:
            self.go.touch()

    def check(self, command: Command | None) -> None:
        assert command
        started = "SELECT id FROM sessions WHERE state = 'started'"
        begun = lambda: command.popen.poll() is not None or self.go.exists() or self.swept.node.ledger(started)  # noqa: E731
        wait_for("its start", begun, PATIENCE)
        self.go.touch()
        code, out, err = command.end()
        self.swept.nothing_left()
        found = code, out, self.swept.ran(self.counter)
        expect(f"exit code, output and runs of a command, which said {err.decode()!r}", found, (7, b"begun\nsaid\n", 1))


class Pull(Create):
    """As a create, with an image that is not there."""

    def __init__(self, swept: Swept) -> None:
        super().__init__(swept)
        self.place = Path(tempfile.mkdtemp(prefix="registry-", dir=swept.node.root))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        storage = {"filesystem": {"rootdirectory": str(self.place)}}
        settings = {"version": 0.1, "storage": storage, "http": {"addr": self.address}}
        (self.place / "config.yml").write_text(json.dumps(settings))  # which is YAML too
        self.registry = Process(self.place / "log", "docker-registry", "serve", str(self.place / "config.yml"))
        self.registry.start()

    def prepare(self) -> None:
        """Another layer each time, as those that are there are not fetched."""
        archive = self.place / "image.tar"
        root = images.alpine({"number": os.urandom(64)})
        images.oci_archive(root, archive)
        name = f"{self.address}/lab/tool:{self.swept.number}"
        copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", f"oci-archive:{archive}"]
        wait_for("the registry", lambda: not subprocess.run([*copy, f"docker://{name}"], stderr=-3).returncode)
        self.image = ("--image", name)

    def close(self) -> None:
        self.registry.kill(signal.SIGTERM)


class Stop(Operation):
    def prepare(self) -> None:
        self.counter = self.swept.counter()
        script = f"trap 'exit 3' TERM; echo x >> ~/{self.counter}; while :; do usleep 20000; done"
        code, out, err = self.swept.beaker(
            "session", "create", "--gpus", "1", "--detach", "--", "sh", "-c", script
        ).end()
        expect(f"exit code of `session create`, which said {err.decode()!r}", code, 0)
        self.id = out.decode().strip()
        wait_for("its start", lambda: self.swept.ran(self.counter))

    def begin(self) -> Command:
        return self.swept.beaker("session", "stop", self.id)

    def check(self, command: Command | None) -> None:
        assert command
        code, _, err = command.end()
        if code != 0:  # it was told that the executor went away, and tries again
            again, _, err = self.swept.beaker("session", "stop", self.id).end()
            expect(f"exit code of a second stop, which said {err.decode()!r}", again, 0)
        self.swept.nothing_left()
        status = self.swept.user.json("session", "get", self.id)[0]["status"]  # type: ignore[index]
        expect("exit code", status.get("exitCode"), 3, 143, 137)
        expect("message", status.get("message"), f"stopped by {self.swept.user.name}")
        expect("runs of the command", self.swept.ran(self.counter), 1)


class Exec(Operation):
    live = 1

    def __init__(self, swept: Swept) -> None:
        super().__init__(swept)
        code, out, _ = swept.beaker("session", "create", "--gpus", "1", "--detach", "--", "sleep", "10000").end()
        expect("exit code of `session create`", code, 0)
        self.id = out.decode().strip()
        wait_for("its start", lambda: swept.node.sandboxes().get(self.id))
        self.pid = swept.node.sandboxes()[self.id]

    def begin(self) -> Command:
        self.counter = self.swept.counter()
        return self.swept.beaker(
            "session", "exec", self.id, "--", "sh", "-c", f"echo x >> ~/{self.counter}; echo said; exit 7"
        )

    def check(self, command: Command | None) -> None:
        assert command
        code, out, err = command.end()
        ran = self.swept.ran(self.counter)
        if code == 7:
            expect("runs of the command, and output", (ran, out), (1, b"said\n"))
        elif not err or ran > 1:  # whether it ran may not be known, which must be said
            raise Wrong(f"exit code {code}, {ran} runs of the command, {err!r}")
        expect("the session", self.swept.node.sandboxes(), {self.id: self.pid})
        expect("what is left", self.swept.node.left(), {})

    def close(self) -> None:
        self.swept.beaker("session", "stop", self.id).end()


class Restart(Operation):
    """An executor that starts: one session runs, one waits, one ended meanwhile."""

    live = 2

    def __init__(self, swept: Swept) -> None:
        super().__init__(swept)
        self.counter = swept.counter()
        self.ids = [self._create("1", "sleep 10000"), self._create("2", f"echo x >> ~/{self.counter}")]
        wait_for("its start", lambda: swept.node.sandboxes().get(self.ids[0]))
        self.pid = swept.node.sandboxes()[self.ids[0]]

    def _create(self, gpus: str, script: str) -> str:
        words = ["session", "create", "--gpus", gpus, "--detach", "--", "sh", "-c", script]
        if gpus == "2":  # it waits, and `--detach` returns
            words.insert(2, "--quiet")
        code, out, err = self.swept.beaker(*words).end()
        expect(f"exit code of `session create`, which said {err.decode()!r}", code, 0)
        return out.decode().strip()

    def prepare(self) -> None:
        go = self.swept.user.home / "go"
        go.unlink(missing_ok=True)
        self.ended = self._create("0", "until test -e ~/go; do usleep 20000; done; echo said; exit 9")
        wait_for("its start", lambda: self.swept.node.sandboxes().get(self.ended))
        pid = self.swept.node.sandboxes()[self.ended]
        self.swept.settle()
        self.swept.node.executor.kill()
        go.touch()
        wait_for("its end", lambda: not Path(f"/proc/{pid}").exists())

    def begin(self) -> None:
        self.swept.node.executor.start()

    def check(self, command: Command | None) -> None:  # noqa: ARG002
        wait_for("the executor", self.swept.node.answers)
        self.swept.nothing_left(live=2)
        status = self.swept.user.json("session", "get", self.ended)[0]["status"]  # type: ignore[index]
        expect("exit code", status.get("exitCode"), 9)
        expect("output", self.swept.user.beaker("session", "logs", self.ended).stdout, b"said\n")
        expect("the session that runs", self.swept.node.sandboxes(), {self.ids[0]: self.pid})
        expect("what is live", self.swept.node.live(), self.ids)

    def close(self) -> None:
        self.swept.beaker("session", "stop", self.ids[0]).end()
        self.swept.nothing_left()
        expect("runs of the command that waited", self.swept.ran(self.counter), 1)


OPERATIONS: dict[str, type[Operation]] = {
    "create": Create, "stop": Stop, "exec": Exec, "pull": Pull, "restart": Restart,
}  # fmt: skip


@dataclass
class Result:
    """places: how many were found. killed: rounds in which the executor died. missed: moments that did not come again.
    wrong: (moment, what was wrong).
    """

    places: int = 0
    killed: int = 0
    missed: list[str] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)


def moments(events: list[str], every: bool) -> list[str]:
    """What to kill at: each event if `every`, else one for each place."""
    counts: Counter[str] = Counter()
    found = []
    for event in events:
        counts[event] += 1
        if every or counts[event] == 1:
            found.append(f"{counts[event]} {event}")
    return found


def in_short(found: list[str], seen: set[tuple[str, ...]]) -> list[str]:
    """Of the moments of one line of the product, those that differ: after it, and before what it takes away.

    seen: lines that had their turn in another operation.
    """
    short = []
    for moment in found:
        _, side, kind, place = moment.split(" ", 3)
        line = re.sub(r"^(executor/(ledger|sessions|caller):\d+<)*([^<]*).*", r"\3", place)  # who asked for a commit
        if (side == "after" or kind in TAKES) and (side, kind, line) not in seen:
            seen.add((side, kind, line))
            short.append(moment)
    return short


def learn(operation: Operation) -> list[str]:
    """The moments of an operation that nobody interrupts."""
    operation.prepare()
    operation.swept.quiet()
    before = len(operation.swept.events())
    command = operation.begin()
    operation.check(command)
    operation.swept.quiet()
    return operation.swept.events()[before:]


def sweep(operation: Operation, every: bool, say: Callable[[str], None], seen: set[tuple[str, ...]]) -> Result:
    """Kill at each event of an operation, or where not `every`, once for each line of the product not yet `seen`."""
    swept = operation.swept
    found = moments(learn(operation), every)
    if not every:
        found = in_short(found, seen)
    result = Result(places=len(found))
    for moment in found:
        try:
            operation.prepare()
            command = _killed(operation, moment)
            if command is MISSED:  # an executor that has done this before may not do it again
                swept.node.executor.kill()
                swept.again()
                operation.prepare()
                command = _killed(operation, moment)
            if command is MISSED:
                result.missed.append(moment)
            else:
                result.killed += 1
                swept.again()
                operation.check(command)
        except (AssertionError, TimeoutError) as error:
            result.wrong.append((moment, str(error)))
            say(f"killed {moment}: {error}")
            swept.again()
            with contextlib.suppress(Wrong, TimeoutError):
                recover(operation)
    return result


class Missed(Command):
    """An operation that came to its right end before the moment came."""


MISSED = Missed(None)  # type: ignore[arg-type]


def _killed(operation: Operation, moment: str) -> Command | None:
    """Do it with an executor that dies at a moment: the command that is left; MISSED if the moment did not come."""
    swept = operation.swept
    swept.settle()
    swept.arm(moment)
    command = operation.begin()
    if swept.dies(operation, command):
        return command
    swept.kill.unlink()
    operation.check(command)
    return MISSED


def recover(operation: Operation) -> None:
    """Have the next round begin as if this one had gone well."""
    swept = operation.swept
    wait_for("the executor", swept.node.answers)
    keep = getattr(operation, "ids", []) + ([operation.id] if isinstance(operation, Exec) else [])
    for id in swept.node.live():
        if id not in keep:
            swept.beaker("session", "stop", id).end()
