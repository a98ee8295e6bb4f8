"""What only the Docker driver has: pulls from a registry, engines that are away, what its doctor says."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from beaker_sessions.errors import Error
from beaker_sessions.model import Pull
from beaker_sessions.sandbox import LABEL_OWNER, Progress, Status
from beaker_sessions.sandbox.docker import config, images
from beaker_sessions.sandbox.docker.driver import DockerSandboxes
from tests import images as built
from tests import network
from tests.conftest import inside_network
from tests.dripping import Drip

from .conftest import SECONDS, DockerLab, Maker, pinned


@pytest.fixture
def registry(dockerd: str, tmp_path: Path) -> Iterator[str]:
    """The address of an empty registry on the engine's loopback, to which Docker Engine speaks plain HTTP."""
    program = shutil.which("docker-registry")
    if not program:
        pytest.skip("needs docker-registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"version": 0.1, "storage": {"filesystem": {"rootdirectory": str(tmp_path / "images")}}}
    settings["http"] = {"addr": f"127.0.0.1:{port}"}
    (tmp_path / "registry.yml").write_text(yaml.safe_dump(settings))
    command = [*inside_network(dockerd), program, "serve", str(tmp_path / "registry.yml")]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + SECONDS
        listening = f"0100007F:{port:04X} 00000000:0000 0A"  # proc_net_tcp, for the registry's network
        while listening not in Path(f"/proc/{process.pid}/net/tcp").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def test_pull(docker_lab: DockerLab, registry: str) -> None:
    reference = f"{registry}/lab/tool:1"
    docker_lab.image("alpine")
    _push(docker_lab, registry)
    seen: list[Progress] = []
    with pytest.raises(Error) as error:
        docker_lab.sandboxes.image(reference, Pull.NEVER, seen.append)
    assert error.value.code == "not_found"
    image = docker_lab.sandboxes.image(f"docker://{reference}", Pull.MISSING, seen.append)
    docker_lab.known[reference] = image
    assert (image.reference, seen[-1].layers) == (reference, (1, 1))
    assert seen[-1].done == seen[-1].total
    count = len(seen)
    assert docker_lab.sandboxes.image(reference, Pull.MISSING, seen.append) == image
    assert len(seen) == count
    assert docker_lab.sandboxes.image(reference, Pull.ALWAYS, seen.append) == image


def test_an_image_that_is_too_large_does_not_stay(docker_lab: DockerLab, registry: str) -> None:
    docker_lab.image("alpine")
    _push(docker_lab, registry)
    small = DockerSandboxes(docker_lab.socket, docker_lab.state, docker_lab.owner, image_size=1000)
    with pytest.raises(Error) as error:
        small.image(f"{registry}/lab/tool:1", Pull.MISSING, lambda _: None)
    assert (error.value.code, "(imageSize)" in error.value.message) == ("storage_full", True)
    with pytest.raises(Error) as error:
        small.image(f"{registry}/lab/tool:1", Pull.NEVER, print)
    assert error.value.code == "not_found"


def test_a_pull_ends_when_the_disk_is_nearly_full(
    docker_lab: DockerLab, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of zeros, which takes the engine longer to unpack than we take to look."""
    name, bomb = f"{registry}/lab/bomb", built.tar({"zeros": bytes(1 << 29)})
    docker_lab.engine.call("POST", "/images/create", {"fromSrc": "-", "repo": name, "tag": "1"}, bomb, timeout=SECONDS)
    push = ["docker", "--host", f"unix://{docker_lab.socket}", "push", f"{name}:1"]
    subprocess.run(push, check=True, capture_output=True)
    docker_lab.engine.call("DELETE", f"/images/{name}:1")
    monkeypatch.setattr("beaker_sessions.sandbox.free.lacks", lambda _: "the disk of /x has 1B free")
    with pytest.raises(Error) as error:
        docker_lab.sandboxes.image(f"{name}:1", Pull.MISSING, lambda _: None)
    assert (error.value.code, "1B free" in error.value.message) == ("storage_full", True)
    with pytest.raises(Error) as error:
        docker_lab.sandboxes.image(f"{name}:1", Pull.NEVER, print)
    assert error.value.code == "not_found"


@pytest.mark.parametrize("manifest", [False, True])
def test_a_stop_ends_a_pull(docker_lab: DockerLab, manifest: bool) -> None:
    """The engine says nothing before a manifest has come, and nothing while no byte of a layer does."""
    drips = list[Drip]()
    pid = int(Path(docker_lab.socket).with_name("pid").read_text())
    network.inside(pid, lambda: drips.append(Drip(manifest=manifest)))
    with drips[0] as drip:

        def going() -> None:
            if drip.begun.is_set():
                raise KeyError("stopped")

        with pytest.raises(KeyError):
            docker_lab.sandboxes.image(f"{drip.address}/lab/tool:1", Pull.MISSING, lambda _: None, going=going)
        # Engine 20.10 itself waits on for a manifest, with nobody's claim.
        assert manifest or drip.left.wait(SECONDS)


def test_image_that_the_registry_does_not_have(docker_lab: DockerLab, registry: str) -> None:
    for pull in (Pull.MISSING, Pull.ALWAYS):
        with pytest.raises(Error) as error:
            docker_lab.sandboxes.image(f"{registry}/no/such", pull, print)
        assert error.value.code == "not_found"
        assert f"{registry}/no/such:latest" in error.value.message


def test_registry_that_is_away(docker_lab: DockerLab) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # not listening, and nobody else can
        with pytest.raises(Error) as error:
            docker_lab.sandboxes.image(f"127.0.0.1:{held.getsockname()[1]}/a/b:1", Pull.MISSING, print)
    assert error.value.code == "unavailable"
    assert "/a/b:1" in error.value.message


def test_reference_that_is_none(docker_lab: DockerLab) -> None:
    with pytest.raises(Error) as error:
        docker_lab.sandboxes.image("UPPER CASE", Pull.MISSING, print)
    assert error.value.code == "invalid"


def test_engine_that_is_away(tmp_path: Path) -> None:
    sandboxes = DockerSandboxes(str(tmp_path / "no.sock"), tmp_path / "state", "nobody")
    with pytest.raises(Error) as error:
        sandboxes.list()
    assert (error.value.code, "systemctl start docker" in error.value.hint) == ("unavailable", True)
    assert sandboxes.check()[0].level == "error"


def test_watch_ends_with_the_engine(tmp_path: Path) -> None:
    """A stand-in that agrees and goes away; the tests' own engine is still needed."""
    path = str(tmp_path / "engine.sock")
    answers = [b'{"ApiVersion": "1.41", "MinAPIVersion": "1.12"}', b""]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        watch = DockerSandboxes(path, tmp_path, "nobody").watch()

        def serve() -> None:
            while answers:
                connection, _ = server.accept()
                with connection:
                    if connection.recv(65536):  # else it was looked up whose socket this is
                        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + answers.pop(0))

        thread = threading.Thread(target=serve)
        thread.start()
        assert list(watch) == [""]
        thread.join(SECONDS)


def test_full_disk(docker_lab: DockerLab, tmp_path: Path) -> None:
    state = tmp_path / "small"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(state)], check=True)
    try:
        sandboxes = DockerSandboxes(docker_lab.socket, state, docker_lab.owner)
        spec = Maker(docker_lab).spec("true")
        with pytest.raises(Error) as error:
            sandboxes.create(spec)
        assert error.value.code == "storage_full"
        assert not (state / spec.id).exists()
    finally:
        subprocess.run(["umount", str(state)], check=True)


