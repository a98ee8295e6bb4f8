"""The oci driver when something is killed: what runs goes on, what was interrupted leaves nothing."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.sandbox import Status
from beaker_sessions.sandbox.oci import mounts
from beaker_sessions.sandbox.oci.processes import Process, mentioning
from tests.stack import wait_for

from .conftest import ADA, SECONDS, Maker, OciLab, pinned

# An executor that makes, starts and removes sessions until it is killed.
EXECUTOR = """
import itertools, json, sys
from pathlib import Path
from beaker_sessions.model import Identity, Pull
from beaker_sessions.sandbox import Spec
from beaker_sessions.sandbox.oci.driver import OciSandboxes
state, owner, bridge, etc = sys.argv[1:]
sandboxes = OciSandboxes(Path(state), owner, bridge=bridge, etc=Path(etc))
image = sandboxes.image("alpine:test", Pull.NEVER, print)
print("ready", flush=True)
for number in itertools.count():
    spec = Spec(f"KILLED{number}", {}, image, Identity("ada", 1500, 1500, "/", {}), ("sleep", "1000"))
    sandboxes.create(spec)
    sandboxes.start(spec.id, (24, 80))
    sandboxes.remove(spec.id)
"""


@pytest.fixture
def make(oci_lab: OciLab) -> Iterator[Maker]:
    maker = Maker(oci_lab)
    yield maker
    maker.close()


def left_behind(lab: OciLab) -> dict[str, list[str]]:
    """What there is of sessions that are not listed."""
    driver = lab.sandboxes
    listed = {found.id for found in driver.list()}
    mounted = Path("/proc/self/mountinfo").read_text().splitlines()
    networks = [path.name for path in driver.network.directory.iterdir() if path.suffix != ".ready"]
    ready = [path.stem for path in driver.network.directory.glob("*.ready")]
    return {
        "directories": [d.name for d in (lab.state / "sessions").iterdir() if d.name not in listed],
        "runtime": [d.name for d in (lab.state / "runtime").iterdir() if d.name not in listed],
        "roots": [d.name for d in driver.roots.iterdir() if d.name not in listed],
        "mounts": [line for line in mounted if f" {lab.state}/" in line or f" {driver.roots}/" in line],
        "cgroups": sorted(driver.cgroups.children(driver.cgroup) - listed),
        "processes": [str(process.pid) for process in mentioning(lab.state / "sessions")],
        "networks": [name for name in networks if name not in ready],
    }


def test_executor_killed_at_any_moment_leaves_nothing(oci_lab: OciLab, tmp_path: Path) -> None:
    oci_lab.image("alpine")
    for number in range(16):
        command = [sys.executable, "-c", EXECUTOR, str(oci_lab.state), oci_lab.owner, oci_lab.bridge, str(oci_lab.etc)]
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        with process:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n", (tmp_path / "log").read_text()
            time.sleep(0.007 * number)
            process.kill()
        again = oci_lab.again()
        for found in again.list():  # whole, hence adopted; its ledger would say what becomes of it
            assert found.id.startswith("KILLED")
            again.remove(found.id)
        deadline = time.monotonic() + SECONDS
        while any(left := left_behind(oci_lab).values()) and time.monotonic() < deadline:
            time.sleep(0.1)  # a namespace that is just being made ready
        assert not any(left), (number, left_behind(oci_lab))


def test_without_its_conmon_a_session_has_ended(make: Maker) -> None:
    spec = make.spec("sleep", "1000", tty=True)
    make.start(spec)
    pid = make.wait(spec.id, Status.RUNNING).pid
    holder = json.loads((make.lab.state / "sessions" / spec.id / "sandbox.json").read_text())["conmon"]["pid"]
    os.kill(holder, signal.SIGKILL)
    assert make.exit_code(spec.id) == 128 + 9
    assert Process.of(pid).wait(10)
    assert "conmon" in make.lab.sandboxes.list()[0].why


def test_another_runtime_that_was_installed_since_changes_nothing_for_what_runs(make: Maker) -> None:
    spec = make.spec("sleep", "1000")
    make.start(spec)
    again = make.lab.again()
    again.runtime = replace(again.runtime, path="/bin/false")
    handle, terminal = again.exec(
        spec.id, ("sh", "-c", "exit 4"), env={}, identity=ADA, workdir="/", size=None, stdin=False
    )  # fmt: skip
    make.stream(terminal).read()
    assert again.exec_exit(spec.id, handle) == 4


def test_a_runtime_that_was_removed_is_named(make: Maker, oci_lab: OciLab, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = "/usr/sbin/removed-runtime"
    monkeypatch.setattr(oci_lab.sandboxes, "runtime", replace(oci_lab.sandboxes.runtime, path=gone))
    with pytest.raises(Error) as error:
        oci_lab.sandboxes.create(make.spec("true"))
    assert (error.value.code, error.value.message) == ("unavailable", f"{gone} is not there any more")
    assert any(f.level == "error" and gone in f.what for f in oci_lab.sandboxes.check())
    wait_for("the clean-up", lambda: not any(left_behind(oci_lab).values()))  # an interface goes in the background


def test_conmon_left_stopped_is_woken(make: Maker) -> None:
    """An executor that was killed while somebody came back."""
    spec = make.spec("cat", tty=True)
    stream = make.start(spec)
    holder = json.loads((make.lab.state / "sessions" / spec.id / "sandbox.json").read_text())["conmon"]["pid"]
    os.kill(holder, signal.SIGSTOP)
    make.lab.again()
    stream.write(b"awake\n")
    stream.read(b"awake")


def test_an_end_while_the_executor_was_away_is_known(make: Maker) -> None:
    spec = make.spec("sh", "-c", "read x; exit 6")
    stream = make.start(spec)
    stream.write(b"\n")
    stream.read()
    again = make.lab.again()
    deadline = time.monotonic() + SECONDS
    while (found := next(f for f in again.list() if f.id == spec.id)).status is not Status.EXITED:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert found.exit_code == 6


@pytest.mark.usefixtures("oci_lab")
def test_what_is_mounted_in_a_directory_is_not_deleted_with_it(tmp_path: Path) -> None:
    """A home or a layer, had an unmount been missed."""
    precious, target = tmp_path / "precious", tmp_path / "trash/a/b"
    precious.mkdir()
    (precious / "file").write_text("kept")
    target.mkdir(parents=True)
    subprocess.run(["mount", "--bind", str(precious), str(target)], check=True)
    mounts.remove_tree(tmp_path / "trash")
    assert (precious / "file").read_text() == "kept"
    assert not (tmp_path / "trash").exists()


DYING = ("driver.py", "conmon.py")


def killed_at(step: int, act: Callable[[], None]) -> bool:
    """Do something in a process that is gone when it comes to that line of the driver's. False when there are fewer."""
    child = os.fork()
    if child == 0:
        left = itertools.count(step, -1)

        def trace(frame: FrameType, event: str, _argument: object) -> Any:
            if os.path.basename(frame.f_code.co_filename) not in DYING:
                return None
            if event == "line" and next(left) == 0:
                os._exit(9)
            return trace

        sys.settrace(trace)
        try:
            act()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def test_a_command_runs_once_wherever_its_start_was_killed(oci_lab: OciLab, tmp_path: Path) -> None:
    maker, sandboxes, killed = Maker(oci_lab), oci_lab.sandboxes, True
    tmp_path.chmod(0o755)
    for step in itertools.count():
        home = tmp_path / str(step)
        home.mkdir()
        os.chown(home, ADA.uid, ADA.gid)
        with pinned(home, "/home/ada") as mount:
            spec = maker.spec("sh", "-c", "echo ran >> /home/ada/ran; exec sleep 1000", mounts=(mount,), stdin=False)
            sandboxes.create(spec)
            killed = killed_at(step, partial(sandboxes.start, spec.id, None))
            deadline = time.monotonic() + SECONDS
            while not (home / "ran").exists():  # as the next executor does, which may look at any moment
                assert time.monotonic() < deadline
                found = sandboxes.find(spec.id)
                if found and found.status is Status.CREATED:
                    with suppress(Error):  # it is just noticing that nobody waits for it any more
                        sandboxes.start(spec.id, None)
                elif found and found.status is Status.EXITED:
                    assert found.started is None
                    sandboxes.remove(spec.id)
                    sandboxes.create(spec)
        assert [found.status for found in sandboxes.list() if found.id == spec.id] == [Status.RUNNING]
        sandboxes.remove(spec.id)
        assert (home / "ran").read_text() == "ran\n", step
        if not killed:
            break
    assert step > 10
    maker.close()


def test_a_disk_without_room_for_the_first_directory_is_named(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    spec = make.spec("true")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(Error) as error:
            make.lab.sandboxes.create(spec)
    assert error.value.code == "storage_full"
