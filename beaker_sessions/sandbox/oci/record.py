"""What the driver writes down about each sandbox, and what that says about the sandbox now.

Owns: `sandbox.json` in a sandbox's directory, written before anything is made and again when it has been made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from .. import Found, Status
from .processes import Process

FILE = "sandbox.json"
KILLED = 137  # 128 + SIGKILL
LOST = "conmon, which held the streams of this session, was killed, and the session could not go on without it"


@dataclass(frozen=True)
class Record:
    """boot: of the machine when it was made. runtime: its program, which alone can `exec` in it.

    network: the name of its namespace, "" for this machine's own. project: of its layer's quota, 0 for none.

    conmon and init: once they run; before that the sandbox is being made, or was when its executor was killed.
    """

    id: str
    labels: Mapping[str, str]
    tty: bool
    cgroup: str
    network: str = ""
    boot: str = ""
    project: int = 0
    runtime: str = ""
    conmon: Process = field(default=Process(0, 0))
    init: Process = field(default=Process(0, 0))

    def save(self, directory: Path) -> None:
        temporary = directory / f"{FILE}.{os.urandom(4).hex()}"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(directory / FILE)

    @property
    def made(self) -> bool:
        return self.conmon.pid > 0

    def found(self, directory: Path, *, waiting: bool, oom: bool) -> Found:
        """What there is now. Without conmon nothing holds the streams and the exit code: that counts as killed."""
        alive = self.conmon.alive()
        code = _number(directory / "exit")  # looked for after conmon, which writes it before it ends
        why = ""
        if code is None and not alive:
            code, why = KILLED, LOST
        started = _time(directory / "started")
        if code is not None:
            finished = _time(directory / "exit") or datetime.now(UTC)
            return Found(self.id, self.labels, Status.EXITED, 0, code, oom, started, finished, why)
        if waiting:
            return Found(self.id, self.labels, Status.CREATED)
        return Found(self.id, self.labels, Status.RUNNING, self.init.pid, None, oom, started)


def load(directory: Path) -> Record | None:
    """None when the executor was killed before it wrote the file. After a reboot, none of its processes is alive."""
    try:
        data = json.loads((directory / FILE).read_text())
    except FileNotFoundError:
        return None
    same = data["boot"] == boot()
    processes = {name: Process(data[name]["pid"], data[name]["started"] if same else 0) for name in ("conmon", "init")}
    data.pop("ports", None)  # of an earlier version's
    return Record(**data | processes)


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _time(path: Path) -> datetime | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:
        return None
