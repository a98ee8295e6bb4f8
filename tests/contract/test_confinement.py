"""Drivers that run processes: who one is inside, and what one can reach."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from beaker_sessions.model import Identity
from beaker_sessions.sandbox import Status
from beaker_sessions.sandbox.oci import cgroups

from .conftest import ADA, Lab, Maker, OciLab, pinned

MAJOR = 240  # for local use, no driver: opening says ENXIO where the device is allowed, EPERM where it is not
OPEN = (
    "import os, sys, errno\ntry: os.open(sys.argv[1], os.O_RDWR)\nexcept OSError as e: print(errno.errorcode[e.errno])"
)


@pytest.mark.parametrize(("image", "prefix"), [("scratch", ["/busybox"]), ("alpine", []), ("debian", [])])
def test_identity_resolves_in_any_image(make: Maker, image: str, prefix: list[str]) -> None:
    code, out, _ = make.run(*prefix, "id", image=image)
    groups = set(out.decode().split()[2].removeprefix("groups=").split(","))
    assert (code, out.split()[:2]) == (0, [b"uid=1500(ada)", b"gid=1500(ada)"])
    assert groups == {"1500(ada)", "27(sudo)", "4711(project)"}
    assert make.run(*prefix, "whoami", image=image)[1] == b"ada\n"


def test_bash_has_a_name_and_a_home(make: Maker) -> None:
    stream = make.start(make.spec(image="debian", tty=True, env={}))
    stream.write(b"PS1='<\\u>'; echo ~ $HOME ~ada; exit\n")
    assert b"/home/ada /home/ada /home/ada\r\n" in stream.read()


def test_the_image_s_groups_keep_their_files(make: Maker) -> None:
    _, out, _ = make.run("cat", "/etc/group")
    lines = out.decode().splitlines()
    assert "staff:x:44:guest" in lines
    assert "sudo:x:27:ada,root" in lines


def test_an_ordinary_user_has_no_way_to_more(make: Maker) -> None:
    _, out, _ = make.run("grep", "-E", "CapEff|CapBnd|NoNewPrivs|Seccomp:", "/proc/self/status")
    values = dict(line.split() for line in out.decode().splitlines())
    # In a user namespace root inside is nobody outside, so that sudo may work there.
    oci = isinstance(make.lab, OciLab)
    assert values.pop("CapBnd:") == f"{0xA00C25FB if oci else 0:016x}"
    assert values == {"CapEff:": "0" * 16, "NoNewPrivs:": "0" if oci else "1", "Seccomp:": "2"}


def test_what_it_writes_outside_of_mounts_is_counted(make: Maker, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    write = "head -c 6000000 /dev/zero >/tmp/own; head -c 60000000 /dev/zero >/mnt/theirs; echo done; cat"
    with pinned(tmp_path, "/mnt") as mount:
        spec = make.spec("sh", "-c", write, image="debian", mounts=(mount,))
        stream = make.start(spec)
    before = make.lab.sandboxes.disk(spec.id)
    stream.read(b"done")
    after = make.lab.sandboxes.disk(spec.id)
    assert before is not None
    assert after is not None
    assert before <= after
    assert 6_000_000 <= after < 20_000_000


def test_own_files_cannot_be_changed(make: Maker) -> None:
    root = Identity("root", 0, 0, "/root", {0: "root"})
    paths = ["/.beaker/entry.sh", "/.beaker/busybox"]
    if not isinstance(make.lab, OciLab):  # there they are the sandbox's own, for useradd to work
        paths += ["/.beaker/gate", "/etc/passwd", "/etc/group"]
    for path in paths:
        code, _, err = make.run("sh", "-c", f"echo x > {path}", identity=root)
        assert code != 0
        assert b"Read-only" in err


def test_mounts_by_descriptor(make: Maker, tmp_path: Path) -> None:
    for name in ("home", "net"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    (tmp_path / "net/file").write_text("shared")
    (tmp_path / "net/file").chmod(0o644)
    with pinned(tmp_path / "home", "/home/ada") as home, pinned(tmp_path / "net", "/net", read_only=True) as net:
        spec = make.spec(
            "sh", "-c", "cat /net/file; echo mine > ~/file; touch /net/new; ls -d /.beaker/m*", mounts=(home, net),
            workdir="/home/ada", stdin=False,
        )  # fmt: skip
        (tmp_path / "home").rename(tmp_path / "moved")
        (tmp_path / "home").symlink_to("/etc")
        stream = make.start(spec)
    stream.read()
    assert stream.out == b"shared"
    assert b"Read-only" in stream.err
    assert (tmp_path / "moved/file").read_text() == "mine\n"
    assert (tmp_path / "moved/file").stat().st_uid == ADA.uid


@pytest.fixture
def gpus(lab: Lab, tmp_path: Path) -> Iterator[list[Path]]:
    """Two made-up GPUs, one with an alias, and a common device."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make device nodes")
    devices = [tmp_path / name for name in ("gpu0", "gpu1", "gpuctl")]
    for number, path in enumerate(devices):
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(MAJOR, number))
        path.chmod(0o666)

    def node(n: int) -> dict[str, Any]:
        return {"deviceNodes": [{"path": f"/dev/gpu{n}", "hostPath": str(devices[n])}], "env": [f"GPU{n}=claimed"]}

    spec = {
        "cdiVersion": "0.6.0",
        "kind": "example.com/gpu",
        "containerEdits": {"deviceNodes": [{"path": "/dev/gpuctl", "hostPath": str(devices[2])}]},
        "devices": [{"name": str(n), "containerEdits": node(n)} for n in (0, 1)],
    }
    path = lab.cdi / "example.yaml"  # type: ignore[attr-defined]
    path.write_text(yaml.safe_dump(spec))
    yield devices
    path.unlink()


