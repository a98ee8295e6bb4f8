"""The settings of executor and server: one frozen object per program, flag > environment > file > default.

Owns: reading `/etc/beaker/config.yml` (the executor's keys at its top level, as in the original system, the server's
under `server`). Must not be imported by the command line's hot path. A key that is not known is an error: a misspelt
limit must not silently be no limit.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import Error
from .transport import Endpoint

CONFIG = "/etc/beaker/config.yml"


@dataclass(frozen=True)
class ExecutorSettings:
    """What one node's executor is told. `metadata["key"]` is the dotted path in the file.

    insecure_addresses: servers that may be reached without encryption; this machine's is found beside `socket`.
    accounts: Unix name -> account name where they differ. gpus: CDI names to offer, None for all that are found.
    cdi_hooks: programs that CDI specs may run, besides NVIDIA's.
    session_disk: what a session may write outside of home and mounts, as `200GiB`; "" for no limit. image_path: where
    images are, "" for below storage_path. image_size: what one may take unpacked, "" for no limit; image_space: what
    all together may, "" for 80 % of their file system. registry_realms: registry -> host of its token service or its
    blobs, where that has no public address.
    limit_…: what one account may have here at once, 0 for no limit; see `admission.Limits`. subordinate_ids: where new
    accounts get their range of subordinate ids. trust_without_server: how long after the server last knew a token it
    starts new sessions while the server is away. stop_grace: seconds between asking a session to end and killing it.
    """

    storage_path: str = field(default="/var/lib/beaker", metadata={"key": "storagePath"})
    socket: str = field(default="/run/beaker/executor.sock", metadata={"key": "socket"})
    address: str = field(default="http://127.0.0.1:8420", metadata={"key": "beaker.address"})
    token_path: str = field(default="/etc/beaker/executor.token", metadata={"key": "beaker.tokenPath"})
    insecure_addresses: list[str] = field(default_factory=list, metadata={"key": "beaker.insecureAddresses"})
    cluster: str = field(default="lab/main", metadata={"key": "beaker.cluster"})
    hostname: str = field(default="", metadata={"key": "hostname"})
    gpus: list[str] | None = field(default=None, metadata={"key": "resources.gpus"})
    session_home: str = field(default="", metadata={"key": "sessionHome"})
    mount_paths: list[str] = field(default_factory=lambda: ["/net"], metadata={"key": "mountPaths"})
    accounts: dict[str, str] = field(default_factory=dict, metadata={"key": "accounts"})
    driver: str = field(default="auto", metadata={"key": "driver"})
    bridge: str = field(default="beaker0", metadata={"key": "bridge"})
    docker_socket: str = field(default="/var/run/docker.sock", metadata={"key": "dockerSocket"})
    cdi_paths: list[str] = field(default_factory=lambda: ["/etc/cdi", "/var/run/cdi"], metadata={"key": "cdiPaths"})
    cdi_hooks: list[str] = field(default_factory=list, metadata={"key": "cdiHooks"})
    default_image: str = field(default="beaker-sessions/base", metadata={"key": "defaultImage"})
    host_networking: bool = field(default=False, metadata={"key": "hostNetworking"})
    session_disk: str = field(default="", metadata={"key": "sessionDisk"})
    image_path: str = field(default="", metadata={"key": "imagePath"})
    image_size: str = field(default="200GiB", metadata={"key": "imageSize"})
    image_space: str = field(default="", metadata={"key": "imageSpace"})
    registry_realms: dict[str, str] = field(default_factory=dict, metadata={"key": "registryRealms"})

    port_range: str = field(default="20000-29999", metadata={"key": "portRange"})  # from which the node picks
    session_access: list[str] = field(default_factory=list, metadata={"key": "sessionAccess"})  # [ADDRESS:]PORT
    limit_sessions: int = field(default=100, metadata={"key": "limits.sessions"})
    limit_waiting: int = field(default=50, metadata={"key": "limits.waiting"})
    limit_unreserved: int = field(default=50, metadata={"key": "limits.unreserved"})
    limit_pulls: int = field(default=4, metadata={"key": "limits.pulls"})
    limit_execs: int = field(default=64, metadata={"key": "limits.execs"})
    subordinate_ids: str = field(default="2000224256-2147352575", metadata={"key": "subordinateIds"})
    trust_without_server: str = field(default="15m", metadata={"key": "trustWithoutServer"})
    stop_grace: int = field(default=10, metadata={"key": "stopGrace"})

    metrics: str = field(default="", metadata={"key": "metrics"})  # HOST:PORT, "" for no listener

    prefix: typing.ClassVar[str] = "BEAKER_EXECUTOR_"
    section: typing.ClassVar[str] = ""

    @property
    def endpoint(self) -> Endpoint:
        """The server; that of the same machine has its socket beside the executor's. Raises Error invalid."""
        return Endpoint(self.address, str(Path(self.socket).parent), self.insecure_addresses)


