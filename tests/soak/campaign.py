"""The campaign: rounds of people and fate on one node, and after each what became of every session.

Owns the stack that it happens on, the rounds, and the judgement. A round ends with quiet: fate undoes its last act, the
people finish, all sessions are stopped, and nothing may be left. What the recorder saw must have kept the invariants.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from beaker_sessions.sandbox.oci.processes import mentioning
from tests import images, network
from tests.recorder import Recorder
from tests.stack import REPOSITORY, Process, Stack, wait_for

from .fate import Excuse, Fate
from .node import IMAGE, Node
from .people import Errand, People

ROUND = 90.0  # seconds of trouble
PEOPLE = 6
DISK = 3 << 30  # bytes of the file system that the state is on
LAST = 40  # events that a failure shows
CLONE_NEWNS, MS_REC, MS_SLAVE, MS_BIND = 0x20000, 16384, 1 << 19, 4096
RIGHT, EXCUSED, REFUSED = "right", "ended or not started by an act that explains it", "refused"
LOST, DOUBLED, STUCK = "lost", "doubled", "stuck"
GONE = "gone.lab/tool:1"  # its name server does not answer


class Ground:
    """What a campaign stands on, apart from the machine: a network, mounts, a disk, a name server, a registry."""

    def __init__(self, driver: str) -> None:
        network.leave()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None):
            raise OSError(ctypes.get_errno(), "no mount namespace of its own")
        self.root = Path(tempfile.mkdtemp(prefix="bs-"))
        self.root.chmod(0o755)
        self._name_server()
        limits = {"sessions": 500, "waiting": 300, "unreserved": 300, "pulls": 20}
        settings = {"defaultImage": IMAGE, "mountPaths": [], "limits": limits}
        kind = Node if driver == "oci" else Stack
        disk = self.root / "disk.img"
        with disk.open("wb") as file:
            file.truncate(DISK)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", disk], check=True)
        (self.root / "state").mkdir()
        subprocess.run(["mount", "-o", "loop", disk, self.root / "state"], check=True)
        self.stack = kind(self.root, gpus=2, driver=driver, settings=settings)
        if driver == "docker":  # in this network, that of what it calls, and again there after it was killed
            self.stack.docker.command = self.stack.docker.command[2:]
        self.registry = self._registry()
        self._clock = self.root / "clock"

    def _name_server(self) -> None:
        """One that takes questions and never answers."""
        self.silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.silent.bind(("127.0.0.53", 53))
        resolv = self.root / "resolv.conf"
        resolv.write_text("nameserver 127.0.0.53\noptions timeout:5 attempts:2\n")
        subprocess.run(["mount", "--bind", resolv, "/etc/resolv.conf"], check=True)

    def _registry(self) -> Process:
        place = self.root / "registry"
        place.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        settings = {
            "version": 0.1, "storage": {"filesystem": {"rootdirectory": str(place)}}, "http": {"addr": self.address},
        }  # fmt: skip
        (place / "config.yml").write_text(yaml.safe_dump(settings))
        return Process(place / "log", "docker-registry", "serve", str(place / "config.yml"))

    def start(self) -> None:
        self.stack.start()
        if self.stack.driver == "docker":
            tar = self.root / "alpine.tar"
            tar.write_bytes(images.alpine())
            self.stack.image(IMAGE, tar)
        self.registry.start()
        self.push()

    def push(self) -> str:
        """A new image in the registry: its name."""
        archive = self.root / "push.tar"
        images.oci_archive(images.alpine({"number": os.urandom(64)}), archive)
        name = f"{self.address}/lab/tool:1"
        copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", f"oci-archive:{archive}"]
        wait_for("the registry", lambda: not subprocess.run([*copy, f"docker://{name}"], stderr=-3).returncode)
        return name

    def jump(self) -> None:
        """The clock of executor and server goes on by a day, and back."""
        (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
        self._clock.write_text("+0")
        # libfaketime 0.9.10 fails clock_nanosleep when it leaves monotonic clocks alone.
        slept = "import threading, time\ntime.sleep = lambda seconds: threading.Event().wait(seconds) and None\n"
        (self.root / "sitecustomize.py").write_text(slept)
        env = {
            "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(self._clock), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "PYTHONPATH": str(self.root),
        }  # fmt: skip
        self._restart(env)
        for jump in ("+1d", "-1d", "+0"):
            self._clock.write_text(jump)
            time.sleep(3)
        self._restart(None)

    def _restart(self, env: dict[str, str] | None) -> None:
        for process in (self.stack.server, self.stack.executor):
            process.kill(signal.SIGTERM)
            process.env = env
            process.start()
        wait_for("server and executor", lambda: self.stack.admin.whoami() and self.stack.answers())

    def close(self) -> None:
        self.registry.kill()
        with contextlib.suppress(OSError):
            self.stack.executor.kill()
        if hasattr(self.stack, "admin"):
            self.stack.close()
        for shim in mentioning(self.root / "exec/containerd"):
            shim.kill()  # an engine that was killed while it made a container does not know of its shim
        self.silent.close()
        subprocess.run(["umount", "--lazy", "/etc/resolv.conf"], check=False)
        subprocess.run(["umount", self.root / "state"], check=False)
        subprocess.run(["rm", "-rf", "--one-file-system", self.root], check=False)


class Campaign:
    """say: prints a line."""

    def __init__(self, driver: str, minutes: float, seed: str, say: Callable[[str], None] = print) -> None:
        self.driver, self.minutes, self.seed, self.say = driver, minutes, seed, say
        self.began = time.monotonic()
        self.last: deque[str] = deque(maxlen=LAST)
        self.counts: Counter[str] = Counter()
        self.acts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()  # why, as it was said
        self.failures: list[str] = []

    def run(self) -> int:
        """Until the time is over: 0 when nothing was wrong."""
        self.say(f"seed {self.seed}, driver {self.driver}, {self.minutes:g} minutes")
        ground = Ground(self.driver)
        try:
            ground.start()
            users = [ground.stack.user(name) for name in ("ada", "bob", "eve")]
            for number in itertools.count():
                self.round(ground, users, number)
                if time.monotonic() - self.began > self.minutes * 60:
                    break
        finally:
            if self.failures:  # what was there is looked at then
                kept = REPOSITORY / "build/soak" / self.seed
                kept.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-r", ground.root / "log", kept], check=False)
                self.say(f"the logs are in {kept}")
            ground.close()
        if self.driver == "oci":  # Docker Engine leaves its own
            self.fail("the network", network.left())
        self.report()
        return int(bool(self.failures))

    def tell(self, what: str) -> None:
        self.last.append(f"{time.monotonic() - self.began:7.1f} s  {what}")

    def fail(self, where: str, what: list[str]) -> None:
        if not what:
            return
        for line in what:
            self.failures.append(line)
            self.say(f"WRONG, {where}: {line}")
        self.say(f"seed {self.seed}; the last events:")
        for line in self.last:
            self.say(f"  {line}")

    def round(self, ground: Ground, users: list[Any], number: int) -> None:
        stack, name = ground.stack, f"{self.seed}-{number}"
        chance = random.Random(name)
        people = People(users, name, self.tell, lambda: f"{ground.address}/lab/tool:1", GONE)
        fate = Fate(stack, people, chance, self.tell, ground.registry, ground.jump)
        self.tell(f"round {number} begins")
        with Recorder(stack, pause=0.5) as recorder:
            people.begin(PEOPLE)
            end = time.monotonic() + min(ROUND, self.minutes * 60)
            while time.monotonic() < end:
                time.sleep(chance.uniform(0.2, 3))
                fate.act()
            self.tell("fate rests")
            people.end()
            quiet = self._quiet(stack)
        excused = {id for excuse in fate.excuses for id in excuse.ended}
        broken = [line for line in recorder.broken() if not any(id in line for id in excused)]
        if fate.excuses and self.driver == "oci":  # a disk that refuses also keeps claims
            broken = [line for line in broken if not line.startswith("I5")]
        wrong = [*people.failures, *fate.failures, *quiet, *broken]
        self.acts.update(fate.counts)
        for errand in people.errands:
            verdict, why = judge(errand, records(stack, errand.name), fate.excuses)
            self.counts[verdict] += 1
            if verdict == REFUSED:
                said = errand.said.strip().rpartition("\n")[2].removeprefix("beaker: ")
                self.refusals[re.sub(r"\w{26}|[\w-]*\d[\w-]*", "…", said)[:100]] += 1
            if verdict in (LOST, DOUBLED, STUCK):
                wrong.append(
                    f"{verdict}: {errand.kind} {errand.name} {errand.id}: {why}; it was told {errand.said[-300:]!r}"
                )
        for user in users:
            for path in user.home.glob(f"s*-{name}*"):
                path.unlink()
        self.say(f"round {number}: {len(people.errands)} sessions, {fate.counts.total()} acts, {len(wrong)} wrong")
        self.fail(f"round {number}", wrong)
        ground.push()

    def _quiet(self, stack: Stack) -> list[str]:
        """All ends, and nothing is left: what is."""
        try:
            wait_for("the executor", stack.answers)
            wait_for("the queue and all that ends by itself", lambda: _over(stack), 30)
        except TimeoutError:
            pass  # what was begun with `--detach` and goes on for ever
        try:
            stack.settle()
        except (TimeoutError, AssertionError) as error:
            return [f"after the round: {error}"]
        if not isinstance(stack, Node):
            return []
        with contextlib.suppress(TimeoutError):
            wait_for("an end without remains", lambda: not stack.left(), 30)
        return [f"left: {what}: {names}" for what, names in stack.left().items()]

    def report(self) -> None:
        minutes = (time.monotonic() - self.began) / 60
        kills = sum(n for name, n in self.acts.items() if name == "kill_executor")
        self.say(f"\nseed {self.seed}, driver {self.driver}, {minutes:.0f} minutes, {datetime.now():%Y-%m-%d}")
        self.say(f"{self.counts.total()} sessions asked for, {kills} executors killed")
        for what in (RIGHT, REFUSED, EXCUSED, LOST, DOUBLED, STUCK):
            self.say(f"{self.counts[what]:6} {what}")
        for said, times in self.refusals.most_common(6):
            self.say(f"{times:12} {said or 'nothing was said'}")
        self.say("acts: " + ", ".join(f"{name} {n}" for name, n in sorted(self.acts.items())))
        self.say(f"{len(self.failures)} failures")


def _over(stack: Stack) -> bool:
    return not stack.live()


def records(stack: Stack, name: str) -> list[dict[str, Any]]:
    """The sessions of a name, as the ledger has them."""
    path = f"file:{stack.state}/executor/ledger.db?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True)) as ledger:
        rows = ledger.execute("SELECT job FROM sessions WHERE json_extract(job, '$.name') = ?", (name,)).fetchall()
    return [json.loads(job) for (job,) in rows]


def judge(errand: Errand, found: list[dict[str, Any]], excuses: list[Excuse]) -> tuple[str, str]:
    """What became of a session, and what is wrong with it. found: the sessions of its name."""
    ran = errand.ran
    if len(found) > 1 or ran > 1:
        return DOUBLED, f"{len(found)} sessions, {ran} runs of its command"
    if not found:
        if errand.id:
            return LOST, f"it was acknowledged as {errand.id}, and is not known"
        return (LOST, "its command ran, and it is not known") if ran else (REFUSED, "")
    status = found[0]["status"]
    if not status.get("finalized"):
        return STUCK, f"{status}"
    code, canceled = status.get("exitCode"), status.get("canceled")
    if errand.kind == "nameless" and not ran:
        return RIGHT, ""  # the name server was given up before the stop
    if canceled or (code == errand.code and ran):
        if errand.broken and not _excused(found[0], excuses):
            return LOST, errand.broken
        if errand.heard and errand.heard[0] == code and errand.heard[1]:
            return LOST, f"output: {errand.heard[1]}"
        if errand.heard and errand.heard[0] != code and not errand.said:
            return LOST, f"its command line ended with {errand.heard[0]} and said nothing"
        return RIGHT, ""
    if _excused(found[0], excuses):
        return EXCUSED, ""
    return LOST, f"exit code {code}, not {errand.code}; {ran} runs; {status.get('message')!r}"


def _excused(job: dict[str, Any], excuses: list[Excuse]) -> bool:
    """An act that could have ended it: one that names it, or one at which a start may fail."""
    status = job["status"]
    since, until = datetime.fromisoformat(status["created"]), datetime.fromisoformat(status["exited"])
    named = any(job["id"] in excuse.ended for excuse in excuses)
    meanwhile = any(excuse.since <= until and since <= excuse.until for excuse in excuses)
    return named or (meanwhile and not status.get("started"))
