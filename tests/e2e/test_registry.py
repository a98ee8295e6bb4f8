"""Private images: fetched with the user's own login, and with nobody else's."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import platform
import queue
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import yaml

from beaker_sessions.sandbox import commands
from beaker_sessions.sandbox.oci.registry import ARCHITECTURES
from tests import images, network
from tests.dripping import TYPE, Answer, Drip, Server, described, image
from tests.stack import BIN, Stack, User, wait_for

PASSWORD = "correct horse"
T = TypeVar("T")


@pytest.fixture
def registry(stack: Stack, tmp_path: Path) -> Iterator[str]:
    """The address of a registry that gives lab/tool:1 to ada, with PASSWORD."""
    program = shutil.which("docker-registry")
    if not program:
        pytest.skip("needs docker-registry")
    libcrypt = ctypes.CDLL("libcrypt.so.1")
    libcrypt.crypt.restype = ctypes.c_char_p
    hashed = libcrypt.crypt(PASSWORD.encode(), b"$2y$05$" + b"a" * 22).decode()
    (tmp_path / "htpasswd").write_text(f"ada:{hashed}\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {
        "version": 0.1, "storage": {"filesystem": {"rootdirectory": str(tmp_path / "images")}},
        "http": {"addr": address}, "auth": {"htpasswd": {"realm": "lab", "path": str(tmp_path / "htpasswd")}},
    }  # fmt: skip
    (tmp_path / "registry.yml").write_text(yaml.safe_dump(settings))
    network = ["nsenter", "--net", "--target", str(stack.docker.pid)] if stack.driver == "docker" else []
    subprocess.run([*network, "ip", "link", "set", "lo", "up"], check=True)
    with open(tmp_path / "log", "wb") as log:
        command = [*network, program, "serve", str(tmp_path / "registry.yml")]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        images.oci_archive(images.alpine(), tmp_path / "tool.tar")
        copy = [*network, "skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
        (tmp_path / "auth.json").write_text(logged_in(address))
        copy += [f"--dest-authfile={tmp_path}/auth.json", f"oci-archive:{tmp_path}/tool.tar"]
        wait_for("the registry", lambda: not subprocess.run([*copy, f"docker://{address}/lab/tool:1"]).returncode)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def logged_in(address: str, password: str = PASSWORD) -> str:
    auth = base64.b64encode(f"ada:{password}".encode()).decode()
    return json.dumps({"auths": {address: {"auth": auth}}})


@pytest.mark.parametrize("path", [".docker/config.json", ".config/containers/auth.json"])
def test_an_image_comes_with_ones_own_login(stack: Stack, ada: User, bob: User, registry: str, path: str):
    image = f"{registry}/lab/tool:1"
    words = ["session", "create", "--gpus", "0", "--image", image, "--pull", "always", "--", "echo", "here"]
    login = ada.home / path
    ada.run("mkdir", "-p", str(login.parent))
    try:
        for content in ("", "{", "[" * 100_000, '{"auths": []}', logged_in(registry, "wrong")):
            login.write_text(content)
            done = ada.beaker(*words)
            assert done.returncode != 0
            assert f"docker login {registry}".encode() in done.stderr
        login.write_text(logged_in(registry))
        done = ada.beaker(*words)
        assert (done.returncode, done.stdout) == (0, b"here\n"), done.stderr
        # Neither another's login, nor a file that only root can read, is used.
        assert bob.beaker(*words).returncode != 0
        login.chmod(0o600)
        assert ada.beaker(*words).returncode != 0
        assert PASSWORD not in stack.executor.log.read_text()
    finally:
        login.unlink()


@contextlib.contextmanager
def where_images_come_from(stack: Stack, make: Callable[[], T]) -> Iterator[T]:
    """A registry on the loopback of whoever fetches from it."""
    made = list[T]()

    def begin() -> None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        made.append(make())

    network.inside(stack.docker.pid if stack.driver == "docker" else os.getpid(), begin)
    with made[0] as server:
        yield server


def test_what_a_registry_sends_that_is_no_image_ends_the_session_and_frees_its_gpus(stack: Stack, ada: User):
    """It was retried every 10 s, held them for ever, and could not be stopped."""
    found = {"Content-Type": TYPE}
    index = {"Content-Type": "application/vnd.oci.image.index.v1+json"}
    platform_ = {"os": "linux", "architecture": ARCHITECTURES[platform.machine()]}
    manifests: list[Answer] = [
        (200, found, b"<html>"), (200, found, b""), (200, found, b'{"schemaVersion": 2, "layers": ["x"]}'),
        (200, index, json.dumps({"schemaVersion": 2, "manifests": [{"platform": platform_}]}).encode()),
        (302, {"Location": "file:///etc/shadow"}, b""), (500, {}, b"\x1b[2J"),
        (401, {"WWW-Authenticate": "Bearer"}, b""),
    ]  # fmt: skip
    answers = [lambda path, _, one=one: one if "/manifests/" in path else (200, {}, b"{}") for one in manifests]
    answers += [image(b"<html>", b"layer"), image(b"[]", b""), image(b"{}", b"layer" * 99)]
    for answer in answers:
        with where_images_come_from(stack, lambda answer=answer: Server(answer)) as server:
            reference = f"{server.address}/a/b:1"
            done = ada.beaker("session", "create", "--gpus", "2", "--image", reference, "--", "true")
            assert done.returncode in (64, 69, 77), done.stderr  # never "internal"
            assert reference.encode() in done.stderr.split(b"Reserved")[-1]
            assert b"incident" not in done.stderr
            assert b"\x1b[2J" not in done.stderr
            wait_for("its end", lambda: not stack.live())


@pytest.mark.parametrize("manifest", [False, True])
def test_a_stop_ends_a_pull_from_a_registry_that_drips(stack: Stack, ada: User, bob: User, manifest: bool):
    """Its next byte is far away. The stop waited for it, and the GPU stayed claimed."""
    make = lambda: Drip(pause=120, manifest=manifest)  # noqa: E731
    with where_images_come_from(stack, make) as drip, contextlib.ExitStack() as ends:
        users = {f"{user.name}-drips": user for user in (ada, bob)}
        for name, user in users.items():
            words = ["--gpus", "1", "--name", name, "--image", f"{drip.address}/lab/tool:1", "--", "true"]
            command = [BIN / "beaker", "session", "create", *words]
            client = ends.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, **user.process()))
            ends.callback(client.kill)
            assert drip.begun.wait(60)  # bob's then waits for what ada's fetches
            wait_for("its claim", lambda name=name, user=user: scheduled(user, name))
        ends.callback(drip.over.set)
        for name, user in reversed(users.items()):
            assert user.beaker("session", "stop", name).returncode == 0
            status = user.json("session", "get", name)[0]["status"]
            assert status.get("finalized"), status
        assert not list((stack.state / "executor/oci/images").glob("pull-*"))


def test_a_pull_that_stands_still_outlives_neither_its_session_nor_the_executor(stack: Stack, ada: User, bob: User):
    """Ctrl-C ends it; so does a stop, also when the executor was ended meanwhile; and then the image can be had."""
    stands, asked = threading.Event(), queue.SimpleQueue[str]()
    layer = images.alpine()
    config = {"os": "linux", "rootfs": {"type": "layers", "diff_ids": [described(layer)["digest"]]}}
    parts = image(json.dumps({"architecture": ARCHITECTURES[platform.machine()], **config}).encode(), layer)

    def halfway(path: str) -> None:
        if path.endswith(described(layer)["digest"]):
            asked.put(path)
            stands.wait(120)

    with where_images_come_from(stack, lambda: Server(parts, halfway)) as server, contextlib.ExitStack() as ends:
        ends.callback(stands.set)
        words = ["session", "create", "--gpus", "2", "--name", "stands", "--image", f"{server.address}/a/b:1", "--"]

        def create() -> subprocess.Popen[bytes]:
            command = [BIN / "beaker", *words, "true"]
            client = ends.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, **ada.process()))
            ends.callback(client.kill)
            asked.get(timeout=60)
            return client

        client = create()
        client.send_signal(signal.SIGINT)
        assert client.wait(60) == 128 + signal.SIGINT
        wait_for("its end", lambda: not stack.live())
        create()
        for how in (signal.SIGTERM, signal.SIGKILL):
            stack.executor.kill(how)
            stack.start_executor()
            asked.get(timeout=60)  # the next executor begins again
        assert ada.beaker("session", "stop", "stands").returncode == 0
        assert not stack.live()
        stands.set()
        done = bob.beaker(*words, "echo", "here")
        assert (done.returncode, done.stdout) == (0, b"here\n"), done.stderr
    left = [words for _, words in commands.of(0) if any(os.fsencode(stack.state) in word for word in words)]
    assert not [words for words in left if b"skopeo" in b" ".join(words)]
    assert not list((stack.state / "executor/oci/images").glob("pull-*"))


def scheduled(user: User, name: str) -> bool:
    return any(job.get("name") == name and job["status"].get("scheduled") for job in user.json("session", "list"))
