"""What the driver writes down about each sandbox, and what that says about the sandbox now.

Owns: `sandbox.json` in a sandbox's directory, written before anything is made and again when it has been made, with a
checksum. One that cannot be read is written anew from what runs, and from `config.json`, where the labels are too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import Found, Status
from .cgroups import Cgroups
from .processes import Process

FILE, SUM = "sandbox.json", "sum"
ENDED = Process(1, 0)  # of a sandbox of which nothing runs any more
KILLED = 137  # 128 + SIGKILL
# What a damaged disk or directory answers. Anything else passes, such as too many open files, and says nothing.
DAMAGED = (errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.EBADMSG, errno.EUCLEAN)
log = logging.getLogger(__name__)
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
        data = asdict(self)
        temporary.write_text(json.dumps(data | {SUM: _sum(data)}))
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


class Records:
    """cgroup: the parent of the sandboxes' own. networks: the directory of their namespaces' files.

    parents: also that of an earlier version's, right below the root, where the sandboxes that it began still are.
    """

    def __init__(self, cgroups: Cgroups, cgroup: str, networks: Path) -> None:
        self.cgroups, self.networks = cgroups, networks
        self.parents = tuple(dict.fromkeys((cgroup, "/" + cgroup.rpartition("/")[2])))

    def load(self, directory: Path) -> Record | None:
        """As the function, and of a damaged file what can be found out otherwise.

        Raises OSError when that cannot be known at this moment: that nothing runs would be the wrong answer.
        """
        try:
            return load(directory)
        except ValueError as error:
            found = self._found_out(directory)
            what = "what it said is known from what runs" if found else "nothing of it has run"
            log.error("%s is damaged (%s); %s", directory / FILE, error, what)
        with contextlib.suppress(OSError):  # on a full disk it stays as it is
            if (directory / FILE).is_dir():
                (directory / FILE).rename(directory / f"{FILE}.damaged")
            if found:
                found.save(directory)
        return found

    def _found_out(self, directory: Path) -> Record | None:
        groups = [f"{parent}/{directory.name}" for parent in self.parents]
        config = configuration(directory)
        main = config.get("process")
        tty = bool(main.get("terminal")) if isinstance(main, dict) else False
        labels = config.get("annotations")
        one = Record(
            directory.name, dict(labels) if isinstance(labels, dict) else {}, tty, groups[0], boot=boot(), conmon=ENDED
        )
        for cgroup, pid in [(group, pid) for group in groups for pid in self.cgroups.processes(group)]:
            facts = _status(pid)
            if facts.get("NSpid", "").split()[1:] == ["1"]:  # the first process of the sandbox; its parent is conmon
                network = self._network(pid)
                init, parent = Process.of(pid), int(facts.get("PPid", "0"))
                conmon = Process.of(parent) if _status(parent).get("Name", "").strip() == "conmon" else ENDED
                seen = {"init": init, "conmon": conmon, "network": network, "cgroup": cgroup}
                return Record(**one.__dict__ | seen)
        return one if (directory / "started").exists() else None

    def _network(self, pid: int) -> str:
        """The name of the network namespace that a process is in, "" for one that is none of ours."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended just now
            own = os.stat(f"/proc/{pid}/ns/net").st_ino
            for path in self.networks.iterdir():
                if path.stat().st_ino == own:
                    return path.name
        return ""


def load(directory: Path) -> Record | None:
    """None when the executor was killed before it wrote the file. After a reboot, none of its processes is alive.

    Raises ValueError for a damaged one, OSError for one that cannot be read at this moment.
    """
    try:
        data = json.loads((directory / FILE).read_bytes())
        if data.get(SUM) not in (None, _sum({key: value for key, value in data.items() if key != SUM})):
            raise ValueError("its checksum is another")
        same = data["boot"] == boot()
        processes = {
            name: Process(int(data[name]["pid"]), int(data[name]["started"]) if same else 0)
            for name in ("conmon", "init")
        }
        for name in (SUM, "ports"):  # the latter of an earlier version's
            data.pop(name, None)
        return Record(**data | processes)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in DAMAGED:
            raise
        raise ValueError(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def configuration(directory: Path) -> dict[str, Any]:
    """A sandbox's `config.json`, nothing where it is damaged. Raises OSError as `load`."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        try:
            found = json.loads((directory / "config.json").read_bytes())
        except OSError as error:
            if error.errno in DAMAGED:
                return {}
            raise
        return found if isinstance(found, dict) else {}
    return {}


def _sum(data: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(line.split(":", 1) for line in lines if ":" in line)


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _time(path: Path) -> datetime | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:
        return None
