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

from . import daemon, host
from .steps import Failed, Report, Step, command, wait

DOOR = host.RUN / "executor.sock"
SETTINGS = host.ETC / "config.yml"
EXAMPLE = Path(__file__).with_name("config.yml")
UNITS = Path("/etc/systemd/system")

_UNIT = """[Unit]
Description={description}
After=network-online.target docker.service
Wants=network-online.target

[Service]
ExecStart={command}
Restart=always
RestartSec=1
# What the executor has started are sessions, or parts of them.
KillMode=process
Environment=LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
LimitNOFILE=1048576
OOMScoreAdjust=-900
RuntimeDirectory=beaker
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
{options}
[Install]
WantedBy=multi-user.target
"""
# Nothing that gives the executor a mount namespace of its own: its mounts are the sessions', and it serves whoever is
# in its namespaces. Its children are sessions too, so no filters of system calls either.
_EXECUTOR = "Delegate=yes\n"
# The server needs its database and the network, nothing else.
_SERVER = """UMask=0077
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths=/var/lib/beaker
ProtectHome=read-only
PrivateDevices=yes
ProtectClock=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectHostname=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
# AF_NETLINK: whose a connection of this machine is.
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
"""


@dataclass(frozen=True)
class Service:
    name: str
    description: str
    arguments: tuple[str, ...]
    answers: Callable[[], bool]
    options: str

    @property
    def unit(self) -> Path:
        return UNITS / f"{self.name}.service"

    def step(self) -> Step:
        return Step(self.description, lambda: not self.answers() or self.stale(), self.start)

    def stale(self) -> bool:
        """Whether the program, its libraries or its settings are newer than the running process."""
        sources = [SETTINGS, host.VENV / ".requirements", *(host.ROOT / "beaker_sessions").rglob("*.py")]
        try:
            return max(path.stat().st_mtime for path in sources if path.exists()) > self._stamp.stat().st_mtime
        except FileNotFoundError:
            return True

    def start(self, report: Report) -> str:
        program = [str(host.VENV / "bin" / self.name), *self.arguments]
        host.STATE.mkdir(parents=True, exist_ok=True)
        host.write(self._stamp, "")
        if host.SYSTEMD:
            report("starting")
            host.write(self.unit, self.unit_text(program))
            command(["systemctl", "daemon-reload"], report)
            command(["systemctl", "enable", "--quiet", self.unit.name], report)
            command(["systemctl", "restart", self.unit.name], report)
            wait(f"{self.unit.name} (see journalctl -u {self.name})", self.answers, lambda: True)
            return f"started {self.unit.name}"
        again = daemon.stop(self.name)
        process = daemon.start(self.name, program)
        try:
            wait(self.name, self.answers, lambda: daemon.alive(process))
        except Failed as error:
            raise Failed(f"{error}; its log is {daemon.log(self.name)}", daemon.tail(self.name)) from None
        return f"{'restarted' if again else 'started'}, log {daemon.log(self.name)}"

    def unit_text(self, program: list[str]) -> str:
        """Its unit file (systemd.service(5)). Double quotes keep any path one word; `$` means nothing there."""
        quoted = " ".join(f'"{word}"'.replace("%", "%%") for word in program)
        return _UNIT.format(
            description=f"Beaker Sessions: the {self.description}", command=quoted, options=self.options
        )

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


SERVER = Service("beaker-server", "server", ("serve",), _server_answers, _SERVER)
EXECUTOR = Service("beaker-executor", "executor", (), _executor_answers, _EXECUTOR)


def _configure(_report: Report) -> str:
    host.ETC.mkdir(mode=0o755, parents=True, exist_ok=True)
    shutil.copyfile(EXAMPLE, SETTINGS)
    SETTINGS.chmod(0o644)
    return f"written to {SETTINGS}"


settings = Step("settings", lambda: not SETTINGS.exists(), _configure)
