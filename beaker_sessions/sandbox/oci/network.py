"""Network namespaces made ahead, each with an address on the sessions' own bridge and a way out.

Owns: the bridge, the pairs of virtual interfaces, the firewall around the bridge (`sandbox.firewall`), the rules of
iptables that carry the bridge's name, and the files in one directory that keep the namespaces. The sandbox's user
namespace does not own them, so that root inside can change nothing about them; what it needs (low ports, ping) is set
here.
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
import subprocess
import threading
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import TypeVar

from ...errors import Error
from .. import firewall, resolvers, uplinks
from . import mounts, retired

COUNT = 4  # namespaces kept ready
SETTLE = 0.3  # seconds after one was taken until another is made: a session starts, and needs the CPUs just then
READY = ".ready"  # beside the file of each of these
CLONE_NEWNET = 0x40000000
# Searched for one that nothing on this machine uses; Docker and Podman take others by default.
BLOCKS = [ipaddress.IPv4Network(block) for block in ("10.213.0.0/16", "10.214.0.0/16", "172.31.192.0/18")]
PREFIX = 22  # of a bridge's network: a thousand sessions
SYSCTLS = {"ipv4/ip_unprivileged_port_start": "0", "ipv4/ping_group_range": "0 2147483647"}

FILTER = ["iptables", "-w", "-t", "filter"]
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")

T = TypeVar("T")

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


class Network:
    """directory: of the namespaces' files. bridge: its name, at most 10 bytes, also the prefix of interfaces' names.

    access: what sessions may reach of this machine, as `firewall.rules` takes it.
    """

    def __init__(self, directory: Path, bridge: str, access: Iterable[str] = ()) -> None:
        self.directory, self.bridge, self.access = directory, bridge, list(access)
        self._forwarded = directory.with_name("forwarded")
        self._rules = ""  # in force
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

    def adopt(self, used: Container[str]) -> None:
        """After a restart: the namespaces that are in use or ready stay, the others go."""
        if self._address():  # there may be sessions
            try:
                self._ensure()
            except Error as error:
                log.error("%s", error.message)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        ready = {path.stem for path in self._ready()}
        for path in self.directory.iterdir():
            if path.suffix != READY and path.name not in ready and path.name not in used:
                self.drop(path.name)

    def guard(self) -> None:
        """Have the firewall there, should somebody have flushed it. Raises Error unavailable."""
        if self._network and not self._closed:
            self._ensure(again=True)

    def warm(self, after: float = 0.0) -> None:
        """Make namespaces in the background until enough are ready, beginning after so many seconds."""
        threading.Thread(target=self._fill, args=[after], name="network", daemon=True).start()

    def close(self) -> None:
        """Remove everything: for tests, and when the executor is uninstalled."""
        self._closed = True
        with self._filling:
            for path in self.directory.iterdir():
                self.drop(path.name)
            for rule in self._lets():
                while _run([*FILTER, "-D", *rule]):
                    pass
            retired.remove(self.bridge)
            _run(["ip", "link", "delete", self.bridge])
            firewall.remove(self.bridge)  # last: until then there is somebody to protect
            self._forward_no_more()

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
            if self._network is None or again:
                self._network = self._network or self._bridge()
                self._protect(self._network)
                _run(["ip", "link", "set", self.bridge, "up"])  # not before there is a firewall
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
                f"link add {self.bridge} type bridge\naddress add {network[1]}/{network.prefixlen} dev {self.bridge}\n",
            )
        retired.remove(self.bridge)
        self._forward()
        return network

    def _address(self) -> ipaddress.IPv4Network | None:
        command = ["ip", "-4", "-json", "address", "show", "dev", self.bridge]
        links = json.loads(subprocess.run(command, capture_output=True, check=False).stdout or b"[]")
        # Some versions list a `{}` for each other interface.
        address = next((a for link in links if link for a in link["addr_info"]), None)
        return ipaddress.IPv4Interface(f"{address['local']}/{address['prefixlen']}").network if address else None

    def _protect(self, network: ipaddress.IPv4Network) -> None:
        """Have the firewall say what it should: it may have been set up anew, and resolvers may be others by now."""
        text = firewall.rules(self.bridge, str(network), resolvers.addresses(), self.access, uplinks.names())
        if text != self._rules or not firewall.exists(self.bridge):
            firewall.apply(text)
            self._rules = text
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
            self._forwarded.touch()
            FORWARD.write_text("1")

    def _forward_no_more(self) -> None:
        """Unless somebody else came to count on it: who has a bridge, does."""
        if self._forwarded.exists():
            if not list(Path("/sys/class/net").glob("*/bridge")):
                FORWARD.write_text("0")
            self._forwarded.unlink()


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
