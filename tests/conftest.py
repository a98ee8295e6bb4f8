"""How tests run beside each other, and what contract and end-to-end tests share: a Docker Engine, and images."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from beaker_sessions.errors import Error
from beaker_sessions.sandbox.docker.engine import Engine
from tests import images, network

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    distributes = config.getoption("dist", "no") != "no"  # its workers run the tests
    if os.geteuid() == 0 and not distributes:
        network.leave()


# The longest first. On more than two CPUs the end-to-end tests of a driver have two stacks: see `_group`.
GROUPS = ["e2e docker", "e2e oci", "e2e docker 2", "e2e oci 2", "contract", "tests/soak/test_sweep.py", "console"]
SECOND = "tests/e2e/test_i"  # the first file, by name, of those that have the second stack: half of the lines


def _group(test: str, cpus: int = len(os.sched_getaffinity(0))) -> str:
    """What shares a stack, and hence runs in one worker: one of GROUPS, or the test's file."""
    file, _, name = test.partition("::")
    if file.startswith("tests/contract/"):
        return "contract"
    if file.startswith("tests/e2e/console/"):
        return "console"
    drivers = {"docker", "oci"} & set(re.split(r"[\[\]-]", name))
    if file.startswith("tests/e2e/") and drivers:
        return f"e2e {drivers.pop()}" + (" 2" if cpus > 2 and file >= SECOND else "")
    return file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {group: place for place, group in enumerate(GROUPS)}
    items.sort(key=lambda item: places.get(_group(item.nodeid), len(GROUPS)))


class _Groups(LoadScopeScheduling):
    """Gives each worker a group, and the next when it is done."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _Groups(config, log)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_of_the_network() -> Iterator[None]:
    """Set up first, and hence ended last."""
    yield
    assert network.left() == []


@pytest.fixture(scope="session")
def debian() -> Path:
    """The tar of a small Debian root file system."""
    if reason := images.missing_for_debian():
        pytest.skip(reason)
    return images.debian()


@pytest.fixture(scope="session")
def dockerd() -> Iterator[str]:
    """The socket of a Docker Engine for these tests alone, in a network namespace of its own.

    BEAKER_TEST_DOCKER names the socket of one that runs already.
    """
    if given := os.environ.get("BEAKER_TEST_DOCKER"):
        yield given
        return
    if os.geteuid() != 0:
        pytest.skip("needs root to start a Docker Engine")
    if not shutil.which("dockerd"):
        pytest.skip("needs Docker Engine (dockerd)")
    with tempfile.TemporaryDirectory(prefix="beaker-docker-") as root:
        socket = f"{root}/docker.sock"
        command = [
            "unshare", "--net", "dockerd", "--data-root", f"{root}/data", "--exec-root", f"{root}/exec",
            "--pidfile", f"{root}/pid", "--host", f"unix://{socket}", "--live-restore",
        ]  # fmt: skip
        with open(f"{root}/log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(socket, process, Path(root, "log"))
            subprocess.run([*inside_network(socket), "ip", "link", "set", "lo", "up"], check=True)
            yield socket
        finally:
            process.terminate()
            process.wait(60)
            _unmount(root)


def inside_network(socket: str) -> list[str]:
    """What to put before a command that shall run in the network of the engine of `dockerd`."""
    pid = Path(socket).with_name("pid")
    return ["nsenter", f"--net=/proc/{pid.read_text().strip()}/ns/net"] if pid.exists() else []


def _unmount(root: str) -> None:
    """Docker Engine leaves the mounts of its networks behind."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for target in reversed(mounted):
        if target.startswith(root + "/"):
            subprocess.run(["umount", "--lazy", target], check=True)


def _wait(socket: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            Engine(socket).version  # noqa: B018
            return
        except Error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text()[-2000:]) from None
            time.sleep(0.05)
