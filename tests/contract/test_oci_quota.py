"""The cap on what a sandbox writes, on a file system with project quotas that the test makes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.model import Identity
from beaker_sessions.sandbox.oci import layer

from .conftest import Maker, OciLab

LIMIT = 20 << 20
ROOT = Identity("root", 0, 0, "/root", {0: "root"})


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    disk, mounted = tmp_path / "disk", tmp_path / "mounted"
    mounted.mkdir()
    tmp_path.chmod(0o711)
    with disk.open("wb") as file:
        file.truncate(600 << 20)
    format = ["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota", str(disk)]
    if subprocess.run(format, capture_output=True).returncode:
        pytest.skip("needs mkfs.ext4 with project quotas")
    if subprocess.run(["mount", "-o", "loop,prjquota", disk, mounted], capture_output=True).returncode:
        pytest.skip("needs a kernel with project quotas for ext4 (CONFIG_QFMT_V2)")
    lab = None
    try:
        mounted.chmod(0o711)
        lab = OciLab(mounted, None)
        maker = Maker(lab)
        yield maker
        maker.close()
    finally:
        if lab:
            lab.close()
        subprocess.run(["umount", "--lazy", mounted], check=True)


def test_a_sandbox_writes_no_more_than_it_may_and_others_do(make: Maker) -> None:
    fill = ("sh", "-c", "head -c 40000000 /dev/zero >/tmp/file; echo $?; cat")
    full, other = make.spec(*fill, disk=LIMIT), make.spec(*fill)
    assert b"0\n" not in make.start(full).read(b"\n")
    assert make.start(other).read(b"\n") == b"0\n"
    assert 0.9 * LIMIT < (make.lab.sandboxes.disk(full.id) or 0) <= LIMIT
    assert (make.lab.sandboxes.disk(other.id) or 0) >= 40_000_000


def test_root_inside_cannot_leave_the_project(make: Maker) -> None:
    spec = make.spec("sleep", "1000", image="alpine", disk=LIMIT)
    make.start(spec)
    assert isinstance(make.lab, OciLab)
    upper = make.lab.state / "sessions" / spec.id / "upper"
    number = next(sandbox.project for _, sandbox in make.lab.sandboxes._sandboxes())
    _, terminal = make.lab.sandboxes.exec(
        spec.id, ("sh", "-c", "mkdir /var/free; chattr -p 0 /var/free; chattr -P /var/free"), env={}, identity=ROOT,
        workdir="/", size=None, stdin=False,
    )  # fmt: skip
    make.stream(terminal).read()
    listing = subprocess.run(["lsattr", "-dp", upper / "var/free"], capture_output=True, text=True, check=True).stdout
    assert listing.split()[0] == str(number)
    assert "P" in listing.split()[1]


def test_nothing_is_left_of_a_limit(make: Maker) -> None:
    spec = make.spec("true", disk=LIMIT)
    make.start(spec).read()
    assert isinstance(make.lab, OciLab)
    number = next(sandbox.project for _, sandbox in make.lab.sandboxes._sandboxes())
    make.lab.sandboxes.remove(spec.id)
    state = make.lab.state
    assert layer._quotactl(state, layer.Q_GETQUOTA, number)[:8] == bytes(8)
