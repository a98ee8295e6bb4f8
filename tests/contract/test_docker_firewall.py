"""Who may speak with a session of the docker driver, and with whom it may speak. Calls of the machine are made in the
network of the tests' Docker Engine, which takes the machine's place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from beaker_sessions.sandbox import firewall, packet
from tests.conftest import inside_network
from tests.stack import wait_for

from .conftest import ADA, DockerLab, Maker

CALLER = (
    "import errno, socket, sys\ntry: socket.create_connection((sys.argv[1], int(sys.argv[2])), 3); print('open')\n"
    "except TimeoutError: print('silence')\nexcept OSError as e: print(errno.errorcode[e.errno])"
)
SERVER = "import socket, time; s = socket.create_server(('', 8000)); print('up', flush=True); time.sleep(1000)"
STRANGER = 1600


@pytest.fixture
def make(docker_lab: DockerLab) -> Iterator[Maker]:
    maker = Maker(docker_lab)
    yield maker
    maker.close()


def calling(make: Maker, id: str, address: str, port: int) -> str:
    command = ("python3", "-c", CALLER, address, str(port))
    sandboxes = make.lab.sandboxes
    handle, terminal = sandboxes.exec(id, command, env={}, identity=ADA, workdir="/", size=None, stdin=False)
    stream = make.stream(terminal)
    stream.read()
    sandboxes.exec_exit(id, handle)
    return (stream.out + stream.err).decode().strip()


def test_machine_and_sessions_are_closed_to_each_other(make: Maker, docker_lab: DockerLab, dockerd: str) -> None:
    there = inside_network(dockerd)
    first = make.spec("python3", "-c", SERVER, image="debian", host_network=False, stdin=False)
    second = make.spec("python3", "-c", SERVER, image="debian", host_network=False, stdin=False)
    for spec in (first, second):
        make.start(spec).read(until=b"up")
    networks = docker_lab.engine.call("GET", f"/containers/beaker-{first.id}/json")["NetworkSettings"]["Networks"]
    own = networks[docker_lab.sandboxes.network.name]
    address, gateway = own["IPAddress"], own["Gateway"]

    def user_calling(uid: int) -> str:
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        command = [*there, *user, "/usr/bin/python3", "-c", CALLER, address, "8000"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()

    assert user_calling(0) == "open"
    assert user_calling(STRANGER) == "ECONNREFUSED"
    assert calling(make, second.id, address, 8000) != "open"
    with subprocess.Popen([*there, sys.executable, "-c", SERVER], stdout=subprocess.PIPE) as service:
        assert service.stdout
        service.stdout.readline()
        try:
            assert calling(make, first.id, gateway, 8000) == "ECONNREFUSED"
            # Whoever sets up a firewall anew, or prunes networks, is followed within seconds, or at the next start.
            network = docker_lab.sandboxes.network
            firewall.remove(network.name, network._prefix())
            assert calling(make, first.id, gateway, 8000) == "open", "the test tests nothing"
            docker_lab.sandboxes.guard()
            assert calling(make, first.id, gateway, 8000) == "ECONNREFUSED"
            with network.followed():  # by the kernel's word
                subprocess.run([*there, "nft", "flush", "table", "inet", network.name], check=True)
                wait_for("the firewall", lambda: calling(make, first.id, gateway, 8000) == "ECONNREFUSED")
            if os.path.exists(packet.DEVICE):
                assert [finding.level for finding in network.check()] == ["ok"] * 3
                firewall.apply("flush table ip nat", there)  # somebody's `flush ruleset`: the engine notices nothing
                (found,) = [finding for finding in network.check() if finding.level != "ok"]
                assert "leave with the address" in found.what
                assert "systemctl restart docker" in found.mend
        finally:
            service.kill()


def test_a_network_that_was_pruned_is_made_again(make: Maker, docker_lab: DockerLab) -> None:
    docker_lab.sandboxes.network.ensure()
    docker_lab.engine.call("DELETE", f"/networks/{docker_lab.sandboxes.network.name}")
    assert make.run("true", host_network=False)[0] == 0


def test_the_first_sessions_at_once_make_one_network(docker_lab: DockerLab) -> None:
    """The engine refused the second with "networks have same bridge name", and its session did not start."""
    network = docker_lab.sandboxes.network
    for _ in range(3):
        network.remove()
        with ThreadPoolExecutor(8) as pool:
            for made in [pool.submit(network.ensure) for _ in range(8)]:
                made.result()


def test_init_is_the_first_process(make: Maker, docker_lab: DockerLab) -> None:
    spec = make.spec("sleep", "1000", host_network=False, stdin=False)
    make.start(spec)
    init = docker_lab.sandboxes.init(spec.id)
    assert init is not None
    os.close(init)
    docker_lab.sandboxes.stop(spec.id, 0)
    wait_for("the end", lambda: docker_lab.sandboxes.init(spec.id) is None)
