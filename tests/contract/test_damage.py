"""The oci driver on damaged files: it starts, and what runs goes on, with its labels. The ledger on a full disk."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.sandbox import Found, Sandboxes, Status
from beaker_sessions.sandbox.oci.driver import OciSandboxes
from beaker_sessions.sandbox.oci.record import Record, Records
from beaker_sessions.sandbox.oci.remains import Remains

from .conftest import ADA, Maker, OciLab

Again = Callable[[], OciSandboxes]
FLIPS, SEED = 40, 7


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff<html>")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_json(path: Path) -> None:
    path.write_text('[{"id": 7, "layers": ["x"]}, null]')


DAMAGES = (garbage, empty, zeros, cut, directory, other_json)


@pytest.fixture
def make(oci_lab: OciLab) -> Iterator[Maker]:
    maker = Maker(oci_lab)
    yield maker
    maker.close()


@pytest.fixture
def again(oci_lab: OciLab) -> Iterator[Callable[[], OciSandboxes]]:
    """Another executor's driver. It makes no more namespaces ready when the test is over."""
    made: list[OciSandboxes] = []

    def another() -> OciSandboxes:
        made.append(oci_lab.again())
        return made[-1]

    yield another
    for one in made:
        one.network._closed = True
        with one.network._filling:
            pass


def found(driver: Sandboxes, id: str) -> Found:
    return next(one for one in driver.list() if one.id == id)


def runs(driver: Sandboxes, make: Maker, id: str) -> bytes:
    handle, terminal = driver.exec(
        id, ("cat", "/proc/self/net/route"), env={}, identity=ADA, workdir="/", size=None, stdin=False
    )
    stream = make.stream(terminal)
    stream.read()
    assert driver.exec_exit(id, handle) == 0, stream.err
    return stream.out


def test_a_damaged_record_is_written_anew(make: Maker, oci_lab: OciLab, again: Again) -> None:
    """Whatever is wrong with it: the same process, labels and network, and its end is seen."""
    spec = make.spec("sh", "-c", "read x; exit 6", host_network=False)
    stream = make.start(spec)
    path = oci_lab.state / "sessions" / spec.id / "sandbox.json"
    before, whole, routes = found(oci_lab.sandboxes, spec.id), path.read_bytes(), runs(oci_lab.sandboxes, make, spec.id)
    chance = random.Random(SEED)

    def flip(path: Path) -> None:
        bit = chance.randrange(8 * len(whole))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)

    for number in range(FLIPS):
        flip(path)
        now = found(oci_lab.sandboxes, spec.id)
        assert (now.pid, now.status, now.labels) == (before.pid, Status.RUNNING, before.labels), (number, whole)
        path.write_bytes(whole)
    for damage in DAMAGES:
        damage(path)
        other = again()
        now = found(other, spec.id)
        assert (now.pid, now.status, now.labels) == (before.pid, Status.RUNNING, before.labels), damage
        assert runs(other, make, spec.id) == routes, damage
        assert json.loads(path.read_text())["network"] == json.loads(whole)["network"], damage
    stream.write(b"\n")
    stream.read()
    assert make.exit_code(spec.id) == 6