def test_only_the_claimed_gpu_can_be_opened(make: Maker, gpus: list[Path]) -> None:
    def opened(path: str, **more: Any) -> str:
        return make.run("python3", "-c", OPEN, path, image="debian", **more)[1].decode().strip()

    claim = {"gpus": ("example.com/gpu=1",)}
    assert opened("/dev/gpu1", **claim) == "ENXIO"
    assert opened("/dev/gpuctl", **claim) == "ENXIO"
    assert opened("/dev/gpu0", **claim) == "ENOENT"
    assert opened("/dev/gpu1") == "ENOENT"
    with pinned(gpus[0].parent, "/stolen") as mount:
        root = Identity("root", 0, 0, "/root", {0: "root"})
        if isinstance(make.lab, OciLab):  # where no mount gives access to devices
            assert opened("/stolen/gpu0", mounts=(mount,), identity=root, **claim) == "EACCES"
        else:
            assert opened("/stolen/gpu0", mounts=(mount,), identity=root, **claim) == "EPERM"
            assert opened("/stolen/gpu1", mounts=(mount,), identity=root, **claim) == "ENXIO"


def test_the_kernel_denies_devices_to_whatever_runs_in_the_group(make: Maker, gpus: list[Path]) -> None:
    """A process of this machine that is put there, so that nothing but the control of devices is in its way."""
    spec = make.spec("sleep", "1000", gpus=("example.com/gpu=1",), stdin=False)
    make.start(spec)
    pid = make.wait(spec.id, Status.RUNNING).pid
    lines = [line.split(":") for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    group = next((path for _, names, path in lines if "devices" in names.split(",")), lines[-1][2])
    found = cgroups.detect()
    root = next((path for names, path in found.hierarchies.items() if "devices" in names.split(",")), None)
    procs = (root or found.hierarchies[""]) / group.lstrip("/") / "cgroup.procs"
    script = f"import os; open({str(procs)!r}, 'w').write(str(os.getpid()))\n{OPEN}"

    def opened(path: Path | str) -> str:
        done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert [opened(path) for path in gpus] == ["EPERM", "ENXIO", "ENXIO"]
    assert opened("/dev/mem") in ("EPERM", "ENOENT")
    assert opened("/dev/null") == ""


@pytest.mark.usefixtures("gpus")
def test_gpu_variables_of_image_and_user_are_stripped(make: Maker) -> None:
    env = {"CUDA_VISIBLE_DEVICES": "0,1", "NVIDIA_VISIBLE_DEVICES": "all", "FRUIT": "pear"}
    _, out, _ = make.run("env", image="greedy", env=env, gpus=("example.com/gpu=1",))
    seen = dict(line.split("=", 1) for line in out.decode().splitlines())
    assert {key: value for key, value in seen.items() if "VISIBLE" in key or "NVIDIA" in key} == {
        "NVIDIA_VISIBLE_DEVICES": "void"
    }
    assert (seen["FRUIT"], seen["GREEDY"], seen["GPU1"], "GPU0" in seen) == ("pear", "yes", "claimed", False)


def test_none_removes_the_image_s_variable(make: Maker) -> None:
    _, out, _ = make.run("env", image="greedy", env={"GREEDY": None})
    assert b"GREEDY" not in out


def test_pids_limit(make: Maker) -> None:
    script = (
        "import os\nn = 0\ntry:\n while n < 200:\n  if not os.fork(): os.read(os.pipe()[0], 1)\n  n += 1\n"
        "except OSError: pass\nprint(n, flush=True); os.kill(-1, 9)"
    )
    _, out, _ = make.run("python3", "-c", script, image="debian", pids=40)
    assert 20 < int(out) < 40


def test_out_of_memory_is_told(make: Maker) -> None:
    spec = make.spec("python3", "-c", "b = bytearray(1 << 30)", image="debian", memory=64 << 20, stdin=False)
    make.start(spec).read()
    found = make.wait(spec.id, Status.EXITED)
    assert (found.exit_code, found.oom) == (128 + 9, True)


def test_settings_reach_the_kernel(make: Maker) -> None:
    script = "cat /proc/self/oom_score_adj; hostname; df -k /dev/shm | tail -1 | awk '{print $2}'"
    _, out, _ = make.run("sh", "-c", script, image="debian", oom_score_adj=321, hostname="lab-7", shared_memory=8 << 20)
    assert out.split() == [b"321", b"lab-7", b"8192"]


def test_files_that_tell_names_are_no_programs(make: Maker) -> None:
    """Whatever the image's are: the tests' have this machine's modes."""
    script = "stat -c %a /etc/hostname /etc/hosts /etc/resolv.conf"
    assert make.run("sh", "-c", script, image="debian")[1].split() == [b"644"] * 3


def test_first_process_reaps(make: Maker) -> None:
    _, out, _ = make.run("sh", "-c", "(sleep 0 &) ; sleep 0.3; ps -eo stat,comm", image="debian")
    assert b"Z" not in out


def test_network_of_its_own_or_the_host_s(make: Maker) -> None:
    def network(shared: bool) -> tuple[bytes, set[bytes]]:
        listing = make.run("sh", "-c", "ls -l /proc/self/ns/net; cat /proc/net/dev", host_network=shared)[
            1
        ].splitlines()
        return listing[0].split()[-1], {line.split(b":")[0].strip() for line in listing[3:]}

    (own, interfaces), (host, _), (again, _) = (network(shared) for shared in (False, True, True))
    assert interfaces - {b"tunl0", b"sit0"} == {b"eth0", b"lo"}
    assert host == again != own


def test_what_sessions_claimed_is_theirs_against_the_rest_of_the_machine(oci_lab: OciLab) -> None:
    """How much that is: `unit/test_oci.py`; on a machine with systemd, by the clock: `tests/units.sh`."""
    driver, groups = oci_lab.sandboxes, oci_lab.sandboxes.cgroups
    driver.weigh(os.cpu_count() or 1)
    try:
        assert groups.weights()[driver.cgroup.strip("/")] > 1000
    finally:
        driver.weigh(0)
    assert groups.weights()[driver.cgroup.strip("/")] == 100
