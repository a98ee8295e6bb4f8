"""What `executor doctor` says about Docker Engine. Reads only; one finding for each question, good or bad."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import Error
from .. import LOW_DISK, PIDS, Finding, vulnerabilities
from ..busybox import BUSYBOX
from ..cdi import Registry
from .engine import Engine

PT_INTERP = 3  # elf(5)
DAEMON_JSON = "/etc/docker/daemon.json"


def check(engine: Engine, registry: Registry) -> list[Finding]:
    try:
        version, info = engine.version, engine.call("GET", "/info")
    except Error as error:
        return [Finding("error", error.message, error.hint), _busybox()]
    return [
        *_engine(version, info),
        *_runtime(version),
        _firewall(),
        _busybox(),
        *_devices(info, registry),
        *_disk(info),
    ]


def _engine(version: dict[str, Any], info: dict[str, Any]) -> Iterator[Finding]:
    yield Finding("ok", f"Docker Engine {version['Version']}, API {version['ApiVersion']}, storage {info['Driver']}")
    yield Finding("ok", f"cgroup version {info['CgroupVersion']}, driver {info['CgroupDriver']}")
    for what, has in (("memory", info["MemoryLimit"]), ("pids", info["PidsLimit"]), ("CPU", info["CPUShares"])):
        if not has:
            yield Finding("error", f"this kernel has no {what} limits for containers", "enable the cgroup controller")
    yield _pids()
    if info["LiveRestoreEnabled"]:
        yield Finding("ok", "live-restore is on: sessions survive a restart of Docker Engine")
    else:
        mend = f'set "live-restore": true in {DAEMON_JSON}, then systemctl reload docker'
        yield Finding("warning", "live-restore is off: a restart of Docker Engine ends all sessions", mend)
    components = {component["Name"] for component in version.get("Components") or ()}
    if info.get("InitBinary") and "docker-init" in components:
        yield Finding("ok", f"init binary {info['InitBinary']}")
    else:
        yield Finding("error", "Docker Engine has no init binary to reap processes", "apt-get install tini")
    if "bridge" not in info["Plugins"]["Network"] or not info["IPv4Forwarding"]:
        yield Finding(
            "error", "sessions have no network: no bridge or no forwarding", "sysctl -w net.ipv4.ip_forward=1"
        )
    options = " ".join(info.get("SecurityOptions") or ())
    if "name=userns" in options or "name=rootless" in options:
        yield Finding(
            "error",
            "Docker Engine maps user ids, so that homes would belong to others",
            f"remove it from {DAEMON_JSON}",
        )
    if "name=seccomp" in options:
        yield Finding("ok", "seccomp is on")
    else:
        yield Finding("error", "Docker Engine runs containers without seccomp", "use a kernel with CONFIG_SECCOMP")

    if "name=apparmor" in options:
        yield Finding("ok", "AppArmor is on, with Docker Engine's profile for containers")


def _pids() -> Finding:
    """Docker Engine limits each container alone, so that there must be room for many at their limit."""
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    full = most // PIDS
    what = f"the machine's {most} ids of processes are enough for {full} sessions at their limit of {PIDS}"
    mend = "sysctl -w kernel.pid_max=4194304, and in /etc/sysctl.d"
    return Finding("ok", what) if full >= 64 else Finding("warning", what, mend)


def _runtime(version: dict[str, Any]) -> Iterator[Finding]:
    for component in version.get("Components") or ():
        if component["Name"] in vulnerabilities.known():
            yield vulnerabilities.finding(component["Name"], component["Version"])


def _firewall() -> Finding:
    if shutil.which("nft"):
        return Finding("ok", "nft is there, for the firewall of sessions")
    return Finding(
        "error", "nft is missing: sessions with a network of their own cannot start", "apt-get install nftables"
    )


def _disk(info: dict[str, Any]) -> Iterator[Finding]:
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(info["DockerRootDir"]).free
        what = f"{free / 2**30:.1f} GiB are free in {info['DockerRootDir']}, for images and sessions"
        yield Finding("ok", what) if free > LOW_DISK else Finding("warning", what, "docker image prune")


def _busybox() -> Finding:
    mend = "make session"
    try:
        static = is_static(Path(BUSYBOX).read_bytes())
    except OSError as error:
        return Finding("error", f"{BUSYBOX}: {error.strerror}", mend)
    except (ValueError, struct.error):
        return Finding("error", f"{BUSYBOX} is no program for this machine", mend)
    if static:
        return Finding("ok", f"{BUSYBOX} is static")
    return Finding("error", f"{BUSYBOX} is not static, so that it cannot start in any image", mend)


def _devices(info: dict[str, Any], registry: Registry) -> Iterator[Finding]:
    if info.get("CDISpecDirs"):
        yield Finding("ok", f"Docker Engine applies CDI specs of {', '.join(info['CDISpecDirs'])}")
        return
    yield Finding("ok", "CDI specs are applied for Docker Engine, which does not itself")
    hooked = [d.name for d in registry.devices.values() if d.own.hooks or d.common.hooks]
    if hooked:
        mend = f'install Docker Engine 25 or newer and set "features": {{"cdi": true}} in {DAEMON_JSON}'
        yield Finding("error", f"these devices need hooks, which Docker Engine cannot run: {', '.join(hooked)}", mend)
    for device in registry.devices.values():
        for node in (*device.common.nodes, *device.own.nodes):
            if not os.path.exists(node.host_path):
                yield Finding("error", f"{device.name}: there is no {node.host_path}", "load the device's driver")


def is_static(program: bytes) -> bool:
    """Whether an ELF program needs no dynamic linker, that is, has no PT_INTERP header (elf(5))."""
    if program[:4] != b"\x7fELF":
        raise ValueError("not ELF")
    order = "<" if program[5] == 1 else ">"
    wide = program[4] == 2
    offset = struct.unpack_from(order + ("Q" if wide else "L"), program, 32 if wide else 28)[0]
    size, count = struct.unpack_from(order + "HH", program, 54 if wide else 42)
    return all(struct.unpack_from(order + "L", program, offset + size * n)[0] != PT_INTERP for n in range(count))
