"""`make test`: everything, then whether it left anything running or mounted.

What the tests start carries their mark in its environment, children included, and keeps its files below one directory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import host

_MARK = "BEAKER_TEST_RUN"


def run(arguments: list[str]) -> int:
    """Run pytest with these arguments: its exit status, or 1 when it passed but left something behind."""
    directory = tempfile.mkdtemp(prefix="bt-")  # short: a unix socket's path has at most 107 bytes
    os.chmod(directory, 0o711)  # for the Unix users that tests make
    mark = f"{_MARK}={directory}"
    environment = {**os.environ, _MARK: directory, "TMPDIR": directory}
    # This is root, and the checkout its owner's: nothing is written there.
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_STORAGE_DIRECTORY": f"{directory}/hypothesis"}
    options = ["-p", "no:cacheprovider", f"--basetemp={directory}/pytest"]
    command = [str(host.VENV / "bin/python"), "-m", "pytest", *options, *arguments]
    status = subprocess.run(command, cwd=host.ROOT, env=environment).returncode
    left = _left(directory, mark)
    for line in left:
        print(f"left behind: {line}", file=sys.stderr)
    if not any(line.startswith("mount") for line in left):
        shutil.rmtree(directory)
    return status or int(bool(left))


def bench(arguments: list[str]) -> int:
    """Run the comparison with docker: its exit status. Its table is the checkout's owner's."""
    command = [str(host.VENV / "bin/python"), "-B", "-m", "bench", *arguments]
    status = subprocess.run(command, cwd=host.ROOT).returncode
    table = host.ROOT / "bench/README.md"
    if table.exists():
        os.chown(table, host.owner().pw_uid, host.owner().pw_gid)
    return status


def _left(directory: str, mark: str, seconds: float = 5) -> list[str]:
    """Processes and mounts of that run, after those that are just ending have had their time."""
    end = time.monotonic() + seconds
    while found := [*_processes(mark), *_mounts(directory)]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return found


def _processes(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"process {process.name}: {words.strip()}")
        except OSError:
            continue  # it has ended meanwhile
    return found


def _mounts(directory: str) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [f"mount {mount}" for mount in (line.split()[4] for line in lines) if mount.startswith(f"{directory}/")]
