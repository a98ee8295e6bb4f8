"""Control groups: which kind this machine has, and what the kernel says about a sandbox's.

Owns: reading and removing what the runtime made, on cgroup v1, hybrid and v2 alike, and the limit on the processes of
all sandboxes together. Each one's limits are set by the runtime (`config.py`). Sources: the kernel's
`admin-guide/cgroup-v1` and `cgroup-v2.rst`.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOST = 10000  # the greatest weight
SPARED = 0.05  # of the machine's CPUs, for everybody else when sessions have claimed all
SHARES = 1024  # of version 1: what the weight 100 is of version 2


@dataclass(frozen=True)
class Cgroups:
    """hierarchies: mount points by controller names (`memory`, `cpu,cpuacct`, …); "" is version 2."""

    hierarchies: dict[str, Path]

    @property
    def unified(self) -> bool:
        """Whether version 2 has the controllers; on a hybrid machine it has none."""
        return set(self.hierarchies) == {""}

    @property
    def swap(self) -> bool:
        """Whether swap can be limited together with memory."""
        if self.unified:
            return Path("/proc/swaps").exists()
        return (self._controller("memory") / "memory.memsw.limit_in_bytes").exists()

    @property
    def name(self) -> str:
        return "version 2" if self.unified else "version 1, hybrid" if "" in self.hierarchies else "version 1"

    def controllers(self) -> set[str]:
        """What can be limited: `cpu`, `memory`, `pids` and more."""
        if self.unified:
            return set((self.hierarchies[""] / "cgroup.controllers").read_text().split())
        return {name for names in self.hierarchies for name in names.split(",")}

    def oom(self, cgroup: str) -> bool:
        """Whether the kernel has killed some process of the group for memory."""
        file = "memory.events" if self.unified else "memory.oom_control"
        try:
            text = (self._controller("memory") / cgroup.lstrip("/") / file).read_text()
        except (OSError, KeyError):
            return False
        return any(line.startswith("oom_kill ") and line.split()[1] != "0" for line in text.splitlines())

    def processes(self, cgroup: str) -> set[int]:
        """All that run in the group, of any hierarchy. Raises OSError when that cannot be read at this moment."""
        pids: set[int] = set()
        for directory in self._directories(cgroup):
            try:
                pids |= {int(pid) for pid in (directory / "cgroup.procs").read_text().split()}
            except OSError as error:
                _gone(error)
        return pids

    def limit_pids(self, cgroup: str, most: int) -> bool:
        """Make a group that has at most so many processes and threads, with all below it: whether that can be."""
        try:
            root = self._controller("pids")
            directory = root / cgroup.lstrip("/")
            directory.mkdir(parents=True, exist_ok=True)
            if self.unified:
                for above in reversed(directory.relative_to(root).parents):
                    (root / above / "cgroup.subtree_control").write_text("+pids")
            (directory / "pids.max").write_text(str(most))
        except (OSError, StopIteration):
            return False
        return True

    def weigh(self, cgroup: str, weight: int) -> bool:
        """Give a group this weight for the CPU, of 1 to 10000 where 100 is the usual one: whether that can be."""
        try:
            directory = self._controller("cpu") / cgroup.lstrip("/")
            directory.mkdir(parents=True, exist_ok=True)  # the runtime makes it with the first sandbox
            if self.unified:
                (directory.parent / "cgroup.subtree_control").write_text("+cpu")
                (directory / "cpu.weight").write_text(str(weight))
            else:
                (directory / "cpu.shares").write_text(str(weight * SHARES // 100))
        except (OSError, StopIteration):
            return False
        return True

    def weights(self) -> dict[str, int]:
        """Of the groups right below the root, by name."""
        root, file = self._controller("cpu"), "cpu.weight" if self.unified else "cpu.shares"
        found = {}
        for path in root.glob(f"*/{file}"):
            with contextlib.suppress(OSError, ValueError):  # removed just now
                number = int(path.read_text())
                found[path.parent.name] = number if self.unified else number * 100 // SHARES
        return found

    def remove(self, cgroup: str) -> bool:
        """Remove the group everywhere; False while something runs in it."""
        gone = True
        for directory in self._directories(cgroup):
            try:
                directory.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                gone = False
        return gone

    def children(self, cgroup: str) -> set[str]:
        """The names of the groups right below one, in any hierarchy."""
        names: set[str] = set()
        for root in self.hierarchies.values():
            with contextlib.suppress(FileNotFoundError):
                names |= {entry.name for entry in os.scandir(root / cgroup.lstrip("/")) if entry.is_dir()}
        return names

    def _directories(self, cgroup: str) -> Iterator[Path]:
        """Innermost first."""
        for root in self.hierarchies.values():
            for path, _, _ in os.walk(root / cgroup.lstrip("/"), topdown=False, onerror=_gone):
                yield Path(path)

    def _controller(self, name: str) -> Path:
        if self.unified:
            return self.hierarchies[""]
        return next(path for names, path in self.hierarchies.items() if name in names.split(","))


def _gone(error: OSError) -> None:
    """Raise it, unless a group was removed just now, or has threads alone, whose processes the one above it has."""
    if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
        raise error


def room() -> int:
    """How many processes and threads sandboxes may have together: an eighth of the machine's stays for all else.

    Source: proc_sys_kernel(5), pid_max and threads-max.
    """
    most = min(int(Path("/proc/sys/kernel", name).read_text()) for name in ("pid_max", "threads-max"))
    return most - most // 8


def guarantee(cpus: float, machine: float, others: int) -> int:
    """The weight of all sessions that have claimed so many CPUs of the machine's, whoever else is busy.

    others: the weights of everybody else beside them, together. Never less than the usual weight, and never all of the
    machine, or nobody could log in to it.
    """
    rest = max(machine - cpus, machine * SPARED)
    return max(100, min(MOST, math.ceil(others * cpus / rest)))


def detect() -> Cgroups:
    """As mounted (proc_pid_mountinfo(5)). A hierarchy that is mounted twice counts once."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ")
        if kind == "cgroup2":
            found.setdefault("", Path(before.split()[4]))
        elif kind == "cgroup":
            names = [o for o in options.split(",") if o not in ("rw", "ro", "xattr", "clone_children", "noprefix")]
            found.setdefault(",".join(names), Path(before.split()[4]))
    return Cgroups(found)
