"""What root runs: installed once, read once, and nobody else's to change. Needs root."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from beaker_sessions import trust
from setup import everyone, host, installed, steps

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, whose files are compared with others'")
ADA = 4_000_001  # a uid that nobody has
PROGRAMS = ("beaker_sessions.executor.main", "beaker_sessions.server.main")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory like /opt: every directory on the way to it is root's. A space is in its path."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="beaker install-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def checkout(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that belongs to Ada, in a home that nobody else may enter."""
    checkout = place / "home/check out"
    for name in installed.sources(host.ROOT):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(host.ROOT / name, checkout / name)
    for path in (place / "home", *(place / "home").rglob("*")):
        os.chown(path, ADA, ADA)
    (place / "home").chmod(0o700)
    monkeypatch.setattr(host, "ROOT", checkout)
    return checkout


@pytest.fixture
def install(place: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Installs that checkout below `opt`, with an environment that shows the packages of this one."""
    (packages,) = (Path(sys.prefix) / "lib").glob("python3*/site-packages")

    def environment(part: Path, lock: bytes, _report: steps.Report) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", part], check=True)
        (target,) = (part / "lib").glob("python3*/site-packages")
        (target / "these.pth").write_text(f"{packages}\n")
        (part / "requirements.txt").write_bytes(lock)

    monkeypatch.setattr(installed, "_make_environment", environment)
    monkeypatch.setattr(os, "sync", lambda: None)  # it would wait for all that others write

    return lambda: installed.install(lambda _: None, place / "opt", checkout)


def executor(programs: Path) -> str:
    """What an executor says that root starts, with settings that are none."""
    done = subprocess.run([programs / "beaker-executor", "--config", "/dev/zero/x"], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_a_change_of_the_checkout_does_not_reach_root(install: Callable[[], Path], checkout: Path, place: Path) -> None:
    install()
    programs = place / "opt/current/bin"
    assert "cannot read the settings" in executor(programs)
    (checkout / "beaker_sessions/executor/main.py").write_text("print('as root:', __import__('os').geteuid())")
    assert "cannot read the settings" in executor(programs)
    shutil.move(checkout / "beaker_sessions", checkout / "away")
    assert "cannot read the settings" in executor(programs)
    assert subprocess.run([programs / "beaker", "--version"], capture_output=True).returncode == 0
    assert list(trust.of([str(place / "opt")], [])) == [], "all of it is root's, and nobody else writes it"


def test_each_change_is_another_version_and_what_is_in_use_stays(
    install: Callable[[], Path], checkout: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = install()
    assert install() == first
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(str(place / "door"))
        door.listen()
        door.settimeout(20)
        environment = {**os.environ, "BEAKER_SOCKET": str(place / "door")}
        command = [place / "opt/current/bin/beaker", "executor", "doctor"]
        user = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        waiting, _ = door.accept()  # it waits for an answer, which does not come
        try:
            (checkout / "beaker_sessions/cli/extra.py").touch()
            monkeypatch.setattr(installed, "_make_environment", None)  # nothing is fetched again
            second = install()
            assert second != first
            assert (place / "opt/current").resolve() == second
            installed.clean_up(place / "opt")
            assert first.exists(), "somebody runs it"
        finally:
            user.kill()
            user.wait()
            waiting.close()
    installed.clean_up(place / "opt")
    assert sorted(path.name for path in (place / "opt").iterdir()) == [".lock", second.name, "current"]
    assert "cannot read the settings" in executor(second / "bin"), "it needs nothing of the one before"


def test_an_interrupted_installation_is_begun_again(
    install: Callable[[], Path], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "sync", killed)
        with pytest.raises(KeyboardInterrupt):
            install()
    assert [path.name for path in (place / "opt").iterdir()] == [".lock"]
    name = installed.version(installed.sources(host.ROOT))
    (place / f"opt/.{name}/bin").mkdir(parents=True)  # of one that was killed
    assert "cannot read the settings" in executor(install() / "bin")


def test_it_is_not_installed_where_others_write(install: Callable[[], Path], place: Path) -> None:
    (place / "opt").mkdir()
    os.chown(place / "opt", ADA, ADA)
    with pytest.raises(steps.Failed, match="root alone writes"):
        install()


def test_links_in_a_checkout_are_not_followed(install: Callable[[], Path], checkout: Path) -> None:
    (checkout / "beaker_sessions/shadow.py").symlink_to("/etc/shadow")
    assert not (install() / "package/beaker_sessions/shadow.py").exists()


def run(package: Path, module: str) -> str:
    """What root is told that starts a program of a package."""
    start = f"import sys; sys.path.insert(0, {str(package)!r}); import {module} as m; sys.exit(m.main())"
    words = ["serve"] if "server" in module else []
    command = [sys.executable, "-P", "-c", start, "--config", "/dev/zero/x", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.parametrize("module", PROGRAMS)
def test_root_does_not_run_what_others_can_change(module: str, place: Path) -> None:
    package = place / "a/package"
    shutil.copytree(host.ROOT / "beaker_sessions", package / "beaker_sessions")
    file = package / "beaker_sessions/executor/plan.py"
    assert "cannot read the settings" in run(package, module)
    os.chown(file, ADA, ADA)
    assert f"{file} belongs to uid {ADA}" in run(package, module)
    if module != PROGRAMS[0]:
        return  # it is the same check
    os.chown(file, 0, 0)
    file.chmod(0o666)
    assert f"everybody can write {file}" in run(package, module)
    file.chmod(0o644)
    os.chown(place / "a", ADA, ADA)  # who could put another package in its place
    assert f"{place / 'a'} belongs to uid {ADA}" in run(package, module)
    os.chown(place / "a", 0, 0)
    package.rename(place / "real")
    package.symlink_to(place / "real")
    os.chown(package, ADA, ADA, follow_symlinks=False)
    assert f"{package} belongs to uid {ADA}" in run(package, module)
    assert "make session" in run(package, module)


def test_ways_that_others_can_turn(place: Path) -> None:
    shared, open_ = place / "shared", place / "shared/open"
    open_.mkdir(parents=True)
    shared.chmod(0o1777)
    assert list(trust.of([str(open_)], [])) == [], "nobody replaces root's directory in one like /tmp"
    assert list(trust.of([str(shared)], [])) == [f"everybody can write {shared}"], "but may put something into it"
    assert list(trust.of([], [str(shared / "missing")])) == [f"everybody can write {shared}"]
    assert list(trust.of([], [str(place / "missing")])) == []
    os.chown(open_, 0, ADA)
    open_.chmod(0o775)
    assert list(trust.of([str(open_)], [])) == [f"the group {ADA} can write {open_}"]
    open_.chmod(0o755)
    (open_ / "link").symlink_to(place / "elsewhere/file")
    (place / "elsewhere").mkdir()
    os.chown(place / "elsewhere", ADA, ADA)
    assert set(trust.of([str(open_)], [])) == {f"{place / 'elsewhere'} belongs to uid {ADA}"}
    (place / "loop").symlink_to(place / "loop")
    assert "loop of links" in next(trust.of([], [str(place / "loop")]))


def test_the_command_of_an_older_version_is_ours(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = place / "bin/beaker"
    monkeypatch.setattr(everyone, "PROGRAM", program)
    monkeypatch.setattr(everyone, "_FORMER", place / "lib/beaker")
    assert everyone._missing()
    program.parent.mkdir()
    program.write_text(f"#!/usr/bin/python3 -IS\nimport sys\nsys.path.insert(0, '{place}/lib/beaker')\n")
    assert everyone._missing(), "that of an older version"
    everyone._install(lambda _: None)
    assert os.readlink(program) == "/opt/beaker-sessions/current/bin/beaker"
    assert not everyone._missing()
    assert everyone.remove() == [program]
    program.write_text("#!/bin/sh\n")
    assert not everyone._missing(), "somebody else's is left alone"
    assert everyone.remove() == []
    assert program.exists()
