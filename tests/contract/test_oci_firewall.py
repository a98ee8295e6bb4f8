"""Who may speak with a session of the oci driver, and with whom it may speak: tried from every side."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.executor import forwarding, ports
from beaker_sessions.model import Claim, Request
from beaker_sessions.sandbox import firewall
from beaker_sessions.sandbox.oci.network import Network
from tests.stack import wait_for

from .conftest import Inside, Maker, OciLab

# What becomes of a call: `open`, the error's name, or `silence`.
CALLER = """
import errno, socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)
    print("open")
except TimeoutError:
    print("silence")
except OSError as error:
    print(errno.errorcode[error.errno])
"""
SERVER = "import socket, time; s = socket.create_server(('', 8000)); time.sleep(1000)"
ADDRESS = "import socket; s = socket.socket(2, 2); s.connect(('192.0.2.1', 9)); print(s.getsockname()[0])"
STRANGER = 1600  # a uid of this machine, without an account


@pytest.fixture
def make(oci_lab: OciLab) -> Iterator[Maker]:
    maker = Maker(oci_lab)
    yield maker
    maker.close()


@pytest.fixture
def inside(make: Maker, tmp_path: Path) -> Inside:
    return Inside(make, tmp_path / "home")


@pytest.fixture
def other(make: Maker, tmp_path: Path) -> Inside:
    return Inside(make, tmp_path / "other")


def calling(inside: Inside, address: str, port: int) -> str:
    return inside.run("python3", "-c", CALLER, address, str(port))[1].strip()


def user_calling(address: str, port: int, uid: int = STRANGER, prefix: tuple[str, ...] = ()) -> str:
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
    command = [*prefix, *user, "/usr/bin/python3", "-c", CALLER, address, str(port)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


def serve(inside: Inside) -> str:
    """Have a session serve its port 8000: its own address."""
    inside.run("sh", "-c", f'python3 -c "{SERVER}" >/dev/null 2>&1 &')
    address = inside.run("python3", "-c", ADDRESS)[1].strip()
    wait_for("the server", lambda: user_calling(address, 8000, uid=0) == "open")
    return address


def gateway(lab: OciLab) -> str:
    return str(lab.sandboxes.network._ensure()[1])


def publish(inside: Inside) -> int:
    """Publish a session's port 8000, as the executor does."""
    choice = ports.Ports()
    request = Request("image", ports=((8000, 0),))
    mapped, sockets = choice.take(inside.spec.id, request, Claim(ports=choice.pick(inside.spec.id, request, [])), [])
    init = inside.make.lab.sandboxes.init(inside.spec.id)
    assert init is not None
    forwarding.start(inside.spec.id, init, sockets)
    os.close(init)
    for sock, _ in sockets:
        sock.close()
    return mapped[0][1]


def test_services_of_the_machine_are_closed_to_sessions(inside: Inside, oci_lab: OciLab) -> None:
    """Those that listen on every address, at whatever address of the machine; and its datagrams."""
    machine = gateway(oci_lab)
    with socket.create_server(("", 0)) as service, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        port = service.getsockname()[1]
        others = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
        for address in {machine, *(one for one in others if "." in one)}:
            assert calling(inside, address, port) == "ECONNREFUSED", address
        datagrams.bind(("", 0))
        where = (machine, datagrams.getsockname()[1])
        inside.run("python3", "-c", f"import socket; socket.socket(2, 2).sendto(b'hello', {where})")
        datagrams.settimeout(0.5)
        with pytest.raises(TimeoutError):
            datagrams.recv(100)


def test_nor_are_they_open_by_ipv6(inside: Inside, oci_lab: OciLab) -> None:
    shown = subprocess.run(["ip", "-6", "-o", "address", "show", "dev", oci_lab.bridge], capture_output=True, text=True)
    if not shown.stdout:
        pytest.skip("needs IPv6")
    with socket.create_server(("::", 0), family=socket.AF_INET6) as service:
        link_local = shown.stdout.split()[3].split("/")[0]
        assert calling(inside, f"{link_local}%eth0", service.getsockname()[1]) != "open"


