"""The sessions' own network of Docker Engine, with the firewall of `sandbox.firewall` around its bridge.

Owns: that network and that table, both of which may be gone at any time: `docker network prune` takes the one, whoever
sets up a firewall the other. They are in the network namespace of the engine, which need not be ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Iterable

from ...errors import Error
from .. import LABEL_OWNER, firewall, resolvers, uplinks
from .engine import Engine

log = logging.getLogger(__name__)


class Network:
    """name: of the network and its bridge, at most 15 bytes. access: as `firewall.rules` takes it."""

    def __init__(self, engine: Engine, owner: str, name: str, access: Iterable[str]) -> None:
        self.engine, self.owner, self.name, self.access = engine, owner, name, list(access)
        self._table = firewall.Table(name)
        self._lock = threading.Lock()  # the engine refuses whoever comes while another makes it

    def ensure(self) -> None:
        """Have both there. Raises Error."""
        with self._lock:
            self._ensure()

    def _ensure(self) -> None:
        try:
            self.engine.call("GET", f"/networks/{self.name}")
        except Error as error:
            if error.code != "not_found":
                raise
            body = {
                "Name": self.name, "CheckDuplicate": True, "Driver": "bridge", "Labels": {LABEL_OWNER: self.owner},
                "Options": {
                    "com.docker.network.bridge.name": self.name, "com.docker.network.bridge.enable_icc": "false",
                },
            }  # fmt: skip
            self.engine.call("POST", "/networks/create", body=body)
        prefix = self._prefix()
        rules = firewall.rules(self.name, "", resolvers.addresses(), self.access, uplinks.names(prefix))
        if self._table.ensure(rules, prefix):
            log.warning("somebody changed the firewall of sessions, table inet %s; it is set up again", self.name)

    def remove(self) -> None:
        """Silent when they are gone, or containers still use the network."""
        with contextlib.suppress(Error):
            self.engine.call("DELETE", f"/networks/{self.name}")
            firewall.remove(self.name, self._prefix())

    def _prefix(self) -> list[str]:
        """Of a command that shall run in the engine's network namespace."""
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(self.engine.path)
            except OSError as error:
                raise Error("unavailable", f"no Docker Engine at {self.engine.path}: {error}") from error
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = struct.unpack("3i", credentials)[0]  # unix(7)
        namespace = f"/proc/{pid}/ns/net"
        with contextlib.suppress(OSError):
            if os.stat(namespace).st_ino != os.stat("/proc/self/ns/net").st_ino:
                return ["nsenter", f"--net={namespace}"]
        return []
