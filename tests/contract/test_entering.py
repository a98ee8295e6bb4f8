"""Users of the machine who look for a way into others' sessions: while one is made, while it runs, and after.

Attackers are programs of their own on the machine, of a Unix user without an account or of the session's own user. What
they may reach of a session through the machine's file system is nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.sandbox import Mount, Status
from beaker_sessions.sandbox.oci import mounts
from tests import images

from .conftest import ADA, ROOT, DockerLab, Lab, Maker, OciLab, pinned

STRANGER = 1666
OWN = "run/beaker"
# Polls until its input ends: every directory given and what is in it, every mount point of the machine, and where
# processes say that they are; prints once each path at which it found the session's own files.
POLLER = """
import glob, os, select, socket, sys
places = sys.argv[1:]
found = set()
def reach(path):
    for name in ("run/beaker/secret", "tmp", "upper/tmp"):
        try:
            os.close(os.open(f"{path}/{name}", os.O_PATH))
        except OSError:
            continue
        if name != "tmp" or os.path.exists(f"{path}/.beaker"):
            found.add(f"{path}/{name}")
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.setblocking(False)
            s.connect(f"{path}/run/beaker/session.sock")
            found.add(f"{path}/run/beaker/session.sock")
    except BlockingIOError:  # nobody takes so many
        found.add(f"{path}/run/beaker/session.sock")
    except OSError:
        pass
    return found
def below(path):
    try:
        return [path, *(f"{path}/{name}" for name in os.listdir(path))]
    except OSError:
        return [path]
print("ready", flush=True)
started = {name for name in os.listdir("/proc") if name.isdigit()}
while not select.select([sys.stdin], [], [], 0)[0]:
    for place in places:
        for path in below(place):
            reach(path)
    for line in open("/proc/self/mountinfo"):
        if (point := line.split()[4]).startswith(tuple(places)):
            reach(point)
    for pid in os.listdir("/proc"):
        if pid.isdigit() and pid not in started and int(pid) != os.getpid():
            reach(f"/proc/{pid}/root")
            reach(f"/proc/{pid}/cwd")
            try:
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    reach(f"/proc/{pid}/fd/{fd}")
            except OSError:
                pass
print("\\n".join(sorted(found)))
"""
# Tries to open each path of its input, prints those that it could.
OPENER = """
import os, sys
for path in sys.stdin.read().split("\\0"):
    try:
        os.close(os.open(path, os.O_PATH | os.O_NOFOLLOW))
        print(path)
    except OSError:
        pass
"""


@pytest.fixture(params=["docker", "oci"])
def make(request: pytest.FixtureRequest) -> Iterator[Maker]:
    """Makes sandboxes of a driver whose state is in a directory that every user of the machine may look into."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        debian = None if images.missing_for_debian() else images.debian()
        lab: DockerLab | OciLab
        if request.param == "docker":
            lab = DockerLab(request.getfixturevalue("dockerd"), root, debian)
        else:
            request.getfixturevalue("oci_lab")  # skips where there can be none
            lab = OciLab(root, debian)
        maker = Maker(lab)
        yield maker
        maker.close()
        lab.close()


def places(lab: Lab) -> list[Path]:
    """Directories in which something of a session is, for a moment or longer."""
    if isinstance(lab, DockerLab):
        return [lab.state, Path(lab.socket).parent]
    assert isinstance(lab, OciLab)
    return [lab.state, lab.sandboxes.roots.parent]


@contextlib.contextmanager
def polled(lab: Lab, uid: int) -> Iterator[list[str]]:
    """The paths that a user found while the block ran."""
    found: list[str] = []
    listed = [str(path) for place in places(lab) for path in (place, *(p for p in place.iterdir() if p.is_dir()))]
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", POLLER, *listed], user=uid, group=uid, extra_groups=[], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield found
        finally:
            found += process.communicate("\n")[0].split()


@contextlib.contextmanager
def own(tmp_path: Path) -> Iterator[Mount]:
    """What a session has at /run/beaker: a socket that anybody may connect to, and a file that anybody may read."""
    directory = tmp_path / "own"
    directory.mkdir(exist_ok=True)
    (directory / "secret").write_text("secret")
    with socket.socket(socket.AF_UNIX) as server, mounts.opened(os.open(directory, os.O_PATH)) as fd:
        server.bind(f"/proc/self/fd/{fd}/session.sock")
        os.chmod(directory / "session.sock", 0o666)
        server.listen(1000)
        yield Mount(str(directory), f"/{OWN}", read_only=True)


