"""`make test`: everything, then whether it left anything running or mounted.

What the tests start carries their mark in its environment, children included, and keeps its files below one directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import host, installed

_MARK = "BEAKER_TEST_RUN"


def run(arguments: list[str]) -> int:
    """Run pytest with these arguments: its exit status, or 1 when it passed but left something behind."""
    with _checkout() as (checkout, directory):
        environment = {**os.environ, _MARK: str(directory), "TMPDIR": str(directory)}
        # What is tested is an installed copy, as `make session` would install it.
        environment["BEAKER_TEST_BIN"] = str(installed.install(lambda _: None, directory / "opt", checkout) / "bin")
        command = [".venv/bin/python", "-m", "pytest", f"--basetemp={directory}/pytest", *arguments]
        before = _networks()
        status = subprocess.run(command, cwd=checkout, env=environment).returncode
        mark = f"{_MARK}={directory}"
        left = _left(str(directory), mark)
        networks = sorted(_networks() - before)
        if networks and _processes(mark, "pytest"):
            print(f"another run of tests goes on, whose may be: {', '.join(networks)}", file=sys.stderr)
        else:
            left += networks
        for line in left:
            print(f"left behind: {line}", file=sys.stderr)
    return status or int(bool(left))


def bench(arguments: list[str]) -> int:
    """Run the comparison with docker: its exit status. Its table goes to the checkout, as its owner's."""
    with _checkout() as (checkout, _):
        status = subprocess.run([".venv/bin/python", "-m", "bench", *arguments], cwd=checkout).returncode
        table = Path("bench/README.md")
        if status == 0 and checkout != host.ROOT:
            shutil.copyfile(checkout / table, host.ROOT / table)
            os.chown(host.ROOT / table, host.owner().pw_uid, host.owner().pw_gid)
    return status


@contextlib.contextmanager
def _checkout() -> Iterator[tuple[Path, Path]]:
    """A checkout with an environment for tests, and a directory for their files, removed unless a mount is left."""
    directory = Path(tempfile.mkdtemp(prefix="bt-"))  # short: a unix socket's path has at most 107 bytes
    directory.chmod(0o755)  # for the Unix users that tests make
    try:
        checkout = host.ROOT if _open_to_all(host.ROOT) else _copy(directory / "checkout")
        if status := subprocess.run([sys.executable, "-B", "-m", "setup", "develop"], cwd=checkout).returncode:
            raise SystemExit(status)  # it has said why
        yield checkout, directory
    finally:
        if not _mounts(str(directory)):
            shutil.rmtree(directory)


def _open_to_all(checkout: Path) -> bool:
    """Whether root may write there as its owner, and the Unix users that tests make may run the command from there."""
    return checkout.stat().st_uid == 0 and all(
        path.stat().st_mode & 0o005 == 0o005 for path in (checkout, *checkout.parents)
    )


def _copy(target: Path) -> Path:
    """Root's own copy of the checkout, uncommitted changes included."""
    git = ["git", "-c", f"safe.directory={host.ROOT}", "-C", str(host.ROOT)]
    listing = subprocess.run([*git, "ls-files", "-z", "-co", "--exclude-standard"], capture_output=True, check=True)
    for name in filter(None, listing.stdout.decode().split("\0")):
        source = host.ROOT / name
        if source.is_file():  # else deleted, and not committed yet
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def _left(directory: str, mark: str, seconds: float = 5) -> list[str]:
    """Processes and mounts of that run, after those that are just ending have had their time."""
    end = time.monotonic() + seconds
    while found := [*_processes(mark), *_mounts(directory)]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return found


def _processes(mark: str, other: str = "") -> list[str]:
    """Those that carry the mark, or, with a program's name, those that run it and do not."""
    found = []
    for process in [Path("/proc", name) for name in os.listdir("/proc") if name.isdigit()]:
        try:
            marked = mark.encode() in (process / "environ").read_bytes().split(b"\0")
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended meanwhile
        if (other in words and not marked) if other else marked:
            found.append(f"process {process.name}: {words.strip()}")
    return found


def _mounts(directory: str) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [f"mount {mount}" for mount in (line.split()[4] for line in lines) if mount.startswith(f"{directory}/")]


def _networks() -> set[str]:
    """Bridges, and network namespaces that a mount keeps, wherever it is."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    # proc(5): … mount point … - type …: a namespace is a file of the file system nsfs
    kept = [line.split()[4] for line in lines if line.partition(" - ")[2].startswith("nsfs ")]
    bridges = [path.parent.name for path in Path("/sys/class/net").glob("*/bridge")]
    return {f"namespace {mount}" for mount in kept} | {f"bridge {bridge}" for bridge in bridges}