@dataclass(frozen=True)
class ServerSettings:
    """What the server is told. database: a SQLAlchemy URL, by default SQLite below storage_path.

    sockets: the directory of the Unix socket through which programs of this machine reach it.
    connections_each: of one user of this machine, or of one other address; behind a proxy, of all that it serves.
    connections_all: at a time, a quarter of them for executors alone.
    key: the file with the key that secrets are sealed with, by default server.key there; not in the database's backup.
    oidc_…: the provider through which people may sign in to the console, see `server.oidc`.
    """

    storage_path: str = field(default="/var/lib/beaker", metadata={"key": "storagePath"})
    host: str = field(default="127.0.0.1", metadata={"key": "host"})
    port: int = field(default=8420, metadata={"key": "port"})
    sockets: str = field(default="/run/beaker", metadata={"key": "sockets"})
    database: str = field(default="", metadata={"key": "database"})
    key: str = field(default="", metadata={"key": "key"})
    connections_each: int = field(default=128, metadata={"key": "connections.each"})
    connections_all: int = field(default=4096, metadata={"key": "connections.all"})
    oidc_issuer: str = field(default="", metadata={"key": "oidc.issuer"})
    oidc_client_id: str = field(default="", metadata={"key": "oidc.clientId"})
    oidc_client_secret_file: str = field(default="", metadata={"key": "oidc.clientSecretFile"})
    oidc_name: str = field(default="", metadata={"key": "oidc.name"})
    oidc_claim: str = field(default="preferred_username", metadata={"key": "oidc.claim"})
    oidc_accounts: dict[str, str] = field(default_factory=dict, metadata={"key": "oidc.accounts"})

    prefix: typing.ClassVar[str] = "BEAKER_SERVER_"
    section: typing.ClassVar[str] = "server"

    @property
    def file(self) -> Path | None:
        """The SQLite database; None when it is another one's."""
        if not self.database:
            return Path(self.storage_path, "server.db")
        kind, _, path = self.database.partition("?")[0].partition(":///")
        return Path(path) if kind.partition("+")[0] == "sqlite" and path not in ("", ":memory:") else None

    @property
    def key_file(self) -> Path:
        return Path(self.key or Path(self.storage_path, "server.key"))


Settings = TypeVar("Settings", ExecutorSettings, ServerSettings)


def load(
    kind: type[Settings],
    path: str | None = None,
    environ: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of one program.

    path: the file; when None, CONFIG if it exists. environ: `prefix` + FIELD_NAME, lists and maps as YAML.
    Raises Error invalid for an unreadable file, an unknown key or a value of the wrong type.
    """
    tree = _read(Path(path)) if path else _read(Path(CONFIG)) if os.path.exists(CONFIG) else {}
    if kind.section:
        tree = tree.get(kind.section) or {}
    else:
        tree = {key: value for key, value in tree.items() if key != ServerSettings.section}
    flat = dict(_flatten(tree, {f.metadata["key"]: f for f in fields(kind)}, path or CONFIG))
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for f in fields(kind):
        if flags and flags.get(f.name) is not None:
            value, source = flags[f.name], f"--{f.name.replace('_', '-')}"
        elif (variable := kind.prefix + f.name.upper()) in environ:
            text = environ[variable]
            value, source = (text if hints[f.name] is str else yaml.safe_load(text)), variable
        elif f.metadata["key"] in flat:
            value, source = flat[f.metadata["key"]], f"{path or CONFIG}: {f.metadata['key']}"
        else:
            value = f.default_factory() if f.default is MISSING else f.default  # type: ignore[operator]
            source = ""
        if source and not _matches(value, hints[f.name]):
            raise Error(
                "invalid", f"{source}: {value!r} is not of the type {_name(hints[f.name])}", "correct the value"
            )
        values[f.name] = value
    return kind(**values)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Error("invalid", f"cannot read the settings in {path}: {error}", "correct the file") from error
    if not isinstance(tree, dict):
        raise Error("invalid", f"{path} holds no settings: it is not a YAML mapping", "correct the file")
    return tree


def _flatten(
    tree: dict[str, Any], known: Mapping[str, Any], path: str, prefix: str = ""
) -> typing.Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if dotted in known:
            yield dotted, value
        elif isinstance(value, dict) and any(name.startswith(dotted + ".") for name in known):
            yield from _flatten(value, known, path, dotted + ".")
        else:
            raise Error("invalid", f"{path}: no setting is called {dotted!r}", f"known: {', '.join(sorted(known))}")


def _matches(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_matches(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_matches(k, args[0]) and _matches(v, args[1]) for k, v in value.items())
    if args:  # a union, the only other generic here
        return any(_matches(value, arg) for arg in args)
    return type(value) is hint


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
