"""The cgroups that systemd has handed over to us, where it runs: those of a unit that no restart of the executor
touches.

Owns: which they are, and the group HOLDERS in them, for processes that belong to sessions and run outside of them:
conmon, forwarders. systemd ends what is in a unit's own group together with the unit. Without systemd there is none,
and nothing to move. Sources: systemd's CGROUP_DELEGATION.md, the kernel's `cgroup-v2.rst`.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess
from contextlib import suppress
from pathlib import Path

from ..errors import Error

MOUNTED = Path("/sys/fs/cgroup")  # where systemd has all hierarchies
OWN = Path("/proc/self/cgroup")
UNIT = "beaker.slice/beaker-cgroup.service"
EXECUTOR = "/beaker-executor.service"  # the end of the group that systemd starts an executor in
HOLDERS = "holders"

log = logging.getLogger(__name__)


def base() -> str:
    """The group below which sessions' groups are, "" for the root of each hierarchy."""
    return f"/{UNIT}" if _units() else ""


def hold(pid: int) -> None:
    """Move a process out of the executor's group, if systemd would end it there."""
    for file in holders():
        try:
            file.write_text(str(pid))
        except ProcessLookupError:  # it has ended already
            pass
        except OSError as error:
            log.warning("process %d stays in the executor's cgroup: %s: %s", pid, file, error.strerror)


@functools.cache
def holders() -> tuple[Path, ...]:
    """The files that take the pids of HOLDERS, one in each hierarchy."""
    files = []
    for unit in _units():
        (unit / HOLDERS).mkdir(exist_ok=True)
        files.append(unit / HOLDERS / "cgroup.procs")
    return tuple(files)


def weigh(weight: int) -> None:
    """Give all of ours together this weight for the CPU beside `system.slice` and `user.slice`; systemd's is to set.

    Raises Error unavailable.
    """
    command = ["systemctl", "set-property", "--runtime", UNIT.partition("/")[0], f"CPUWeight={weight}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30, check=False)
    if done.returncode:
        raise Error("unavailable", f"the sessions' CPUs are no guarantee: {done.stderr.strip()}", " ".join(command))


def take_over() -> None:
    """Move what earlier executors of this unit left in its group: of versions that moved nothing, or interrupted."""
    for line in OWN.read_text().splitlines():
        number, names, path = line.split(":", 2)
        if not path.endswith(EXECUTOR) or (number != "0" and names != "name=systemd"):
            continue
        for place in ("", "unified" if number == "0" else "systemd"):
            for group in {path, f"/system.slice{EXECUTOR}"}:  # the second of an earlier version's unit
                with suppress(OSError):
                    pids = (MOUNTED / place / group[1:] / "cgroup.procs").read_text().split()
                    for pid in sorted({int(pid) for pid in pids} - {os.getpid()}):
                        hold(pid)


def _units() -> list[Path]:
    places = [MOUNTED, *(path for path in MOUNTED.glob("*/") if not path.is_symlink())]
    return [place / UNIT for place in places if (place / UNIT).is_dir()]
