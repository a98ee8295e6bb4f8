"""People who use a node while it is ill-treated, and what each of them must find in the end.

Owns the client's view of each session: its name, how it shall end, and what was heard of it. What the system made of it
is read from the ledger when all is quiet, and judged there.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pexpect

from tests.stack import BIN, User

PATIENCE = 120.0  # seconds in which a command line must have ended
PAUSE = 2.0  # seconds at most between two sessions of one of them
NUMBERS = 20000  # lines of a flow


@dataclass
class Errand:
    """One session that somebody asked for. code: with which it ends. name: also of the file that counts its runs.

    id: once it was acknowledged. heard: exit code and output of a command line that followed it to its end, None of one
    that did not. stopped: whether somebody asked for its end. broken: what a terminal did not do.
    """

    name: str
    user: User
    kind: str
    code: int
    at: float = field(default_factory=time.monotonic)
    id: str = ""
    heard: tuple[int, str] | None = None
    said: str = ""
    stopped: bool = False
    broken: str = ""

    @property
    def ran(self) -> int:
        path = self.user.home / self.name
        return len(path.read_text().splitlines()) if path.exists() else 0


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


FLOW = digest("".join(f"{n}\n" for n in range(1, NUMBERS + 1)).encode())


class People:
    """tell: hears of each thing that somebody does. gone: names of images that cannot be had."""

    def __init__(
        self, users: Sequence[User], seed: str, tell: Callable[[str], None], image: Callable[[], str], gone: str
    ) -> None:
        self.users, self.seed, self.tell, self.image, self.gone = users, seed, tell, image, gone
        self.errands: list[Errand] = []
        self.failures: list[str] = []
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def begin(self, number: int) -> None:
        for n in range(number):
            self._thread(self._live, random.Random(f"{self.seed}-{n}"))

    def burst(self, number: int, chance: random.Random) -> None:
        """So many creates at once."""
        for _ in range(number):
            self._thread(self._detached, self._errand("burst", chance), random.Random(chance.random()))

    def end(self) -> None:
        """Let everybody finish what they began."""
        self.over.set()
        for thread in list(self._threads):
            thread.join()
        self._threads.clear()

    def _thread(self, call: Callable[..., None], *args: object) -> None:
        def guarded() -> None:
            try:
                call(*args)
            except Exception as error:  # in the campaign itself
                self.failures.append(f"{call.__name__}: {error!r}")

        thread = threading.Thread(target=guarded, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _errand(self, kind: str, chance: random.Random) -> Errand:
        with self._lock:
            errand = Errand(
                f"s{len(self.errands)}-{self.seed}", chance.choice(self.users), kind, chance.randrange(3, 99)
            )
            self.errands.append(errand)
        return errand

    def _live(self, chance: random.Random) -> None:
        acts = {
            self._followed: 4, self._flow: 3, self._typed: 2, self._detached: 4, self._stopped: 2, self._pull: 1,
            self._nameless: 0.3,
        }  # fmt: skip
        while not self.over.is_set():
            (act,) = chance.choices(list(acts), list(acts.values()))
            act(self._errand(act.__name__.strip("_"), chance), chance)
            self.over.wait(chance.uniform(0, PAUSE))

    # -- what they do

    def _create(self, errand: Errand, chance: random.Random, script: str, *more: str) -> list[str]:
        words = ["session", "create", "--gpus", chance.choice("000112"), "--name", errand.name, *more]
        return [*words, "--", "sh", "-c", f"echo x >> ~/{errand.name}; {script}"]

    def _beaker(self, errand: Errand, *words: str, input: bytes = b"") -> tuple[int, bytes]:
        """Run it to its end: exit code and output."""
        process = subprocess.Popen(
            [BIN / "beaker", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            **errand.user.process(),
        )  # fmt: skip
        try:
            out, err = process.communicate(input, PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            self.failures.append(f"{errand.name}: `{' '.join(words[:3])}` does not end; said {err.decode()[-300:]!r}")
            return -1, out
        errand.said = err.decode(errors="replace")
        if found := re.search(r"session (\w{26})", errand.said):
            errand.id = errand.id or found.group(1)
        return process.returncode, out

    def _followed(self, errand: Errand, chance: random.Random) -> None:
        script = f"sleep {chance.choice(('0', '0.5', '3'))}; echo said; exit {errand.code}"
        code, out = self._beaker(errand, *self._create(errand, chance, script))
        errand.heard = code, "" if out == b"said\n" else f"{out[:80]!r} instead of what it said"

    def _flow(self, errand: Errand, chance: random.Random) -> None:
        """What goes in and what comes out, with a checksum; to a reader that sometimes is not there."""
        given = chance.randbytes(300_000)
        script = f"cat; seq 1 {NUMBERS}; sleep 0.2; exit {errand.code}"
        code, out = self._beaker(errand, *self._create(errand, chance, script), input=given)
        came = digest(out[: len(given)]) == digest(given), digest(out[len(given) :]) == FLOW
        errand.heard = code, "" if all(came) else f"{len(out)} bytes came, and others than were sent: {came}"

    def _detached(self, errand: Errand, chance: random.Random) -> None:
        script = f"sleep {chance.choice(('0', '1', '4'))}; exit {errand.code}"
        code, out = self._beaker(errand, *self._create(errand, chance, script, "--detach"))
        if code == 0:
            errand.id = out.decode().strip()

    def _stopped(self, errand: Errand, chance: random.Random) -> None:
        """Ended by its user, after a second terminal."""
        code, out = self._beaker(errand, *self._create(errand, chance, "sleep 1000", "--detach"))
        if code == 0:
            errand.id = out.decode().strip()
        counter = f"{errand.name}-exec"
        script = f"echo x >> ~/{counter}; echo here; exit 5"
        code, out = self._beaker(errand, "session", "exec", errand.name, "--", "sh", "-c", script)
        path = errand.user.home / counter
        ran = len(path.read_text().splitlines()) if path.exists() else 0
        if ran > 1 or (code == 5 and (ran, out) != (1, b"here\n")) or (code != 5 and not errand.said):
            self.failures.append(
                f"{errand.name}: exec ended with {code}, ran {ran} times, said {out!r} {errand.said!r}"
            )
        errand.stopped = True
        deadline = time.monotonic() + PATIENCE
        while self._beaker(errand, "session", "stop", errand.name)[0] not in (0, 66) and time.monotonic() < deadline:
            time.sleep(0.5)

    def _pull(self, errand: Errand, chance: random.Random) -> None:
        words = self._create(errand, chance, f"exit {errand.code}", "--image", self.image(), "--pull", "always")
        code, _ = self._beaker(errand, *words)
        errand.heard = code, ""

    def _nameless(self, errand: Errand, chance: random.Random) -> None:
        """An image of a registry whose name server does not answer, and a stop meanwhile."""
        command = [BIN / "beaker", *self._create(errand, chance, "true", "--image", self.gone)]
        errand.stopped = True
        process = subprocess.Popen(command, stdin=-3, stdout=-3, stderr=subprocess.PIPE, **errand.user.process())
        time.sleep(chance.uniform(0.2, 2))
        self._beaker(errand, "session", "stop", errand.name)
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self.failures.append(f"{errand.name}: a create without a name server does not end after a stop")

    def _typed(self, errand: Errand, chance: random.Random) -> None:
        """A shell in a terminal: typed at, resized, hung up, and taken up again."""
        errand.broken = "its terminal was not opened"
        terminal = None
        try:
            words = ["session", "create", "--gpus", "0", "--name", errand.name]
            script = f"echo x >> ~/{errand.name}; mark=kept; export mark; exec sh"
            terminal = self._terminal(errand, [*words, "--", "sh", "-c", script])
            if not self._answers(terminal, 30):
                terminal.close(force=True)
                return
            errand.broken = "its shell did not answer"
            for _ in range(chance.randrange(1, 6)):
                if not self._answers(terminal):
                    return
                rows = chance.randrange(5, 70)
                terminal.setwinsize(rows, chance.randrange(20, 200))
                time.sleep(chance.uniform(0, 0.7))
            if chance.random() < 0.5:
                errand.broken = "it could not be attached to again"
                terminal.close(force=True)
                deadline = time.monotonic() + 45
                while True:
                    terminal = self._terminal(errand, ["session", "attach", errand.name])
                    if self._answers(terminal, 15):
                        break
                    terminal.close(force=True)
                    if time.monotonic() > deadline:
                        return
                    time.sleep(1)
                errand.broken = "its shell has forgotten"
                terminal.send("echo =$mark=\r")
                terminal.expect_exact("=kept=", timeout=15)
            errand.broken = "it did not end"
            terminal.send(f"exit {errand.code}\r")
            terminal.expect(pexpect.EOF, timeout=45)
            terminal.close()
            errand.broken = ""
        except pexpect.ExceptionPexpect as error:
            errand.broken += f": {str(error).splitlines()[0]}"
        finally:
            if terminal is not None and not terminal.closed:
                terminal.close(force=True)
            if errand.broken:  # whoever may have lost it ends it
                errand.stopped = True
                self._beaker(errand, "session", "stop", errand.name)

    @staticmethod
    def _terminal(errand: Errand, words: list[str]) -> pexpect.spawn:
        process = errand.user.process()

        def become() -> None:
            os.setgroups(process["extra_groups"])
            os.setgid(process["group"])
            os.setuid(process["user"])

        return pexpect.spawn(
            str(BIN / "beaker"), words, env=process["env"], cwd=str(process["cwd"]), dimensions=(24, 80),
            encoding="utf-8", codec_errors="replace", preexec_fn=become,
        )  # fmt: skip

    @staticmethod
    def _answers(terminal: pexpect.spawn, seconds: float = 15) -> bool:
        """Whether a shell answers a line, typed again where it got lost before there was a shell."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            number = random.randrange(10**6, 10**9)
            try:
                terminal.send(f"echo $(({number} + 1))\r")
                terminal.expect_exact(str(number + 1), timeout=5)
            except pexpect.TIMEOUT:
                continue
            except (pexpect.EOF, OSError):
                return False
            return True
        return False
