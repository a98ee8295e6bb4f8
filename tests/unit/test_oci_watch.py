"""Waiting for the ends of sandboxes, with real processes for their conmons."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT = """
import os, subprocess, sys
from pathlib import Path
from beaker_sessions.sandbox.oci import inotify, record, watch
from beaker_sessions.sandbox.oci.processes import Process

Path("/proc/sys/user/max_inotify_instances").write_text("0")
try:
    inotify.Renames()
    sys.exit("there are instances")
except OSError:
    pass
conmon = subprocess.Popen(["sleep", "1000"])
try:
    one = record.Record("one", {}, False, "", conmon=Process.of(conmon.pid))
    directory = Path(sys.argv[1])
    before = len(os.listdir("/proc/self/fd"))
    watched = watch.Watch(lambda: iter([(directory, one)]))
    ids = iter(watched)
    watched.tell("told")
    assert next(ids) == "told"
    conmon.kill()
    assert next(ids) == "one"
    watched.close()
    assert len(os.listdir("/proc/self/fd")) == before
finally:
    conmon.kill()
"""


def test_ends_are_seen_when_the_machine_has_no_inotify_instance_left(tmp_path: Path) -> None:
    """The kernel charges those of sessions to root, whose 128 they can use up."""
    (tmp_path / "log").touch()
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", WITHOUT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
