"""From a `Spec` to an OCI runtime configuration. Pure: no input or output, no policy.

Shapes: https://github.com/opencontainers/runtime-spec, `config.md` and `config-linux.md`. Of bind mounts only those
in `/dev` are in it. The others are in the root file system beforehand, where no mount point is made through a link of
the image that leads into another mount.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import Error
from ...model import Identity
from .. import Spec
from ..cdi import CdiMount, Edits
from ..environment import variables
from .mounts import IdMap
from .seccomp import profile
from .userns import mapped

INSIDE = "/.beaker"  # where a sandbox sees the programs that start it
INIT = [f"{INSIDE}/init", "--"]
ENTRY = [f"{INSIDE}/busybox", "sh", f"{INSIDE}/entry.sh"]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FILES = 65536  # open files of a process unless it raises the limit itself

# Docker's default set without CAP_MKNOD, which means nothing in a user namespace, and with CAP_SYS_PTRACE, by which
# root inside debugs all that runs inside, and nothing else: it is of the sandbox's own user namespace.
CAPABILITIES = [
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
]  # fmt: skip
# What the kernel does not keep apart between namespaces.
MASKED = [
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
    "/sys/firmware",
]  # fmt: skip
HOST_INTERFACES = ["/sys/class/net", "/sys/devices/virtual/net"]
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


@dataclass(frozen=True)
class Node:
    """A device of this machine, as found: type `b` or `c`."""

    host_path: str
    path: str
    type: str
    major: int
    minor: int
    permissions: str


@dataclass(frozen=True)
class Host:
    """What the configuration depends on beside the `Spec`.

    rootfs: the mounted root file system. cgroup: path below the controllers' roots. unified: whether cgroups are pure
    version 2. swap: whether it can be limited. files: the hard limit of open files. apparmor: a profile, or "".
    """

    rootfs: Path
    cgroup: str
    uids: IdMap
    gids: IdMap
    unified: bool
    swap: bool
    files: int
    apparmor: str = ""


def config(spec: Spec, host: Host, edits: Edits, nodes: Sequence[Node]) -> dict[str, Any]:
    """The `config.json` of a sandbox. edits: of the spec's GPUs; nodes: their device files, as found on this machine.

    Raises Error invalid for text that JSON cannot carry unchanged.
    """
    main = process(
        [*INIT, *entry(spec.workdir, spec.command)],
        environment(spec.image.env, variables(spec.image.env, spec.env, edits.env)),
        spec.identity,
        tty=spec.tty,
        gids=[gid for gid in (*spec.identity.groups, *edits.gids) if mapped(host.gids, gid)],
        files=host.files,
        apparmor=host.apparmor,
    )
    main["oomScoreAdj"] = spec.oom_score_adj
    return {
        "ociVersion": "1.0.2",
        "hostname": spec.hostname,
        "root": {"path": str(host.rootfs)},
        "process": main,
        "mounts": [*_mounts(spec, host), *_devices(nodes), *_edits(edits)],
        "hooks": _hooks(edits),
        "linux": {
            "uidMappings": _ids(host.uids),
            "gidMappings": _ids(host.gids),
            # Not the network: the runtime is started in it. runc before 1.2 could not `exec` in one that belongs to
            # this machine's user namespace, as it must lest root inside change it.
            "namespaces": [{"type": type} for type in ("pid", "ipc", "uts", "mount", "user", "cgroup")],
            "cgroupsPath": host.cgroup,
            "resources": _resources(spec, host, nodes),
            "maskedPaths": MASKED if spec.host_network else MASKED + HOST_INTERFACES,
            "readonlyPaths": READ_ONLY,
            "seccomp": profile(),
        },
    }


def entry(workdir: str, command: Iterable[str]) -> list[str]:
    """The arguments of a first process, which goes to its directory itself (see `entry.sh`)."""
    return [*ENTRY, "-C", workdir, "", *command]


def process(
    args: Sequence[str],
    env: Mapping[str, str],
    identity: Identity,
    *,
    tty: bool,
    gids: Iterable[int],
    files: int,
    size: tuple[int, int] | None = None,
    apparmor: str = "",
) -> dict[str, Any]:
    """`process` of the configuration, and what `runc exec --process` takes.

    Root of the sandbox holds its capabilities, anybody else has only the possibility, through sudo.
    """
    held = CAPABILITIES if identity.uid == 0 else []
    result: dict[str, Any] = {
        "terminal": tty,
        "args": [_text(word) for word in args],
        "env": [_text(f"{name}={value}") for name, value in env.items()],
        "cwd": "/",
        "user": {"uid": identity.uid, "gid": identity.gid, "additionalGids": sorted({identity.gid, *gids})},
        "capabilities": {
            "bounding": CAPABILITIES, "permitted": held, "effective": held, "inheritable": [], "ambient": [],
        },
        "noNewPrivileges": False,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": min(files, FILES), "hard": files}],
    }  # fmt: skip
    if apparmor:
        result["apparmorProfile"] = apparmor
    if size:
        result["consoleSize"] = {"height": size[0], "width": size[1]}
    return result


def environment(image: Iterable[str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """The image's variables with changes over them, of which None removes."""
    result: dict[str, str | None] = {"PATH": PATH}
    result |= {name: value for name, _, value in (pair.partition("=") for pair in image)}
    return {name: value for name, value in (result | dict(changes)).items() if value is not None}


