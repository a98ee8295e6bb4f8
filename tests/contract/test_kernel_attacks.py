"""Doors of the kernel that have led out of sandboxes before, tried from inside by root and by the user."""

from __future__ import annotations

import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from beaker_sessions.sandbox import Status
from beaker_sessions.sandbox.oci import userns

from .conftest import ADA, ROOT, Inside, Maker, OciLab, pinned

BEN = replace(ADA, name="ben", uid=1600, gid=1600, groups={1600: "ben"})
# setcap cap_setuid,cap_dac_override+ep, in the form of linux/capability.h: revision 2, which the kernel turns into
# one that is good in the setter's user namespace alone (revision 3).
SETCAP = """
import os, struct, sys
value = struct.pack("<IIIII", 0x02000001, 0x82, 0, 0, 0)
os.setxattr(sys.argv[1], "security.capability", value)
print(len(os.getxattr(sys.argv[1], "security.capability")))
"""


@pytest.fixture
def make(oci_lab: OciLab) -> Iterator[Maker]:
    maker = Maker(oci_lab)
    yield maker
    maker.close()


@pytest.fixture
def inside(make: Maker) -> Iterator[Inside]:
    """Below a directory that every user of the machine may pass."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        yield Inside(make, Path(name, "home"))


def outside(program: Path, *arguments: str, uid: int) -> str:
    done = subprocess.run([program, *arguments], user=uid, group=uid, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_set_ids_of_root_inside_are_nobodys_outside(inside: Inside, make: Maker, oci_lab: OciLab) -> None:
    """Neither on the machine, as either account, nor in the other account's session, by whoever."""
    kinds = {"suid": "4755", "sgid": "2755", "both": "6755"}
    for name, mode in kinds.items():
        assert inside.run("sh", "-c", f"cp /usr/bin/id /home/ada/{name} && chmod {mode} /home/ada/{name}")[0] == 0
    ranges = {one.name: userns.subordinate(one, oci_lab.etc) for one in (ADA, BEN)}
    assert abs(ranges["ada"] - ranges["ben"]) >= userns.SIZE
    real = {entry.pw_uid for entry in pwd.getpwall()} | {ADA.uid, BEN.uid}
    for uid in (ADA.uid, BEN.uid):
        for name in kinds:
            ids = {int(outside(inside.home / name, flag, uid=uid)) for flag in ("-u", "-g")}
            assert ids <= {uid, ranges["ada"]}, (uid, name, ids)
            assert not (ids - {uid}) & real
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        with pinned(inside.home, "/stolen") as stolen:
            other = Inside(make, Path(name, "home"), identity=BEN, mounts=(stolen,))
        for identity in (BEN, ROOT):
            for kind in kinds:
                for flag in ("-u", "-g"):
                    code, out = other.run(f"/stolen/{kind}", flag, identity=identity)
                    assert (code, out) == (0, f"{identity.uid if flag == '-u' else identity.gid}\n"), (kind, out)


def test_a_shell_of_root_inside_opens_nobodys_files_outside(inside: Inside, make: Maker, oci_lab: OciLab) -> None:
    """Run on the machine it is an id of ada's range: it reads ada's own sandbox at most, never ben's."""
    assert inside.run("sh", "-c", "cp /bin/cat /home/ada/cat && chmod 6755 /home/ada/cat")[0] == 0
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        other = Inside(make, Path(name, "home"), identity=BEN)
        assert other.run("sh", "-c", "echo secret > /root/kept; chmod 700 /root; chmod 600 /root/kept")[0] == 0
        layer = oci_lab.state / "sessions" / other.spec.id / "upper/root/kept"
        assert layer.read_text() == "secret\n"
        for uid in (ADA.uid, BEN.uid):
            assert "secret" not in outside(inside.home / "cat", str(layer), uid=uid)
        pid = make.wait(other.spec.id, Status.RUNNING).pid
        assert "secret" not in outside(inside.home / "cat", f"/proc/{pid}/root/root/kept", uid=ADA.uid)


def test_capabilities_of_files_set_inside_are_worthless_outside(inside: Inside, oci_lab: OciLab) -> None:
    for place in ("/home/ada", "/usr/local/bin"):
        assert inside.run("sh", "-c", f"cp /bin/grep {place}/grep; chmod 755 {place}/grep")[0] == 0
        code, out = inside.run("python3", "-c", SETCAP, f"{place}/grep")
        assert code == 0, out
    # In the layer they hold inside; a home is mounted nosuid, where they do not.
    _, layer = inside.run("/usr/local/bin/grep", "CapEff", "/proc/self/status", identity=ADA)
    _, home = inside.run("/home/ada/grep", "CapEff", "/proc/self/status", identity=ADA)
    assert (layer.split()[1], home.split()[1]) == (f"{0x82:016x}", "0" * 16)
    upper = oci_lab.state / "sessions" / inside.spec.id / "upper/usr/local/bin/grep"
    copy = inside.home.parent / "grep"
    subprocess.run(["cp", "--preserve=all", upper, copy], check=True)
    for program in (inside.home / "grep", copy):
        assert os.getxattr(program, "security.capability")
        for uid in (ADA.uid, BEN.uid):
            assert outside(program, "CapEff", "/proc/self/status", uid=uid).split()[1] == "0" * 16


