"""Paths of a user's choice, and images whose links lead them astray: nothing outside is written by root for anybody."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.sandbox import Status

from .conftest import ADA, Maker, pinned

BEN_UID = 1600


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory of ben's in which ada may not write."""
    path = tmp_path / "net"
    path.mkdir(mode=0o755)
    os.chown(path, BEN_UID, BEN_UID)
    return path


def attempt(make: Maker, shared: Path, home: Path, **more: object) -> bytes:
    """Run `pwd` with home and a shared directory mounted; what it printed, b"" when it was refused."""
    home.mkdir(exist_ok=True)
    os.chown(home, ADA.uid, ADA.gid)
    extra = more.pop("mounts", ())
    with (
        pinned(home, "/home/ada") as own,
        pinned(shared, "/net") as net,
        contextlib.suppress(Error),
    ):
        spec = make.spec("pwd", mounts=(own, net, *extra), stdin=False, **more)  # type: ignore[misc]
        stream = make.start(spec)
        stream.read()
        make.wait(spec.id, Status.EXITED)
        return stream.out
    return b""


@pytest.mark.parametrize("below", ["/net", "/home/ada"])
def test_a_working_directory_is_not_made_in_what_is_mounted(
    make: Maker, shared: Path, tmp_path: Path, below: str
) -> None:
    attempt(make, shared, tmp_path / "home", workdir=f"{below}/planted/deep")
    assert list(shared.iterdir()) == []
    for path in (tmp_path / "home").iterdir():
        assert path.stat().st_uid != 0


@pytest.mark.parametrize("link", ["to-net", "to-home", "to-outside"])
def test_a_mount_point_is_not_made_in_what_is_mounted(make: Maker, shared: Path, tmp_path: Path, link: str) -> None:
    """A file such as a secret's, at a path that a link of the image turns to other people's files."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with pinned(secret, f"/{link}/planted/deep", read_only=True) as mount:
        attempt(make, shared, tmp_path / "home", image="links", mounts=(mount,))
    assert list(shared.iterdir()) == []
    assert list((tmp_path / "home").iterdir()) == []
    assert not Path("/planted").exists()


def test_a_working_directory_that_is_not_there_is_told(make: Maker) -> None:
    code, out, err = make.run("pwd", workdir="/no such\n*dir")
    assert (code, out) == (126, b"")
    assert b"/no such\n*dir: there is no such directory" in err
    assert make.run("sh", "-c", "pwd; echo $OLDPWD", workdir="/etc")[1] == b"/etc\n\n"


def test_working_directories_by_descriptor_lead_nowhere(make: Maker) -> None:
    """CVE-2024-21626: a runtime that leaks a descriptor of this machine's files, by number or a link of the image."""
    running = make.spec("sleep", "1000", image="links", stdin=False)
    make.start(running)
    look = ("sh", "-c", "echo listing; ls ../../../../../../../../..")
    inside = {b"bin", b"fd3", b"to-net"}  # the root that the links are in
    paths = [f"{name}{number}" for number in range(3, 24) for name in ("/proc/self/fd/", "/fd")]
    for number, path in enumerate(paths):
        with contextlib.suppress(Error):  # refused by the runtime itself
            handle, terminal = make.lab.sandboxes.exec(
                running.id, look, env={}, identity=ADA, workdir=path, size=None, stdin=False
            )
            stream = make.stream(terminal)
            stream.read()
            make.lab.sandboxes.exec_exit(running.id, handle)
            assert b"listing" not in stream.out or inside <= set(stream.out.split()), (path, stream.out)
        if number % 7 == 0:
            _, out, _ = make.run(*look, image="links", workdir=path)
            assert b"listing" not in out or inside <= set(out.split()), (path, out)
