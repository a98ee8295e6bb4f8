"""The pure parts of the oci driver: id maps and ranges, references, configuration, logs."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beaker_sessions.errors import Error
from beaker_sessions.model import Identity
from beaker_sessions.sandbox import Image, Spec
from beaker_sessions.sandbox.cdi import CdiMount, Edits, Hook
from beaker_sessions.sandbox.oci import cgroups, config, logs, reference, userns

START = userns.FIRST
ADA = Identity("ada", 1500, 1500, "/home/ada", {1500: "ada", 27: "sudo"})


@settings(deadline=None)
@given(st.lists(st.integers(0, START - 1) | st.integers(START + userns.SIZE, 1 << 31), max_size=80))
def test_map_is_one_to_one_and_one_s_own_ids_are_themselves(own: list[int]) -> None:
    entries = userns.id_map(START, own)
    assert len(entries) <= userns.LINES
    inside = [id for first, _, count in entries for id in range(first, first + count)]
    outside = [id for _, start, count in entries for id in range(start, start + count)]
    assert len(set(inside)) == len(inside) == len(set(outside))
    assert set(range(userns.SIZE)) <= set(inside)
    for theirs, ours in zip(inside, outside, strict=True):
        assert ours == theirs if theirs in own[:50] else ours == START + theirs or theirs in own
    # Nothing outside but one's own ids and one's own range.
    assert {id for id in outside if not START <= id < START + userns.SIZE} <= set(own)


def test_root_of_the_machine_is_nobody_inside() -> None:
    for identity in (Identity("root", 0, 0, "/root"), Identity("eve", 1501, 0, "/", {0: "root"})):
        with pytest.raises(Error) as error:
            userns.maps(identity, START)
        assert error.value.code == "forbidden"
    member = Identity("eve", 1501, 1501, "/", {0: "root", 27: "sudo", 1501: "eve"})
    for map in userns.maps(member, START, [0, 44]):
        assert userns.outside(map, 0) == START
    assert userns.outside(userns.maps(member, START, [0, 44])[1], 44) == 44


def test_ranges_are_allotted_once_and_never_twice(tmp_path: Path) -> None:
    (tmp_path / "subuid").write_text(f"other:{START}:65536")  # without a newline, as some editors leave it
    found: dict[str, int] = {}

    def allot(number: int) -> None:
        identity = Identity(f"user{number}", 90000 + number, 90000, "/", {})
        found[identity.name] = userns.subordinate(identity, tmp_path)

    threads = [threading.Thread(target=allot, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found.values()) == [START + n * userns.SIZE for n in range(1, 9)]
    assert userns.subordinate(Identity("user3", 90003, 90000, "/", {}), tmp_path) == found["user3"]
    lines = (tmp_path / "subuid").read_text().splitlines()
    assert lines[0] == f"other:{START}:65536"
    assert sorted(lines[1:]) == sorted((tmp_path / "subgid").read_text().splitlines())
    assert {path.name for path in tmp_path.iterdir()} == {"subuid", "subgid"}


def test_range_that_is_not_one_s_own_is_refused(tmp_path: Path) -> None:
    for name in ("subuid", "subgid"):
        (tmp_path / name).write_text(f"ada:{START}:65536\nben:{START + 65535}:65536\n")
    with pytest.raises(Error) as error:
        userns.subordinate(ADA, tmp_path)
    assert error.value.code == "conflict"
    assert "ben" in error.value.message


def test_range_with_a_real_account_is_refused(tmp_path: Path) -> None:
    for name in ("subuid", "subgid"):
        (tmp_path / name).write_text("zoe:0:65536\nben:70000:65536\n")
    with pytest.raises(Error) as error:
        userns.subordinate(Identity("zoe", 66000, 66000, "/"), tmp_path)
    assert error.value.code == "conflict"
    for own in (Identity("ada", 1500, 66000, "/"), Identity("eve", 66000, 66000, "/", {70001: "lab"})):
        with pytest.raises(Error) as error:
            userns.subordinate(own, tmp_path)
        assert error.value.code == "forbidden"


def test_range_with_one_s_own_group_is_not_chosen(tmp_path: Path) -> None:
    assert (
        userns.subordinate(Identity("eve", 1501, START + 5, "/", {START + 5: "big"}), tmp_path) == START + userns.SIZE
    )


@pytest.mark.parametrize(
    "text", ["", "1-2", "x-y", "65536", "0-999999", "-1-999999", "200000-100000", "65536-4294967295"]
)
def test_what_is_no_interval_for_ranges(text: str) -> None:
    with pytest.raises(Error, match="subordinateIds"):
        userns.interval(text)


def test_ranges_are_taken_from_the_interval_alone(tmp_path: Path) -> None:
    first, end = userns.interval("700000-831071")
    starts = {userns.subordinate(Identity(f"u{n}", 90000 + n, 9, "/"), tmp_path, first, end) for n in range(2)}
    assert starts == {700000, 765536}
    with pytest.raises(Error) as error:
        userns.subordinate(Identity("late", 90009, 9, "/"), tmp_path, first, end)
    assert error.value.code == "unavailable"


def test_lock_of_the_dead_is_broken(tmp_path: Path) -> None:
    (tmp_path / "subuid.lock").write_text("4194305\0")  # above the kernel's highest pid
    assert userns.subordinate(ADA, tmp_path) == START


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ubuntu", "docker.io/library/ubuntu:latest"),
        ("docker://lab/cuda:12.4", "docker.io/lab/cuda:12.4"),
        ("localhost/x", "localhost/x:latest"),
        ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest"),
        ("ghcr.io/a/b@sha256:" + "0" * 64, "ghcr.io/a/b@sha256:" + "0" * 64),
    ],
)
def test_full_names(text: str, name: str) -> None:
    assert reference.parse(text).name == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "A",
        "a b",
        "../x",
        "/x",
        "x/",
        "-x",
        "x:",
        "x@y",
        "x\n",
        "x\0",
        "a" * 600,
        "oci:/etc",
        "x;id",
        "[a]b",
        "é",
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(Error) as error:
        reference.parse(text)
    assert error.value.code == "invalid"


@given(st.binary(max_size=300), st.integers(1, 40))
def test_log_gives_back_every_byte(output: bytes, size: int) -> None:
    text = b""
    for start in range(0, len(output), size):  # as conmon writes each piece that it reads
        *whole, rest = output[start : start + size].split(b"\n")
        text += b"".join(b"2026-01-01T00:00:00.0+00:00 stdout F " + line + b"\n" for line in whole)
        text += b"2026-01-01T00:00:00.0+00:00 stderr P " + rest + b"\n" if rest else b""
    assert logs.payload(text) == output


def made(spec: Spec, edits: Edits = Edits(), *, unified: bool) -> dict:  # noqa: B008
    uids, gids = userns.maps(spec.identity, START)
    host = config.Host(Path("/r"), "/beaker/x", uids, gids, unified, swap=True, files=1 << 20)
    return config.config(spec, host, edits, [config.Node("/dev/real", "/dev/gpu0", "c", 195, 0, "rw")])


def test_a_log_that_was_closed_late_is_put_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KEEP", 3000)
    lines = [b"2026-01-01T00:00:00.000000000+00:00 stdout F line %d\n" % number for number in range(1000)]
    (tmp_path / "log").write_bytes(b"".join(lines[:10]))
    os.link(tmp_path / "log", tmp_path / "log.closed")
    logs.trim(tmp_path)  # conmon still writes to it
    assert (tmp_path / "log.closed").exists()
    (tmp_path / "log").unlink()
    (tmp_path / "log").write_bytes(lines[10])
    logs.trim(tmp_path)
    assert (tmp_path / "log.closed").samefile(tmp_path / "log")
    assert logs.tail(tmp_path, 1000) == b"".join(b"line %d\n" % number for number in range(11))

    (tmp_path / "log").write_bytes(b"".join(lines[10:20]))
    (tmp_path / "log.tmp").write_bytes(b"".join(lines[20:30]))  # conmon took the one that was made ahead
    (tmp_path / "log.tmp").rename(tmp_path / "log")
    logs.trim(tmp_path)
    logs.trim(tmp_path)
    kept = (tmp_path / "log.old").read_bytes()
    assert kept == b"".join(lines[:20])
    assert logs.tail(tmp_path, 1000) == b"".join(b"line %d\n" % number for number in range(30))


def test_where_output_may_be_missing_it_is_said(tmp_path: Path) -> None:
    """When conmon has begun more logs than anybody saw: which are two, and which more, nobody knows."""
    for number in range(4):
        (tmp_path / "log.tmp").write_bytes(b"2026-01-01T00:00:00.000000000+00:00 stdout F line %d\n" % number)
        (tmp_path / "log.tmp").rename(tmp_path / "log")
        if number < 2:
            logs.trim(tmp_path)
    assert logs.tail(tmp_path, 1000) == b"line 0\nline 1\nline 2\n\r\n[output may be missing here]\r\nline 3\n"


def test_limits_on_both_kinds_of_cgroups() -> None:
    spec = Spec("x", {}, Image("sha256:0", "x"), ADA, cpu_weight=100, memory=1 << 30, pids=77)
    first = made(spec, unified=False)["linux"]["resources"]
    second = made(spec, unified=True)["linux"]["resources"]
    assert first["cpu"] == {"shares": 1024}
    assert second["unified"] == {"cpu.weight": "100"}
    for resources in (first, second):
        assert resources["memory"] == {"limit": 1 << 30, "swap": 1 << 30}
        assert resources["pids"] == {"limit": 77}
        assert resources["devices"] == [
            {"allow": False, "access": "rwm"},
            {"allow": True, "type": "c", "major": 195, "minor": 0, "access": "rw"},
        ]


def test_edits_become_mounts_hooks_and_variables() -> None:
    edits = Edits(
        env=("GPU=yes",),
        mounts=(
            CdiMount("/usr/lib/libcuda.so", "/usr/lib/libcuda.so", ("ro", "nosuid")),
            CdiMount("/run/gpu", "/dev/gpu-caps", ("ro", "nosuid")),
        ),
        hooks=(Hook("createContainer", "/usr/bin/nvidia-ctk", ("nvidia-ctk", "hook"), (), 5),),
    )
    result = made(Spec("x", {}, Image("sha256:0", "x", ("GPU=no",)), ADA, env={"GPU": "mine"}), edits, unified=True)
    assert "GPU=yes" in result["process"]["env"]
    assert result["hooks"]["createContainer"][0]["timeout"] == 5
    bound = {
        mount["destination"]: mount
        for mount in result["mounts"]
        if "bind" in mount["options"] or "rbind" in mount["options"]
    }
    assert bound["/dev/gpu-caps"]["options"] == ["rbind", "ro", "nosuid"]
    assert "/usr/lib/libcuda.so" not in bound  # which the root file system has before
    assert config.beforehand(edits) == [edits.mounts[0]]
    assert bound["/dev/gpu0"]["source"] == "/dev/real"


def test_nobody_holds_capabilities_but_root_inside() -> None:
    for identity, held in ((ADA, []), (Identity("root", 0, 0, "/root", {}), config.CAPABILITIES)):
        process = config.process(["x"], {}, identity, tty=False, gids=[], files=1024)
        assert (process["capabilities"]["effective"], process["capabilities"]["bounding"]) == (
            held,
            config.CAPABILITIES,
        )
        assert "CAP_SYS_ADMIN" not in config.CAPABILITIES


@pytest.mark.parametrize(
    ("cpus", "weight"), [(0, 100), (1, 100), (16, 300), (24, 900), (30, 4500), (30.4, 5700), (32, 6000), (50, 9375)]
)
def test_the_weight_of_all_sessions_gives_them_what_they_claimed(cpus: float, weight: int) -> None:
    """Beside three busy groups of the usual weight: weight / (weight + 300) of 32 CPUs is what is claimed, or 95 %."""
    assert cgroups.guarantee(cpus, 32, 300) == weight
    assert 32 * weight / (weight + 300) >= min(cpus, 0.95 * 32)