def test_kernel_interfaces_that_led_out_before(inside: Inside) -> None:
    for identity in (ROOT, ADA):
        seen = inside.python(
            """
import os
call("unshare", 0x10000000 | 0x00020000)
call("syscall", 56, 0x10000000 | 17, 0, 0, 0, 0)  # clone of x86-64 with CLONE_NEWUSER
call("syscall", 435, None, 0)                     # clone3
call("syscall", 425, 1, b"x" * 200)               # io_uring_setup
call("syscall", 321, 0, b"x" * 200, 100)          # bpf
call("syscall", 323, 0)                           # userfaultfd
call("syscall", 298, b"x" * 200, 0, -1, -1, 0)    # perf_event_open
call("syscall", 304, 3, b"x" * 200, 0)            # open_by_handle_at
call("syscall", 272, 0x20000)                     # unshare by number
call("syscall", 308, 3, 0)                        # setns by number
call("syscall", 428, -100, b"/", 1)               # open_tree
call("syscall", 429, -1, b"", -1, b"", 0)         # move_mount
call("syscall", 430, b"tmpfs", 0)                 # fsopen
call("syscall", 442, -1, b"", 0, b"", 0)          # mount_setattr
call("syscall", 300, 8, 0x10)                     # fanotify_init
call("syscall", 246, 0, 0, 0, 0)                  # kexec_load
call("syscall", 313, -1, b"", 0)                  # finit_module
""",
            identity,
        )
        assert seen.pop("syscall 435") == "ENOSYS"
        assert set(seen.values()) <= {"EPERM"}, (identity.name, seen)


def test_files_of_the_kernel_that_led_out_before(inside: Inside) -> None:
    inside.run("mkdir", "-p", "/mnt/cgroup")
    for identity in (ROOT, ADA):
        seen = inside.python(
            """
import glob
paths = ["/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/hotplug",
         "/proc/sys/vm/panic_on_oom", "/proc/sys/fs/binfmt_misc/register", "/proc/sysrq-trigger", "/proc/kcore",
         "/proc/kallsyms", "/proc/acpi/x", "/sys/kernel/uevent_helper", "/sys/firmware/efi/vars", "/sys/kernel/debug/x",
         "/sys/kernel/security/x", "/sys/fs/cgroup/release_agent", "/sys/fs/cgroup/memory/release_agent",
         "/sys/fs/cgroup/cgroup.procs", "/proc/bus/pci/x", "/proc/irq/0/smp_affinity", "/proc/self/attr/exec",
         "/dev/mem", "/dev/kmsg", "/dev/fuse", "/dev/kvm", "/dev/net/tun", "/dev/sda", "/dev/vda"]
for path in [*paths, *glob.glob("/sys/fs/cgroup/*/release_agent")]:
    def write(path=path):
        with open(path, "r+b", buffering=0) as file:
            file.write(b"|/tmp/x")
    attempt(path, write)
def lower():
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
attempt("oom", lower)
attempt("nice", __import__("os").nice, -5)
call("mount", b"cgroup", b"/mnt/cgroup", b"cgroup", 0, b"memory")
call("mount", b"cgroup2", b"/mnt/cgroup", b"cgroup2", 0, None)
call("mount", b"proc", b"/mnt/cgroup", b"proc", 0, None)
call("mount", None, b"/proc/sys", None, 4096 | 32, None)
""",
            identity,
        )
        refused = {"EPERM", "EACCES", "EROFS", "ENOENT", "EISDIR", "ENOTDIR", "EIO", "ENXIO", "EINVAL"}
        assert set(seen.values()) <= refused, (identity.name, {k: v for k, v in seen.items() if v not in refused})


def test_no_process_outside_is_traced(inside: Inside) -> None:
    with subprocess.Popen(["sleep", "60"], user=ADA.uid, group=ADA.gid) as target:  # the user's own, on the machine
        seen = inside.python(
            f"""
for request in (16, 0x4206):  # PTRACE_ATTACH, PTRACE_SEIZE
    call("ptrace", request, {target.pid}, 0, 0)
call("syscall", 434, {target.pid}, 0)                    # pidfd_open
call("kill", {target.pid}, 9)
""",
            ADA,
        )
        assert set(seen.values()) <= {"ESRCH", "EPERM"}, seen
        assert target.poll() is None
        target.kill()


def test_networks_are_not_changed_and_not_listened_to(inside: Inside) -> None:
    """The network namespace is not of the user namespace, so that even root inside owns nothing of it; ping works."""
    seen = inside.python(
        """
import socket
attempt("icmp", socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)
attempt("packet", socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0x0300)
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
attempt("ping", socket.socket, socket.AF_INET, socket.SOCK_DGRAM, 1)
""",
    )
    assert (seen["icmp"], seen["packet"], seen["ping"]) == ("EPERM", "EPERM", "ok")
    code, out = inside.run("python3", "-c", ADD_ADDRESS)
    assert (code, out.strip()) == (0, "EPERM")


# RTM_NEWADDR of 192.0.2.1/24 on the second interface: rtnetlink(7).
ADD_ADDRESS = """
import errno, socket, struct
body = struct.pack("BBBBi", socket.AF_INET, 24, 0, 0, 2) + struct.pack("HH4s", 8, 2, socket.inet_aton("192.0.2.1"))
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
    netlink.send(struct.pack("IHHII", 16 + len(body), 20, 5, 1, 0) + body)
    print(errno.errorcode[-struct.unpack_from("i", netlink.recv(4096), 16)[0]])
"""
