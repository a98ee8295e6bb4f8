"""What `executor doctor` says about running containers ourselves. Tries rather than asks for versions where it can."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import Finding
from ..cdi import Registry
from ..docker.check import is_static
from . import mounts, userns
from .cgroups import Cgroups

PACKAGES = {"conmon": "conmon", "skopeo": "skopeo", "ip": "iproute2", "iptables": "iptables", "unshare": "util-linux"}
CONMON = (2, 1, 6)  # the oldest that this was written for
FIXED = {"runc": (1, 1, 12), "crun": (1, 14, 3)}  # after CVE-2024-21626 and its like
ROOM = 10 << 30  # bytes of free disk below which images and sessions will soon be in trouble


def check(state: Path, runtime: str, cgroups: Cgroups, init: str, busybox: str, registry: Registry) -> list[Finding]:
    return [
        _runtime(runtime),
        *_programs(),
        _conmon(),
        *(_static(program) for program in (init, busybox)),
        _layers(state),
        _cgroups(cgroups),
        *_subordinate(),
        _forwarding(),
        _disk(state),
        *registry.findings,
    ]


def _runtime(path: str) -> Finding:
    name, text = Path(path).name, _version(path)
    version = _numbers(text)
    what = f"{name} {'.'.join(map(str, version))}"
    if version >= FIXED.get(name, ()) or "deb" in text or "ubuntu" in text:
        return Finding("ok", f"{what} runs the sessions")  # distributions mend old versions without a new number
    fixed = ".".join(map(str, FIXED[name]))
    return Finding("warning", f"{what} has known ways out of a container, mended in {fixed}", f"apt-get install {name}")


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
    mend = "apt-get install busybox-static tini"
    return Finding("error", f"{program} is not static, so that it cannot start in any image", mend)


def _layers(state: Path) -> Finding:
    """Makes what every session needs: an overlay on a layer whose owners are mapped."""
    mapping = userns.id_map(userns.FIRST, [])
    with tempfile.TemporaryDirectory(dir=state / "trash") as name:
        base = Path(name)
        for part in ("layer", "upper", "work", "root"):
            (base / part).mkdir()
        try:
            with mounts.opened(mounts.user_namespace(mapping, mapping)) as namespace:
                mounts.overlay(base / "root", [base / "layer"], base, namespace)
        except OSError as error:
            what = f"no idmapped layers on {state}: {error.strerror}; sessions of this driver will not start"
            return Finding("error", what, "use Linux 5.19 or newer and ext4, XFS or Btrfs, or set driver: docker")
        finally:
            mounts.unmount(base / "root")
    return Finding("ok", f"Linux {os.uname().release} has idmapped layers on {state}")


def _cgroups(cgroups: Cgroups) -> Finding:
    if not cgroups.hierarchies:
        return Finding("error", "no cgroups are mounted", "systemctl daemon-reexec")
    if not cgroups.swap:
        return Finding("warning", f"cgroups {cgroups.name}, without limits on swap", "boot with swapaccount=1")
    return Finding("ok", f"cgroups {cgroups.name}")


def _subordinate() -> Iterator[Finding]:
    for file in ("/etc/subuid", "/etc/subgid"):
        ranges = sorted(userns.ranges(Path(file)), key=lambda entry: entry[1])
        for (name, start, count), (other, second, _) in itertools.pairwise(ranges):
            if name != other and second < start + count:
                yield Finding("error", f"{file}: the ranges of {name} and {other} overlap", f"edit {file}")


def _forwarding() -> Finding:
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1":
        return Finding("ok", "packets are forwarded")
    return Finding("warning", "packets are not forwarded yet", "sysctl -w net.ipv4.ip_forward=1")


def _disk(state: Path) -> Finding:
    disk = os.statvfs(state)
    free = disk.f_bavail * disk.f_frsize
    what = f"{free / (1 << 30):.0f} GiB are free on the disk of {state}"
    return Finding("ok", what) if free > ROOM else Finding("warning", what, "beaker executor images prune")


def _version(program: str) -> str:
    try:
        return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""


def _numbers(text: str) -> tuple[int, ...]:
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in match.groups()) if match else ()
