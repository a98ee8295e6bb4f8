"""What set-up asks of this driver when no executor runs: `python -m beaker_sessions.sandbox.oci.command VERB …`.

Owns no judgement and no clean-up: they are the doctor's and the driver's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ...errors import Error
from .. import Finding
from ..busybox import BUSYBOX
from . import cgroups, record
from .check import check
from .driver import OciSandboxes
from .processes import mentioning
from .programs import INITS, RUNTIMES, find


def problem(directory: Path) -> Finding | None:
    """What keeps the driver from running with its state on the file system of directory, None for nothing."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="probe-") as name:
        try:
            found = check(directory, Path(name), find(RUNTIMES), cgroups.detect(), find(INITS), BUSYBOX)
        except Error as error:
            return Finding("error", error.message, error.hint)
        return next((finding for finding in found if finding.level == "error"), None)


def count(state: Path) -> int:
    """How many sandboxes of that state are alive."""
    alive = 0
    for directory in (state / "sessions").iterdir():
        try:
            sandbox = record.load(directory)
            alive += sandbox is not None and sandbox.conmon.alive()
        except ValueError:  # its record is damaged: whoever runs, has a conmon
            alive += bool(mentioning(directory))
    return alive


def remove(state: Path, owner: str, bridge: str) -> None:
    """End all sandboxes and take back what the driver made outside of its state."""
    sandboxes = OciSandboxes(state, owner, bridge=bridge)
    for found in sandboxes.list():
        sandboxes.remove(found.id)
        print(found.id)
    sandboxes.close()
    sandboxes.cgroups.remove(sandboxes.cgroup)


def main(verb: str, *arguments: str) -> int:
    match verb:
        case "probe":
            found = problem(Path(arguments[0]))
            print(found.what if found else "")
            return int(found is not None)
        case "count":
            print(count(Path(arguments[0])))
        case "remove":
            remove(Path(arguments[0]), *arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
