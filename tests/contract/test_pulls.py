"""Pulls that go wrong: what a registry sends is no image, who waits is stopped, the executor dies. Nothing is left."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.model import Pull
from beaker_sessions.sandbox import Limits, Progress
from beaker_sessions.sandbox.commands import tied
from beaker_sessions.sandbox.oci.images import Images
from beaker_sessions.sandbox.oci.room import Room
from tests import images
from tests.dripping import Answer, Server, described, image, manifest
from tests.stack import wait_for

pytestmark = pytest.mark.usefixtures("oci_lab")  # what images need, the lab needs
FILES = images.tar({"bin/true": b"#!"})


class Stopped(Exception):
    pass


def config(*layers: bytes, **about: Any) -> bytes:
    """The configuration of an image with these layers."""
    digests = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    rootfs = {"type": "layers", "diff_ids": digests}
    return json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs, "config": about}).encode()


def left(store: Images) -> list[str]:
    """What pulls have left."""
    storage = store.storage.root
    found = [
        *store.root.glob("pull-*"),
        *(storage / "overlay").glob("?" * 64),
        *(storage / "overlay-images").glob("?" * 64),
    ]
    return [str(path) for path in found]


EVIL: dict[str, tuple[bytes, bytes]] = {
    "text": (b"<html>", FILES), "list": (b"[]", FILES), "layerless": (b"{}", FILES),
    "other": (config(FILES, b""), FILES), "foreign": (config(b"another"), FILES),
    "env": (config(FILES, Env=["A=b", "A"]), FILES),
    "nul": (config(FILES, Env=["A=\0"]), FILES), "long": (config(FILES, Env=["A=" + "b" * (1 << 17)]), FILES),
    "number": (config(FILES, Env=[1]), FILES), "user": (config(FILES, User=7), FILES),
    "garbage": (config(b"garbage" * 99), b"garbage" * 99), "zip": (config(FILES), gzip.compress(FILES)[:-20]),
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("evil") / "images")


@pytest.mark.parametrize("name", EVIL)
def test_what_is_no_image_is_an_error_that_names_it(store: Images, name: str) -> None:
    """Of some of these a session was started, others were "internal", as if the machine had a fault."""
    with Server(image(*EVIL[name])) as server:
        reference = f"{server.address}/a/b:1"
        with pytest.raises(Error) as error:
            store.get(reference, Pull.MISSING, lambda _: None)
        assert (error.value.code, reference in error.value.message) == ("invalid", True), error.value
        assert server.address in error.value.message
        assert (left(store), store.stored(), store._turns._turns) == ([], [], {})


def test_an_image_does_not_take_the_place_of_another_with_its_configuration(store: Images) -> None:
    """Its id is its configuration's digest; nobody could fetch the right one any more."""
    with Server(image(config(FILES), images.tar({"bin/true": b"evil"}))) as evil, pytest.raises(Error):
        store.get(f"{evil.address}/a/b:1", Pull.MISSING, lambda _: None)
    with Server(image(config(FILES), FILES)) as good:
        found = store.get(f"{good.address}/a/b:1", Pull.MISSING, lambda _: None)
    assert Path(store.describe(found.id).layers[0], "bin/true").read_bytes() == b"#!"


def test_an_image_by_the_digest_of_its_index(tmp_path: Path) -> None:
    """It ended in an error of skopeo's, for which the name was that of another manifest."""
    raw = manifest(config(FILES), FILES)
    machine = {"architecture": json.loads(config())["architecture"], "os": "linux"}
    index = json.dumps({"manifests": [described(raw, "manifest.v1+json") | {"platform": machine}]}).encode()
    digest, parts = described(index)["digest"], image(config(FILES), FILES)

    def answer(path: str, headers: dict[str, str]) -> Answer:
        return (200, {}, index) if path.endswith(digest) else parts(path, headers)

    store = Images(tmp_path / "images")
    with Server(answer) as server:
        reference = f"{server.address}/a/b@{digest}"
        found = store.get(reference, Pull.MISSING, lambda _: None)
        count = len(server.asked)
        assert Images(store.root).get(reference, Pull.MISSING, lambda _: None).id == found.id == store.id(reference)
        assert len(server.asked) == count


