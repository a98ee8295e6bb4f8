"""Attacks from inside a sandbox of the oci driver, mostly by root inside, who is nobody outside."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.model import Pull
from beaker_sessions.sandbox import Status
from beaker_sessions.sandbox.oci import cgroups, userns
from tests import images

from .conftest import ADA, CALL, ROOT, SECONDS, Inside, Maker, OciLab, pinned

BEN_UID = 1600


@pytest.fixture
def make(oci_lab: OciLab) -> Iterator[Maker]:
    maker = Maker(oci_lab)
    yield maker
    maker.close()


@pytest.fixture
def inside(make: Maker, tmp_path: Path) -> Inside:
    return Inside(make, tmp_path / "home")


def test_root_inside_is_an_id_of_ones_own_outside(inside: Inside, oci_lab: OciLab) -> None:
    assert inside.run("sh", "-c", "id -u; touch /home/ada/by-root") == (0, "0\n")
    assert inside.run("touch", "/home/ada/by-ada", identity=ADA) == (0, "")
    start = userns.subordinate(ADA, oci_lab.etc)
    assert (inside.home / "by-root").stat().st_uid == start >= userns.FIRST
    assert (inside.home / "by-ada").stat().st_uid == ADA.uid
    pid = inside.make.wait(inside.spec.id, Status.RUNNING).pid
    assert Path(f"/proc/{pid}").stat().st_uid in (start, ADA.uid)


def test_sudo_installs_and_makes_users(inside: Inside) -> None:
    script = "sudo -n useradd -m bob && sudo -n -u bob id -un && sudo -n touch /usr/bin/new && ls -l /usr/bin/new"
    code, out = inside.run("sh", "-c", script, identity=ADA)
    assert (code, out.splitlines()[0]) == (0, "bob"), out
    assert " root root " in out


def test_other_peoples_files_stay_closed(make: Maker, tmp_path: Path) -> None:
    homes = tmp_path / "homes"
    (homes / "ben").mkdir(parents=True)
    (homes / "ben/secret").write_text("ben's")
    os.chown(homes / "ben", BEN_UID, BEN_UID)
    (homes / "ben").chmod(0o700)
    with pinned(homes, "/homes") as mount:
        inside = Inside(make, tmp_path / "home", mounts=(mount,))
    for identity in (ROOT, ADA):
        code, out = inside.run("cat", "/homes/ben/secret", identity=identity)
        assert (code, "Permission denied" in out) == (1, True)
        code, out = inside.run("chown", "0", "/homes/ben", identity=identity)
        assert code == 1
    assert (homes / "ben").stat().st_uid == BEN_UID


def test_fork_bombs_in_several_sessions_leave_the_machine_ids_of_processes(
    make: Maker, oci_lab: OciLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own limit; that of all together is set where a driver starts, also below what runs already."""
    bomb = ("sh", "-c", "n=0; while [ $n -lt 25 ]; do sleep 1000 & n=$((n + 1)); done; echo all; wait")
    with monkeypatch.context() as patch:
        patch.setattr(cgroups, "room", lambda: 40)
        driver = oci_lab.again()
    try:
        first, second = make.spec(*bomb, stdin=False), make.spec(*bomb, stdin=False)
        make.start(first).read(b"all")
        stream = make.start(second)
        assert make.exit_code(second.id) != 0
        stream.read()
        assert b"fork" in stream.err, "one process more is refused, though it has less than its own limit"
        assert make.wait(first.id, Status.RUNNING)
    finally:
        oci_lab.again()
    assert any("sessions together have at most" in found.what for found in driver.check())


def test_what_only_the_machines_root_may(inside: Inside) -> None:
    seen = inside.python(
        """
call("mount", b"none", b"/mnt", b"tmpfs", 0, None)
call("mount", b"/dev/vda", b"/mnt", b"ext4", 0, None)
call("umount2", b"/proc", 2)
call("unshare", 0x10000000)
call("unshare", 0x00020000)
call("setns", 0, 0)
call("chroot", b"/home")
call("sethostname", b"x", 1)
call("reboot", 0)
call("swapon", b"/x", 0)
call("init_module", b"", 0, b"")
call("syscall", 175, b"", 0, b"")
call("syscall", 248, b"user", b"x", b"y", 1, -2)
call("syscall", 250, 0, -2, 0)
call("syscall", 321, 0, b"", 0)
call("syscall", 298, b"", 0, -1, -1, 0)
call("syscall", 304, -100, b"", 0)
call("syscall", 425, 1, b"")
"""
    )
    assert seen.pop("chroot") == "ok"  # of one's own root, which opens nothing
    assert set(seen.values()) == {"EPERM"}, seen