def test_what_the_settings_name_is_open(inside: Inside, oci_lab: OciLab) -> None:
    network: Network = oci_lab.sandboxes.network
    with socket.create_server(("", 0)) as service:
        port = service.getsockname()[1]
        network.access = [f"{gateway(oci_lab)}:{port}"]
        try:
            network._ensure(again=True)
            assert calling(inside, gateway(oci_lab), port) == "open"
        finally:
            network.access = []
            network._ensure(again=True)
        assert calling(inside, gateway(oci_lab), port) == "ECONNREFUSED"


# Many calls at once, each refused, or still waiting after a while.
MANY = """
import asyncio, errno, sys
async def call():
    try:
        await asyncio.wait_for(asyncio.open_connection(sys.argv[1], int(sys.argv[2])), 5)
        return "open"
    except asyncio.TimeoutError:
        return "silence"
    except OSError as error:
        return errno.errorcode[error.errno]
async def main():
    print(*sorted(set(await asyncio.gather(*(call() for _ in range(60))))))
asyncio.run(main())
"""


def test_every_one_of_many_calls_is_refused(inside: Inside, oci_lab: OciLab) -> None:
    with socket.create_server(("", 0)) as service:
        port = str(service.getsockname()[1])
        said = inside.run("python3", "-c", MANY, gateway(oci_lab), port)
    assert said[1].split() == ["ECONNREFUSED"]


METADATA = ("169.254.169.254", "100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254")


def words(*lines: str, prefix: tuple[str, ...] = ()) -> None:
    for line in lines:
        subprocess.run([*prefix, *line.split()], check=True)


