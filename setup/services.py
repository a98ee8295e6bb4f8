"""The server and the executor: started in the background, restarted when what they were started from has changed.

As systemd units where systemd is init, else as daemons. Stopping either ends no session.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from beaker_sessions.errors import Error
from beaker_sessions.transport import Endpoint

from . import daemon, host, installed
from .steps import Failed, Report, Step, command, wait

DOOR = host.RUN / "executor.sock"
SETTINGS = host.ETC / "config.yml"
EXAMPLE = Path(__file__).with_name("config.yml")
UNITS = Path("/etc/systemd/system")


@dataclass(frozen=True)
class Service:
    name: str
    description: str
    arguments: tuple[str, ...]
    answers: Callable[[], bool]

    @property
    def unit(self) -> Path:
        return UNITS / f"{self.name}.service"

    def step(self) -> Step:
        return Step(self.description, lambda: not self.answers() or self.stale(), self.start)

    def stale(self) -> bool:
        """Whether it was started from another version than is installed, with other settings, or as another unit."""
        try:
            started = self._stamp.stat().st_mtime
            if self._stamp.read_text() != installed.current():
                return True
            if SETTINGS.exists() and SETTINGS.stat().st_mtime > started:
                return True
            return host.SYSTEMD and self.unit.read_text() != self.unit_text()
        except FileNotFoundError:
            return True

    def start(self, report: Report) -> str:
        host.STATE.mkdir(parents=True, exist_ok=True)
        host.write(self._stamp, installed.current())
        if host.SYSTEMD:
            report("starting")
            host.write(self.unit, self.unit_text())
            command(["systemctl", "daemon-reload"], report)
            command(["systemctl", "enable", "--quiet", self.unit.name], report)
            command(["systemctl", "restart", self.unit.name], report)
            wait(f"{self.unit.name} (see journalctl -u {self.name})", self.answers, lambda: True)
            installed.clean_up()
            return f"started {self.unit.name}"
        again = daemon.stop(self.name)
        process = daemon.start(self.name, [str(installed.CURRENT / "bin" / self.name), *self.arguments])
        try:
            wait(self.name, self.answers, lambda: daemon.alive(process))
        except Failed as error:
            raise Failed(f"{error}; its log is {daemon.log(self.name)}", daemon.tail(self.name)) from None
        installed.clean_up()
        return f"{'restarted' if again else 'started'}, log {daemon.log(self.name)}"

    def unit_text(self, programs: Path = installed.CURRENT / "bin") -> str:
        """Its unit file (systemd.service(5)). Double quotes keep any path one word; `$` means nothing there."""
        text = (host.ROOT / "setup/units" / self.unit.name).read_text()
        return text.replace("@BIN@", str(programs).replace("%", "%%"))

    def stop(self, report: Report) -> bool:
        """Stop it, and let it not start with the machine: whether it ran."""
        self._stamp.unlink(missing_ok=True)
        if host.SYSTEMD and self.unit.exists():
            command(["systemctl", "disable", "--quiet", "--now", self.unit.name], report)
            return True
        return daemon.stop(self.name)

    @property
    def _stamp(self) -> Path:
        return host.STATE / "setup" / self.name


def setting(key: str, default: str) -> str:
    """The settings' only value of that key. This runs before there is anything that reads YAML."""
    text = SETTINGS.read_text() if SETTINGS.exists() else ""
    found = re.search(rf"^\s*{key}:\s*([^\s#]+)", text, re.MULTILINE)
    return found[1].strip("'\"") if found else default


def address() -> str:
    """The server's address."""
    return setting("address", "http://127.0.0.1:8420").rstrip("/")


def _server_answers() -> bool:
    try:
        ask("/")
        return True
    except (OSError, http.client.HTTPException):
        return False


def ask(path: str, token: str = "") -> int:
    """The status of a GET at the server of this machine. Raises OSError when there is none."""
    try:
        with closing(Endpoint(address(), str(host.RUN)).connection(10)) as connection:
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
            return connection.getresponse().status
    except Error as error:
        raise OSError(error.message) from error


def _executor_answers() -> bool:
    """The door answers a question without a token with an error, which is an answer."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            door.settimeout(10)
            door.connect(str(DOOR))
            door.send(json.dumps({"v": 1, "op": "node", "token": ""}).encode())
            return bool(door.recv(1 << 17))
    except OSError:
        return False


SERVER = Service("beaker-server", "server", ("serve",), _server_answers)
EXECUTOR = Service("beaker-executor", "executor", (), _executor_answers)


def _configure(_report: Report) -> str:
    host.ETC.mkdir(mode=0o755, parents=True, exist_ok=True)
    shutil.copyfile(EXAMPLE, SETTINGS)
    SETTINGS.chmod(0o644)
    return f"written to {SETTINGS}"


settings = Step("settings", lambda: not SETTINGS.exists(), _configure)
