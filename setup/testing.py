"""`make test`: everything, then whether it left anything behind.

What the tests start carries their mark in its environment, children included; what they make is below one directory, or
has its name. Hence other runs of tests, and sessions, may be on the same machine. Bridges and rules of the firewall are
in networks of the tests' own, which look at these themselves (`tests/network.py`).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import host, installed

MARK = "BEAKER_TEST_RUN"
WORKERS = 4 if len(os.sched_getaffinity(0)) <= 2 else 6  # tests wait more than they compute


def run(arguments: list[str]) -> int:
    """Run pytest with these arguments: its exit status, or 1 when it passed but left something behind."""
    with _checkout() as (checkout, directory):
        environment = {**os.environ, MARK: str(directory), "TMPDIR": str(directory)}
        # What is tested is an installed copy, as `make session` would install it.
        environment["BEAKER_TEST_BIN"] = str(installed.install(lambda _: None, directory / "opt", checkout) / "bin")
        command = [".venv/bin/python", "-m", "pytest", f"--basetemp={directory}/pytest", *arguments]
        images = None
        if all((checkout / argument).is_dir() for argument in arguments):  # else somebody looks at some tests
            command += ["-n", str(WORKERS), "--no-loadscope-reorder", "--max-worker-restart=0"]
            if any(not argument.startswith("tests/unit") for argument in arguments or ["tests"]):
                builder = [".venv/bin/python", "-m", "tests.images"]  # the first tests do not need all of them
                images = subprocess.Popen(builder, cwd=checkout, env=environment)
        status = subprocess.run(command, cwd=checkout, env=environment).returncode
        if images:
            images.wait()
        left = _left(str(directory))
        for line in left:
            print(f"left behind: {line}", file=sys.stderr)
        if left and not status:  # pytest has said last that all passed
            print(f"{len(left)} failed: nothing may be left behind", flush=True)
    return status or int(bool(left))


def soak(arguments: list[str]) -> int:
    """Run the fault campaign: its exit status, or 1 when it passed but left something behind."""
    with _checkout() as (checkout, directory):
        environment = {**os.environ, MARK: str(directory), "TMPDIR": str(directory)}
        command = [".venv/bin/python", "-m", "tests.soak", *arguments]
        status = subprocess.run(command, cwd=checkout, env=environment).returncode
        left = _left(str(directory))
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
        if not any(_mounts(str(directory))):
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


def _left(directory: str, seconds: float = 5) -> list[str]:
    """What there is of that run, after what is just ending has had its time."""
    end = time.monotonic() + seconds
    while found := [*_processes(f"{MARK}={directory}"), *_mounts(directory), *_groups(directory), *_users(directory)]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return found


def _processes(mark: str) -> Iterator[str]:
    for process in [Path("/proc", name) for name in os.listdir("/proc") if name.isdigit()]:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield f"process {process.name}: {words.strip()}"


def bridges(directory: str) -> str:
    """How the names of a run's bridges begin, of which all may have at most 10 bytes."""
    return f"b{directory[-4:]}"


def _mounts(directory: str) -> Iterator[str]:
    """Those below the directory, and those of its bridges' sessions: layers, and files that keep networks."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount = line.split()[4]
        if mount.startswith((f"{directory}/", f"/run/beaker/oci/{bridges(directory)}")):
            yield f"mount {mount}"


def _groups(directory: str) -> Iterator[str]:
    """Control groups: a driver's is named after its state, which is below the directory."""
    name = "beaker-" + re.sub(r"[^a-z0-9]+", "-", directory.lower()).strip("-")
    for path, inner, _ in os.walk("/sys/fs/cgroup"):
        yield from (f"control group {path}/{group}" for group in inner if group.startswith(name))


def _users(directory: str) -> Iterator[str]:
    return (f"user {entry.pw_name}" for entry in pwd.getpwall() if entry.pw_dir.startswith(f"{directory}/"))
