"""What operators and fate do to a node, at random but from a seed: one act after the other, each undone at its end.

Owns the acts, and what each of them excuses. An act that changes the machine does so in the network and the mounts of
the campaign's own. `Fate.excuses` says which sessions an act may have ended, and when; all others must go on.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.stack import REPOSITORY, Stack, wait_for

from .people import People

MENDED = 45.0  # seconds in which bridge and firewall are there again: 30 as promised, and a busy machine
BURST = 25
COPY = """
import sys
from pathlib import Path
from beaker_sessions.errors import Error
from beaker_sessions.executor.ledger import Ledger
try:
    Ledger(Path(sys.argv[1])).live()
except Error as error:
    print(error)
"""


@dataclass(frozen=True)
class Excuse:
    """Sessions that live between these times may not have started, and `ended` may have been ended."""

    since: datetime
    until: datetime
    ended: frozenset[str] = frozenset()


class Fate:
    """tell: hears of each act before it happens. disk: where the state is, on a file system of its own."""

    def __init__(
        self, stack: Stack, people: People, chance: random.Random, tell: Callable[[str], None], registry: object,
        clock: Callable[[], object],
    ) -> None:  # fmt: skip
        self.stack, self.people, self.chance, self.tell, self.registry = stack, people, chance, tell, registry
        self.clock = clock
        self.counts: Counter[str] = Counter()
        self.excuses: list[Excuse] = []
        self.failures: list[str] = []
        acts: dict[Callable[[], None], float] = {
            self.kill_executor: 20, self.stop_executor: 2, self.kill_server: 2, self.stop_server: 1,
            self.kill_registry: 1, self.stop_registry: 1, self.fill_disk: 1, self.freeze_disk: 1, self.read_only: 1,
            self.flip_bits: 1, self.burst: 2, self.jump_clock: 0.5, self.cut_server: 0.5,
        }  # fmt: skip
        if stack.driver == "oci":
            acts |= {
                self.kill_conmon: 1, self.stop_conmon: 1, self.kill_runtime: 1, self.stop_runtime: 1,
                self.cut_network: 1, self.delete_bridge: 0.5, self.flush_firewall: 1,
            }  # fmt: skip
        else:
            acts |= {self.kill_engine: 1, self.stop_engine: 1}
        self.acts = acts

    def act(self) -> None:
        (act,) = self.chance.choices(list(self.acts), list(self.acts.values()))
        name = act.__name__
        self.counts[name] += 1
        self.tell(name)
        try:
            act()
        except Exception as error:
            self.failures.append(f"{name}: {error!r}")

    @contextlib.contextmanager
    def excused(self, *ended: str) -> Iterator[None]:
        since = datetime.now(UTC)
        try:
            yield
        finally:
            self.excuses.append(Excuse(since, datetime.now(UTC), frozenset(ended)))

    def pause(self, longest: float) -> None:
        time.sleep(self.chance.uniform(0, longest))

    # -- programs

    def kill_executor(self) -> None:
        self.stack.executor.kill()
        if self.chance.random() < 0.3:
            self.pause(3)
        self.stack.start_executor()

    @contextlib.contextmanager
    def stopped(self, pid: int, longest: float) -> Iterator[None]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                self.pause(longest)
                yield
            finally:
                os.kill(pid, signal.SIGCONT)

    def stop_executor(self) -> None:
        with self.stopped(self.stack.executor.pid, 15):
            pass

    def kill_server(self) -> None:
        self.stack.server.kill()
        self.pause(3)
        self.stack.server.start()
        wait_for("the server", lambda: self.stack.admin.whoami())

    def stop_server(self) -> None:
        with self.stopped(self.stack.server.pid, 12):
            pass

    def kill_registry(self) -> None:
        with self.excused():
            self.registry.kill()  # type: ignore[attr-defined]
            self.pause(3)
            self.registry.start()  # type: ignore[attr-defined]
            time.sleep(0.5)

    def stop_registry(self) -> None:
        with self.excused(), self.stopped(self.registry.pid, 10):  # type: ignore[attr-defined]
            pass

    def _conmon(self) -> tuple[str, int]:
        """A session that has begun to run, and its conmon; or nothing."""
        live = sorted(id for id, pid in self.stack.sandboxes().items() if pid)
        if not live:
            return "", 0
        id = self.chance.choice(live)
        pid = self.stack.state / "executor/oci/sessions" / id / "conmon.pid"
        with contextlib.suppress(OSError, ValueError):
            return id, int(pid.read_text())
        return "", 0

    def kill_conmon(self) -> None:
        id, pid = self._conmon()
        if pid:
            with self.excused(id), contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop_conmon(self) -> None:
        _, pid = self._conmon()
        if pid:
            with self.stopped(pid, 5):
                pass

    def _runtime(self) -> int:
        """A runtime that makes something right now, waited for; or 0."""
        mark = os.fsencode(f"--root={self.stack.state}/executor/oci/runtime")
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            for path in Path("/proc").iterdir():
                if path.name.isdigit():
                    with contextlib.suppress(OSError):
                        words = (path / "cmdline").read_bytes().split(b"\0")
                        if mark in words and b"conmon" not in words[0]:
                            return int(path.name)
        return 0

    def kill_runtime(self) -> None:
        with self.excused():
            if pid := self._runtime():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            else:
                self.counts["kill_runtime, none at work"] += 1
            time.sleep(1)

    def stop_runtime(self) -> None:
        if pid := self._runtime():
            with self.stopped(pid, 3):
                pass

    def kill_engine(self) -> None:
        with self.excused():
            self.stack.docker.kill()
            containerd = (self.stack.root / "exec/containerd/containerd.pid").read_text().strip()
            wait_for("the end of containerd", lambda: not Path("/proc", containerd).exists())
            self.pause(2)
            self.stack.docker.start()
            wait_for("Docker Engine", lambda: self.stack.docker_cli("version").returncode == 0)

    def stop_engine(self) -> None:
        with self.excused(), self.stopped(self.stack.docker.pid, 8):
            pass

    # -- the disk

    def fill_disk(self) -> None:
        with self.excused():
            fill = self.stack.state / "fill"
            try:
                with fill.open("wb") as file, contextlib.suppress(OSError):
                    while True:
                        size = os.statvfs(self.stack.state)
                        if not size.f_bavail:
                            break
                        os.posix_fallocate(
                            file.fileno(), file.seek(0, 2), max(4096, size.f_bavail * size.f_frsize // 2)
                        )
                self.pause(4)
                if self.chance.random() < 0.3:  # one that starts there
                    self.stack.executor.kill()
                    self.stack.executor.start()
                    self.pause(4)
            finally:
                fill.unlink()
            if self.stack.executor.popen and self.stack.executor.popen.poll() is not None:
                self.counts["executors that did not start on a full disk"] += 1
                self.stack.start_executor()
            wait_for("the executor", self.stack.answers)

    def freeze_disk(self) -> None:
        with self.excused():
            subprocess.run(["fsfreeze", "--freeze", self.stack.state], check=True)
            try:
                self.pause(5)
            finally:
                subprocess.run(["fsfreeze", "--unfreeze", self.stack.state], check=True)

    def read_only(self) -> None:
        """Refused by the kernel while anything is open for writing."""
        with self.excused():
            self.stack.executor.kill()
            self.stack.server.kill()
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                done = subprocess.run(["mount", "-o", "remount,ro", self.stack.state], capture_output=True)
                if done.returncode == 0:
                    break
                time.sleep(0.1)
            else:
                self.counts["read_only, refused"] += 1
            try:
                self.stack.executor.start()
                self.stack.server.start()
                self.pause(4)
            finally:
                subprocess.run(["mount", "-o", "remount,rw", self.stack.state], check=True)
            for process in (self.stack.server, self.stack.executor):
                process.kill()
            self.stack.server.start()
            wait_for("the server", lambda: self.stack.admin.whoami())
            self.stack.start_executor()

    def flip_bits(self) -> None:
        """In a copy of the ledger: it is opened, or what is wrong is said; it never ends in a traceback."""
        with tempfile.TemporaryDirectory(dir=self.stack.root) as place:
            copy = Path(place, "ledger.db")
            with (
                contextlib.closing(
                    sqlite3.connect(f"file:{self.stack.state}/executor/ledger.db?mode=ro", uri=True)
                ) as db,
                contextlib.closing(sqlite3.connect(copy)) as to,
            ):
                db.backup(to)
            content = bytearray(copy.read_bytes())
            for _ in range(self.chance.randrange(1, 30)):
                content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
            copy.write_bytes(content)
            command = [sys.executable, "-c", COPY, copy]
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
            if done.returncode != 0:
                kept = Path(tempfile.mkdtemp(prefix="flipped-"), "ledger.db")
                shutil.copyfile(copy, kept)
                self.failures.append(f"flip_bits: a damaged ledger ends in {done.stderr[-400:]!r}")

    # -- the network

    def cut_server(self) -> None:
        """Its socket beside the door is gone: the executor has no way to it."""
        (path,) = self.stack.root.glob("server-*.sock")
        away = path.with_suffix(".away")
        path.rename(away)
        self.pause(8)
        away.rename(path)

    def cut_network(self) -> None:
        subprocess.run(["ip", "link", "set", self.stack.bridge, "down"], check=True)
        self.pause(4)
        subprocess.run(["ip", "link", "set", self.stack.bridge, "up"], check=True)

    def delete_bridge(self) -> None:
        with self.excused():
            subprocess.run(["ip", "link", "delete", self.stack.bridge], check=True)
            self._mended("the bridge", lambda: Path("/sys/class/net", self.stack.bridge).exists())

    def flush_firewall(self) -> None:
        subprocess.run(["nft", "flush", "ruleset"], check=True)
        self._mended("the firewall", self._protected)

    def _protected(self) -> bool:
        command = ["nft", "list", "table", "inet", self.stack.bridge]
        return subprocess.run(command, capture_output=True).returncode == 0

    def _mended(self, what: str, check: Callable[[], bool]) -> None:
        """It is looked after while there are sessions, and people go on making them."""
        try:
            wait_for(what, check, MENDED)
        except TimeoutError:
            live = sum(bool(pid) for pid in self.stack.sandboxes().values())
            self.failures.append(f"{what} is not there again after {MENDED:g} s; {live} sessions run")

    # -- all else

    def burst(self) -> None:
        self.people.burst(BURST, self.chance)

    def jump_clock(self) -> None:
        self.clock()
