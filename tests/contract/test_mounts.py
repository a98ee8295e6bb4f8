"""Mounts of the machine, as sandboxes see them: what comes and goes below /net while a session runs."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import SECONDS, Maker, Stream, pinned
from .test_confinement import MAJOR, OPEN

# Runs each line that it is given, and says when it is done.
ANSWER = 'while read -r line; do eval "$line" 2>&1; echo ==; done'


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", *words], check=True)


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Path]:
    """A shared mount, as systemd makes all of them, with one below it."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    net = tmp_path / "net"
    net.mkdir()
    mount("tmpfs", net)
    subprocess.run(["mount", "--make-shared", net], check=True)
    for name in ("early", "late"):
        (net / name).mkdir()
    mount("tmpfs", net / "early")
    (net / "early/file").touch()
    yield net
    subprocess.run(["umount", "--recursive", "--lazy", net], check=True)


def ask(stream: Stream, line: str) -> str:
    """What a line prints in a sandbox that runs ANSWER."""
    before = len(stream.out)
    stream.write(line.encode() + b"\n")
    deadline = time.monotonic() + SECONDS
    while not stream.out[before:].endswith(b"==\n"):
        assert time.monotonic() < deadline
        stream._take(os.read(stream.terminal.fd, 1 << 16))
    return stream.out[before:-3].decode()


def test_mounts_come_and_go_while_it_runs(make: Maker, net: Path) -> None:
    with pinned(net, "/net") as pin:
        stream = make.start(make.spec("sh", "-c", ANSWER, mounts=(pin,)))
    assert ask(stream, "ls /net /net/early") == "/net:\nearly\nlate\n\n/net/early:\nfile\n"

    mount("tmpfs", net / "late")
    (net / "late/file").write_text("new\n")
    assert ask(stream, "cat /net/late/file") == "new\n"
    for name in ("late", "early"):  # one that it began with, too: it is not pinned by the sandbox
        subprocess.run(["umount", net / name], check=True)
    assert ask(stream, "ls /net/early /net/late") == "/net/early:\n\n/net/late:\n"
    assert ask(stream, "grep -c ' /net' /proc/self/mountinfo") == "1\n"


def test_nothing_mounted_inside_reaches_the_machine(make: Maker, net: Path) -> None:
    """A sandbox's own mounts of it are copies: removing them leaves the machine's alone."""
    with pinned(net, "/net") as pin:
        spec = make.spec("sh", "-c", ANSWER, mounts=(pin,))
        stream = make.start(spec)
    assert ask(stream, "ls /net/early") == "file\n"
    make.lab.sandboxes.remove(spec.id)
    assert [path.name for path in (net / "early").iterdir()] == ["file"]
    assert (net / "early").is_mount()


def test_a_mount_that_came_later_gives_no_rights(make: Maker, net: Path) -> None:
    """It comes with the machine's flags; still no set-uid program of it makes root, and no device of it opens."""
    with pinned(net, "/net") as pin:
        stream = make.start(make.spec("sh", "-c", ANSWER, image="debian", mounts=(pin,)))
    mount("-o", "suid,dev", "tmpfs", net / "late")
    os.mknod(net / "late/gpu", stat.S_IFCHR | 0o666, os.makedev(MAJOR, 0))
    (net / "late/gpu").chmod(0o666)
    (net / "late/cat").write_bytes(Path("/bin/cat").read_bytes())  # the image is of the machine's own release
    (net / "late/cat").chmod(0o6755)
    (net / "late/open.py").write_text(OPEN)
    status = dict(line.split(":\t", 1) for line in ask(stream, "/net/late/cat /proc/self/status").splitlines())
    assert (status["Uid"].split(), status["Gid"].split()) == (["1500"] * 4, ["1500"] * 4)
    assert status["CapEff"] == "0" * 16
    assert ask(stream, "python3 /net/late/open.py /net/late/gpu") == "EPERM\n"


def test_a_private_source_is_mounted_as_it_is(make: Maker, net: Path) -> None:
    """Where mounts are not shared there is nothing to follow, and that is no error."""
    subprocess.run(["mount", "--make-rprivate", net], check=True)
    with pinned(net, "/net") as pin:
        stream = make.start(make.spec("sh", "-c", ANSWER, mounts=(pin,)))
    assert ask(stream, "ls /net/early") == "file\n"
    mount("tmpfs", net / "late")
    (net / "late/file").touch()
    assert ask(stream, "ls /net/late") == ""
