"""From a `Spec` to what the Engine API is told. Pure: no input or output, no defaults that the executor should choose.

Shapes: https://docs.docker.com/engine/api/v1.41/, `ContainerCreate` and `ContainerExec`.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import Error
from ...model import Identity
from .. import LABEL, Mount, Spec
from ..cdi import Edits
from ..environment import variables

INSIDE = "/.beaker"  # where a sandbox sees its own files
ENTRY = [f"{INSIDE}/busybox", "sh", f"{INSIDE}/entry.sh"]
GATE = "gate"

# What a root inside needs to install packages and drop to other users; an ordinary user needs none.
ROOT_CAPABILITIES = [
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID",
]  # fmt: skip

# The engine always listens for a sequence that detaches; this one starts with the key that the command line keeps for
# itself, and is too long to be typed by chance.
DETACH_KEYS = ",".join(["ctrl-^", "ctrl-_"] * 4)


def name(id: str) -> str:
    """The container's name, by which the engine itself refuses a second one for the same session."""
    return f"beaker-{id}"


def container(
    spec: Spec, files: Path, mounts: Sequence[Mount], edits: Edits | None, network: str = "bridge"
) -> dict[str, Any]:
    """The body of `POST /containers/create`.

    files: the session's directory on the host. mounts: the spec's, with sources that the engine can open. edits: of
    the spec's GPUs, None when the engine applies CDI specs itself. network: the engine's, unless the spec has the
    host's. Raises Error invalid for text that JSON cannot carry to the engine unchanged, unavailable for edits that
    Docker's API cannot express.
    """
    applied = edits or Edits()
    if applied.hooks:
        raise Error(
            "unavailable",
            f"{', '.join(spec.gpus)}: the CDI spec has hooks, which this Docker Engine cannot run",
            'install Docker Engine 25 or newer and set "features": {"cdi": true} in /etc/docker/daemon.json',
        )
    identity = spec.identity
    gids = sorted({*identity.groups, *applied.gids} - {identity.gid, 0})  # root's group is the machine's
    binds = [
        Mount(str(files / "inside"), INSIDE, read_only=True),
        Mount(str(files / "passwd"), "/etc/passwd", read_only=True),
        Mount(str(files / "group"), "/etc/group", read_only=True),
        *(Mount(mount.host_path, mount.container_path, "ro" in mount.options) for mount in applied.mounts),
        *mounts,
    ]
    host: dict[str, Any] = {
        "Init": True,
        "NetworkMode": "host" if spec.host_network else network,
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "8m", "max-file": "2"}},
        "Mounts": [
            {"Type": "bind", "Source": bind.source, "Target": bind.target, "ReadOnly": bind.read_only}
            # The engine refuses this for what is neither shared nor a slave.
            | ({"BindOptions": {"Propagation": "rslave"}} if bind.slave else {})
            for bind in binds
        ],
        "GroupAdd": [str(gid) for gid in gids],
        "SecurityOpt": ["no-new-privileges"],
        "CapDrop": ["ALL"],
        "CapAdd": ROOT_CAPABILITIES if identity.uid == 0 else [],
        # Docker's 1024 shares are the weight 100; the kernel takes no fewer than 2.
        "CpuShares": max(2, spec.cpu_weight * 1024 // 100),
        "Memory": spec.memory,
        "MemorySwap": spec.memory,
        "PidsLimit": spec.pids,
        "ShmSize": spec.shared_memory,
        "OomScoreAdj": spec.oom_score_adj,
        "Devices": [
            {"PathOnHost": node.host_path, "PathInContainer": node.path, "CgroupPermissions": node.permissions}
            for node in applied.nodes
        ],
    }
    if spec.gpus and edits is None:
        host["DeviceRequests"] = [{"Driver": "cdi", "DeviceIDs": list(spec.gpus)}]
    return {
        "Image": spec.image.id,
        "Labels": {**spec.labels, LABEL: spec.id},
        "User": f"{identity.uid}:{identity.gid}",
        "Hostname": spec.hostname,
        "WorkingDir": "/",
        "Env": _environment(variables(spec.image.env, spec.env, applied.env)),
        "Entrypoint": ENTRY,
        "Cmd": [
            "-C",
            _text(spec.workdir),
            f"{INSIDE}/{GATE}" if spec.tty else "",
            *(_text(word) for word in spec.command),
        ],
        "Tty": spec.tty,
        "OpenStdin": spec.stdin,
        "StdinOnce": spec.stdin and not spec.tty,
        "AttachStdin": spec.stdin,
        "AttachStdout": True,
        "AttachStderr": True,
        # An interactive Bash takes no notice of SIGTERM.
        "StopSignal": (signal.SIGHUP if spec.tty else signal.SIGTERM).name,
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": host,
    }


def process(
    command: Sequence[str],
    env: Mapping[str, str],
    identity: Identity,
    workdir: str,
    gate: str,
    *,
    tty: bool,
    stdin: bool,
) -> dict[str, Any]:
    """The body of `POST /containers/…/exec`; gate: the name of its gate file, "" for none."""
    return {
        "Cmd": [*ENTRY, f"{INSIDE}/{gate}" if gate else "", *(_text(word) for word in command)],
        "Env": _environment(variables((), env)),
        "User": f"{identity.uid}:{identity.gid}",
        "WorkingDir": workdir,
        "Tty": tty,
        "AttachStdin": stdin,
        "AttachStdout": True,
        "AttachStderr": True,
        "DetachKeys": DETACH_KEYS,
    }


def _environment(env: Mapping[str, str | None]) -> list[str]:
    return [_text(key if value is None else f"{key}={value}") for key, value in env.items()]


def _text(text: str) -> str:
    """Unchanged, if the engine will read it unchanged: its JSON is UTF-8, and processes take no NUL."""
    try:
        if b"\0" not in text.encode():
            return text
    except UnicodeEncodeError:
        pass
    raise Error("invalid", f"{text!r} cannot be passed to a process by Docker", "use valid UTF-8 without NUL")