@contextlib.contextmanager
def network_of_another(name: str) -> Iterator[tuple[str, ...]]:
    """A network namespace behind the interface `name` of this machine; the words that run a program in it."""
    with subprocess.Popen(["unshare", "--net", "sleep", "1000"]) as owner:
        there = ("nsenter", f"--net=/proc/{owner.pid}/ns/net")
        try:
            wait_for("it", lambda: os.readlink(f"/proc/{owner.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
            words(f"ip link add {name} type veth peer name eth0 netns {owner.pid}", f"ip link set {name} up")
            words("ip link set lo up", "ip link set eth0 up", prefix=there)
            yield there
        finally:
            owner.kill()
            subprocess.run(["ip", "link", "delete", name], check=False)


@contextlib.contextmanager
def serving(there: tuple[str, ...]) -> Iterator[None]:
    """A server of port 8000 in that network, at all its addresses."""
    listen = "s = socket.create_server(('::', 8000), family=10, dualstack_ipv6=True)"
    code = f"import socket, time; {listen}; print(flush=True); time.sleep(1000)"
    with subprocess.Popen([*there, sys.executable, "-c", code], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout
            server.stdout.readline()
            yield
        finally:
            server.kill()


@pytest.fixture
def world(oci_lab: OciLab) -> Iterator[tuple[str, ...]]:
    """What is beyond the machine: its only way out leads there, at 198.51.100.2. It serves port 8000."""
    with network_of_another("uplink0") as there:
        words("ip address add 198.51.100.1/24 dev uplink0", "ip -6 address add fd99::1/64 dev uplink0 nodad")
        words("ip address add 198.51.100.2/24 dev eth0", "ip -6 address add fd99::2/64 dev eth0 nodad", prefix=there)
        words("ip route add default via 198.51.100.2", "ip -6 route add default via fd99::2")
        oci_lab.sandboxes.network._ensure(again=True)
        with serving(there):
            yield there


@pytest.fixture
def container(oci_lab: OciLab) -> Iterator[str]:
    """Somebody's container, as Docker makes one, with its port 8000 published as 8080 of the machine; its address."""
    there = ["PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "test-docker"]
    nat = ["iptables", "-w", "-t", "nat"]
    with network_of_another("vethdocker") as inside:
        words("ip link add docker9 type bridge", "ip address add 10.97.0.1/24 dev docker9", "ip link set docker9 up")
        words("ip link set vethdocker master docker9")
        words("ip address add 10.97.0.2/24 dev eth0", "ip route add default via 10.97.0.1", prefix=inside)
        try:
            for rule in (["-N", "test-docker"], ["-A", *there]):
                subprocess.run([*nat, *rule], check=True)
            led = "! -i docker9 -p tcp --dport 8080 -j DNAT --to-destination 10.97.0.2:8000"
            subprocess.run([*nat, "-A", "test-docker", *led.split()], check=True)
            with serving(inside):
                yield "10.97.0.2"
        finally:
            for rule in (["-D", *there], ["-F", "test-docker"], ["-X", "test-docker"]):
                subprocess.run([*nat, *rule], check=True)
            words("ip link delete docker9")
    del oci_lab


def test_the_way_out_is_open_and_metadata_services_are_not(inside: Inside, world: tuple[str, ...]) -> None:
    assert calling(inside, "198.51.100.2", 8000) == "open"
    for address in METADATA:
        words(f"ip address add {address} dev lo{' nodad' if ':' in address else ''}", prefix=world)
        assert user_calling(address, 8000) == "open", "the test tests nothing"
        assert calling(inside, address, 8000) in ("ECONNREFUSED", "ENETUNREACH"), address


def test_a_bridge_that_leads_to_other_machines_is_a_way_out(
    inside: Inside, world: tuple[str, ...], oci_lab: OciLab
) -> None:
    words("ip link add br0 type bridge", "ip link set br0 up", "ip address flush dev uplink0")
    try:
        words("ip link set uplink0 master br0", "ip address add 198.51.100.1/24 dev br0")
        words("ip route add default via 198.51.100.2")
        oci_lab.sandboxes.network._ensure(again=True)
        wait_for("the bridge", lambda: user_calling("198.51.100.2", 8000) == "open")
        assert calling(inside, "198.51.100.2", 8000) == "open"
    finally:
        words("ip link delete br0")
    del world


def test_containers_of_the_machine_are_closed_whatever_they_publish(
    inside: Inside, world: tuple[str, ...], container: str, oci_lab: OciLab
) -> None:
    network, machine = oci_lab.sandboxes.network, gateway(oci_lab)
    assert user_calling("198.51.100.1", 8080, prefix=world, uid=0) == "open", "published for the world"
    assert user_calling(container, 8000) == "open"
    assert calling(inside, container, 8000) == "ECONNREFUSED"
    assert calling(inside, machine, 8080) == "ECONNREFUSED"
    assert calling(inside, "198.51.100.1", 8080) == "ECONNREFUSED"
    for access, port in (("8080", 8080), (f"{machine}:8080", 8080), ("9999", 0), (f"{container}:8000", 0)):
        network.access = [access]
        try:
            network._ensure(again=True)
            assert calling(inside, machine, 8080) == ("open" if port else "ECONNREFUSED"), access
            assert calling(inside, container, 8000) == ("open" if container in access else "ECONNREFUSED"), access
        finally:
            network.access = []
            network._ensure(again=True)


def test_unpublished_ports_are_open_to_root_alone(inside: Inside, other: Inside) -> None:
    address = serve(inside)
    assert user_calling(address, 8000, uid=0) == "open"
    assert user_calling(address, 8000) == "ECONNREFUSED"
    assert calling(other, address, 8000) != "open"
    # A container of somebody else's, on a bridge of its own, or another machine with a route to us.
    with network_of_another("stranger0") as there:
        words("ip address add 10.98.0.1/24 dev stranger0")
        words("ip address add 10.98.0.2/24 dev eth0", "ip route add default via 10.98.0.1", prefix=there)
        with socket.create_server(("10.98.0.1", 0)) as reached:
            assert user_calling("10.98.0.1", reached.getsockname()[1], uid=0, prefix=there) == "open"
        assert user_calling(address, 8000, uid=0, prefix=there) == "silence"


def test_published_ports_are_open_to_all_and_only_while_they_are_published(
    inside: Inside, other: Inside, oci_lab: OciLab
) -> None:
    serve(inside)
    port = publish(inside)
    machine = gateway(oci_lab)
    assert user_calling("127.0.0.1", port) == "open"
    assert calling(other, machine, port) == "open"
    assert calling(inside, machine, port) == "open", "its own, too"
    inside.make.lab.sandboxes.remove(inside.spec.id)
    wait_for("the forwarder's end", lambda: inside.spec.id not in forwarding.running())
    with socket.create_server(("", port)):  # whoever has the port next is no published port
        assert calling(other, machine, port) == "ECONNREFUSED"


def test_a_firewall_that_was_flushed_is_there_again(inside: Inside, oci_lab: OciLab) -> None:
    with oci_lab.sandboxes.network._filling:  # which looks at the firewall as well
        firewall.remove(oci_lab.bridge)
    with socket.create_server(("", 0)) as service:
        oci_lab.again()
        assert calling(inside, gateway(oci_lab), service.getsockname()[1]) == "ECONNREFUSED"


def test_a_firewall_that_was_flushed_is_there_again_though_no_session_starts(
    inside: Inside, world: tuple[str, ...], oci_lab: OciLab
) -> None:
    """Everything that the reconciling executor asks for, after all tables went, iptables' too."""
    address = serve(inside)
    assert calling(inside, "198.51.100.2", 8000) == "open"
    assert user_calling(address, 8000) == "ECONNREFUSED"
    with oci_lab.sandboxes.network._filling:
        words("nft flush ruleset")
    assert user_calling(address, 8000) == "open", "the test tests nothing"
    oci_lab.sandboxes.guard()
    assert user_calling(address, 8000) == "ECONNREFUSED"
    assert user_calling("198.51.100.2", 8000) == "open"
    assert calling(inside, "198.51.100.2", 8000) == "open"
    del world


def test_rules_of_an_earlier_version_go(inside: Inside, oci_lab: OciLab) -> None:
    bridge, nat = oci_lab.bridge, ["iptables", "-w", "-t", "nat"]
    mark = ["-m", "comment", "--comment", bridge]
    led = ["-p", "tcp", "-m", "tcp", "--dport", "8420", "-m", "comment", "--comment", inside.spec.id]
    for rule in (
        [*nat, "-N", bridge],
        [*nat, "-A", bridge, *led, "-j", "DNAT", "--to-destination", "10.213.0.2:80"],
        [*nat, "-I", "OUTPUT", "-m", "addrtype", "--dst-type", "LOCAL", *mark, "-j", bridge],
        ["iptables", "-w", "-t", "raw", "-I", "PREROUTING", "-i", bridge, "-d", "127.0.0.0/8", *mark, "-j", "DROP"],
    ):
        subprocess.run(rule, check=True)
    localnet = Path(f"/proc/sys/net/ipv4/conf/{bridge}/route_localnet")
    localnet.write_text("1")
    oci_lab.again()
    for table in ("nat", "raw"):
        listed = subprocess.run(["iptables", "-w", "-t", table, "-S"], capture_output=True, text=True, check=True)
        assert bridge not in listed.stdout
    assert localnet.read_text().strip() == "0"


FORWARDING = """
import sys
from pathlib import Path
from beaker_sessions.sandbox.oci.network import FORWARD, Network
for before in "01":
    FORWARD.write_text(before)
    network = Network(Path(sys.argv[1], "networks"), "bforward")
    network.adopt(())
    network._ensure()
    Network(Path(sys.argv[1], "networks"), "bforward")._ensure()
    print(before, FORWARD.read_text().strip())
    network.close()
    print(FORWARD.read_text().strip())
"""


def test_forwarding_is_switched_off_again_by_whoever_switched_it_on(tmp_path: Path) -> None:
    """On a machine of its own, as far as networks go."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a network namespace")
    mounts = "mount -t sysfs none /sys; ip link set lo up"
    script = f'{mounts}; exec "$@"'
    command = ["unshare", "--net", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", FORWARDING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["0 1", "0", "1 1", "1", ""]