def test_too_many_open_files_are_no_damage(make: Maker, oci_lab: OciLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the files cannot be opened at this moment, nothing is written, and nothing is said to have ended."""
    spec = make.spec("sh", "-c", "read x", host_network=False)
    make.start(spec)
    path, records = oci_lab.state / "sessions" / spec.id / "sandbox.json", oci_lab.sandboxes.records
    fresh = path.with_suffix(".fresh")
    whole, before, opened = path.read_bytes(), records.load(path.parent), list[object]()
    assert before
    real, bad, this = io.open, 0, threading.current_thread()

    def failing(name: object, *rest: Any, **more: Any) -> Any:
        if threading.current_thread() is this:
            opened.append(name)
        if threading.current_thread() is this and len(opened) == bad:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), name)
        return real(name, *rest, **more)  # type: ignore[call-overload]

    def load(number: int) -> Record | None:
        nonlocal bad
        bad = number
        opened.clear()
        with monkeypatch.context() as patched:
            patched.setattr(io, "open", failing)
            return records.load(path.parent)

    for damage in (None, garbage):
        fresh.write_bytes(whole)
        if damage:
            damage(fresh)
        fresh.replace(path)
        load(0)
        for number in range(1, len(opened) + 1):
            fresh.write_bytes(whole)
            if damage:
                damage(fresh)
            fresh.replace(path)  # a driver of another test may look
            try:
                now = load(number)
            except OSError:
                now = records.load(path.parent)
            if now != before:  # made anew
                assert damage
                assert now
                assert (now.conmon, now.init, now.labels) == (before.conmon, before.init, before.labels), opened
    fresh.write_bytes(whole)
    fresh.replace(path)


def test_sandboxes_of_an_earlier_version_are_in_another_cgroup(make: Maker, oci_lab: OciLab) -> None:
    """It had them right below the root; systemd's unit is ours since."""
    spec, driver = make.spec("sh", "-c", "read x"), oci_lab.sandboxes
    make.start(spec)
    directory = oci_lab.state / "sessions" / spec.id
    before = driver.records.load(directory)
    garbage(directory / "sandbox.json")
    records = Records(driver.cgroups, f"/none{driver.cgroup}", driver.network.directory)
    assert before
    assert records.load(directory) == replace(before, runtime="", project=0)

    orphan = f"{driver.cgroup}/orphan"
    for root in driver.cgroups.hierarchies.values():
        (root / orphan[1:]).mkdir()
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            for root in driver.cgroups.hierarchies.values():
                if not (root / orphan[1:] / "cpuset.cpus").exists():
                    (root / orphan[1:] / "cgroup.procs").write_text(str(process.pid))
            state, roots = oci_lab.state, driver.roots
            Remains(state, roots, driver.cgroups, f"/none{driver.cgroup}", driver.network, records).adopt()
            assert process.wait(10) == -signal.SIGKILL
            assert "orphan" not in driver.cgroups.children(driver.cgroup)
            assert found(driver, spec.id).status is Status.RUNNING
        finally:
            process.kill()


def test_the_end_is_known_though_the_record_is_not(make: Maker, oci_lab: OciLab, again: Again) -> None:
    spec = make.spec("sh", "-c", "exit 3")
    make.start(spec).read()
    assert make.exit_code(spec.id) == 3
    empty(oci_lab.state / "sessions" / spec.id / "sandbox.json")
    assert found(again(), spec.id).exit_code == 3


def test_what_was_only_made_is_begun_again(make: Maker, oci_lab: OciLab, again: Again) -> None:
    spec = make.spec("true")
    oci_lab.sandboxes.create(spec)
    empty(oci_lab.state / "sessions" / spec.id / "sandbox.json")
    assert [one.status for one in again().list() if one.id == spec.id] in ([], [Status.CREATED])


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_its_configuration_a_session_runs_on(
    make: Maker, oci_lab: OciLab, again: Again, damage: Callable[[Path], None]
) -> None:
    spec = make.spec("sleep", "1000")
    make.start(spec)
    damage(oci_lab.state / "sessions" / spec.id / "config.json")
    other = again()
    assert found(other, spec.id).status is Status.RUNNING
    with pytest.raises(Error, match=r"config\.json is damaged"):
        runs(other, make, spec.id)
    other.stop(spec.id, 5)
    assert make.exit_code(spec.id) > 128


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["overlay-images/images.json", "overlay-layers/layers.json"])
def test_damaged_images_take_nothing_from_what_runs(
    make: Maker, oci_lab: OciLab, again: Again, name: str, damage: Callable[[Path], None]
) -> None:
    """Layers that no image seems to have are those of live sessions."""
    spec = make.spec("sleep", "1000")
    make.start(spec)
    path = oci_lab.state / "images/storage" / name
    whole = path.read_bytes()
    layers = sorted(path.parent.parent.joinpath("overlay").iterdir())
    try:
        damage(path)
        assert found(again(), spec.id).status is Status.RUNNING
        assert sorted(path.parent.parent.joinpath("overlay").iterdir()) == layers
    finally:
        shutil.rmtree(path, ignore_errors=True)
        path.write_bytes(whole)


def filled(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.usefixtures("oci_lab")
def test_the_ledger_has_room_of_its_own_on_a_full_disk(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path], check=True)
    try:
        path = tmp_path / "executor/ledger.db"
        ledger, filler = Ledger(path), tmp_path / "filler"
        filled(filler)
        for number in range(200):
            ledger.fact("node", f"N{number}")
        filler.unlink()
        ledger.close()  # SQLite gives the room back with the log
        filled(filler)
        again = Ledger(path)
        assert again.fact("node") == "N199"
        again.note("boot", "new")  # silent
        with pytest.raises(Error, match=str(path)) as refused:
            again.fact("node", "N200")
        assert refused.value.code == "storage_full"
        filler.unlink()
        again.fact("node", "N200")
        again.close()
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