def test_who_is_stopped_leaves_what_came_to_who_waits(tmp_path: Path) -> None:
    """It had to come again, or was left to nobody."""
    big = images.tar({"big": os.urandom(1000)})
    slow, begun, released = f"/{described(big)['digest']}", threading.Event(), threading.Event()
    parts = image(config(FILES, big), FILES, big)

    def halfway(path: str) -> None:
        if path.endswith(slow) and not released.is_set():
            begun.set()
            released.wait(60)

    store, stopped, results = Images(tmp_path / "images"), threading.Event(), dict[str, object]()

    def get(name: str, progress: Callable[[Progress], None]) -> None:
        try:
            results[name] = store.get(
                f"{server.address}/a/b:1", Pull.MISSING, progress, going=going.get(name, lambda: None)
            )
        except BaseException as error:
            results[name] = error

    def look(progress: Progress) -> None:
        if stopped.is_set() and progress.layers[0]:
            raise Stopped

    waits = threading.Event()
    going = {"bob": waits.set}
    with Server(parts, halfway) as server:
        threads = {name: threading.Thread(target=get, args=[name, act]) for name, act in (("ada", look), ("bob", id))}
        threads["ada"].start()
        assert begun.wait(60)
        threads["bob"].start()
        assert waits.wait(60)
        stopped.set()
        threads["ada"].join(30)
        assert isinstance(results.pop("ada"), Stopped)
        released.set()
        threads["bob"].join(60)
        assert getattr(results["bob"], "id", results)
        fast = [path for path, _ in server.asked if path.endswith(described(FILES)["digest"])]
        assert len(fast) == 1
    assert not list(store.root.glob("pull-*"))


@pytest.mark.parametrize("what", ["filling", "clearing"])
def test_who_waits_for_the_storage_can_stop(tmp_path: Path, what: str) -> None:
    """While another's image is unpacked, or images are removed: that took as long as it did."""
    room = Room(tmp_path, Limits(), lambda: 0)

    def stop() -> None:
        raise Stopped

    with room.clearing() if what == "filling" else room.filling():
        with pytest.raises(Stopped), getattr(room, what)(stop):
            pass
        assert not room.quiet()
    assert room.quiet()
    with room.clearing(stop), contextlib.suppress(TimeoutError):
        pass


# -- the executor dies


def test_a_program_that_began_too_late_to_hear_of_our_end_does_not_begin(tmp_path: Path) -> None:
    command = tied(["touch", str(tmp_path / "made")])
    assert subprocess.run(command, check=False).returncode == 0
    (tmp_path / "made").unlink()
    command[command.index(str(os.getpid()))] = "1"  # as if it had been started by one that is gone
    assert subprocess.run(command, check=False).returncode == 1
    assert not (tmp_path / "made").exists()


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Callable[[str, Callable[[], bool]], Images]]:
    """Kill a process that fetches an image, as soon as something is so; gives the images as the next one finds them."""
    root = tmp_path / "images"

    def kill(reference: str, ready: Callable[[], bool]) -> Images:
        script = (
            "import sys; from pathlib import Path; from beaker_sessions.model import Pull\n"
            "from beaker_sessions.sandbox.oci.images import Images\n"
            "Images(Path(sys.argv[1])).get(sys.argv[2], Pull.MISSING, lambda _: None)"
        )
        process = subprocess.Popen([sys.executable, "-c", script, str(root), reference], stderr=subprocess.PIPE)
        try:
            wait_for("its moment", lambda: ready() or process.poll() is not None)
            assert process.poll() is None, process.communicate()[1]
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        wait_for("the end of its programs", lambda: not programs(root))
        return Images(root)

    return kill


def programs(root: Path) -> list[str]:
    """The processes that have to do with a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(root) in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.mark.parametrize("when", ["fetching", "unpacking"])
def test_a_pull_whose_executor_is_killed_leaves_nothing(
    killed: Callable[[str, Callable[[], bool]], Images], tmp_path: Path, when: str
) -> None:
    """And the next one fetches the image."""
    layer = images.tar({"zeros": bytes(200 << 20)}) if when == "unpacking" else FILES
    packed = gzip.compress(layer, 1)
    begun, released, parts = threading.Event(), threading.Event(), image(config(layer), packed)

    def halfway(path: str) -> None:
        if path.endswith(described(packed)["digest"]) and when == "fetching" and not released.is_set():
            begun.set()
            released.wait(60)

    def unpacks() -> bool:
        return any((tmp_path / "images/storage/overlay").glob("?" * 64))

    with Server(parts, halfway) as server:
        store = killed(f"{server.address}/a/b:1", begun.is_set if when == "fetching" else unpacks)
        released.set()
        assert (left(store), store.stored()) == ([], [])
        assert store.get(f"{server.address}/a/b:1", Pull.MISSING, lambda _: None)
