"""Network namespaces made ahead, each with an address on the sessions' own bridge and a way out.

Owns: the bridge, the pairs of virtual interfaces, the rules of iptables that carry the bridge's name, and the files in
one directory that keep the namespaces. Published ports are rules in a chain of the bridge's name, each with the
sandbox's id as its comment. The sandbox's user namespace does not own them, so that root inside can change
nothing about them; what it needs (low ports, ping) is set here.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import ipaddress
import json
import logging
import os
import random
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from ...errors import Error
from . import mounts

COUNT = 4  # namespaces kept ready
SETTLE = 0.3  # seconds after one was taken until another is made: a session starts, and needs the CPUs just then
READY = ".ready"  # beside the file of each of these
CLONE_NEWNET = 0x40000000
# Searched for one that nothing on this machine uses; Docker and Podman take others by default.
BLOCKS = [ipaddress.IPv4Network(block) for block in ("10.213.0.0/16", "10.214.0.0/16", "172.31.192.0/18")]
PREFIX = 22  # of a bridge's network: a thousand sessions
SYSCTLS = {"ipv4/ip_unprivileged_port_start": "0", "ipv4/ping_group_range": "0 2147483647"}
RESOLVERS = ("/run/systemd/resolve/resolv.conf", "/etc/resolv.conf")  # the first names no resolver on loopback

NAT = ["iptables", "-w", "-t", "nat"]

T = TypeVar("T")
Ports = Sequence[Sequence[int]]  # pairs: of a sandbox, of this machine

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


class Network:
    """directory: of the namespaces' files. bridge: its name, at most 10 bytes, also the prefix of interfaces' names."""

    def __init__(self, directory: Path, bridge: str) -> None:
        self.directory, self.bridge = directory, bridge
        self._network: ipaddress.IPv4Network | None = None
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
        path.unlink(missing_ok=True)
        if path.suffix != READY:
            # Its interface goes now: another mount namespace of this machine may have a copy of the mount.
            threading.Thread(target=_run, args=[["ip", "link", "delete", f"{self.bridge}-{name}"]], daemon=True).start()

    def publish(self, name: str, id: str, ports: Ports) -> None:
        """Let ports of this machine lead to those of the sandbox `id` in the namespace `name`. Idempotent."""
        if not ports:
            return
        for rule in self._leads(self._ensure(), name, id, ports):
            if not _run([*NAT, "-C", *rule]):
                _output([*NAT, "-A", *rule])

    def withdraw(self, name: str, id: str, ports: Ports) -> None:
        """The opposite of `publish`. Silent if it was not done."""
        if ports and (network := self._address()):
            for rule in self._leads(network, name, id, ports):
                _run([*NAT, "-D", *rule])

    def _leads(self, network: ipaddress.IPv4Network, name: str, id: str, ports: Ports) -> Iterator[list[str]]:
        for own, port in ports:
            yield [
                self.bridge, "-p", "tcp", "-m", "tcp", "--dport", str(port), "-m", "comment", "--comment", id,
                "-j", "DNAT", "--to-destination", f"{network[int(name)]}:{own}",
            ]  # fmt: skip

    def adopt(self, used: Container[str], ids: Container[str]) -> None:
        """After a restart: the namespaces that are in use or ready stay, and the ports of these ids; the others go."""
        rules = subprocess.run([*NAT, "-S", self.bridge], capture_output=True, text=True, check=False).stdout
        for words in map(shlex.split, rules.splitlines()):
            if words[0] == "-A" and words[words.index("--comment") + 1] not in ids:
                _run([*NAT, "-D", *words[1:]])
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        ready = {path.stem for path in self._ready()}
        for path in self.directory.iterdir():
            if path.suffix != READY and path.name not in ready and path.name not in used:
                self.drop(path.name)

    def warm(self, after: float = 0.0) -> None:
        """Make namespaces in the background until enough are ready, beginning after so many seconds."""
        threading.Thread(target=self._fill, args=[after], name="network", daemon=True).start()

    def close(self) -> None:
        """Remove everything: for tests, and when the executor is uninstalled."""
        self._closed = True
        with self._filling:
            for path in self.directory.iterdir():
                self.drop(path.name)
            if network := self._address():
                for table, rule in self._rules(network):
                    while _run(["iptables", "-w", "-t", table, "-D", *rule]):
                        pass
                for action in ("-F", "-X"):
                    _run([*NAT, action, self.bridge])
                _run(["ip", "link", "delete", self.bridge])

    def resolvers(self) -> str:
        """The text of `/etc/resolv.conf` for a sandbox: this machine's, without resolvers that only it can reach."""
        text = next((Path(path).read_text() for path in RESOLVERS if Path(path).exists()), "")
        return "".join(line + "\n" for line in text.splitlines() if not _loopback(line))

    def _ready(self) -> list[Path]:
        return list(self.directory.glob(f"*{READY}"))

    def _fill(self, after: float) -> None:
        if not self._filling.acquire(blocking=False):
            return
        try:
            time.sleep(after)
            while not self._closed and len(self._ready()) < COUNT:
                path = self._make()
                path.with_suffix(READY).touch()
        except Error as error:
            log.error("%s", error.message)
        finally:
            self._filling.release()

    def _ensure(self) -> ipaddress.IPv4Network:
        """The bridge's network, with all that it needs."""
        with self._lock:
            self._network = self._network or self._bridge()
            return self._network

    def _make(self) -> Path:
        network = self._ensure()
        for attempt in range(3):
            # At random, because the kernel takes its time to remove the interfaces of one that was just dropped.
            path = self.directory / str(random.randrange(2, network.num_addresses - 1))
            try:
                path.touch(mode=0o600, exist_ok=False)
            except FileExistsError:
                continue
            try:
                self._populate(path, network)
                return path
            except (Error, OSError) as error:
                self.drop(path.name)
                if attempt == 2:
                    raise Error(
                        "unavailable", f"no network for the session: {error}", "beaker executor doctor"
                    ) from error
        raise Error("unavailable", f"all addresses of {network} are in use", "stop some sessions")

    def _populate(self, path: Path, network: ipaddress.IPv4Network) -> None:
        _apart(lambda: _namespace(path))
        name = f"{self.bridge}-{path.name}"
        _output(
            ["ip", "-batch", "-"],
            f"link add {name} type veth peer name eth0 netns {path}\n"
            f"link set {name} master {self.bridge} up\n"
            f"link set {name} type bridge_slave isolated on\n",
        )
        within = (
            "link set lo up\n"
            f"address add {network[int(path.name)]}/{network.prefixlen} dev eth0\n"
            "link set eth0 up\n"
            f"route add default via {network[1]}\n"
        )
        inside(path, lambda: _output(["ip", "-batch", "-"], within))

    def _bridge(self) -> ipaddress.IPv4Network:
        """The bridge's network, made when it is missing."""
        network = self._address()
        if not network:
            taken = [
                ipaddress.ip_network(route["dst"])
                for route in json.loads(_output(["ip", "-4", "-json", "route", "show", "table", "all"]))
                if route["dst"] != "default" and route.get("type") != "broadcast"
            ]
            free = (n for b in BLOCKS for n in b.subnets(new_prefix=PREFIX) if not any(n.overlaps(t) for t in taken))
            network = next(free, None)
            if not network:
                raise Error("unavailable", "every network for sessions is in use on this machine", "ip route")
            _output(
                ["ip", "-batch", "-"],
                f"link add {self.bridge} type bridge\n"
                f"address add {network[1]}/{network.prefixlen} dev {self.bridge}\n"
                f"link set {self.bridge} up\n",
            )
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        _run([*NAT, "-N", self.bridge])
        for table, rule in self._rules(network):
            if not _run(["iptables", "-w", "-t", table, "-C", *rule]):
                _output(["iptables", "-w", "-t", table, "-I", *rule])
        # Programs of this machine reach published ports at 127.0.0.1 too; the rule in `raw` keeps sessions from it.
        Path(f"/proc/sys/net/ipv4/conf/{self.bridge}/route_localnet").write_text("1")
        return network

    def _address(self) -> ipaddress.IPv4Network | None:
        command = ["ip", "-4", "-json", "address", "show", "dev", self.bridge]
        links = json.loads(subprocess.run(command, capture_output=True, check=False).stdout or b"[]")
        # Some versions list a `{}` for each other interface.
        address = next((a for link in links if link for a in link["addr_info"]), None)
        return ipaddress.IPv4Interface(f"{address['local']}/{address['prefixlen']}").network if address else None

    def _rules(self, network: ipaddress.IPv4Network) -> list[tuple[str, list[str]]]:
        """(table, chain and rule). Docker drops what it does not forward itself, hence ours come first."""
        mark = ["-m", "comment", "--comment", self.bridge]
        led = ["-o", self.bridge, "-m", "conntrack", "--ctstate", "DNAT", *mark]
        local = ["-m", "addrtype", "--dst-type", "LOCAL", *mark]
        return [
            ("raw", ["PREROUTING", "-i", self.bridge, "-d", "127.0.0.0/8", *mark, "-j", "DROP"]),
            ("nat", ["PREROUTING", *local, "-j", self.bridge]),
            ("nat", ["OUTPUT", *local, "-j", self.bridge]),
            # The way back must lead through this machine: from its own loopback, and from one session to another. The
            # latter fails where br_netfilter filters bridges: it turns such packets round on the bridge itself, and
            # `isolated` drops them there.
            ("nat", ["POSTROUTING", "-s", str(network), *led, "-j", "MASQUERADE"]),
            ("nat", ["POSTROUTING", "-s", "127.0.0.0/8", *led, "-j", "MASQUERADE"]),
            ("filter", ["FORWARD", *led, "-j", "ACCEPT"]),
            ("nat", ["POSTROUTING", "-s", str(network), "!", "-o", self.bridge, *mark, "-j", "MASQUERADE"]),
            ("filter", ["FORWARD", "-i", self.bridge, "!", "-o", self.bridge, *mark, "-j", "ACCEPT"]),
            (
                "filter",
                ["FORWARD", "-o", self.bridge, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", *mark,
                 "-j", "ACCEPT"],
            ),
        ]  # fmt: skip


def _loopback(line: str) -> bool:
    words = line.split()
    return len(words) > 1 and words[0] == "nameserver" and (words[1].startswith("127.") or words[1] == "::1")


def inside(namespace: Path | None, call: Callable[[], T]) -> T:
    """Call in a network namespace, None for this machine's own; programs started by it are in it too."""
    if namespace is None:
        return call()

    def entered() -> T:
        with mounts.opened(os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            _check(_libc.setns(fd, CLONE_NEWNET))
        return call()

    return _apart(entered)


def _apart(call: Callable[[], T]) -> T:
    """Call in a thread of its own: a thread can change its network namespace alone, and is of no use afterwards."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return future.result()


def _namespace(path: Path) -> None:
    """Make a network namespace and keep it by a mount at path."""
    _check(_libc.unshare(CLONE_NEWNET))
    mounts.mount(f"/proc/self/task/{threading.get_native_id()}/ns/net", path, None, mounts.MS_BIND)
    for name, value in SYSCTLS.items():
        Path("/proc/sys/net", name).write_text(value)


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _run(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _output(command: list[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Error("unavailable", f"{' '.join(command)} failed: {' '.join(done.stderr.split())}")
    return done.stdout
