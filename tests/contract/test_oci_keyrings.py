"""Keyrings of the kernel: a session has none of its own, as its user may have 200, and cannot use the common one."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.sandbox.oci import programs, userns

from .conftest import ADA, Maker, OciLab


@pytest.fixture
def make(oci_lab: OciLab) -> Iterator[Maker]:
    maker = Maker(oci_lab)
    yield maker
    maker.close()


def keys(uid: int) -> int:
    """How many keys count as a user's. Source: proc(5), /proc/key-users."""
    users = (line.split() for line in Path("/proc/key-users").read_text().splitlines())
    return next((int(line[3].split("/")[0]) for line in users if int(line[0].rstrip(":")) == uid), 0)


@pytest.mark.parametrize("runtime", programs.RUNTIMES)
def test_no_session_has_a_keyring_of_its_own(
    make: Maker, oci_lab: OciLab, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its main process nor another, with every runtime that works here."""
    driver = oci_lab.sandboxes
    if not (path := shutil.which(runtime)):
        pytest.skip(f"needs {runtime}")
    monkeypatch.setattr(driver, "runtime", replace(driver.runtime, path=path))
    root = userns.outside(userns.maps(ADA, userns.subordinate(ADA, oci_lab.etc, *driver.ids))[0], 0)
    before = keys(ADA.uid), keys(root)
    spec = make.spec("sleep", "1000", stdin=False)
    try:
        make.start(spec)
    except Error as error:
        pytest.skip(f"{runtime} cannot run here: {error.message}")
    make.stream(driver.exec(spec.id, ("sleep", "1000"), env={}, identity=ADA, workdir="/", size=None, stdin=False)[1])
    assert len(driver.execs(spec.id)) == 1
    assert (keys(ADA.uid), keys(root)) == before


def test_the_keyring_in_common_can_neither_be_read_nor_filled() -> None:
    """Even by root of the machine, had no filter of system calls been in the way."""
    describe = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); "
    describe += "libc.syscall(*map(ctypes.c_long, (keyring.NUMBERS[platform.machine()], 6, -3, 0, 0)))"
    script = f"import platform; from beaker_sessions.sandbox.oci import keyring; keyring.join(); {describe}; "
    script += "print(ctypes.get_errno())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) in (errno.EACCES, errno.ENOSYS, errno.EPERM)
