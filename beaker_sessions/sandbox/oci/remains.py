"""Sandboxes coming to an end, orderly or not: their processes, and everything that was made for them.

Owns: the order in which a sandbox is unmade, and what a new instance of the driver removes because no sandbox needs it.
It finds all by `sandbox.json` and by names; nothing is remembered.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import threading
import time
from pathlib import Path

from ...errors import Error
from .. import delegated
from . import layer, mounts
from .cgroups import Cgroups
from .network import Network
from .processes import Process, mentioning
from .record import Record, Records

GONE = 10.0  # seconds in which what was killed must end

log = logging.getLogger(__name__)


class Remains:
    """state: of the driver. roots: where root file systems are mounted. cgroup: the parent of the sandboxes' own."""

    def __init__(
        self, state: Path, roots: Path, cgroups: Cgroups, cgroup: str, network: Network, records: Records
    ) -> None:
        self.state, self.roots, self.cgroups, self.cgroup, self.network = state, roots, cgroups, cgroup, network
        self.records = records

    def kill(self, sandbox: Record, directory: Path) -> None:
        """End all that runs in a sandbox, and its conmon. Raises Error unavailable when something does not end."""
        sandbox.init.kill()
        if not sandbox.conmon.wait(GONE):
            sandbox.conmon.kill()
        deadline = time.monotonic() + GONE
        # Without pids in the record its executor was killed while this was made, and conmon may still be at it.
        while left := [
            *map(Process.of, self.cgroups.processes(sandbox.cgroup)),
            *([] if sandbox.made else mentioning(directory)),
        ]:
            for process in left:
                process.kill()
            if time.monotonic() > deadline:
                what = f"its process {left[0].pid} was killed, and is still there"
                raise Error("unavailable", what, "restart the machine")
            time.sleep(0.001)

    def remove(self, id: str) -> None:
        """As `Sandboxes.remove`. Its files are deleted in the background."""
        directory = self.state / "sessions" / id
        if not directory.exists():
            return
        if sandbox := self.records.load(directory):
            self.kill(sandbox, directory)
            self.cgroups.remove(sandbox.cgroup)
            if sandbox.network:
                self.network.drop(sandbox.network)
            if sandbox.project:
                layer.lift(self.state, sandbox.project)
        self._forget(id)
        mounts.remove_tree(self.state / "runtime" / id)
        directory.rename(self.state / "trash" / secrets.token_hex(8))
        threading.Thread(target=self._empty, name="trash", daemon=True).start()

    def adopt(self) -> None:
        """Remove what was interrupted and what belongs to no sandbox."""
        known, used = set(), set()
        for directory in (self.state / "sessions").iterdir():
            sandbox = self.records.load(directory)
            if not sandbox or not sandbox.made:
                self.remove(directory.name)
                continue
            sandbox.conmon.kill(signal.SIGCONT)  # in case its executor was killed while it was stopped
            known.add(sandbox.id)
            used.add(sandbox.network)
        for parent in self.records.parents:
            for name in self.cgroups.children(parent) - known:
                self.kill(Record(name, {}, False, f"{parent}/{name}"), self.state / "sessions" / name)
                self.cgroups.remove(f"{parent}/{name}")
        if delegated.base():  # where an earlier version had them
            self.cgroups.remove("/" + self.cgroup.rpartition("/")[2])
        for path in (self.state / "runtime").iterdir():
            if path.name not in known:
                mounts.remove_tree(path)
        for root in self.roots.iterdir():
            mounts.unmount(root)
            if root.name not in known:
                self._forget(root.name)
        self.network.adopt(used)
        self.network.warm()
        self._empty()

    def close(self) -> None:
        """As `OciSandboxes.close`."""
        self.network.close()
        self.cgroups.remove(self.cgroup)
        for path in (*self.roots.iterdir(), self.roots, self.network.directory, self.roots.parent):
            mounts.unmount(path)
            path.rmdir()

    def _forget(self, id: str) -> None:
        """The root of a sandbox of an earlier version (0.x), whose runtime goes to this directory to `exec`."""
        with contextlib.suppress(FileNotFoundError):
            (self.roots / id).rmdir()

    def _empty(self) -> None:
        for path in (self.state / "trash").iterdir():
            try:
                mounts.remove_tree(path)
            except OSError as error:
                log.error("%s could not be deleted: %s", path, error)
