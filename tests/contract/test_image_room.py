"""Images that want the whole disk, or a file outside of it: from a registry, from archives, several at once."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.executor import main
from beaker_sessions.model import Pull
from beaker_sessions.sandbox import Limits
from beaker_sessions.sandbox.oci import driver
from beaker_sessions.sandbox.oci.driver import OciSandboxes
from beaker_sessions.sandbox.oci.images import Images
from beaker_sessions.settings import ExecutorSettings
from tests import images

from .conftest import ROOT, SECONDS, Maker, OciLab
from .test_oci_images import registry  # noqa: F401

pytestmark = pytest.mark.usefixtures("oci_lab")  # what images need, the lab needs
MIB = 1 << 20


def zeros(mib: int, name: str = "zeros") -> bytes:
    """A layer of so many MiB, of which nearly nothing is left when it is compressed."""
    return images.tar({name: bytes(mib * MIB)})


def archive(path: Path, layer: bytes, kind: str = "oci", **more: Any) -> Path:
    """kind: `oci`, `docker`, or `docker.gz`."""
    images.oci_archive(layer, path, compress=True, **more)
    if kind == "oci":
        return path
    other = path.with_name(f"{path.name}.{kind}")
    copy = ["skopeo", "--insecure-policy", "copy", "--quiet", f"oci-archive:{path}"]
    subprocess.run([*copy, f"docker-archive:{other}:a/b:1"], check=True)
    if kind == "docker.gz":
        other.write_bytes(gzip.compress(other.read_bytes()))
    return other


def push(path: Path, reference: str) -> str:
    copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
    subprocess.run([*copy, f"oci-archive:{path}", f"docker://{reference}"], check=True)
    return reference


def used(root: Path) -> int:
    """Bytes on the disk."""
    done = subprocess.run(["du", "-s", "-B1", root], capture_output=True, check=False)  # files come and go
    return int(done.stdout.split()[0])


def layers(store: Images) -> set[str]:
    return {path.name for path in (store.storage.root / "overlay").iterdir() if len(path.name) == 64}


@pytest.mark.parametrize("kind", ["registry", "oci", "docker", "docker.gz"])
def test_a_bomb_is_stopped_and_nothing_of_it_stays(tmp_path: Path, registry: str, kind: str) -> None:  # noqa: F811
    store = Images(tmp_path / "images", limits=Limits(image=32 * MIB))
    bomb = archive(tmp_path / "bomb.tar", zeros(256), "oci" if kind == "registry" else kind)
    reference = push(bomb, f"{registry}/a/bomb:1") if kind == "registry" else ""
    with pytest.raises(Error) as error:
        store.get(reference, Pull.MISSING, lambda _: None) if reference else store.load(bomb, "a/bomb:1")
    assert error.value.code == "storage_full"
    assert "32MiB (imageSize)" in error.value.message
    assert error.value.hint
    assert used(store.root) < MIB
    assert (layers(store), store.stored()) == (set(), [])
    store.load(archive(tmp_path / "good.tar", images.alpine()), "a/good:1")
    assert store.get("a/good:1", Pull.NEVER, print).size < 32 * MIB


def test_what_a_registry_says_is_too_large_is_not_even_fetched(tmp_path: Path, registry: str) -> None:  # noqa: F811
    store = Images(tmp_path / "images", limits=Limits(image=MIB // 2))
    with pytest.raises(Error) as error:
        store.get(f"{registry}/lab/tool:1", Pull.MISSING, lambda _: pytest.fail("it was fetched"))
    assert error.value.code == "storage_full"


def test_room_is_made_of_what_is_not_needed_the_longest_unused_first(tmp_path: Path) -> None:
    store = Images(tmp_path / "images", limits=Limits(total=100 * MIB))
    ids = []
    for number in range(4):
        store.load(archive(tmp_path / "a.tar", zeros(20, f"zeros{number}")), f"a/{number}:1")
        ids.append(store.id(f"a/{number}:1"))
        os.utime(store._description(ids[-1]), (number, number))
    new = archive(tmp_path / "new.tar", zeros(40, "new"))
    with pytest.raises(Error) as error:
        store.load(new, "a/new:1")  # nobody has said which are needed
    assert (error.value.code, "100MiB (imageSpace)" in error.value.message) == ("storage_full", True)
    assert len(store.stored()) == 4
    store.get("a/1:1", Pull.NEVER, print)  # somebody who is about to make a sandbox of it
    os.utime(store._description(ids[1]), (0, 0))
    store.needed = lambda: {ids[0]}
    store.load(new, "a/new:1")
    left = {image.id for image in store.stored()}
    assert {ids[0], ids[1], store.id("a/new:1")} <= left
    assert ids[2] not in left
    store.needed = lambda: left
    with pytest.raises(Error):
        store.load(archive(tmp_path / "more.tar", zeros(60, "more")), "a/more:1")
    assert {image.id for image in store.stored()} == left


def test_a_disk_is_not_filled(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with open(tmp_path / "file", "wb") as file:
        file.truncate(256 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", tmp_path / "file"], check=True)
    subprocess.run(["mount", "-o", "loop", tmp_path / "file", disk], check=True)
    try:
        store = Images(disk / "images", limits=Limits(total=1 << 40))
        lowest, over = 1 << 40, threading.Event()

        def look() -> None:
            nonlocal lowest
            while not over.wait(0.005):
                free = os.statvfs(disk)
                lowest = min(lowest, free.f_bavail * free.f_frsize)

        watcher = threading.Thread(target=look)
        watcher.start()
        with pytest.raises(Error) as error:
            store.load(archive(tmp_path / "bomb.tar", zeros(512)), "a/bomb:1")
        over.set()
        watcher.join()
        assert error.value.code == "storage_full"
        assert used(store.root) < MIB
    finally:
        subprocess.run(["umount", disk], check=True)


def test_bombs_at_the_same_time_do_not_hurt_who_is_honest(tmp_path: Path, registry: str) -> None:  # noqa: F811
    store = Images(tmp_path / "images", limits=Limits(image=32 * MIB))
    bombs = [push(archive(tmp_path / "b.tar", zeros(128, f"z{n}")), f"{registry}/a/bomb{n}:1") for n in range(3)]
    codes: list[str] = []

    def pull(reference: str) -> None:
        try:
            store.get(reference, Pull.MISSING, lambda _: None)
            codes.append("ok")
        except Error as error:
            codes.append(error.code)

    threads = [threading.Thread(target=pull, args=[name]) for name in (*bombs, f"{registry}/lab/tool:1")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert sorted(codes) == ["ok", "storage_full", "storage_full", "storage_full"]
    assert len(layers(store)) == len(store.stored()) == 1
    assert store.get(f"{registry}/lab/tool:1", Pull.NEVER, print)


def test_an_image_that_was_just_handed_out_is_not_removed(tmp_path: Path) -> None:
    store = Images(tmp_path / "images")
    store.load(archive(tmp_path / "a.tar", images.alpine()), "a/b:1")
    id = store.get("a/b:1", Pull.NEVER, print).id
    assert store.remove(id) is False
    store._leases.clear()
    store.needed = lambda: {id}
    assert store.remove(id) is False
    store.needed = set
    assert store.remove(id) is True
    assert store.stored() == []


def test_what_an_executor_was_fetching_ends_with_it(tmp_path: Path) -> None:
    """Else nobody would watch it any more."""
    root, bomb = tmp_path / "images", archive(tmp_path / "bomb.tar", zeros(384))
    script = (
        "import sys; from pathlib import Path; from beaker_sessions.sandbox.oci.images import Images\n"
        "Images(Path(sys.argv[1])).load(Path(sys.argv[2]), 'a/b:1')"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(root), str(bomb)])
    deadline = time.monotonic() + SECONDS
    while not root.exists() or used(root) < 16 * MIB:
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()

    def running() -> list[str]:
        return [
            path.parent.name
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if str(root) in path.read_bytes().decode(errors="replace")
        ]

    while running():
        assert time.monotonic() < deadline, running()
        time.sleep(0.05)
    store = Images(root)
    assert used(root) < MIB
    assert layers(store) == set()


# -- archives that want a file of the machine


def member(name: str, content: bytes = b"", **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def appended(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "a") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("link", ["/", "../../../../../../../../.."])
def test_a_link_in_an_archive_leads_nowhere(tmp_path: Path, link: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").write_text("mine")
    inside = f"x{victim}"
    path = archive(tmp_path / "evil.tar", images.alpine())
    appended(
        path, member("x", type=tarfile.SYMTYPE, linkname=link), member(f"{inside}/evil", b"evil"),
        member("h", type=tarfile.LNKTYPE, linkname=f"{link}{victim}/kept"), member("h", b"evil"),
        member(f"..{victim}/evil", b"evil"), member(f"{victim}/evil", b"evil"),
        member("d", type=tarfile.CHRTYPE, devmajor=1, devminor=3), member("n" * 4096, b"evil"),
    )  # fmt: skip
    Images(tmp_path / "images").load(path, "a/b:1")
    assert [(file.name, file.read_text()) for file in victim.iterdir()] == [("kept", "mine")]


def test_archives_that_are_none_say_so(tmp_path: Path) -> None:
    store = Images(tmp_path / "images")
    good = archive(tmp_path / "good.tar", images.alpine()).read_bytes()
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    hostile = {
        "empty": b"", "text": b"hello" * 1000, "short": good[: len(good) // 2], "gzip": b"\x1f\x8b" + b"x" * 100,
        "header": header.tobuf() + good, "zeros": bytes(10240), "many": member("a")[0].tobuf() * 100_000,
    }  # fmt: skip
    for name, data in hostile.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Error) as error:
            store.load(tmp_path / name, "a/b:1")
        assert error.value.code == "invalid", name
    twice = tmp_path / "twice"
    twice.write_bytes(good)
    appended(twice, member("index.json", b"{}"))
    with pytest.raises(Error) as error:
        store.load(twice, "a/b:1")
    assert (error.value.code, "twice" in error.value.message) == ("invalid", True)
    assert used(store.root) < MIB


@pytest.mark.parametrize(
    "config",
    [
        b'{"config": {"Env": {"A": "b"}}, ROOT}', b'{"config": {"Env": [1, null]}, ROOT}', b'{"config": [], ROOT}',
        b'{"config": {"Env": ["NOVALUE"]}, ROOT}', b'{"config": {"x": ' + b"[" * 5000 + b"]" * 5000 + b"}, ROOT}",
    ],
)  # fmt: skip
def test_a_hostile_configuration_is_an_error_and_no_image(tmp_path: Path, config: bytes) -> None:
    """An exception would have had the executor start the session again and again."""
    store = Images(tmp_path / "images")
    layer = images.alpine()
    diff = hashlib.sha256(layer).hexdigest()
    root = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff}"]}}
    text = config.replace(b"ROOT", json.dumps(root).encode()[1:-1])
    images.oci_archive(layer, tmp_path / "a.tar", config=text)
    with pytest.raises(Error) as error:
        store.load(tmp_path / "a.tar", "a/b:1")
    assert error.value.code in ("invalid", "internal")
    assert store.stored() == []


def test_a_layer_writes_nothing_outside_of_its_directory(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").write_text("mine")
    tricks = {
        "symlink": [member("x", type=tarfile.SYMTYPE, linkname=str(victim)), member("x/evil", b"evil")],
        "hardlink": [member("h", type=tarfile.LNKTYPE, linkname=f"../../../../../..{victim}/kept"), member("h", b"e")],
        "dots": [member(f"../../../../../../..{victim}/evil", b"evil")],
        "whiteout": [
            member("x", type=tarfile.SYMTYPE, linkname=str(victim)), member("x/.wh.kept"), member("x/.wh..wh..opq"),
        ],
    }  # fmt: skip
    store = Images(tmp_path / "images")
    for name, members in tricks.items():
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            for info, content in members:
                tar.addfile(info, io.BytesIO(content))
        images.oci_archive(layer.getvalue(), tmp_path / f"{name}.tar")
        with contextlib.suppress(Error):
            store.load(tmp_path / f"{name}.tar", f"a/{name}:1")
        assert [(file.name, file.read_text()) for file in victim.iterdir()] == [("kept", "mine")], name


# -- in use, and elsewhere


@pytest.mark.parametrize("damage", ["", "{"])
def test_a_lost_list_of_images_takes_no_layer_along(tmp_path: Path, damage: str) -> None:
    """Live sessions are on them."""
    store = Images(tmp_path / "images")
    store.load(archive(tmp_path / "a.tar", images.alpine()), "a/b:1")
    held, records = layers(store), store.storage.root / "overlay-images/images.json"
    records.write_text(damage) if damage else records.unlink()
    assert layers(Images(tmp_path / "images")) == held != set()


def test_an_image_is_never_gone_between_being_handed_out_and_used(tmp_path: Path) -> None:
    """Whoever starts a session has it described, or an error that says that it is not there; others remove it."""
    store = Images(tmp_path / "images")
    path, over, wrong = archive(tmp_path / "a.tar", images.alpine()), threading.Event(), list[BaseException]()

    def remove() -> None:
        while not over.is_set():
            for image in store.stored():
                store._leases.clear()  # as if much time had gone by
                with contextlib.suppress(Error):
                    store.remove(image.id)

    def use() -> None:
        while not over.is_set():
            try:
                store.get("a/b:1", Pull.NEVER, print)
            except Error as error:
                if error.code != "not_found":
                    wrong.append(error)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=target) for target in (remove, use, use)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        with contextlib.suppress(Error):  # removed before it was described
            store.load(path, "a/b:1")
    over.set()
    for thread in threads:
        thread.join(SECONDS)
    assert wrong == []


@pytest.mark.usefixtures("oci_lab")
def test_images_may_be_on_another_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with open(tmp_path / "file", "wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", tmp_path / "file"], check=True)
    subprocess.run(["mount", "-o", "loop", tmp_path / "file", disk], check=True)

    class Elsewhere(OciLab):
        def again(self) -> OciSandboxes:
            return OciSandboxes(self.state, self.owner, bridge=self.bridge, etc=self.etc, images=disk / "beaker")

    try:
        lab = Elsewhere(tmp_path, None)
        maker = Maker(lab)
        try:
            done = maker.run("sh", "-c", "echo new > /made; cat /made", identity=ROOT)
            assert done == (0, b"new\n", b"")
            assert not (lab.state / "images").exists()
            found = [finding for finding in lab.sandboxes.check() if str(disk) in finding.what]
            assert ("idmapped layers" in found[0].what, [f.level for f in found]) == (True, ["ok", "warning"])
        finally:
            maker.close()
            lab.close()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("how", ["owner", "link", "file"])
def test_images_are_in_no_directory_that_somebody_else_made(tmp_path: Path, how: str) -> None:
    root = tmp_path / "beaker-images"
    if how == "owner":
        root.mkdir()
        os.chown(root, 4711, 4711)
    elif how == "link":
        (tmp_path / "theirs").mkdir(mode=0o755)
        root.symlink_to(tmp_path / "theirs")
    else:
        root.touch()
    with pytest.raises(Error) as error:
        Images(root)
    assert error.value.code == "unavailable"
    assert str(root) in error.value.message


def test_with_image_path_images_have_a_directory_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor took the whole directory: for itself alone, and removed `pull-*` and `mount-*` in it."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(driver, "OciSandboxes", lambda *_, **more: given.update(more))
    (tmp_path / "pull-requests").mkdir()
    tmp_path.chmod(0o755)
    main._oci(ExecutorSettings(image_path=str(tmp_path)))
    store = Images(given["images"])
    assert store.root.parent == tmp_path
    assert (tmp_path / "pull-requests").exists()
    assert tmp_path.stat().st_mode & 0o777 == 0o755
