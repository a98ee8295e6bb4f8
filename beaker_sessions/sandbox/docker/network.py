"""The sessions' own network of Docker Engine, with the firewall of `sandbox.firewall` around its bridge.

Owns: that network and that table, both of which may be gone at any time: `docker network prune` takes the one, whoever
sets up a firewall the other. They are in the network namespace of the engine, which need not be ours.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...errors import Error
from .. import LABEL_OWNER, Finding, firewall, netns, packet, resolvers, uplinks
from ..changes import followed
from .engine import Engine

# Its own rules, of which a `flush ruleset` takes all, it makes only when it starts.
MEND = f"systemctl restart docker, with live-restore on; {packet.GUIDE}"

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

    def followed(self) -> contextlib.AbstractContextManager[None]:
        """While this lasts, what somebody changes of the firewall is mended at once, and not only by `ensure`."""
        return followed(self.name, self._again, self._namespace())

    def check(self) -> Iterator[Finding]:
        """What `executor doctor` should say: whether the rules are there, and what becomes of a packet."""
        try:
            known = self.engine.call("GET", f"/networks/{self.name}")
        except Error as error:
            level, what = ("ok", f"the network {self.name} is made with the first session")
            yield Finding(level, what) if error.code == "not_found" else Finding("error", error.message, error.hint)
            return
        try:
            self.ensure()
            yield Finding("ok", f"the firewall of sessions is table inet {self.name}, as it should be")
            machine = self._namespace()
            config = known["IPAM"]["Config"][0]
            network, used = ipaddress.IPv4Network(config["Subnet"]), known["Containers"] or {}
            taken = {each["IPv4Address"].partition("/")[0] for each in used.values()}
            # The engine takes the lowest that is free.
            address = next(str(network[-n]) for n in range(2, 100) if str(network[-n]) not in taken)
            fd = netns.new(lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
            try:
                session = Path(f"/proc/{os.getpid()}/fd/{fd}")
                port = f"{self.name}-p"
                pair = (
                    f"link add {port} type veth peer name eth0 netns {session}\nlink set {port} master {self.name} up\n"
                )
                within = f"address add {address}/{network.prefixlen} dev eth0\nlink set eth0 up\n"
                netns.inside(machine, lambda: _ip(pair))
                netns.inside(session, lambda: _ip(f"{within}route add default via {config['Gateway']}\n"))
                yield from packet.findings(f"{self.name}-t", session, config["Gateway"], machine, MEND)
            finally:
                os.close(fd)
        except (Error, OSError, subprocess.CalledProcessError) as error:
            yield Finding("error", f"sessions have no network: {error}", MEND)

    def remove(self) -> None:
        """Silent when they are gone, or containers still use the network."""
        with contextlib.suppress(Error):
            self.engine.call("DELETE", f"/networks/{self.name}")
            firewall.remove(self.name, self._prefix())

    def _again(self) -> None:
        if self._table.known:  # else there is no session yet
            self.ensure()

    def _prefix(self) -> list[str]:
        """Of a command that shall run in the engine's network namespace."""
        namespace = self._namespace()
        return ["nsenter", f"--net={namespace}"] if namespace else []

    def _namespace(self) -> Path | None:
        """The engine's network namespace, None for our own."""
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(self.engine.path)
            except OSError as error:
                raise Error("unavailable", f"no Docker Engine at {self.engine.path}: {error}") from error
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = struct.unpack("3i", credentials)[0]  # unix(7)
        namespace = Path(f"/proc/{pid}/ns/net")
        with contextlib.suppress(OSError):
            if namespace.stat().st_ino != os.stat("/proc/thread-self/ns/net").st_ino:
                return namespace
        return None


def _ip(commands: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input=commands, capture_output=True, text=True, check=True)