def test_devices_kernel_settings_and_raw_networks(inside: Inside) -> None:
    seen = inside.python(
        """
import os, socket, stat
attempt("mknod-b", os.mknod, "/tmp/disk", stat.S_IFBLK | 0o600, os.makedev(254, 0))
attempt("mknod-c", os.mknod, "/tmp/mem", stat.S_IFCHR | 0o600, os.makedev(1, 1))
for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory", "/proc/sysrq-trigger",
             "/sys/kernel/mm/ksm/run", "/sys/power/state", "/proc/sys/net/ipv4/ip_forward"):
    attempt(path, open, path, "w")
attempt("packet", socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
attempt("raw", socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)
attempt("alg", socket.socket, 38, socket.SOCK_SEQPACKET)
attempt("vsock", socket.socket, 40, socket.SOCK_STREAM)
attempt("port 80", lambda: socket.create_server(("", 80)))
""",
    )
    assert seen.pop("port 80") == "ok"
    for what, error in seen.items():
        assert error in ("EPERM", "EACCES", "EROFS", "ENOENT"), (what, error)


def test_keyrings_are_closed(inside: Inside) -> None:
    script = """
for number in (248, 249, 250):  # add_key, request_key, keyctl of x86-64
    call("syscall", number, b"user", b"name", b"value", 5, -3)
"""
    for identity in (ROOT, ADA):
        seen = inside.python(script, identity)
        assert len(seen) == 3
        assert set(seen.values()) <= {"EPERM", "ENOSYS"}, seen


def test_kernel_files_tell_nothing(inside: Inside) -> None:
    for path in ("/proc/kcore", "/proc/keys", "/proc/timer_list"):
        assert inside.run("sh", "-c", f"cat {path} 2>/dev/null")[1] == "", path
    for path in ("/sys/firmware", "/sys/class/net", "/sys/devices/virtual/net"):
        assert inside.run("ls", path) == (0, ""), path


def test_processes_outside_cannot_be_seen_or_reached(inside: Inside) -> None:
    found = inside.make.wait(inside.spec.id, Status.RUNNING)
    seen = inside.python(
        f"""
import os
for pid in ({os.getpid()}, {found.pid}):
    attempt("kill " + str(pid), os.kill, pid, 0)
    attempt("mem " + str(pid), open, "/proc/%d/mem" % pid)
"""
    )
    assert set(seen.values()) <= {"ESRCH", "ENOENT"}


def test_another_session_is_out_of_reach(inside: Inside, make: Maker, tmp_path: Path) -> None:
    ben = replace(ADA, name="ben", uid=BEN_UID)
    other = Inside(make, tmp_path / "ben", identity=ben)
    address = other.run("hostname", "-I")[1].split()[0]
    serve = "import socket; s = socket.create_server(('', 8000)); print('up', flush=True); s.accept()"
    _, terminal = make.lab.sandboxes.exec(
        other.spec.id, ("python3", "-c", serve), env={}, identity=ben, workdir="/", size=None, stdin=False
    )
    make.stream(terminal).read(b"up")
    connect = "import socket\nattempt('connect', socket.create_connection, ({!r}, 8000), 0.5)"
    assert other.python(connect.format(address)) == {"connect": "ok"}
    code, out = inside.run("python3", "-c", CALL + connect.format(address))
    assert (code, "timed out" in out or "EHOSTUNREACH" in out or "None" in out) != (0, False), out
    assert "ok" not in out
    etc = make.lab.etc  # type: ignore[attr-defined]
    assert userns.subordinate(ben, etc) != userns.subordinate(ADA, etc)


def test_a_set_uid_file_in_home_opens_nothing(make: Maker, oci_lab: OciLab) -> None:
    """On the machine it makes whoever runs it an id of ada's own range, which owns no file of anybody's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        inside = Inside(make, Path(name, "home"))
        assert inside.run("sh", "-c", "cp /usr/bin/id /home/ada/ && chmod 6755 /home/ada/id")[0] == 0
        assert inside.run("/home/ada/id", "-u", identity=ADA) == (0, f"{ADA.uid}\n")  # homes are mounted nosuid
        start, left = userns.subordinate(ADA, oci_lab.etc), inside.home / "id"
        assert (left.stat().st_uid, left.stat().st_gid) == (start, start)
        for uid in (ADA.uid, BEN_UID):
            out = subprocess.run([left, "-u"], user=uid, group=uid, capture_output=True, text=True, check=True)
            assert out.stdout == f"{start}\n"


def test_working_directory_by_descriptor_leads_nowhere(inside: Inside, make: Maker) -> None:
    """CVE-2024-21626: a runtime that leaks a descriptor of this machine's files."""
    mark = inside.home.parent / "mark"
    mark.write_text("outside")
    for number in range(3, 16):
        path = f"/proc/self/fd/{number}"
        try:
            _, out = inside.run("sh", "-c", f"cat ../../../../../../../../..{mark} .{mark} 2>&1", workdir=path)
        except Error:
            continue
        assert "outside" not in out
        try:
            _, shown, _ = make.run("cat", f"../../../../../../../../..{mark}", workdir=path)
        except Error:
            continue
        assert shown != b"outside"


