"""A whole system of its own in one directory: Docker Engine, server, executor, made-up GPUs, Unix users.

For the end-to-end tests and the bench. Nothing here touches the machine's own Docker Engine, sockets or settings; all
of it is gone after `close`. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from beaker_sessions.executor.rundir import RunDirectories
from beaker_sessions.ids import is_ulid
from beaker_sessions.sandbox.oci import mounts
from beaker_sessions.sandbox.oci.driver import OciSandboxes
from beaker_sessions.transport import Endpoint
from setup import testing

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(os.environ.get("BEAKER_TEST_BIN") or Path(sys.executable).parent)  # of what `make test` installs
GPU_MAJOR = 240  # for local use, no driver: open(2) says ENXIO where the device is allowed and EPERM where it is not


def wait_for(what: str, check: Callable[[], object], seconds: float = 60.0) -> None:
    """Poll until `check` returns something true; it may raise Error or OSError meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(Error, OSError):
            if check():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.02)


def bridge(name: str) -> str:
    """A bridge's name by which `make test` knows it as its own. name: unique in this run, at most 5 bytes."""
    return testing.bridges(os.environ.get(testing.MARK, "")) + name


def make_gpu(root: Path, cdi: Path, number: int, kind: str = "example.com/gpu") -> Path:
    """A device below `root` that nothing drives, and its specification in `cdi`."""
    device = root / f"gpu{number}"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(GPU_MAJOR, number))
    device.chmod(0o666)
    cdi.mkdir(exist_ok=True)
    inside = f"/dev/example{number}"
    edits = {"deviceNodes": [{"path": inside, "hostPath": str(device)}], "env": [f"EXAMPLE_GPU={number}"]}
    named = {"name": str(number), "containerEdits": edits}
    specification = {"cdiVersion": "0.5.0", "kind": kind, "devices": [named]}
    (cdi / f"gpu{number}.json").write_text(json.dumps(specification))
    return device


def load_image(socket: Path, archive: Path, name: str) -> None:
    """Give the executor at a door an image, without an engine or a registry."""
    command = [BIN / "beaker", "executor", "images", "load", archive, name]
    subprocess.run(command, env={**os.environ, "BEAKER_SOCKET": str(socket)}, check=True, capture_output=True)


class Process:
    """A program of the stack, its output in `log`."""

    def __init__(self, log: Path, *command: str, env: Mapping[str, str] | None = None) -> None:
        self.command, self.log, self.env = command, log, env
        self.popen: subprocess.Popen | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(self.env or {})},
                start_new_session=True,
            )  # fmt: skip

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.popen and self.popen.poll() is None:
            self.popen.send_signal(number)
            self.popen.wait(60)

    @property
    def pid(self) -> int:
        assert self.popen
        return self.popen.pid


