"""Container Device Interface: which devices this machine offers, and what a container needs to be given to use them.

Owns: reading specs (JSON or YAML, versions 0.3 to 1.1, https://github.com/cncf-tags/container-device-interface) and
telling whole GPUs from their aliases and composites. Must not decide who gets what. A spec gives devices, files of the
machine and programs that run before a container starts, so it counts only where root alone could write it, and with
programs that are known, of root's too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import trust
from ..errors import Error
from . import Finding

# A machine of eight GPUs has a thousand lines, which the loader in Python takes half a second for.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
VERSIONS = {"0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"}
KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
# What `nvidia-ctk cdi generate` writes: https://github.com/NVIDIA/nvidia-container-toolkit, `cmd/nvidia-cdi-hook`.
# They run in the container's user namespace, before it has its root: kind, programs, and what they are told to do.
HOOK, PROGRAMS = "createContainer", ("nvidia-cdi-hook", "nvidia-ctk")
TASKS = {
    "chmod", "create-soname-symlinks", "create-symlinks", "disable-device-node-modification", "enable-cuda-compat",
    "update-ldcache",
}  # fmt: skip
KINDS = {HOOK, "createRuntime", "prestart", "poststart", "poststop"}  # startContainer takes its program from the image


@dataclass(frozen=True)
class DeviceNode:
    """A device file. type: `b`, `c`, `u` or `p`, "" for that of the host's file; None and 0 likewise."""

    path: str
    host_path: str
    type: str = ""
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    permissions: str = "rwm"
    uid: int | None = None
    gid: int | None = None


@dataclass(frozen=True)
class CdiMount:
    """A bind mount; options are mount(8)'s, such as `ro` and `nosuid`."""

    host_path: str
    container_path: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hook:
    """An OCI hook. name: `createContainer` and the like. timeout: seconds."""

    name: str
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None


@dataclass(frozen=True)
class Edits:
    """A spec's `containerEdits`. env: `NAME=value`. gids: additional groups of the process."""

    env: tuple[str, ...] = ()
    nodes: tuple[DeviceNode, ...] = ()
    mounts: tuple[CdiMount, ...] = ()
    hooks: tuple[Hook, ...] = ()
    gids: tuple[int, ...] = ()

    def __add__(self, other: Edits) -> Edits:
        """Both, in order, each edit once."""
        return Edits(
            tuple(dict.fromkeys(self.env + other.env)),
            tuple(dict.fromkeys(self.nodes + other.nodes)),
            tuple(dict.fromkeys(self.mounts + other.mounts)),
            tuple(dict.fromkeys(self.hooks + other.hooks)),
            tuple(dict.fromkeys(self.gids + other.gids)),
        )


@dataclass(frozen=True)
class Device:
    """A device by its qualified name, `vendor/class=name`. own: its edits; common: those of its whole spec."""

    name: str
    own: Edits
    common: Edits


@dataclass(frozen=True)
class Registry:
    """What was found, and what was wrong with it."""

    devices: Mapping[str, Device] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def edits(self, names: Iterable[str]) -> Edits:
        """All that a container with these devices needs. Raises Error not_found for a device that no spec describes."""
        total = Edits()
        for name in names:
            if name not in self.devices:
                raise Error("not_found", f"no CDI spec describes the device {name}", "beaker executor doctor")
            total = total + self.devices[name].common + self.devices[name].own
        return total


def load(paths: Iterable[str | os.PathLike[str]], hooks: Iterable[str] = ()) -> Registry:
    """All devices of the specs in these directories; a later directory wins over an earlier one. hooks: programs that
    may be hooks besides the known ones.

    A spec that cannot be used is a finding and the others still count. A device that two specs of one directory
    describe is nobody's, as the standard demands.
    """
    devices: dict[str, Device] = {}
    findings = []
    more = set(hooks)
    for directory in map(Path, paths):
        here: dict[str, Device] = {}
        twice: set[str] = set()
        for path in sorted(directory.glob("*")) if directory.is_dir() else []:
            if path.suffix not in (".json", ".yaml", ".yml"):
                continue
            try:
                if why := next(trust.of([], [str(path)]), ""):
                    raise ValueError(f"who can write it gives devices and files to sessions, and {why}")
                found = list(_spec(_read(path)))
                for hook in {hook for device in found for hook in (device.own + device.common).hooks}:
                    _check(hook, more)
            except (OSError, ValueError, yaml.YAMLError) as error:
                text = " ".join(str(error).split())
                findings.append(
                    Finding("error", f"{path} is not a usable CDI spec: {text}", f"correct or remove {path}")
                )
                continue
            twice |= {device.name for device in found} & here.keys()
            here |= {device.name: device for device in found}
        for name in sorted(twice):
            findings.append(Finding("error", f"two CDI specs in {directory} describe {name}", "remove one of them"))
            del here[name]
            devices.pop(name, None)
        devices |= here
    return Registry(devices, tuple(findings))


