"""The AppArmor profile of the oci driver's sandboxes, where the kernel has AppArmor: `tests/guest.sh` has it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.sandbox import Status
from beaker_sessions.sandbox.oci import apparmor

from .conftest import ADA, CALL, ROOT, Inside, Maker, OciLab
from .test_debugging import DEBUG

CONFINED = f"{apparmor.NAME} (enforce)\n"


@pytest.fixture
def make(oci_lab: OciLab) -> Iterator[Maker]:
    maker = Maker(oci_lab)
    yield maker
    maker.close()


@pytest.fixture
def inside(make: Maker, tmp_path: Path) -> Inside:
    if not apparmor.enabled():
        pytest.skip("needs a kernel with AppArmor")
    return Inside(make, tmp_path / "home")


def test_whatever_runs_in_a_session_is_confined(inside: Inside, make: Maker) -> None:
    pid = make.wait(inside.spec.id, Status.RUNNING).pid
    assert Path(f"/proc/{pid}/attr/current").read_text() == CONFINED
    look = ("cat", "/proc/self/attr/current")
    assert inside.run(*look, identity=ADA) == inside.run(*look, identity=ROOT) == (0, CONFINED)
    assert inside.run("sudo", "-n", *look, identity=ADA) == (0, CONFINED)


def test_the_kernels_files_are_shut_and_the_sessions_own_are_not(inside: Inside) -> None:
    seen = inside.python(
        """
import os
for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/kernel/mm/ksm/run"):
    attempt(path, open, path, "w")
attempt("security", os.listdir, "/sys/kernel/security/apparmor")
call("mount", b"none", b"/mnt", b"tmpfs", 0, None)
attempt("/proc/self/oom_score_adj", lambda: os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"900"))
attempt("/etc/new", lambda: open("/etc/new", "w").write("new"))
attempt("unconfined", lambda: os.write(os.open("/proc/self/attr/current", os.O_WRONLY), b"changeprofile unconfined"))
""",
    )
    assert (seen.pop("/proc/self/oom_score_adj"), seen.pop("/etc/new")) == ("ok", "ok")
    assert set(seen.values()) <= {"EACCES", "EPERM", "EROFS", "ENOENT"}, seen


def test_root_inside_installs_debugs_and_signals(inside: Inside) -> None:
    script = "useradd -m bob && dpkg --configure -a && sudo -n -u bob id -un"
    assert inside.run("sudo", "-n", "sh", "-c", script, identity=ADA) == (0, "bob\n")
    code, out = inside.run("sh", "-c", "sleep 1000 > /dev/null 2>&1 & echo $!", identity=ADA)
    pid = out.strip()
    code, out = inside.run("sudo", "-n", "python3", "-c", CALL + DEBUG, pid, identity=ADA)
    assert (code, {line.rpartition(" ")[2] for line in out.splitlines()}) == (0, {"ok"}), out
    assert inside.run("sudo", "-n", "kill", pid, identity=ADA) == (0, "")


def test_a_profile_that_somebody_removed_is_loaded_again(inside: Inside, make: Maker) -> None:
    make.lab.sandboxes.remove(inside.spec.id)
    subprocess.run([apparmor.PARSER, "--remove"], input=apparmor.PROFILE, text=True, check=True)
    assert not apparmor._loaded()
    code, out, _ = make.run("cat", "/proc/self/attr/current", image="debian")
    assert (code, out.decode()) == (0, CONFINED)