def test_handle_is_never_part_of_a_path(docker_lab: DockerLab) -> None:
    maker = Maker(docker_lab)
    spec = maker.spec("cat")
    maker.start(spec)
    for handle in ("", "../containers/json?x=", "0" * 64):
        with pytest.raises(Error) as error:
            docker_lab.sandboxes.exec_exit(spec.id, handle)
        assert error.value.code == "not_found"
    maker.close()


def test_leftover_reading_container_is_removed(docker_lab: DockerLab, monkeypatch: pytest.MonkeyPatch) -> None:
    image = docker_lab.image("alpine")
    body = {"Image": image.id, "Cmd": ["none"], "Labels": {LABEL_OWNER: docker_lab.owner}}
    left = docker_lab.engine.call("POST", "/containers/create", body=body)["Id"]
    docker_lab.sandboxes.list()
    assert docker_lab.engine.call("GET", f"/containers/{left}/json")
    monkeypatch.setattr(images, "STALE", -10)
    docker_lab.sandboxes.list()
    with pytest.raises(Error):
        docker_lab.engine.call("GET", f"/containers/{left}/json")


def test_check_says_what_it_found(docker_lab: DockerLab) -> None:
    hooked = {
        "cdiVersion": "0.5.0",
        "kind": "example.com/gpu",
        "devices": [
            {"name": "hooked", "containerEdits": {
                "deviceNodes": [{"path": "/dev/null"}], "hooks": [{"hookName": "createContainer", "path": "/bin/true"}],
            }}
        ],
    }  # fmt: skip
    (docker_lab.cdi / "hooked.yaml").write_text(yaml.safe_dump(hooked))
    docker_lab.sandboxes.cdi_hooks.append("/bin/true")
    try:
        findings = docker_lab.sandboxes.check()
        assert [finding.level for finding in findings if "live-restore" in finding.what] == ["ok"]
        if not docker_lab.engine.call("GET", "/info").get("CDISpecDirs"):
            assert [finding.level for finding in findings if "example.com/gpu=hooked" in finding.what] == ["error"]
            maker = Maker(docker_lab)
            with pytest.raises(Error) as error:
                docker_lab.sandboxes.create(maker.spec("true", gpus=("example.com/gpu=hooked",)))
            assert error.value.code == "unavailable"
            maker.close()
    finally:
        docker_lab.sandboxes.cdi_hooks.clear()
        for path in docker_lab.cdi.iterdir():
            path.unlink()


