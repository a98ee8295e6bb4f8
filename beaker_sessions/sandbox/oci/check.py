"""What `executor doctor` says about running containers ourselves. Tries rather than asks for versions where it can."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ...errors import Error
from .. import LOW_DISK, Finding, free, subordinate, vulnerabilities
from ..docker.check import is_static
from . import apparmor, taken, trial, userns
from .cgroups import Cgroups

PACKAGES = {
    "conmon": "conmon",
    "skopeo": "skopeo",
    "ip": "iproute2",
    "iptables": "iptables",
    "nft": "nftables",
    "unshare": "util-linux",
}
CONMON = (2, 1, 6)  # the oldest that this was written for
INSTANCES, ENOUGH = Path("/proc/sys/fs/inotify/max_user_instances"), 1024  # the kernel's default is 128
ACTIONS = Path("/proc/sys/kernel/seccomp/actions_avail")


def check(
    state: Path,
    scratch: Path,
    runtime: str,
    cgroups: Cgroups,
    init: str,
    busybox: str,
    images: Path | None = None,
    ids: tuple[int, int] = (userns.FIRST, userns.LAST),
) -> list[Finding]:
    """scratch: a directory for what is tried, on the file system of state. images: where they are. ids: from which
    accounts get ranges.

    Any error among the findings means that no session can run.
    """
    return [
        *_programs(),
        _conmon(),
        *(_static(program) for program in (init, busybox)),
        *_kernel(),
        *_cgroups(cgroups),
        _trial(state, scratch, runtime, cgroups, busybox),
        *_images(state, images, runtime, cgroups, busybox),
        *([vulnerabilities.finding(Path(runtime).name, _version(runtime))] if Path(runtime).exists() else []),
        *([vulnerabilities.finding("conmon", _version("conmon"))] if shutil.which("conmon") else []),
        *_subordinate(ids),
        _forwarding(),
    ]


def _programs() -> Iterator[Finding]:
    for program, package in PACKAGES.items():
        if not shutil.which(program):
            yield Finding("error", f"{program} is missing", f"apt-get install {package}")


def _conmon() -> Finding:
    version = _numbers(_version("conmon"))
    what = f"conmon {'.'.join(map(str, version))}"
    return Finding("ok" if version >= CONMON else "error", what, "" if version >= CONMON else "apt-get install conmon")


def _static(program: str) -> Finding:
    if is_static(Path(program).read_bytes()):
        return Finding("ok", f"{program} is static")
    mend = "make session"
    return Finding("error", f"{program} is not static, so that it cannot start in any image", mend)


def _kernel() -> Iterator[Finding]:
    most = Path("/proc/sys/user/max_user_namespaces")
    if not most.exists() or int(most.read_text()) == 0:
        yield Finding("error", "this kernel makes no user namespaces", "sysctl -w user.max_user_namespaces=65536")
    if not ACTIONS.exists() or "errno" not in ACTIONS.read_text().split():
        yield Finding("error", "this kernel does not filter system calls", "use a kernel with CONFIG_SECCOMP_FILTER")
    if (have := int(INSTANCES.read_text())) < ENOUGH:
        what = f"{have} inotify instances are for root and all sessions together, so that one can use them up"
        yield Finding("warning", what, f"sysctl -w fs.inotify.max_user_instances={8 * ENOUGH}")
    yield apparmor.finding()


def _trial(state: Path, scratch: Path, runtime: str, cgroups: Cgroups, busybox: str) -> Finding:
    """Starts what a session would be."""
    name = Path(runtime).name
    try:
        trial.run(runtime, busybox, cgroups, scratch)
    except OSError as error:
        what = f"no idmapped layers on {state}: {error.strerror}; sessions of this driver will not start"
        return Finding("error", what, "use Linux 5.19 or newer and ext4, XFS or Btrfs, or set driver: docker")
    except Error as error:
        mend = f"install {'crun' if name == 'runc' else 'runc'} in its place and restart the executor"
        return Finding("error", f"{name} cannot start a container here: {error.message}", mend)
    release = os.uname().release
    return Finding("ok", f"{name} starts containers on Linux {release}, on idmapped layers on {state}")


def _images(state: Path, images: Path | None, runtime: str, cgroups: Cgroups, busybox: str) -> Iterator[Finding]:
    """Whether layers on another disk than the state can be used, and whether there is room for more."""
    if not images or not images.is_dir():
        return
    if images.stat().st_dev != state.stat().st_dev:
        yield _trial(images, images, runtime, cgroups, busybox)
    if why := free.lacks(images, LOW_DISK):
        yield Finding("warning", f"{why.partition(',')[0]}, for images", "beaker executor images prune")


def _cgroups(cgroups: Cgroups) -> Iterator[Finding]:
    if not cgroups.hierarchies:
        yield Finding("error", "no cgroups are mounted", "systemctl daemon-reexec")
        return
    if missing := {"cpu", "memory", "pids"} - cgroups.controllers():
        mend = "boot without cgroup_disable, or with cgroup_enable=memory"
        yield Finding("error", f"cgroups {cgroups.name} cannot limit {', '.join(sorted(missing))}", mend)
    elif not cgroups.swap:
        yield Finding("warning", f"cgroups {cgroups.name}, without limits on swap", "boot with swapaccount=1")
    else:
        yield Finding("ok", f"cgroups {cgroups.name}: CPU, memory, swap and pids are limited")


def _subordinate(ids: tuple[int, int]) -> Iterator[Finding]:
    """Whether each account's range is its own, in both files. No error: all accounts but those can have sessions."""
    accounts = {entry.pw_uid: entry.pw_name for entry in pwd.getpwall()}
    bad = False
    for file in ("/etc/subuid", "/etc/subgid"):
        for what in userns.overlaps(subordinate.ranges(Path(file)), accounts):
            bad = True
            yield Finding("warning", f"{file}: {what}, so that they get no session", f"edit {file}")
    have = {one for file in ("subuid", "subgid") for one in subordinate.ranges(subordinate.ETC / file)}
    for what, mend in taken.problems(subordinate.ETC, ids, sorted(have)):
        bad = True
        yield Finding("warning", what, mend)
    if not bad:
        names = {name for name, _, _ in subordinate.ranges(Path("/etc/subuid"))}
        count = "1 account has" if len(names) == 1 else f"{len(names)} accounts have"
        yield Finding("ok", f"{count} subordinate ids of their own; others get them when they come")


def _forwarding() -> Finding:
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1":
        return Finding("ok", "packets are forwarded")
    return Finding("warning", "packets are not forwarded yet", "sysctl -w net.ipv4.ip_forward=1")


def _version(program: str) -> str:
    try:
        return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""


def _numbers(text: str) -> tuple[int, ...]:
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in match.groups()) if match else ()
