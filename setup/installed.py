"""What root runs, and everybody's `beaker`: `/opt/beaker-sessions/VERSION`, which root alone writes.

The checkout is read once, when its owner runs `make` with sudo. What was read is hashed, named and written, so a
change of the checkout meanwhile or later changes nothing here. `current` is a link to the version in use, switched in
one step. Each version is whole: `package/` (ours), `lib/` (the environment of the lock file), `bin/`.
"""

from __future__ import annotations

import compileall
import fcntl
import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import daemon, host
from .environment import launcher, program
from .steps import Failed, Report, Step, command

BASE = Path("/opt/beaker-sessions")
CURRENT = BASE / "current"
PACKAGE = CURRENT / "package"
PYTHON = CURRENT / "bin/python"
SYSTEM = (0, 65534)  # whom services, and forwarders of ports, run as
_LOCK = "requirements.txt"
_STAMP = ".environment"


def current() -> str:
    """The version that is installed, "" for none."""
    try:
        return os.readlink(CURRENT)
    except OSError:
        return ""


def sources(checkout: Path) -> dict[str, bytes]:
    """All that is installed, and what says how: relative path and content. Links are not followed."""
    found = [
        path
        for path in (checkout / "beaker_sessions").rglob("*")
        if not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(checkout).parts)
    ]
    texts = {}
    for path in sorted([*found, checkout / _LOCK, checkout / "setup/installed.py", checkout / "setup/environment.py"]):
        if stat.S_ISREG(path.lstat().st_mode):
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                texts[str(path.relative_to(checkout))] = file.read()
    return texts


def version(files: dict[str, bytes]) -> str:
    """The package's version and a digest, which changes with anything that is installed, and with the interpreter."""
    number = re.search(rb'^__version__ = "([^"]+)"', files["beaker_sessions/__init__.py"], re.MULTILINE)
    assert number
    digest = hashlib.sha256(_python())
    for name, content in files.items():
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
    return f"{number[1].decode()}-{digest.hexdigest()[:12]}"


def install(report: Report, base: Path = BASE, checkout: Path = host.ROOT) -> Path:
    """Install this checkout's version unless it is there, and make it the current one: its directory. Raises Failed."""
    files = sources(checkout)
    place = base / version(files)
    with _locked(base):
        if not place.exists():
            part = base / f".{place.name}"
            _remove(part)  # of an installation that was interrupted
            try:
                _build(part, place, files, report)
                os.sync()  # lest a power cut leave a version of empty files
                part.rename(place)
            finally:
                _remove(part)
        link = base / ".current"
        link.unlink(missing_ok=True)
        link.symlink_to(place.name)
        link.replace(base / CURRENT.name)
    return place


def clean_up(base: Path = BASE) -> None:
    """Remove the versions that nothing runs from, but the current one."""
    with _locked(base):
        used = os.readlink(base / CURRENT.name)
        for place in base.iterdir():
            if place.is_dir() and not place.is_symlink() and place.name != used and not _in_use(place):
                _remove(place)


def _build(part: Path, place: Path, files: dict[str, bytes], report: Report) -> None:
    """part: where it is made. place: where it will be."""
    key = hashlib.sha256(_python() + files[_LOCK]).hexdigest()
    part.mkdir(mode=0o755)
    former = [one.parent for one in place.parent.glob(f"[!.]*/{_STAMP}") if one.read_text() == key]
    if former:
        _copy_environment(former[0], part)
    else:
        _make_environment(part, files[_LOCK], report)
    (packages,) = (part / "lib").glob("python3*/site-packages")
    host.write(packages / "beaker_sessions.pth", f"{os.path.relpath(part / 'package', packages)}\n")
    for name, content in files.items():
        if name.startswith("beaker_sessions/"):
            _write(part / "package" / name, content)
    report("compiling")
    compileall.compile_dir(part / "package", quiet=2, ddir=str(place / "package"))
    for name, text in {
        "beaker": launcher(str(place / "package"), sys.executable),
        "beaker-server": program(place / "bin/python", "beaker_sessions.server.main"),
        "beaker-executor": program(place / "bin/python", "beaker_sessions.executor.main"),
    }.items():
        host.write(part / "bin" / name, text, 0o755)
    host.write(part / _STAMP, key)  # last: from here on another version may take its environment


def _make_environment(part: Path, lock: bytes, report: Report) -> None:
    """Of the lock file, by a pip of its own as root; wheels that root's pip has already are not fetched again."""
    report("creating an environment")
    environment = daemon.environment()
    command([sys.executable, "-I", "-m", "venv", str(part)], report, cwd="/", env=environment)
    _write(part / _LOCK, lock)
    pip = [str(part / "bin/python"), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
    pip += ["--require-hashes", "--no-deps", "-r", str(part / _LOCK)]
    command(pip, report, cwd="/", env=environment)
    for script in (part / "bin").iterdir():  # they name the place where they were made
        if not script.name.startswith("python"):
            script.unlink()


def _copy_environment(former: Path, part: Path) -> None:
    """The same files under another name: nothing writes to them."""
    for name in ("lib", "bin"):
        ignored = shutil.ignore_patterns("beaker*")
        shutil.copytree(former / name, part / name, symlinks=True, copy_function=os.link, ignore=ignored)
    for name in ("pyvenv.cfg", _LOCK):
        os.link(former / name, part / name)
    for link in former.iterdir():
        if link.is_symlink():
            (part / link.name).symlink_to(os.readlink(link))


def _in_use(place: Path) -> bool:
    """Whether a process runs from a directory: names it in its command line, or has it or a file of it open or mapped.

    Users' programs, whose memory is not looked at (`commands`), keep the directory of their package open for this.
    """
    from beaker_sessions.sandbox import commands  # here: it is what is set up, though this needs the library alone

    path = str(place).encode()
    for process in Path("/proc").glob("[0-9]*"):
        if any(path in commands.read(int(process.name), SYSTEM, name) for name in ("cmdline", "maps")):
            return True
        with suppress(OSError):  # it has ended meanwhile
            for fd in (process / "fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    if path in os.readlink(fd).encode():
                        return True
    return False


@contextmanager
def _locked(base: Path) -> Iterator[None]:
    """Nobody else installs or removes meanwhile. Raises Failed where others than root could write."""
    base.mkdir(mode=0o755, parents=True, exist_ok=True)
    for path, now in ((base, base.lstat()), (base.parent, base.parent.stat())):
        shared = now.st_mode & 0o022 and not (path != base and now.st_mode & stat.S_ISVTX)
        if not stat.S_ISDIR(now.st_mode) or now.st_uid != 0 or shared:
            raise Failed(f"{path} is not a directory that root alone writes: chown root {path}; chmod go-w {path}")
    # Root's alone to open: who can read it can hold it.
    with open(os.open(base / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _python() -> bytes:
    return f"{sys.executable} {sys.version_info[:2]}".encode()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _do(report: Report) -> str:
    return str(install(report))


step = Step("server, executor and command", lambda: current() != version(sources(host.ROOT)), _do)