def _push(lab: DockerLab, registry: str) -> None:
    """Put the image `alpine` into the registry as lab/tool:1, and forget it here."""
    name = f"{registry}/lab/tool"
    lab.engine.call("POST", f"/images/alpine:{lab.tag}/tag", {"repo": name, "tag": "1"})
    subprocess.run(["docker", "--host", f"unix://{lab.socket}", "push", f"{name}:1"], check=True, capture_output=True)
    lab.engine.call("DELETE", f"/images/{name}:1")
    lab.engine.call("DELETE", f"/images/alpine:{lab.tag}")
    del lab.known["alpine"]


def test_create_that_was_interrupted_can_be_repeated(docker_lab: DockerLab) -> None:
    maker = Maker(docker_lab)
    spec = maker.spec("true")
    (docker_lab.state / spec.id / "inside").mkdir(parents=True)
    (docker_lab.state / spec.id / "inside/gate").touch()
    maker.start(spec).read()
    assert maker.exit_code(spec.id) == 0
    maker.close()


def test_start_that_was_interrupted_runs_nothing_until_it_is_completed(docker_lab: DockerLab) -> None:
    maker = Maker(docker_lab)
    spec = maker.spec("stty", "size", image="debian", tty=True)
    docker_lab.sandboxes.create(spec)
    stream = maker.stream(docker_lab.sandboxes.attach(spec.id, replay=False))
    docker_lab.engine.call("POST", f"/containers/{config.name(spec.id)}/start")
    maker.wait(spec.id, Status.RUNNING)
    docker_lab.again().start(spec.id, (43, 143))
    assert stream.read() == b"43 143\r\n"
    assert maker.exit_code(spec.id) == 0
    maker.close()


def test_a_start_whose_executor_was_killed_while_the_engine_was_at_it_goes_on(
    docker_lab: DockerLab, tmp_path: Path
) -> None:
    maker = Maker(docker_lab)
    with pinned(tmp_path, "/home/ada") as mount:
        spec = maker.spec("sh", "-c", "echo ran; cat", mounts=(mount,), tty=True)
        docker_lab.sandboxes.create(spec)
        with socket.socket(socket.AF_UNIX) as killed:
            killed.connect(docker_lab.socket)
            path = f"/containers/{config.name(spec.id)}/start"
            killed.sendall(f"POST {path} HTTP/1.1\r\nHost: docker\r\nContent-Length: 0\r\n\r\n".encode())
    again = docker_lab.again()
    assert {found.status for found in again.list() if found.id == spec.id} <= {Status.CREATED, Status.RUNNING}
    stream = maker.stream(again.attach(spec.id, replay=False))
    again.start(spec.id, (24, 80))
    assert stream.read(b"ran\r\n") == b"ran\r\n"
    maker.close()


def test_many_at_once(docker_lab: DockerLab) -> None:
    maker = Maker(docker_lab)
    docker_lab.image("alpine")
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda n: maker.run("sh", "-c", f"echo {n}; exit {n}"), range(12)))
    assert results == [(n, b"%d\n" % n, b"") for n in range(12)]
    maker.close()
