"""What this machine and its sessions use: a sample every STEP seconds, kept until the server has it.

Owns the reading of /proc, cgroups and NVML. What cannot be read is left out of a sample: unknown is never zero. Must
not change anything on the machine.

Formats: proc(5), https://docs.kernel.org/admin-guide/cgroup-v1/ (cpuacct, memory), .../cgroup-v2.html (cpu.stat,
memory.current, memory.stat).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import wire
from ..errors import Error
from ..model import State
from ..sandbox import Sandboxes
from .sessions import Sessions

STEP = 10.0  # seconds
KEPT = 360  # samples that wait for the server, an hour's
Sample = dict[str, Any]  # as `bodies.Sample`
log = logging.getLogger(__name__)


class Metrics:
    """`run` starts the thread that samples; `pending` and `sent` are for whoever reports.

    disk(id): bytes that a session holds on the disk, None when that is not known.
    """

    def __init__(
        self, sessions: Sessions, driver: Sandboxes, storage: str, disk: Callable[[str], int | None] = lambda _: None
    ) -> None:
        self.sessions, self.driver, self.storage, self.disk = sessions, driver, storage, disk
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._last: Sample = {}
        self._taken = 0.0
        self._pids: dict[str, int] = {}  # session -> its first process
        self._before: dict[str, tuple[float, float]] = {}  # "" for the machine, or session -> (when, CPU seconds)
        self._mounts = mounts(Path("/proc/self/mountinfo").read_text())
        self._gpus = Gpus(gpu.id for gpu in sessions.inventory.gpus)

    def run(self) -> None:
        threading.Thread(target=self._loop, name="metrics", daemon=True).start()

    def pending(self, limit: int) -> list[Sample]:
        """The oldest samples that the server does not have."""
        return list(self._samples)[:limit]

    def last(self) -> Sample:
        """The newest sample, {} when it is too old to say what is used now."""
        return self._last if time.monotonic() - self._taken < 3 * STEP else {}

    def sent(self, samples: list[Sample]) -> None:
        for sample in samples:
            with contextlib.suppress(ValueError):  # pushed out by newer ones meanwhile
                self._samples.remove(sample)

    def _loop(self) -> None:
        while True:
            try:
                self._last, self._taken = self.sample(), time.monotonic()
                self._samples.append(self._last)
            except Exception:
                log.exception("sampling failed")
            time.sleep(STEP - time.time() % STEP)

    def sample(self) -> Sample:
        running = {session.id for session in self.sessions.live() if session.state == State.STARTED}
        self._find(running)
        sessions = {id: used for id in sorted(running) if (used := self._session(id))}
        self._before = {key: value for key, value in self._before.items() if not key or key in running}
        return {
            "at": wire.time(datetime.now(UTC)),
            "node": self._node(),
            "gpus": self._gpus.read(),
            "sessions": sessions,
        }

    def _find(self, running: set[str]) -> None:
        """The processes of sessions that are new. Asking the engine is dear, so only then."""
        self._pids = {id: pid for id, pid in self._pids.items() if id in running and os.path.exists(f"/proc/{pid}")}
        if running - self._pids.keys():
            with contextlib.suppress(Error):
                self._pids |= {found.id: found.pid for found in self.driver.list() if found.pid and found.id in running}

    def _node(self) -> Sample:
        used: Sample = {}
        with contextlib.suppress(OSError, ValueError):
            self._rate(used, "", cpu_seconds(Path("/proc/stat").read_text(), os.sysconf("SC_CLK_TCK")))
        with contextlib.suppress(OSError, ValueError, KeyError):
            used["memory"] = memory_used(Path("/proc/meminfo").read_text())
        with contextlib.suppress(OSError):
            used["disk"] = shutil.disk_usage(self.storage).used
        return used

    def _session(self, id: str) -> Sample:
        used: Sample = {}
        try:
            places = cgroups(Path(f"/proc/{self._pids[id]}/cgroup").read_text(), self._mounts)
        except (OSError, KeyError):
            return used
        if (disk := self.disk(id)) is not None:
            used["disk"] = disk
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._rate(used, id, group_cpu(places))
        with contextlib.suppress(OSError, ValueError, KeyError):
            used["memory"] = group_memory(places)
        return used

    def _rate(self, used: Sample, key: str, seconds: float) -> None:
        """Cores used since the sample before; the first has none."""
        now = time.monotonic()
        before = self._before.get(key)
        self._before[key] = (now, seconds)
        if before and now > before[0] and seconds >= before[1]:
            used["cpu"] = round((seconds - before[1]) / (now - before[0]), 3)


class Gpus:
    """NVIDIA's GPUs by CDI name; others have no utilisation that we know of."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._names = {id: id.partition("=")[2] for id in ids if id.startswith("nvidia.com/gpu=")}
        self._handles: dict[str, Any] = {}
        if not self._names:
            return
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                self._handles[str(index)] = self._handles[str(pynvml.nvmlDeviceGetUUID(handle))] = handle

    def read(self) -> Sample:
        """GPU -> {use: percent, memory: bytes used, total: bytes}, without what the driver does not tell."""
        result: Sample = {}
        for id, name in self._names.items():
            if name in self._handles and (one := self._one(self._handles[name])):
                result[id] = one
        return result

    def _one(self, handle: Any) -> Sample:
        import pynvml

        one: Sample = {}
        with contextlib.suppress(pynvml.NVMLError):
            one["use"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        with contextlib.suppress(pynvml.NVMLError):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            one |= {"memory": int(memory.used), "total": int(memory.total)}
        return one


def cpu_seconds(stat: str, ticks: int) -> float:
    """CPU time that the whole machine has spent on work, from /proc/stat."""
    name, *fields = stat.partition("\n")[0].split()
    if name != "cpu":
        raise ValueError("no total in /proc/stat")
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + steal) / ticks


def memory_used(meminfo: str) -> int:
    """Bytes that could not be had without taking them from somebody, from /proc/meminfo."""
    fields = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in meminfo.splitlines())}
    return (fields["MemTotal"] - fields["MemAvailable"]) * 1024


def mounts(mountinfo: str) -> dict[str, str]:
    """Controller -> where its hierarchy is mounted, "" for version 2, from /proc/self/mountinfo."""
    found: dict[str, str] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2":
            found.setdefault("", before.split()[4])
        elif kind == "cgroup":
            for controller in options.split(","):
                found.setdefault(controller, before.split()[4])
    return found


def cgroups(text: str, mounted: Mapping[str, str]) -> dict[str, Path]:
    """Controller -> directory of the group, "" for version 2, from /proc/PID/cgroup."""
    found = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in mounted:
                found[controller] = Path(mounted[controller] + path)
    return found


def group_cpu(places: Mapping[str, Path]) -> float:
    """CPU seconds that a group has used. In a hybrid of both versions, its controllers are version 1's."""
    if "cpuacct" in places:
        return int((places["cpuacct"] / "cpuacct.usage").read_text()) / 1e9
    return _fields(places[""] / "cpu.stat")["usage_usec"] / 1e6


def group_memory(places: Mapping[str, Path]) -> int:
    """Bytes that a group uses, without the file cache that it could do without: as `docker stats` counts."""
    if "memory" in places:
        used = int((places["memory"] / "memory.usage_in_bytes").read_text())
        return max(0, used - _fields(places["memory"] / "memory.stat")["total_inactive_file"])
    used = int((places[""] / "memory.current").read_text())
    return max(0, used - _fields(places[""] / "memory.stat")["inactive_file"])


def _fields(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}
