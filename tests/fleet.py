"""One server and several nodes: executors of their own sockets, state, hostnames and made-up GPUs, on one machine.

For tests of what is seen of several machines at once. Sessions are real, in the driver `oci` and a small image. All of
it is gone after `close`. Needs root.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from pathlib import Path

import yaml

from beaker_sessions.client import Client
from beaker_sessions.executor.rundir import RunDirectories
from beaker_sessions.sandbox.oci.driver import OciSandboxes
from beaker_sessions.transport import Endpoint
from tests import images
from tests.stack import BIN, Process, User, bridge, load_image, make_gpu, wait_for

IMAGE = "alpine"


class Node:
    """An executor. gpus: how many, all of one kind."""

    def __init__(self, fleet: Fleet, hostname: str, gpus: int, kind: str) -> None:
        self.fleet, self.hostname = fleet, hostname
        self.root = fleet.root / hostname.partition(".")[0]
        self.root.mkdir()
        self.socket, self.state = self.root / "x.sock", self.root / "state"
        self.bridge = bridge(f"{fleet.root.name[-4:]}{len(fleet.nodes)}")
        for number in range(gpus):
            make_gpu(self.root, self.root / "cdi", number, kind)
        token = self.root / "token"
        token.touch(0o600)
        token.write_text(fleet.admin.create_token({"name": hostname, "scope": "executor"})["token"])
        beaker = {"address": fleet.address, "tokenPath": str(token), "cluster": "lab/main"}
        beaker |= {"insecureAddresses": [fleet.address]}  # as if on another machine: the socket is beside one door only
        settings = {
            "storagePath": str(self.state), "socket": str(self.socket), "hostname": hostname, "beaker": beaker,
            "cdiPaths": [str(self.root / "cdi")], "driver": "oci", "bridge": self.bridge, "defaultImage": IMAGE,
            "dockerSocket": str(self.root / "none"), "mountPaths": [],
        }  # fmt: skip
        config = self.root / "config.yml"
        config.write_text(yaml.safe_dump(settings))
        self.executor = Process(self.root / "log", str(BIN / "beaker-executor"), "--config", str(config))
        self.id = ""

    def start(self) -> None:
        self.executor.start()
        wait_for(f"the executor of {self.hostname}", lambda: self.fleet.admin.get_node(self.hostname)["status"] == "ok")
        self.id = self.fleet.admin.get_node(self.hostname)["id"]

    def load(self, archive: Path) -> None:
        load_image(self.socket, archive, IMAGE)

    def session(self, user: User, *words: str) -> str:
        """Create one and leave it alone; its id. It may have to wait."""
        done = self.beaker(user, "session", "create", "--detach", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().strip()

    def beaker(self, user: User, *words: str) -> subprocess.CompletedProcess:
        return user.beaker(*words, env={"BEAKER_SOCKET": str(self.socket)})

    def close(self) -> None:
        """The executor ends first, and then what outlives it."""
        self.executor.kill()
        driver = OciSandboxes(self.state / "executor/oci", str(self.state), bridge=self.bridge)
        for found in driver.list():
            driver.remove(found.id)
        driver.close()
        left = RunDirectories(self.root / "sessions")
        for id in left.ids():
            left.remove(id)


class Fleet:
    """root: an empty directory that other users can pass through."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.endpoint = Endpoint(self.address, str(root))
        self.more = f"insecure_addresses: {self.address}\n"
        config = root / "server.yml"
        settings = {"port": port, "storagePath": str(root / "server"), "sockets": str(root)}
        config.write_text(yaml.safe_dump({"server": settings}))
        self.server = Process(root / "server.log", str(BIN / "beaker-server"), "--config", str(config), "serve")
        tokens = ["--token-file", root / "admin.token", "--executor-token-file", root / "executor.token"]
        init = [BIN / "beaker-server", "--config", config, "init", "--account", "root", *tokens]
        subprocess.run(init, check=True, capture_output=True)
        self.admin = Client(self.endpoint, (root / "admin.token").read_text().strip())
        self.nodes: list[Node] = []
        self.users: list[User] = []
        self.archive = root / "image.tar"

    def start(self, *nodes: tuple[str, int, str]) -> None:
        """The server, then these nodes: hostname, number of GPUs and their kind."""
        self.server.start()
        wait_for("the server", lambda: self.admin.whoami())
        images.oci_archive(images.alpine(), self.archive)
        for hostname, gpus, kind in nodes:
            node = Node(self, hostname, gpus, kind)
            self.nodes.append(node)
            node.start()  # one after the other: each chooses a network that is free
            node.load(self.archive)

    def user(self, name: str, **more: str) -> User:
        """A new Unix user with an account, whose name is made unique on this machine."""
        name = f"{name}-{self.root.name[-8:].strip('_').lower()}"
        home = self.root / "home" / name
        home.parent.mkdir(exist_ok=True)
        command = ["useradd", "--create-home", "--home-dir", str(home), "--shell", "/bin/bash", "--user-group", name]
        subprocess.run(command, check=True)
        user = User(self, name, self.admin.create_account({"name": name, **more})["token"])  # type: ignore[arg-type]
        self.users.append(user)
        return user

    @property
    def socket(self) -> Path:
        """Of the node that users are on who name none."""
        return self.nodes[0].socket

    def settle(self) -> None:
        """Uncordon all nodes, stop all sessions, and wait until the server knows that they have ended."""

        def quiet() -> bool:
            live = list(self.admin.jobs(kind="session", finalized=False))
            for job in live:
                self.admin.update_job(job["id"], {"status": {"canceled": True}})
            return not live

        for node in self.nodes:
            self.admin.update_node(node.id, {"cordoned": False})
        wait_for("the end of all sessions", quiet, 60)

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        self.admin.close()
        self.server.kill(signal.SIGTERM)
        for user in self.users:
            subprocess.run(["userdel", "--force", user.name], check=True, capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)