def test_links_of_a_hostile_image_stay_inside(oci_lab: OciLab, make: Maker, tmp_path: Path) -> None:
    """Account files and mount points are made by root before the sandbox is closed."""
    victim = tmp_path / "victim"
    victim.mkdir()
    archive = tmp_path / "hostile.tar"
    root = images.tar(
        {
            "busybox": images.BUSYBOX.read_bytes(),
            "etc": str(victim),
            "home": f"../../../../../../../..{victim}",
            ".beaker": str(victim),
        }
    )
    images.oci_archive(root, archive)
    oci_lab.sandboxes.images.load(archive, "hostile:test")
    image = oci_lab.sandboxes.image("hostile:test", Pull.NEVER, print)
    oci_lab.known["hostile"] = image
    with pinned(tmp_path, "/home/ada") as mount, contextlib.suppress(Error):
        make.run("/busybox", "true", image="hostile", mounts=(mount,))
    assert list(victim.iterdir()) == []


def test_a_socket_of_the_machine_is_not_in_the_network(inside: Inside) -> None:
    """Abstract unix sockets belong to network namespaces."""
    name = f"\0beaker-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        script = f"import socket\nattempt('abstract', socket.socket(socket.AF_UNIX).connect, {name!r})"
        assert inside.python(script) == {"abstract": "ECONNREFUSED"}


def test_a_tree_too_deep_for_paths_is_removed(make: Maker, oci_lab: OciLab) -> None:
    """Else what one session leaves in its own layer would keep the next executor from starting."""
    script = "import os\nfor _ in range(3000):\n os.mkdir('d'); os.chdir('d')\nopen('leaf', 'w').close()"
    assert make.run("python3", "-c", script, image="debian", workdir="/tmp")[0] == 0
    oci_lab.sandboxes.remove(make.ids[-1])
    oci_lab.again()
    deadline = time.monotonic() + SECONDS
    while list((oci_lab.state / "trash").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list((oci_lab.state / "trash").iterdir()) == []


@pytest.mark.parametrize("kind", ["createContainer", "createRuntime"])
def test_a_cdi_hook_has_nothing_of_image_and_user_in_its_environment(
    make: Maker, oci_lab: OciLab, tmp_path: Path, kind: str
) -> None:
    """CVE-2025-23266: LD_PRELOAD of an image, in a program that runs before the container has its root."""
    device = tmp_path / "gpu0"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with tempfile.TemporaryDirectory(dir="/run") as name:  # where the ids inside may pass
        directory = Path(name)
        directory.chmod(0o755)
        said, program = directory / "said", directory / "hook"
        said.touch()
        said.chmod(0o666)
        program.write_text(f"#!/bin/sh\n/usr/bin/env > {said}\n")
        program.chmod(0o755)
        spec = {
            "cdiVersion": "0.6.0", "kind": "hooked.com/gpu",
            "devices": [{"name": "0", "containerEdits": {
                "deviceNodes": [{"path": "/dev/gpu0", "hostPath": str(device)}],
                "hooks": [{"hookName": kind, "path": str(program), "args": ["hook"]}],
            }}],
        }  # fmt: skip
        (oci_lab.cdi / "hooked.json").write_text(json.dumps(spec))
        oci_lab.sandboxes.cdi_hooks.append(str(program))
        try:
            env = {"LD_PRELOAD": "/evil.so", "FRUIT": "pear"}
            assert make.run("true", image="greedy", env=env, gpus=("hooked.com/gpu=0",))[0] == 0
            names = {line.partition("=")[0] for line in said.read_text().splitlines()}
            assert names
            assert names <= {"PATH", "PWD", "SHLVL", "_", "OLDPWD"}
        finally:
            oci_lab.sandboxes.cdi_hooks.clear()
            (oci_lab.cdi / "hooked.json").unlink()