def _mounts(spec: Spec, host: Host) -> list[dict[str, Any]]:
    result = [
        _mount("/proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _mount("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", f"size={spec.shared_memory}"),
        _mount("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
    ]
    if host.unified:
        result.append(_mount("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"))
    return result


def _mount(target: str, type: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": type, "source": type, "options": options}


def _devices(nodes: Iterable[Node]) -> list[dict[str, Any]]:
    """Binds, because device files cannot be made in a user namespace."""
    return [
        {"destination": node.path, "type": "bind", "source": node.host_path, "options": ["bind", "nosuid", "noexec"]}
        for node in nodes
    ]


def _edits(edits: Edits) -> list[dict[str, Any]]:
    return [
        {
            "destination": mount.container_path,
            "type": "bind",
            "source": mount.host_path,
            "options": list(dict.fromkeys(["rbind", *mount.options])),
        }
        for mount in edits.mounts
        if _in_dev(mount)
    ]


def beforehand(edits: Edits) -> list[CdiMount]:
    """The mounts of edits that the root file system has before the runtime comes, which mounts /dev."""
    return [mount for mount in edits.mounts if not _in_dev(mount)]


def _in_dev(mount: CdiMount) -> bool:
    return mount.container_path.startswith("/dev/")


def _hooks(edits: Edits) -> dict[str, list[dict[str, Any]]]:
    hooks: dict[str, list[dict[str, Any]]] = {}
    for hook in edits.hooks:
        # Never empty: a runtime would hand down its own environment, which may be the session's (CVE-2025-23266).
        env = [f"PATH={PATH}", *hook.env]
        entry: dict[str, Any] = {"path": hook.path, "args": list(hook.args), "env": env}
        if hook.timeout:
            entry["timeout"] = hook.timeout
        hooks.setdefault(hook.name, []).append(entry)
    return hooks


def _resources(spec: Spec, host: Host, nodes: Iterable[Node]) -> dict[str, Any]:
    result: dict[str, Any] = {
        # The runtime adds what every container needs: null, zero, full, random, urandom, tty and the pseudo-terminals.
        "devices": [
            {"allow": False, "access": "rwm"},
            *(
                {"allow": True, "type": n.type, "major": n.major, "minor": n.minor, "access": n.permissions}
                for n in nodes
            ),
        ],
        "pids": {"limit": spec.pids},
    }
    if host.unified:
        result["unified"] = {"cpu.weight": str(spec.cpu_weight)}
    else:
        # Docker's 1024 shares are the weight 100; the kernel takes no fewer than 2.
        result["cpu"] = {"shares": max(2, spec.cpu_weight * 1024 // 100)}
    if spec.memory:
        result["memory"] = {"limit": spec.memory} | ({"swap": spec.memory} if host.swap else {})
    return result


def _ids(map: IdMap) -> list[dict[str, int]]:
    return [{"containerID": first, "hostID": start, "size": count} for first, start, count in map]


def _text(text: str) -> str:
    """Unchanged, if JSON and the kernel can carry it unchanged."""
    try:
        if b"\0" not in text.encode():
            return text
    except UnicodeEncodeError:
        pass
    raise Error("invalid", f"{text!r} cannot be passed to a process", "use valid UTF-8 without NUL")
