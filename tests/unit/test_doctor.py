"""What doctor says of the machine itself."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sqlite3
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest

from beaker_sessions.executor import doctor, inventory
from beaker_sessions.model import Gpu
from beaker_sessions.sandbox import Finding, netns, packet
from beaker_sessions.sandbox.fake import FakeSandboxes
from beaker_sessions.settings import ExecutorSettings


def found(tmp_path: Path, **settings: object) -> list[Finding]:
    given = ExecutorSettings(
        storage_path=str(tmp_path), token_path=str(tmp_path / "none"), cdi_paths=[str(tmp_path)], **settings  # type: ignore[arg-type]
    )  # fmt: skip
    return list(doctor.findings(given, FakeSandboxes(("base",)), "of a test"))


def test_it_says_which_driver_and_why(tmp_path: Path) -> None:
    assert found(tmp_path)[0].what == "sessions are run by the fake driver, because of a test"


def test_a_broken_cdi_specification_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    assert [one.level for one in found(tmp_path) if "broken.json" in one.what] == ["error"]


def test_the_database_of_a_server_on_this_machine_is_checked(tmp_path: Path) -> None:
    def said(file: Path | None) -> list[Finding]:
        given = ExecutorSettings(storage_path=str(tmp_path), token_path=str(tmp_path / "none"))
        findings = doctor.findings(given, FakeSandboxes(("base",)), "", database=file)
        return [one for one in findings if one.what.startswith("the database")]

    file = tmp_path / "server.db"
    assert said(None) == said(file) == []
    with contextlib.closing(sqlite3.connect(file)) as made:
        made.executescript("CREATE TABLE x (y); INSERT INTO x VALUES (1)")
    assert [one.level for one in said(file)] == ["ok"]
    with open(file, "r+b") as raw:
        raw.seek(4096)
        raw.write(b"\xff" * 100)
    [bad] = said(file)
    assert (bad.level, "damaged" in bad.what, "beaker-server restore" in bad.mend) == ("error", True, True)
    (tmp_path / "bad.yml").write_text("server: {none: 1}")
    assert doctor.database(str(tmp_path / "bad.yml")) is None


def test_persistence_mode_of_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path)
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(inventory, "_nvidia", dict)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda number: number)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPersistenceMode", lambda handle: handle)
    said = {one.what: one for one in found(tmp_path)}
    assert said["GPU 1 is in persistence mode"].level == "ok"
    off = next(one for what, one in said.items() if what.startswith("GPU 0 is without persistence mode"))
    assert (off.level, "nvidia-persistenced" in off.mend) == ("warning", True)
    assert any("no CDI specification" in what for what in said)


def test_a_driver_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(doctor, "NVIDIA", tmp_path)
    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert any(one.level == "warning" and "NVML does not answer" in one.what for one in found(tmp_path))


def test_gpus_that_came_after_the_executor_started_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = inventory.Inventory("gpu-1", 2.0, 1 << 30, (Gpu("lab.org/gpu=0", "T"),))
    now = replace(offered, gpus=(*offered.gpus, Gpu("lab.org/gpu=1", "T")))
    monkeypatch.setattr(inventory, "read", lambda _: now)
    given = ExecutorSettings(storage_path=str(tmp_path), token_path=str(tmp_path / "none"), cdi_paths=[])
    driver = FakeSandboxes(("base",))
    (told,) = [one for one in doctor.findings(given, driver, "", offered) if "+lab.org/gpu=1" in one.what]
    assert (told.level, "restart" in told.mend) == ("warning", True)
    assert not [one for one in doctor.findings(given, driver, "", now) if "when it started" in one.what]


def test_a_place_that_no_session_can_have_is_told(tmp_path: Path) -> None:
    assert [one.level for one in found(tmp_path, mount_paths=["/proc"]) if "/proc" in one.what] == ["error"]


def test_only_a_mount_that_was_asked_for_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MOUNTS", ["/none/net"])
    for asked, level in ((["/none/net"], "ok"), (["/none/net", "/none/data"], "warning")):
        levels = [one.level for one in found(tmp_path, mount_paths=asked) if one.what.startswith("/none/net is not")]
        assert levels == [level]


@pytest.mark.parametrize(
    ("code", "closed"),
    [(errno.ECONNREFUSED, True), (errno.ETIMEDOUT, True), (errno.EHOSTUNREACH, True), (errno.EMFILE, False)],
)
def test_ports_are_closed_when_the_network_says_so(code: int, closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files say nothing of ports."""

    def failing(*_: object) -> socket.socket:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(netns, "inside", lambda _, act: act())
    monkeypatch.setattr(socket, "create_connection", failing)
    if closed:
        assert packet._closed(Path("/none"), "127.0.0.1").level == "ok"
    else:
        with pytest.raises(OSError, match="Too many"):
            packet._closed(Path("/none"), "127.0.0.1")