def cycle(make: Maker, mount: Mount, count: int) -> None:
    """Sessions made, started, entered and removed."""
    for _ in range(count):
        spec = make.spec("sleep", "1000", mounts=(mount,), stdin=False)
        make.start(spec)
        for identity in (ADA, ROOT):
            handle, terminal = make.lab.sandboxes.exec(
                spec.id, ("true",), env={}, identity=identity, workdir="/", size=None, stdin=False
            )
            make.stream(terminal).read()
            make.lab.sandboxes.exec_exit(spec.id, handle)
        make.lab.sandboxes.remove(spec.id)


def test_a_stranger_who_polls_finds_nothing(make: Maker, tmp_path: Path) -> None:
    with own(tmp_path) as mount:
        cycle(make, mount, 1)
        with polled(make.lab, STRANGER) as found:
            cycle(make, mount, 8)
    assert found == []


def test_the_same_user_outside_finds_nothing(make: Maker, tmp_path: Path) -> None:
    """The kernel lets nobody look into a process of a user namespace that is not theirs, whatever its uid."""
    if isinstance(make.lab, DockerLab):
        pytest.skip("without user namespaces, a user's processes inside and outside are the same user's")
    with own(tmp_path) as mount:
        cycle(make, mount, 1)
        with polled(make.lab, ADA.uid) as found:
            cycle(make, mount, 8)
    assert found == []


