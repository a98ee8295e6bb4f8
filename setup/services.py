"""The server and the executor: started in the background, restarted when what they were started from has changed.

As systemd units where systemd is init, else as daemons. Stopping either ends no session.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

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
    writes: Callable[[], list[Path]] = list  # directories that its unit lets it write to, by the settings
    before: str = ""  # a unit that is there first, and still when this one has been stopped
    after: str = ""  # a unit that is started when this one runs

    @property
    def unit(self) -> Path:
        return UNITS / f"{self.name}.service"

    @property
    def units(self) -> list[Path]:
        """Its own and those around it, in the order in which they are started."""
        return [UNITS / f"{name}.service" for name in (self.before, self.name, self.after) if name]

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
            return host.SYSTEMD and any(unit.read_text() != self.unit_text(name=unit.name) for unit in self.units)
        except FileNotFoundError:
            return True

    def start(self, report: Report) -> str:
        host.STATE.mkdir(parents=True, exist_ok=True)
        host.write(self._stamp, installed.current())
        if host.SYSTEMD:
            report("starting")
            for directory in self.writes():
                directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            for unit in self.units:
                host.write(unit, self.unit_text(name=unit.name))
            command(["systemctl", "daemon-reload"], report)
            for unit in self.units:
                command(["systemctl", "enable", "--quiet", unit.name], report)
                command(["systemctl", "restart" if unit == self.unit else "start", unit.name], report)
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

    def unit_text(self, programs: Path = installed.CURRENT / "bin", name: str = "") -> str:
        """Its unit file, or one of `units` (systemd.service(5)). Double quotes keep any path one word; `$` means
        nothing there.
        """
        text = (host.ROOT / "setup/units" / (name or self.unit.name)).read_text()
        text = text.replace("@BIN@", str(programs).replace("%", "%%"))
        return text.replace("\n[Install]", "".join(map(_may_write, self.writes())) + "\n[Install]")

    def stop(self, report: Report) -> bool:
        """Stop it, and let it not start with the machine: whether it ran."""
        self._stamp.unlink(missing_ok=True)
        if host.SYSTEMD and self.unit.exists():
            command(["systemctl", "disable", "--quiet", *(unit.name for unit in self.units if unit.exists())], report)
            command(["systemctl", "stop", self.unit.name], report)
            return True
        return daemon.stop(self.name)

    def remove_units(self) -> None:
        """To stop those around it ends the sessions, so only when there is none any more."""
        names = [unit.name for unit in self.units if unit.exists()]
        if host.SYSTEMD and names:
            subprocess.run(["systemctl", "--quiet", "stop", *names], stderr=subprocess.DEVNULL, check=False)
        for unit in self.units:
            unit.unlink(missing_ok=True)
        if host.SYSTEMD and names:
            subprocess.run(["systemctl", "daemon-reload"], stderr=subprocess.DEVNULL, check=False)

    @property
    def _stamp(self) -> Path:
        return host.STATE / "setup" / self.name


def setting(key: str, default: str, section: str = "") -> str:
    """The settings' only value of that key, or the one in a section.

    This runs before there is anything that reads YAML: it knows neither `{key: value}` nor a value on several lines.
    """
    text = SETTINGS.read_text() + "\n" if SETTINGS.exists() else ""
    if section:
        part = re.search(rf"^{section}:[^\n]*\n((?:[ \t]+[^\n]*\n|[ \t]*\n|#[^\n]*\n)*)", text, re.MULTILINE)
        text = part[1] if part else ""
    found = re.search(rf"^[ \t]*{key}:[ \t]+([^\s#].*?)[ \t]*([ \t]#.*)?$", text, re.MULTILINE)
    return found[1].strip("'\"") if found else default


def _server_writes() -> list[Path]:
    """Directories of the server, by its settings, that its unit does not name."""
    database = setting("database", "", "server")
    paths = [Path(setting("storagePath", str(host.STATE), "server")), _sockets()]
    if database.startswith("sqlite:////"):
        paths.append(Path(database.partition("?")[0].removeprefix("sqlite:///")).parent)
    if key := setting("key", "", "server"):
        paths.append(Path(key).parent)
    return [path for path in dict.fromkeys(paths) if not {host.STATE, host.RUN} & {path, *path.parents}]


def _may_write(path: Path) -> str:
    """The lines of a unit (systemd.exec(5)). What is below /run goes with the machine, and systemd makes it anew."""
    below_run = path.is_relative_to("/run")
    word = str(path.relative_to("/run") if below_run else path).replace("%", "%%")
    if below_run:
        return f'RuntimeDirectory="{word}"\n'
    homes = any(path.is_relative_to(home) for home in ("/home", "/root"))
    return f'ReadWritePaths="-{word}"\n' + ("ProtectHome=read-only\n" if homes else "")


def _sockets() -> Path:
    return Path(setting("sockets", str(host.RUN), "server"))


def address() -> str:
    """The server's address."""
    return setting("address", "http://127.0.0.1:8420").rstrip("/")


def _server_answers() -> bool:
    try:
        ask("/")
        return True
    except (OSError, http.client.HTTPException):
        return False


class _Local(http.client.HTTPConnection):
    """HTTP through the Unix socket of the server that root runs on this machine."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
        credentials = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] != 0:
            raise OSError(f"whoever listens at {self._path} is not root")


def ask(path: str, token: str = "") -> int:
    """The status of a GET at the server that the settings name. Raises OSError when none can be asked safely."""
    at = urlsplit(address())
    connection: http.client.HTTPConnection
    if at.scheme == "https":
        connection = http.client.HTTPSConnection(at.hostname or "", at.port, timeout=10)
    elif at.hostname in ("localhost", "::1") or (at.hostname or "").startswith("127."):
        connection = _Local(_sockets() / f"server-{at.port or 80}.sock")
    else:
        raise OSError(f"{address()} is another machine's, and not encrypted")
    with closing(connection):
        connection.request(
            "GET", at.path.rstrip("/") + path, headers={"Authorization": f"Bearer {token}"} if token else {}
        )
        return connection.getresponse().status


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


SERVER = Service("beaker-server", "server", ("serve",), _server_answers, _server_writes)
EXECUTOR = Service(
    "beaker-executor", "executor", (), _executor_answers, before="beaker-cgroup", after="beaker-sessions"
)


def _configure(_report: Report) -> str:
    host.ETC.mkdir(mode=0o755, parents=True, exist_ok=True)
    shutil.copyfile(EXAMPLE, SETTINGS)
    SETTINGS.chmod(0o644)
    return f"written to {SETTINGS}"


settings = Step("settings", lambda: not SETTINGS.exists(), _configure)
