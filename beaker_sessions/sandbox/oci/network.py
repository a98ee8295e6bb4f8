"""Network namespaces made ahead, each with an address on the sessions' own bridge and a way out.

Owns: the bridge, the pairs of virtual interfaces, the firewall around the bridge (`sandbox.firewall`), the rules of
iptables that carry the bridge's name, and the files in one directory that keep the namespaces. The sandbox's user
namespace does not own them, so that root inside can change nothing about them; what it needs (low ports, ping) is set
here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import random
import subprocess
import threading
import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import Error
from .. import Finding, firewall, netns, packet, resolvers, uplinks
from ..changes import followed
from . import mounts, retired

COUNT = 4  # namespaces kept ready
SETTLE = 0.3  # seconds after one was taken until another is made: a session starts, and needs the CPUs just then
READY = ".ready"  # beside the file of each of these
# Searched for one that nothing on this machine uses; Docker and Podman take others by default.
BLOCKS = [ipaddress.IPv4Network(block) for block in ("10.213.0.0/16", "10.214.0.0/16", "172.31.192.0/18")]
PREFIX = 22  # of a bridge's network: a thousand sessions
TRIES = 5  # to make a namespace, each with another address
SYSCTLS = {"ipv4/ip_unprivileged_port_start": "0", "ipv4/ping_group_range": "0 2147483647"}

FILTER = ["iptables", "-w", "-t", "filter"]
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")

log = logging.getLogger(__name__)


class Network:
    """directory: of the namespaces' files. bridge: its name, at most 10 bytes, also the prefix of interfaces' names.

    access: what sessions may reach of this machine, as `firewall.rules` takes it.

    A file's name is the number of an address in the bridge's network. It is there from before the namespace is made
    until its interface is gone, so nobody else takes the address meanwhile.
    """

    def __init__(self, directory: Path, bridge: str, access: Iterable[str] = ()) -> None:
        self.directory, self.bridge, self.access = directory, bridge, list(access)
        self._forwarded, self._chosen = directory.with_name("forwarded"), directory.with_name("network")
        self._table = firewall.Table(bridge)
        self._network: ipaddress.IPv4Network | None = None
        self._last = random.randrange(1 << 16)  # the address that was taken last
        self._making: set[str] = set()
        self._lock = threading.Lock()
        self._filling = threading.Lock()
        self._closed = False

    def take(self) -> Path:
        """A namespace that nobody has used. Raises Error unavailable when none can be made."""
        try:
            for ready in self._ready():
                with contextlib.suppress(FileNotFoundError):
                    ready.unlink()  # whoever succeeds in this has it
                    return ready.with_suffix("")
            return self._make()
        finally:
            self.warm(SETTLE)

    def drop(self, name: str) -> None:
        """Forget a namespace; it goes with the last process in it. Silent if there is none."""
        path = self.directory / name
        mounts.unmount(path)
        threading.Thread(target=self._free, args=[path], daemon=True).start()

    def adopt(self, used: Container[str]) -> None:
        """After a restart: the namespaces that are in use or ready stay, the others go."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._chosen.exists() or self._link().get("addr_info"):  # there may be sessions
            try:
                self._ensure()
            except Error as error:
                log.error("%s", error.message)
        ready = {path.stem for path in self._ready()}
        for path in self.directory.iterdir():
            if path.suffix != READY and path.name not in ready and path.name not in used:
                self.drop(path.name)

    def followed(self) -> contextlib.AbstractContextManager[None]:
        """While this lasts, what somebody changes of bridge and firewall is mended at once, and not only by `guard`."""
        return followed(self.bridge, self.guard)

    def guard(self) -> None:
        """Have bridge and firewall as they should be, for those who are on it too. Raises Error unavailable."""
        if self._network and not self._closed:
            self._ensure(again=True)

    def check(self) -> Iterator[Finding]:
        """What `executor doctor` should say: whether bridge and rules are there, and what becomes of a packet."""
        try:
            network = self._ensure(again=True)
            path = self._make()
        except Error as error:
            yield Finding("error", error.message, error.hint)
            return
        try:
            yield Finding("ok", f"the firewall of sessions is table inet {self.bridge}, as it should be")
            yield from packet.findings(f"{self.bridge}-t", path, str(network[1]))
        finally:
            self.drop(path.name)

    def warm(self, after: float = 0.0) -> None:
        """Make namespaces in the background until enough are ready, beginning after so many seconds."""
        threading.Thread(target=self._fill, args=[after], name="network", daemon=True).start()

    def close(self) -> None:
        """Remove everything: for tests, and when the executor is uninstalled."""
        with self._lock:  # what looks after it just now is the last that does
            self._closed = True
        with self._filling:
            for path in self.directory.iterdir():
                mounts.unmount(path)
                self._free(path)
            for rule in self._lets():
                while _run([*FILTER, "-D", *rule]):
                    pass
            retired.remove(self.bridge)
            _run(["ip", "link", "delete", self.bridge])
            firewall.remove(self.bridge)  # last: until then there is somebody to protect
            self._forward_no_more()
            self._chosen.unlink(missing_ok=True)

    def _free(self, path: Path) -> None:
        if path.suffix != READY:
            # Its interface goes now: another mount namespace of this machine may have a copy of the mount.
            _run(["ip", "link", "delete", self._interface(path)])
        path.unlink(missing_ok=True)

    def _interface(self, path: Path) -> str:
        return f"{self.bridge}-{path.name}"

    def _ready(self) -> list[Path]:
        return list(self.directory.glob(f"*{READY}"))

    def _fill(self, after: float) -> None:
        if not self._filling.acquire(blocking=False):
            return
        try:
            time.sleep(after)
            if not self._closed:
                self._ensure(again=True)
            while not self._closed and len(self._ready()) < COUNT:
                path = self._make()
                path.with_suffix(READY).touch()
        except Error as error:
            log.error("%s", error.message)
        finally:
            self._filling.release()

    def _ensure(self, *, again: bool = False) -> ipaddress.IPv4Network:
        """The bridge's network, with all that it needs, looked at once or again."""
        with self._lock:
            if self._closed:
                raise Error("unavailable", f"the network {self.bridge} has been removed")
            if self._network is None or again:
                link = self._link()
                self._network = self._network or self._choose(link)
                self._bridge(self._network, link)
                self._protect(self._network)
                if "UP" not in link.get("flags", ()):
                    _output(["ip", "link", "set", self.bridge, "up"])  # not before there is a firewall
                self._attach(self._network)
            return self._network

    def _make(self) -> Path:
        network, failed = self._ensure(), 0
        for number in self._numbers(network):
            path = self.directory / str(number)
            try:
                path.touch(mode=0o600, exist_ok=False)
            except FileExistsError:
                continue
            self._making.add(path.name)
            try:
                netns.new(lambda path=path: _keep(path))  # type: ignore[misc]
                self._connect(path, network)
                return path
            except (Error, OSError) as error:
                self.drop(path.name)
                failed += 1
                if failed == TRIES:
                    raise Error(
                        "unavailable", f"no network for the session: {error}", "beaker executor doctor"
                    ) from error
                with contextlib.suppress(Error):
                    self._ensure(again=True)  # somebody may have deleted the bridge just now
            finally:
                self._making.discard(path.name)
        raise Error("unavailable", f"all addresses of {network} are in use", "stop some sessions")

    def _numbers(self, network: ipaddress.IPv4Network) -> Iterator[int]:
        """Those of all addresses for sessions, beginning behind the last: one that was just given back comes late."""
        count = network.num_addresses - 3  # without the network's own, the bridge's and the one of all
        for _ in range(count):
            self._last += 1
            yield 2 + self._last % count

    def _connect(self, path: Path, network: ipaddress.IPv4Network) -> None:
        """Give a namespace its interface, address and route."""
        name, address = self._interface(path), network[int(path.name)]
        pair = f"link add {name} type veth peer name eth0 address {_hardware(address)} netns {path}\n"
        _output(["ip", "-batch", "-"], pair + self._port(name))
        within = (
            "link set lo up\n"
            f"address add {address}/{network.prefixlen} dev eth0\n"
            "link set eth0 up\n"
            f"route add default via {network[1]}\n"
        )
        netns.inside(path, lambda: _output(["ip", "-batch", "-"], within))

    def _port(self, interface: str) -> str:
        return f"link set {interface} master {self.bridge} up\nlink set {interface} type bridge_slave isolated on\n"

    def _attach(self, network: ipaddress.IPv4Network) -> None:
        """Have every namespace on the bridge, which may have been deleted and made again."""
        shown = _shown(["ip", "-json", "link", "show", "master", self.bridge])
        attached = {link["ifname"] for link in shown if "UP" in link["flags"]}
        for path in self.directory.iterdir():
            name = self._interface(path)
            if path.suffix == READY or name in attached or path.name in self._making or not os.path.ismount(path):
                continue
            try:
                if not _run(["ip", "link", "show", "dev", name]):
                    self._connect(path, network)
                else:
                    _output(["ip", "-batch", "-"], self._port(name))
                log.warning("%s is on the bridge again", name)
            except (Error, OSError) as error:
                if os.path.ismount(path):  # else it was dropped meanwhile
                    log.error("%s cannot be brought back to the bridge: %s", name, error)

    def _choose(self, link: dict[str, Any]) -> ipaddress.IPv4Network:
        """The network that sessions have addresses of, else the bridge's, else one that is free."""
        chosen: ipaddress.IPv4Network | None = None
        with contextlib.suppress(FileNotFoundError, ValueError):
            chosen = ipaddress.IPv4Network(self._chosen.read_text())
            if any(self.directory.iterdir()):
                return chosen
        for address in link.get("addr_info", ()):
            return ipaddress.IPv4Interface(f"{address['local']}/{address['prefixlen']}").network
        taken = [
            ipaddress.ip_network(route["dst"])
            for route in _shown(["ip", "-4", "-json", "route", "show", "table", "all"])
            if route["dst"] != "default" and route.get("type") != "broadcast"
        ]
        candidates: list[ipaddress.IPv4Network] = [chosen] if chosen else []
        candidates += [network for block in BLOCKS for network in block.subnets(new_prefix=PREFIX)]
        for network in candidates:
            if not any(network.overlaps(other) for other in taken):
                return network
        raise Error("unavailable", "every network for sessions is in use on this machine", "ip route")

    def _bridge(self, network: ipaddress.IPv4Network, link: dict[str, Any]) -> None:
        """Have the bridge there, with its address, and packets forwarded. link: what there is of it."""
        # With an address of its own: else it takes the lowest of its ports', and sessions remember the one before.
        commands = "" if link else f"link add {self.bridge} address {_hardware(network[1])} type bridge\n"
        if not any(address["local"] == str(network[1]) for address in link.get("addr_info", ())):
            commands += f"address add {network[1]}/{network.prefixlen} dev {self.bridge}\n"
        if commands:
            self._note(network)
            _output(["ip", "-batch", "-"], commands)
        elif not self._chosen.exists():  # an earlier version made it
            self._note(network)
            _run(["ip", "link", "set", self.bridge, "address", link["address"]])  # to stay what it is
        retired.remove(self.bridge)
        self._forward()

    def _note(self, network: ipaddress.IPv4Network) -> None:
        self._chosen.touch(mode=0o600)
        self._chosen.write_text(str(network))

    def _link(self) -> dict[str, Any]:
        """The bridge as `ip` shows it, with its IPv4 addresses; empty when there is none."""
        link = next(iter(_shown(["ip", "-json", "address", "show", "dev", self.bridge])), {})
        addresses = [address for address in link.get("addr_info", ()) if address["family"] == "inet"]
        return {**link, "addr_info": addresses} if link else {}

    def _protect(self, network: ipaddress.IPv4Network) -> None:
        """Have the firewall say what it should: it may have been set up anew, and resolvers may be others by now."""
        text = firewall.rules(self.bridge, str(network), resolvers.addresses(), self.access, uplinks.names())
        if self._table.ensure(text):
            log.warning("somebody changed the firewall of sessions, table inet %s; it is set up again", self.bridge)
        for rule in self._lets():
            if not _run([*FILTER, "-C", *rule]):
                _output([*FILTER, "-I", *rule])

    def _lets(self) -> list[list[str]]:
        """Rules of iptables: Docker drops there what it does not forward itself."""
        mark = ["-m", "comment", "--comment", self.bridge]
        back = ["-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"]
        return [
            ["FORWARD", "-i", self.bridge, "!", "-o", self.bridge, *mark, "-j", "ACCEPT"],
            ["FORWARD", "-o", self.bridge, *back, *mark, "-j", "ACCEPT"],
        ]

    def _forward(self) -> None:
        """Have this machine forward packets, and note it if it did not, for `close`."""
        if FORWARD.read_text().strip() == "0":
            log.warning("this machine does not forward packets; for its sessions it does from now on")
            self._forwarded.touch()
            FORWARD.write_text("1")

    def _forward_no_more(self) -> None:
        """Unless somebody else came to count on it: who has a bridge, does."""
        if self._forwarded.exists():
            if not list(Path("/sys/class/net").glob("*/bridge")):
                FORWARD.write_text("0")
            self._forwarded.unlink()


def _keep(path: Path) -> None:
    """Keep the network namespace of the calling thread by a mount at path."""
    mounts.mount(f"/proc/self/task/{threading.get_native_id()}/ns/net", path, None, mounts.MS_BIND)
    for name, value in SYSCTLS.items():
        Path("/proc/sys/net", name).write_text(value)


def _hardware(address: ipaddress.IPv4Address) -> str:
    """What goes with an IP address, the same at each time, as others remember it: locally administered."""
    return f"02:be:{address.packed.hex(':')}"


def _shown(command: list[str]) -> list[dict[str, Any]]:
    """What `ip -json` shows, nothing where what was asked for is not there; some versions list a `{}` for the rest."""
    done = subprocess.run(command, capture_output=True, check=False)
    return [entry for entry in json.loads(done.stdout or b"[]") if entry]


def _run(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _output(command: list[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Error("unavailable", f"{' '.join(command)} failed: {' '.join(done.stderr.split())}")
    return done.stdout