def test_no_file_of_a_session_can_be_opened_outside(make: Maker, tmp_path: Path) -> None:
    """By somebody who knows all its paths: its layer, image, streams, state and what it is described in."""
    with own(tmp_path) as mount:
        command = ("sh", "-c", "echo mine > /tmp/mine; exec sleep 1000")
        spec = make.spec(*command, image="debian", mounts=(mount,), tty=True)
        make.start(spec)
        _, terminal = make.lab.sandboxes.exec(
            spec.id, ("sh", "-c", "until [ -e /tmp/mine ]; do sleep 0.1; done; echo there; exec sleep 9"), env={},
            identity=ADA, workdir="/", size=None, stdin=False,
        )  # fmt: skip
        make.stream(terminal).read(b"there")
    paths = []
    for place in places(make.lab):
        for directory, _, names in os.walk(place):
            if not directory.startswith(f"{place}/etc"):  # of the machine, in place of its own
                paths += [f"{directory}/{name}" for name in names]
    assert len(paths) > 20
    assert any(path.endswith("/tmp/mine") for path in paths)
    for uid in (STRANGER, ADA.uid):
        done = subprocess.run(
            ["/usr/bin/python3", "-c", OPENER], user=uid, group=uid, extra_groups=[], input="\0".join(paths), text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        opened = {path for path in done.stdout.split("\n") if path}
        assert {path for path in opened if Path(path).name not in ("docker.sock", "log", "network", "pid")} == set()


def test_nothing_of_a_session_is_mounted_on_the_machine(make: Maker, tmp_path: Path) -> None:
    """Neither in the machine's own mount namespace nor in one that a process outside of the session keeps."""
    if isinstance(make.lab, DockerLab):
        pytest.skip("an engine mounts what it runs")
    lab = make.lab
    assert isinstance(lab, OciLab)
    with own(tmp_path) as mount:
        spec = make.spec("sleep", "1000", mounts=(mount,), stdin=False)
        make.start(spec)
        init = make.wait(spec.id, Status.RUNNING).pid
        namespaces = {os.readlink(f"/proc/{init}/ns/mnt")}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (link := os.readlink(entry / "ns/mnt")) not in namespaces:
                    namespaces.add(link)
                    table = (entry / "mountinfo").read_text()
                    assert str(lab.sandboxes.roots) not in table, (entry / "comm").read_text()
                    assert f"{lab.state}/sessions" not in table, (entry / "comm").read_text()
        record = json.loads((lab.state / "sessions" / spec.id / "sandbox.json").read_text())
        assert os.readlink(f"/proc/{record['conmon']['pid']}/ns/mnt") == os.readlink("/proc/self/ns/mnt")


EVERYWHERE = ("dev", "proc", "sys", "run", "tmp", ".beaker")


@pytest.fixture
def passable() -> Iterator[Path]:
    """A directory that every user of the machine may pass."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("name", [*EVERYWHERE, "etc", "var"])
@pytest.mark.parametrize("target", ["/home/ada", "/net", "{outside}", "../../../../../..{outside}", "/tmp", "/dev"])
def test_a_link_of_an_image_in_place_of_a_directory(
    make: Maker, tmp_path: Path, passable: Path, name: str, target: str
) -> None:
    """CVE-2026-41579: runtimes fill /dev with links, as root, wherever it leads."""
    home, net, outside = (passable / each for each in ("home", "net", "outside"))
    for directory in (home, net, outside):
        directory.mkdir()
        os.chown(directory, ADA.uid, ADA.gid)
    where = target.format(outside=outside)
    if where == f"/{name}":
        pytest.skip("it would be a link to itself")
    before = {path: path.stat() for path in (home, net, outside)}
    image(make.lab, {name: where})
    said = b""
    with own(tmp_path) as mount, pinned(home, "/home/ada") as at_home, pinned(net, "/net") as at_net:
        spec = make.spec("/bin/busybox", "sh", "-c", "ls -d /dev/fd /proc/self/fd/1 && echo fine", image="linked",
                         mounts=(at_home, at_net, mount), stdin=False)  # fmt: skip
        with contextlib.suppress(Error):
            stream = make.start(spec)
            stream.read()
            make.wait(spec.id, Status.EXITED)
            said = stream.out + stream.err
    for path, was in before.items():
        assert [entry.name for entry in path.iterdir()] == []
        now = path.stat()
        assert (now.st_uid, now.st_gid, now.st_mode, now.st_mtime_ns, now.st_ctime_ns) == (
            was.st_uid, was.st_gid, was.st_mode, was.st_mtime_ns, was.st_ctime_ns,
        )  # fmt: skip
    if isinstance(make.lab, OciLab) and name != "etc":  # what cannot be made there is no harm
        assert said == b"/dev/fd\n/proc/self/fd/1\nfine\n"


def test_the_files_that_a_gpu_needs_are_mounted_and_not_through_a_link(make: Maker, passable: Path) -> None:
    """The mount point of a driver's library is made by root too."""
    if isinstance(make.lab, DockerLab):
        pytest.skip("the engine mounts them, before homes")
    lab = make.lab
    assert isinstance(lab, OciLab)
    home, library = passable / "home", passable / "libgpu.so"
    home.mkdir()
    os.chown(home, ADA.uid, ADA.gid)
    library.write_text("library")
    edits = {"mounts": [{"hostPath": str(library), "containerPath": "/usr/lib/libgpu.so", "options": ["ro", "nosuid"]}]}
    spec = {"cdiVersion": "0.6.0", "kind": "example.com/gpu", "devices": [{"name": "0", "containerEdits": edits}]}
    (lab.cdi / "example.json").write_text(json.dumps(spec))
    look = ("/bin/busybox", "sh", "-c", "cat /usr/lib/libgpu.so; grep libgpu /proc/mounts | cut -d ' ' -f 4")
    for links in ({}, {"usr/lib": "/home/ada"}, {"usr/lib": str(home)}):
        image(lab, links)
        with pinned(home, "/home/ada") as mount, contextlib.suppress(Error):
            code, out, _ = make.run(*look, image="linked", mounts=(mount,), gpus=("example.com/gpu=0",))
            assert links == {} or "ada" not in links["usr/lib"]
            assert (code, out.startswith(b"libraryro,nosuid")) == (0, True), out
        assert list(home.iterdir()) == []


def image(lab: Lab, links: dict[str, str]) -> None:
    """An image of this name with these links, whatever it was before."""
    assert isinstance(lab, DockerLab | OciLab)
    files: dict[str, bytes | str] = {f"bin/{name}": "busybox" for name in images.APPLETS.split()}
    files |= {"bin/busybox": images.BUSYBOX.read_bytes()}
    lab.known.pop("linked", None)
    lab.build("linked", images.tar(files | links))
