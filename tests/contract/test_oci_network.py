"""The bridge of the oci driver and its namespaces, without containers: addresses, and what somebody breaks."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.sandbox import firewall, netns, packet
from beaker_sessions.sandbox.oci import mounts, network
from beaker_sessions.sandbox.oci.network import FORWARD, Network
from tests.stack import bridge, wait_for

Make = Callable[[], Network]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes instances of the driver's network, all of one bridge; a new one takes the place of the last."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    monkeypatch.setattr(Network, "warm", lambda *_: None)  # nothing is made ahead, or looked at unasked
    directory, name = tmp_path / "networks", bridge(secrets.token_hex(3)[:5])
    made: list[Network] = []

    def make() -> Network:
        made.append(Network(directory, name))
        made[-1].adopt({path.name for path in directory.iterdir()} if directory.exists() else ())
        return made[-1]

    yield make
    made[-1].close()


def reaches(net: Network, *paths: Path) -> bool:
    """Whether the machine is heard from within, at the bridge's address: it refuses."""
    gateway = net._ensure()[1]

    def call() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection((str(gateway), 9), 1).close()
        return True

    return all(netns.inside(path, call) for path in paths)


def words(line: str) -> None:
    subprocess.run(line.split(), check=True)


def isolated(net: Network, path: Path) -> bool:
    command = ["ip", "-json", "-details", "link", "show", "dev", net._interface(path)]
    link = network._shown(command)[0]
    return bool(link["master"] == net.bridge and link["linkinfo"]["info_slave_data"]["isolated"])


def test_every_address_is_given_out(make: Make) -> None:
    net = make()
    last = net._ensure().num_addresses - 2
    for number in range(2, last + 1):
        (net.directory / str(number)).touch()
    with pytest.raises(Error) as error:
        net.take()
    assert error.value.message.startswith("all addresses of ")
    (net.directory / "700").unlink()
    path = net.take()
    assert path.name == "700"
    wait_for("the way", lambda: reaches(net, path))
    for other in set(net.directory.iterdir()) - {path}:
        other.unlink()


def test_an_address_is_taken_until_its_interface_is_gone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the interface that goes may be somebody else's by then."""
    net, run, go = make(), network._run, threading.Event()

    def slow(command: list[str]) -> bool:
        if command[:3] == ["ip", "link", "delete"]:
            assert go.wait(60)
        return run(command)

    path = net.take()
    monkeypatch.setattr(network, "_run", slow)
    net.drop(path.name)
    assert path.exists()
    go.set()
    wait_for("the end", lambda: not path.exists())
    assert not run(["ip", "link", "show", "dev", net._interface(path)])


def test_the_bridge_has_one_address_whoever_comes_and_goes(make: Make) -> None:
    """Else those who run remember another, and send to nobody for half a minute."""
    net = make()
    net._ensure()
    before = net._link()["address"]
    paths = [net.take() for _ in range(3)]
    net.drop(paths[0].name)
    wait_for("the end", lambda: not paths[0].exists())
    assert net._link()["address"] == before


BROKEN = {
    "deleted": "ip link delete {bridge}",
    "set down": "ip link set {bridge} down",
    "without its address": "ip address flush dev {bridge}",
    "a port taken away": "ip link set {port} nomaster",
    "an interface deleted": "ip link delete {port}",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_bridge_that_somebody_broke_is_mended_for_those_who_are_on_it(make: Make, how: str) -> None:
    net = make()
    path, other = net.take(), net.take()
    wait_for("the way", lambda: reaches(net, path, other))  # a bridge takes up to a second after its first port
    words(BROKEN[how].format(bridge=net.bridge, port=net._interface(path)))
    with pytest.raises(OSError, match=r"unreachable|No route|timed out"):
        reaches(net, path)
    net.guard()
    wait_for("the way", lambda: reaches(net, path, other))
    assert isolated(net, path)
    assert isolated(net, other)


def test_a_bridge_that_was_deleted_while_no_executor_was_there_has_its_network_again(make: Make) -> None:
    net = make()
    path, before = net.take(), net._ensure()
    words(f"ip link delete {net.bridge}")
    again = make()
    assert again._ensure() == before
    wait_for("the way", lambda: reaches(again, path))


def test_a_bridge_deleted_again_and_again_while_sessions_start(make: Make) -> None:
    net = make()
    net._ensure()
    done = threading.Event()

    def delete() -> None:
        while not done.wait(0.03):
            subprocess.run(["ip", "link", "delete", net.bridge], capture_output=True, check=False)

    with ThreadPoolExecutor() as pool:
        fate = pool.submit(delete)
        results = list(pool.map(lambda _: _taken(net), range(8)))
        done.set()
        fate.result()
    taken = [path for path in results if path]
    assert taken
    net.guard()
    wait_for("the way", lambda: reaches(net, *taken))
    assert all(isolated(net, path) for path in taken)


def _taken(net: Network) -> Path | None:
    """None where the bridge was deleted too often for a start."""
    try:
        return net.take()
    except Error:
        return None


CHANGED = {
    "flushed": "nft flush ruleset",
    "emptied": "nft flush table inet {bridge}",
    "a chain opened": "nft flush chain inet {bridge} input",
    "deleted": "ip link delete {bridge}",
    "set down": "ip link set {bridge} down",
    "without its address": "ip address flush dev {bridge}",
}


def test_what_somebody_changes_is_mended_at_once(make: Make) -> None:
    """By the kernel's word of it: nobody calls `guard`."""
    net = make()
    path = net.take()
    with net.followed(), socket.create_server(("", 0)) as service:
        where = (str(net._ensure()[1]), service.getsockname()[1])

        def closed() -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(where, 1).close()
                return False
            return True

        for how in CHANGED.values():
            words(how.format(bridge=net.bridge))
            wait_for(how, lambda: netns.inside(path, closed))


def test_forwarding_that_was_switched_off_is_on_again(make: Make) -> None:
    net = make()
    net._ensure()
    FORWARD.write_text("0")
    net.guard()
    assert FORWARD.read_text().strip() == "1"


CHAIN = "table ip t {{ chain c {{ type {} priority 0; {} }}; }}"
WRONG = {
    "packets dropped": CHAIN.format("filter hook forward", "policy drop;"),
    "another's translation": CHAIN.format("nat hook postrouting", "ip daddr 198.19.213.2 snat to 203.0.113.9;"),
    "answers dropped": CHAIN.format("filter hook prerouting", "ip saddr 198.19.213.2 drop;"),
}


def test_doctor_sends_a_packet(make: Make) -> None:
    net = make()
    if not os.path.exists(packet.DEVICE):
        pytest.skip("needs /dev/net/tun")
    assert [finding.level for finding in net.check()] == ["ok"] * 3
    for how, rules in WRONG.items():
        firewall.apply(rules)
        try:
            (found,) = [finding for finding in net.check() if finding.level != "ok"]
            assert found.level == "error", how
        finally:
            words("nft delete table ip t")
    shown = network._shown(["ip", "-json", "link", "show"])
    assert not [link for link in shown if link["ifname"] == f"{net.bridge}-t"]


def test_namespaces_of_an_executor_that_was_killed_are_given_back(make: Make) -> None:
    net = make()
    path = net.take()
    mounts.unmount(path)
    net.adopt(())
    wait_for("the end", lambda: not list(net.directory.iterdir()))