def gpus(registry: Registry) -> list[str]:
    """The qualified names of the GPUs that can be claimed, each physical one once, in natural order.

    Devices of class `gpu` with the same device nodes are one GPU under its shortest name (numbers first); one whose
    nodes include all of another's (`all`) is a composite and cannot be claimed.
    """
    return sorted((names[0] for names in _physical(registry)), key=_natural)


def aliases(registry: Registry, name: str) -> tuple[str, ...]:
    """All names of the GPU that has this one, the one to use first; empty for what is no claimable GPU."""
    return next((names for names in _physical(registry) if name in names), ())


def _physical(registry: Registry) -> list[tuple[str, ...]]:
    by_nodes: dict[frozenset[str], list[str]] = {}
    for device in registry.devices.values():
        nodes = frozenset(node.host_path for node in device.own.nodes)
        if nodes and device.name.partition("=")[0].endswith("/gpu"):
            by_nodes.setdefault(nodes, []).append(device.name)
    return [
        tuple(sorted(names, key=lambda name: (not name.partition("=")[2].isdigit(), len(name), _natural(name))))
        for nodes, names in by_nodes.items()
        if not any(other < nodes for other in by_nodes)
    ]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _check(hook: Hook, more: set[str]) -> None:
    """Raises ValueError for a hook that must not run."""
    what = f"its hook {hook.name} {hook.path} {' '.join(hook.args[1:3])}"
    _require(hook.path.startswith("/") and os.path.isfile(hook.path), f"{what} is no program of this machine")
    why = next(trust.of([], [hook.path]), "")
    _require(not why, f"{what} may be another program than root's: {why}")
    words = hook.args[2:] if hook.args[1:2] == ("hook",) else hook.args[1:]
    known = hook.name == HOOK and os.path.basename(hook.path) in PROGRAMS and words and words[0] in TASKS
    _require(known or (hook.path in more and hook.name in KINDS), f"{what} is not known; cdiHooks can name its program")


def _read(path: Path) -> Any:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else yaml.load(text, LOADER)


def _spec(spec: Any) -> Iterable[Device]:
    """The devices of one spec. Raises ValueError saying what is wrong."""
    _require(isinstance(spec, dict), "it is not a mapping")
    _require(spec.get("cdiVersion") in VERSIONS, f"cdiVersion {spec.get('cdiVersion')!r} is unknown")
    kind, devices = spec.get("kind"), spec.get("devices")
    _require(isinstance(kind, str) and KIND.fullmatch(kind), f"kind {kind!r} is not vendor/class")
    _require(isinstance(devices, list) and devices, "it has no devices")
    common = _edits(spec.get("containerEdits"))
    names: set[str] = set()
    for device in devices:
        _require(isinstance(device, dict), f"device {device!r} is not a mapping")
        name = str(device.get("name"))
        _require(NAME.fullmatch(name) and name not in names, f"device name {name!r} is not valid or not unique")
        names.add(name)
        yield Device(f"{kind}={name}", _edits(device.get("containerEdits")), common)


def _edits(data: Any) -> Edits:
    data = {} if data is None else data
    _require(isinstance(data, dict), "containerEdits is not a mapping")
    try:
        env = tuple(data.get("env") or ())
        _require(all(isinstance(text, str) and "=" in text for text in env), f"env {env!r} is not NAME=value")
        return Edits(
            env,
            tuple(_node(node) for node in data.get("deviceNodes") or ()),
            tuple(
                CdiMount(mount["hostPath"], mount["containerPath"], tuple(mount.get("options") or ()))
                for mount in data.get("mounts") or ()
            ),
            tuple(_hook(hook) for hook in data.get("hooks") or ()),
            tuple(int(gid) for gid in data.get("additionalGids") or data.get("additionalGIDs") or ()),
        )
    except KeyError as error:
        raise ValueError(f"containerEdits lack {error}") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"containerEdits have the wrong shape: {error}") from error


def _hook(hook: Mapping[str, Any]) -> Hook:
    args, env, timeout = tuple(hook.get("args") or ()), tuple(hook.get("env") or ()), hook.get("timeout")
    texts = (hook["hookName"], hook["path"], *args, *env)
    _require(all(isinstance(text, str) for text in texts), f"hook {hook!r} has other than texts")
    _require(timeout is None or (type(timeout) is int and timeout > 0), f"hook timeout {timeout!r} is no number")
    return Hook(hook["hookName"], hook["path"], args, env, timeout)


def _node(node: Mapping[str, Any]) -> DeviceNode:
    path = node["path"]
    _require(isinstance(path, str) and path.startswith("/"), f"device node {path!r} is not an absolute path")
    return DeviceNode(
        path, node.get("hostPath") or path, node.get("type") or "", node.get("major") or 0, node.get("minor") or 0,
        node.get("fileMode"), node.get("permissions") or "rwm", node.get("uid"), node.get("gid"),
    )  # fmt: skip


def _require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
