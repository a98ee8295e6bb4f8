"""Debuggers in a session of the oci driver: its own processes are open to them, by root inside, and no others."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.sandbox import Status

from .conftest import ADA, CALL, ROOT, Inside, Maker, OciLab

# Attaches to a process as gdb does, reads its memory as py-spy does, and lets it go.
DEBUG = """
import ctypes, os, sys
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
pid = int(sys.argv[1])
call("ptrace", 16, pid, None, None)  # PTRACE_ATTACH
os.waitpid(pid, 0x40000000)  # __WALL
address = next(int(line.split("-")[0], 16) for line in open(f"/proc/{pid}/maps"))
class Span(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
data = ctypes.create_string_buffer(4)
call("process_vm_readv", pid, ctypes.byref(Span(ctypes.addressof(data), 4)), 1, ctypes.byref(Span(address, 4)), 1, 0)
print("magic", "ok" if data.raw == b"\\x7fELF" else data.raw)
call("ptrace", 17, pid, None, None)  # PTRACE_DETACH
fd = os.pidfd_open(pid)
call("syscall", 438, fd, 0, 0)  # pidfd_getfd
call("syscall", 312, os.getpid(), pid, 2, 0, 0)  # kcmp of the file systems
"""


@pytest.fixture
def make(oci_lab: OciLab) -> Iterator[Maker]:
    maker = Maker(oci_lab)
    yield maker
    maker.close()


@pytest.fixture
def inside(make: Maker, tmp_path: Path) -> Inside:
    return Inside(make, tmp_path / "home")


def test_root_debugs_the_processes_of_the_session(inside: Inside) -> None:
    """`sudo gdb -p`, `sudo strace -p`, `sudo py-spy dump`: of one's own processes, which are none of its children."""
    code, out = inside.run("sh", "-c", "sleep 1000 > /dev/null 2>&1 & echo $!", identity=ADA)
    assert code == 0
    pid = out.strip()
    command = ("sudo", "-n", "python3", "-c", CALL + DEBUG, pid)
    code, out = inside.run(*command, identity=ADA)
    seen = [line.rpartition(" ")[2] for line in out.splitlines()]
    assert (code, len(seen), set(seen)) == (0, 6, {"ok"}), out


def test_memory_is_placed_and_programs_start_without_random_addresses(inside: Inside) -> None:
    for identity in (ROOT, ADA):
        seen = inside.python(
            """
call("syscall", 239, None, None, 0, None, 0)  # get_mempolicy
call("syscall", 238, 0, None, 0)              # set_mempolicy to the default
call("syscall", 237, 0, 0, 0, None, 0, 0)     # mbind of nothing
call("personality", 0x40000)                  # ADDR_NO_RANDOMIZE
call("personality", 0x100000)                 # a flag that nobody needs
""",
            identity,
        )
        assert seen.pop("personality 1048576") == "EPERM"
        allowed = {"ok", "ENOSYS"}  # a kernel without NUMA
        assert set(seen.values()) <= allowed, seen


def test_the_machines_processes_stay_shut(inside: Inside, make: Maker) -> None:
    """Also those of the same user, and by way of what is shared: there is no number by which to name them."""
    with subprocess.Popen(["sleep", "60"], user=ADA.uid, group=ADA.gid) as target:
        pids = (target.pid, os.getpid(), make.wait(inside.spec.id, Status.RUNNING).pid)
        for identity in (ROOT, ADA):
            seen = inside.python(
                f"""
import os
for pid in {pids}:
    for request in (16, 0x4206):  # PTRACE_ATTACH, PTRACE_SEIZE
        print("ptrace", pid, request, end=" "); call("ptrace", request, pid, 0, 0)
    attempt(f"mem {{pid}}", open, f"/proc/{{pid}}/mem", "rb")
    attempt(f"root {{pid}}", os.listdir, f"/proc/{{pid}}/root/")
    attempt(f"pidfd {{pid}}", os.pidfd_open, pid)
""",
                identity,
            )
            assert set(seen.values()) <= {"ESRCH", "EPERM", "ENOENT"}, seen
        assert target.poll() is None
        target.kill()


# As root inside: what comes and is still the runtime, which brings descriptors of the machine along (CVE-2016-9962), is
# looked into as a debugger would. Prints what could be opened of it.
LURK = """
import os
own, met = {str(os.getpid()), "1"}, set()
def runtime(pid):
    try:
        return open(f"/proc/{pid}/comm").read().startswith(("runc", "crun", "exe")) or (
            "init" in open(f"/proc/{pid}/cmdline").read().split(chr(0))[1:2])
    except OSError:
        return False
print("ready", flush=True)
while not os.path.exists("/tmp/enough"):
    for pid in os.listdir("/proc"):
        if not pid.isdigit() or pid in own or not runtime(pid):
            continue
        met.add(pid)
        paths = [f"/proc/{pid}/{name}" for name in ("exe", "mem", "root", "cwd")]
        try:
            paths += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            pass
        for path in paths:
            try:
                os.close(os.open(path, os.O_PATH if "/fd/" in path else os.O_RDONLY))
            except OSError:
                continue
            if runtime(pid):
                print("opened", path, flush=True)
print("met", len(met))
"""


def test_root_inside_does_not_get_hold_of_the_runtime_that_comes(inside: Inside) -> None:
    lines: list[str] = []

    def lurk() -> None:
        lines.extend(inside.run("python3", "-c", LURK)[1].splitlines())

    lurking = threading.Thread(target=lurk)
    lurking.start()
    for _ in range(30):
        inside.run("true", identity=ADA)
        inside.run("true", identity=ROOT)
    inside.run("touch", "/tmp/enough")
    lurking.join()
    assert lines[0] == "ready"
    assert lines[1:-1] == []
    assert int(lines[-1].removeprefix("met ")) > 0