class User:
    """A Unix user with an account of the same name, and its token in its home."""

    def __init__(self, stack: Stack, name: str, token: str) -> None:
        self.stack, self.name, self.token = stack, name, token
        entry = pwd.getpwnam(name)
        self.uid, self.gid, self.home = entry.pw_uid, entry.pw_gid, Path(entry.pw_dir)
        self.login(token)

    def login(self, token: str) -> None:
        config = self.home / ".beaker" / "config.yml"
        config.parent.mkdir(mode=0o700, exist_ok=True)
        config.write_text(f"agent_address: {self.stack.address}\nuser_token: {token}\n{self.stack.more}")
        config.chmod(0o600)
        for path in (config.parent, config):
            os.chown(path, self.uid, self.gid)

    @property
    def env(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "USER": self.name,
            "LOGNAME": self.name,
            "PATH": os.environ["PATH"],
            "TERM": "xterm",
            "LANG": "C.UTF-8",
            "BEAKER_SOCKET": str(self.stack.socket),
        }

    def process(self) -> dict:
        """Keyword arguments that make `subprocess` run something as this user, from home."""
        groups = os.getgrouplist(self.name, self.gid)
        return {"user": self.uid, "group": self.gid, "extra_groups": groups, "env": self.env, "cwd": self.home}

    def beaker(
        self, *words: str, input: bytes = b"", env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> subprocess.CompletedProcess:
        """Run `beaker` without a terminal, from home if not told otherwise."""
        return self.run(str(BIN / "beaker"), *words, input=input, env=env, cwd=cwd)

    def run(
        self, *command: str, input: bytes = b"", env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> subprocess.CompletedProcess:
        """Run a program as this user."""
        process = self.process()
        process.update(env={**process["env"], **(env or {})}, cwd=cwd or process["cwd"])
        return subprocess.run(command, input=input, capture_output=True, timeout=120, **process)

    def json(self, *words: str) -> object:
        done = self.beaker(*words, "--format", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


class Stack:
    """root: an empty directory that other users can pass through. gpus: how many to make up.

    programs: the directory of its programs.
    """

    more = ""  # lines of its users' configuration

    def __init__(
        self, root: Path, gpus: int = 0, driver: str = "docker", settings: Mapping[str, object] | None = None,
        programs: Path = BIN,
    ) -> None:  # fmt: skip
        self.root, self.driver, self.programs = root, driver, programs
        self.docker_socket, self.socket = root / "docker.sock", root / "executor.sock"
        self.state, self.cdi = root / "state", root / "cdi"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.endpoint = Endpoint(self.address, str(root))
        self.config, self.token_file, self.admin_file = (
            root / "config.yml",
            root / "executor.token",
            root / "admin.token",
        )
        self.users: list[User] = []
        self.devices = [make_gpu(root, self.cdi, number) for number in range(gpus)]
        self.bridge = bridge(root.name[-5:])
        self._write_settings(port, {"driver": driver, "bridge": self.bridge, **(settings or {})})
        log = root / "log"
        log.mkdir()
        # A network of its own: no bridge and no rule is shared with the machine's Docker Engine or another test's.
        self.docker = Process(
            log / "dockerd", "unshare", "--net", "dockerd", "--live-restore",
            "--data-root", str(root / "docker"), "--exec-root", str(root / "exec"),
            "--pidfile", str(root / "docker.pid"), "--host", f"unix://{self.docker_socket}",
        )  # fmt: skip
        self.server = Process(log / "server", str(programs / "beaker-server"), "--config", str(self.config), "serve")
        self.executor = Process(log / "executor", str(programs / "beaker-executor"), "--config", str(self.config))

    def _write_settings(self, port: int, settings: Mapping[str, object]) -> None:
        self.config.write_text(
            yaml.safe_dump(
                {
                    "storagePath": str(self.state), "socket": str(self.socket), "hostname": "node-1.lab",
                    "beaker": {"address": self.address, "tokenPath": str(self.token_file), "cluster": "lab/main"},
                    "dockerSocket": str(self.docker_socket), "cdiPaths": [str(self.cdi)],
                    "server": {"port": port, "storagePath": str(self.state), "sockets": str(self.root)},
                    **settings,
                }
            )
        )  # fmt: skip

    def start(self) -> None:
        self.docker.start()
        wait_for("Docker Engine", self.docker_socket.exists)
        wait_for("Docker Engine", lambda: self.docker_cli("version").returncode == 0)
        tokens = ["--token-file", self.admin_file, "--executor-token-file", self.token_file]
        init = [self.programs / "beaker-server", "--config", self.config, "init", "--account", "root", *tokens]
        subprocess.run(init, check=True, capture_output=True)
        self.server.start()
        self.admin = Client(self.endpoint, self.admin_file.read_text().strip())
        wait_for("the server", lambda: self.admin.whoami())
        self.start_executor()

    def start_executor(self) -> None:
        self.executor.start()
        wait_for("the executor", self.answers)

    def answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.connect(str(self.socket))
            probe.sendall(json.dumps({"v": 1, "op": "node", "token": self.admin.token}).encode())
            return "node" in json.loads(probe.recv(1 << 17))

    def image(self, name: str, tar: Path) -> None:
        """Put a root filesystem into Docker Engine under a name."""
        subprocess.run(
            ["docker", "-H", f"unix://{self.docker_socket}", "import", str(tar), name], check=True, capture_output=True
        )

    def docker_cli(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["docker", "-H", f"unix://{self.docker_socket}", *words], capture_output=True, text=True)

    def containers(self) -> list[str]:
        return self.docker_cli("ps", "-aq", "--no-trunc").stdout.split()

    def settle(self) -> None:
        """Stop all sessions, and wait until the node is as if there had been none. Raises TimeoutError."""

        def quiet() -> bool:
            for job in self.admin.jobs(kind="session", finalized=False):  # the server hears of some a little later
                self.admin.update_job(job["id"], {"status": {"canceled": True}})
            return not self.sandboxes() and not self.live()

        wait_for("the end of all sessions", quiet)
        assert not self.files(), f"files of ended sessions are left: {self.files()}"

    def files(self) -> list[Path]:
        """The directories of sandboxes. Names in containers-storage look like ids by chance."""
        found = (self.state / "executor" / self.driver).rglob("*")
        return [path for path in found if is_ulid(path.name) and "storage" not in path.parts]

    def sandboxes(self) -> dict[str, int]:
        """Every sandbox that exists, running or not: session id -> pid of its init, 0 when it does not run."""
        if self.driver == "oci":
            found = (self.state / "executor" / self.driver / "sessions").glob("*/sandbox.json")
            records = [json.loads(path.read_text()) for path in found]
            return {record["id"]: (record["init"] or {}).get("pid", 0) for record in records}
        ids = self.docker_cli("ps", "-aq", "--no-trunc", "--filter", "label=beaker.session").stdout.split()
        found = json.loads(self.docker_cli("inspect", *ids).stdout or "[]")
        return {one["Config"]["Labels"]["beaker.session"]: one["State"]["Pid"] for one in found}

    def live(self) -> list[str]:
        """Ids of sessions that the executor has not finished."""
        with contextlib.closing(sqlite3.connect(f"file:{self.state}/executor/ledger.db?mode=ro", uri=True)) as ledger:
            return [id for (id,) in ledger.execute("SELECT id FROM sessions WHERE state != 'finalized'")]

    def user(self, name: str, groups: tuple[str, ...] = ()) -> User:
        """A new Unix user with an account, its home below `root`. Its name is made unique on this machine."""
        name = f"{name}-{self.root.name[-8:].strip('_').lower()}"
        home = self.root / "home" / name
        home.parent.mkdir(exist_ok=True)
        command = ["useradd", "--create-home", "--home-dir", str(home), "--shell", "/bin/bash", "--user-group", name]
        subprocess.run([*command, *(["--groups", ",".join(groups)] if groups else [])], check=True)
        user = User(self, name, self.admin.create_account({"name": name})["token"])
        self.users.append(user)
        return user

    def close(self) -> None:
        """Stop and remove everything. The sandboxes first, as they would outlive their engine."""
        self.executor.kill()
        if self.driver == "oci":
            driver = OciSandboxes(self.state / "executor" / self.driver, str(self.state), bridge=self.bridge)
            for found in driver.list():
                driver.remove(found.id)
            driver.close()
        if containers := self.containers():
            self.docker_cli("rm", "-f", "-v", *containers)
        self.admin.close()
        self.server.kill(signal.SIGTERM)
        self.docker.kill(signal.SIGTERM)
        mounts.unmount(self.root / "docker")  # one of an engine that was killed
        left = RunDirectories(self.root / "sessions")
        for id in left.ids():
            left.remove(id)
        for user in self.users:
            subprocess.run(["userdel", "--force", user.name], check=True, capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)
