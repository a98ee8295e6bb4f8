"""Each driver with images of its own: what the contract is tested against."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import select
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from beaker_sessions.model import Identity, Pull
from beaker_sessions.sandbox import LABEL, LABEL_OWNER, Found, Framing, Image, Mount, Sandboxes, Spec, Status, Terminal
from beaker_sessions.sandbox.docker.driver import DockerSandboxes
from beaker_sessions.sandbox.docker.engine import Engine
from beaker_sessions.sandbox.fake import FakeSandboxes
from beaker_sessions.sandbox.oci.driver import OciSandboxes
from tests import images
from tests.stack import bridge

ADA = Identity("ada", 1500, 1500, "/home/ada", {1500: "ada", 27: "sudo", 4711: "project"})
SECONDS = 60.0  # after which a test gives up on something that must happen


class Lab(Protocol):
    """A driver under test. images: by name, `scratch`, `alpine`, `debian`, `greedy` (asks for all GPUs), `links`."""

    sandboxes: Sandboxes
    state: Path

    def image(self, name: str) -> Image: ...

    def again(self) -> Sandboxes:
        """Another instance, as after a restart of the executor."""


class DockerLab:
    def __init__(self, socket: str, root: Path, debian: Path | None) -> None:
        self.engine, self.state, self.cdi = Engine(socket), root / "state", root / "cdi"
        self.socket, self.debian, self.owner = socket, debian, secrets.token_hex(4)
        self.cdi.mkdir()
        self.tag = f"test-{self.owner}"
        self.known: dict[str, Image] = {}
        self.sandboxes = self.again()

    def again(self) -> DockerSandboxes:
        return DockerSandboxes(self.socket, self.state, self.owner, [self.cdi], bridge=f"bt{self.owner}")

    def image(self, name: str) -> Image:
        if name not in self.known:
            if name == "debian" and not self.debian:
                pytest.skip(images.missing_for_debian())
            self.build(name, self.debian.read_bytes() if name == "debian" and self.debian else BUILDERS[name]())
        return self.known[name]

    def build(self, name: str, tar: bytes) -> None:
        query: dict[str, Any] = {"fromSrc": "-", "repo": name, "tag": self.tag}
        if name == "greedy":
            query["changes"] = "ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=all GREEDY=yes"
        self.engine.call("POST", "/images/create", query, tar, timeout=SECONDS)
        self.known[name] = self.sandboxes.image(f"{name}:{self.tag}", Pull.NEVER, print)

    def close(self) -> None:
        for image in self.known.values():
            self.engine.call("DELETE", f"/images/{image.reference}", {"force": 1})
        self.sandboxes.close()


class OciLab:
    def __init__(self, root: Path, debian: Path | None) -> None:
        self.state, self.cdi, self.debian, self.owner = root / "state", root / "cdi", debian, str(root)
        self.archives, self.etc = root / "archives", root / "etc"
        for directory in (self.cdi, self.archives, self.etc):
            directory.mkdir()
        self.bridge = bridge(secrets.token_hex(3)[:5])
        self.known: dict[str, Image] = {}
        self.made: list[OciSandboxes] = []
        self.sandboxes = self.again()

    def again(self) -> OciSandboxes:
        # An executor that was there before would make no more namespaces ready.
        with self.sandboxes.network._filling if hasattr(self, "sandboxes") else contextlib.nullcontext():
            self.made.append(OciSandboxes(self.state, self.owner, [self.cdi], bridge=self.bridge, etc=self.etc))
            return self.made[-1]

    def image(self, name: str) -> Image:
        if name not in self.known:
            if name == "debian" and not self.debian:
                pytest.skip(images.missing_for_debian())
            self.build(name, self.debian.read_bytes() if name == "debian" and self.debian else BUILDERS[name]())
        return self.known[name]

    def build(self, name: str, tar: bytes) -> None:
        env = ("NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=all", "GREEDY=yes")
        archive = self.archives / f"{name}.tar"
        images.oci_archive(tar, archive, env if name == "greedy" else ())
        self.sandboxes.images.load(archive, f"{name}:test")
        archive.unlink()
        self.known[name] = self.sandboxes.image(f"{name}:test", Pull.NEVER, print)

    def close(self) -> None:
        for found in self.sandboxes.list():
            self.sandboxes.remove(found.id)
        for made in self.made:  # none may look after the bridge that another removes
            with made.network._lock:
                made.network._closed = True
            made.network._filling.acquire()
            made.network._filling.release()
        self.sandboxes.close()


class FakeLab:
    def __init__(self, root: Path) -> None:
        self.sandboxes, self.state = FakeSandboxes(tuple(BUILDERS)), root

    def again(self) -> FakeSandboxes:
        return self.sandboxes

    def image(self, name: str) -> Image:
        return self.sandboxes.image(name, Pull.NEVER, print)


BUILDERS: dict[str, Callable[[], bytes]] = {
    "scratch": images.scratch, "alpine": images.alpine, "greedy": images.alpine, "debian": bytes, "links": images.links,
}  # fmt: skip


@pytest.fixture(scope="session")
def docker_lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerLab]:
    socket = request.getfixturevalue("dockerd")
    debian = None if images.missing_for_debian() else images.debian()
    lab = DockerLab(socket, tmp_path_factory.mktemp("docker"), debian)
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def fake_lab(tmp_path_factory: pytest.TempPathFactory) -> FakeLab:
    return FakeLab(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="session")
def oci_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OciLab]:
    if os.geteuid() != 0:
        pytest.skip("needs root to start containers")
    for program in ("conmon", "skopeo", "ip", "iptables", "nft", "tini-static"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    if not shutil.which("runc") and not shutil.which("crun"):
        pytest.skip("needs runc or crun")
    lab = OciLab(tmp_path_factory.mktemp("oci"), None if images.missing_for_debian() else images.debian())
    yield lab
    lab.close()


@pytest.fixture(params=["docker", "oci"])
def lab(request: pytest.FixtureRequest) -> Lab:
    """Each driver that runs real processes."""
    result: Lab = request.getfixturevalue(f"{request.param}_lab")
    return result


@pytest.fixture(params=["docker", "oci", "fake"])
def any_lab(request: pytest.FixtureRequest) -> Lab:
    """Each driver."""
    result: Lab = request.getfixturevalue(f"{request.param}_lab")
    return result


@contextlib.contextmanager
def pinned(path: Path, target: str, read_only: bool = False) -> Iterator[Mount]:
    """A mount of a directory by its descriptor, as the executor makes them."""
    descriptor = os.open(path, os.O_PATH)
    try:
        yield Mount(f"/proc/{os.getpid()}/fd/{descriptor}", target, read_only)
    finally:
        os.close(descriptor)


@dataclass
class Stream:
    """The reading end of a terminal: what has come so far, by stream (1 output, 2 errors)."""

    terminal: Terminal
    data: dict[int, bytes] = field(default_factory=lambda: {1: b"", 2: b""})
    rest: bytes = b""
    ended: bool = False

    @property
    def out(self) -> bytes:
        return self.data[1]

    @property
    def err(self) -> bytes:
        return self.data[2]

    def write(self, data: bytes) -> None:
        while data:
            packet = data[: 32 << 10]  # the longest that conmon takes
            data = data[os.write(self.terminal.fd, packet) :]

    def read(self, until: bytes | None = None) -> bytes:
        """Standard output up to its end, or until it holds something."""
        deadline = time.monotonic() + SECONDS
        while not self.ended and (until is None or until not in self.out):
            ready = select.select([self.terminal.fd], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, f"waited for {until!r} after {self.out[-200:]!r}"
            chunk = os.read(self.terminal.fd, 1 << 17)
            self.ended = not chunk
            self._take(chunk)
        assert until is None or until in self.out, f"ended without {until!r}: {self.out[-200:]!r}"
        return self.out

    def close(self) -> None:
        if self.terminal.fd >= 0:
            os.close(self.terminal.fd)
            self.terminal = replace(self.terminal, fd=-1)

    def _take(self, chunk: bytes) -> None:
        if self.terminal.framing is Framing.RAW:
            self.data[1] += chunk
        elif self.terminal.framing is Framing.CONMON and chunk:
            self.data[1 if chunk[0] == 2 else 2] += chunk[1:]
        else:
            self.rest += chunk
            while len(self.rest) >= 8 and len(self.rest) >= 8 + (length := struct.unpack_from(">L", self.rest, 4)[0]):
                self.data[self.rest[0]] += self.rest[8 : 8 + length]
                self.rest = self.rest[8 + length :]


class Maker:
    """Makes sandboxes of one lab, and removes them when the test is over."""

    numbers = itertools.count()

    def __init__(self, lab: Lab) -> None:
        self.lab, self.ids, self.streams = lab, [], []  # type: ignore[var-annotated]

    def spec(self, *command: str, image: str = "alpine", **more: Any) -> Spec:
        id = f"TEST{os.getpid()}N{next(self.numbers)}"
        self.ids.append(id)
        labels = {LABEL: id} | ({LABEL_OWNER: self.lab.owner} if isinstance(self.lab, DockerLab | OciLab) else {})
        defaults: dict[str, Any] = {
            "identity": ADA, "tty": False, "host_network": True, "env": {"HOME": "/home/ada", "USER": "ada"}
        }  # fmt: skip
        return Spec(id=id, labels=labels, image=self.lab.image(image), command=command, **(defaults | more))

    def start(self, spec: Spec, size: tuple[int, int] = (24, 80)) -> Stream:
        self.lab.sandboxes.create(spec)
        stream = self.stream(self.lab.sandboxes.attach(spec.id, replay=False))
        self.lab.sandboxes.start(spec.id, size if spec.tty else None)
        return stream

    def run(self, *command: str, **more: Any) -> tuple[int, bytes, bytes]:
        """The exit code, output and errors of a command without a terminal or standard input.

        Root is of the sandbox: where it is nobody outside, it is only to be had beside the main process.
        """
        identity = more.get("identity", ADA)
        if identity.uid == 0 and self.lab.sandboxes.root:
            spec = self.spec("sleep", "1000", **({"stdin": False} | more | {"identity": ADA}))
            self.start(spec)
            handle, terminal = self.lab.sandboxes.exec(
                spec.id, command, env={}, identity=identity, workdir="/", size=None, stdin=False
            )
            stream = self.stream(terminal)
            stream.read()
            return self.lab.sandboxes.exec_exit(spec.id, handle), stream.out, stream.err
        spec = self.spec(*command, **({"stdin": False} | more))
        stream = self.start(spec)
        stream.read()
        return self.exit_code(spec.id), stream.out, stream.err

    def stream(self, terminal: Terminal) -> Stream:
        stream = Stream(terminal)
        self.streams.append(stream)
        return stream

    def exit_code(self, id: str) -> int:
        found = self.wait(id, Status.EXITED)
        assert found.exit_code is not None
        return found.exit_code

    def wait(self, id: str, status: Status) -> Found:
        deadline = time.monotonic() + SECONDS
        while (found := next(f for f in self.lab.sandboxes.list() if f.id == id)).status is not status:
            assert time.monotonic() < deadline, f"{id} is {found.status}, not {status}"
            time.sleep(0.02)
        return found

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
        for id in self.ids:
            self.lab.sandboxes.remove(id)


@pytest.fixture
def make(lab: Lab) -> Iterator[Maker]:
    maker = Maker(lab)
    yield maker
    maker.close()


@pytest.fixture
def make_any(any_lab: Lab) -> Iterator[Maker]:
    maker = Maker(any_lab)
    yield maker
    maker.close()


ROOT = Identity("root", 0, 0, "/root", {0: "root"})
# Prints the name of the error that a system call ends with, or "ok".
CALL = """
import ctypes, errno, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    result = getattr(libc, name)(*arguments)
    print(name, *(a for a in arguments[:1] if isinstance(a, int)),
          "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()])
def attempt(what, function, *arguments):
    try:
        function(*arguments)
        print(what, "ok")
    except OSError as error:
        print(what, errno.errorcode[error.errno])
"""


class Inside:
    """A running session of ada with a home, in which anyone can run something."""

    def __init__(self, make: Maker, home: Path, **more: object) -> None:
        home.mkdir()
        os.chown(home, ADA.uid, ADA.gid)
        self.make, self.home = make, home
        with pinned(home, "/home/ada") as mount:
            mounts = (mount, *more.pop("mounts", ()))  # type: ignore[misc]
            self.spec = make.spec(
                "sleep", "1000", image="debian", mounts=mounts, host_network=False, stdin=False, **more
            )  # fmt: skip
            make.start(self.spec)

    def run(self, *command: str, identity: Identity = ROOT, workdir: str = "/") -> tuple[int, str]:
        """The exit code, and output and errors together."""
        handle, terminal = self.make.lab.sandboxes.exec(
            self.spec.id, command, env={}, identity=identity, workdir=workdir, size=None, stdin=False
        )
        stream = self.make.stream(terminal)
        stream.read()
        return self.make.lab.sandboxes.exec_exit(self.spec.id, handle), (stream.out + stream.err).decode()

    def python(self, script: str, identity: Identity = ROOT) -> dict[str, str]:
        """What CALL's functions printed."""
        code, out = self.run("python3", "-c", CALL + script, identity=identity)
        assert code == 0, out
        return dict(line.rsplit(" ", 1) for line in out.splitlines())
