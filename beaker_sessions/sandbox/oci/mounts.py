"""Mounts by system call: idmapped layers, overlays and binds whose paths cannot lead out of a root.

Owns: the calls that Python lacks (mount(2), open_tree(2), mount_setattr(2), move_mount(2), openat2(2)). Knows nothing
of sessions. Failures are OSError with the errno; the driver translates.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

IdMap = Sequence[tuple[int, int, int]]  # (inside, outside, count), as in user_namespaces(7)

# Numbers are the same on every architecture since Linux 5.0: asm-generic/unistd.h.
OPEN_TREE, MOVE_MOUNT, OPENAT2, MOUNT_SETATTR = 428, 429, 437, 442
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x04, 0x40
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC, ATTR_IDMAP = 0x1, 0x2, 0x4, 0x8, 0x100000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 2, 4, 4096, 16384, 1 << 18, 1 << 19
CLONE_NEWNS = 0x20000
MNT_DETACH = 2
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 0x02, 0x10

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, path: str | os.PathLike[str] = "") -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(path))
    return result


def mount(source: str, target: Path, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    _check(
        _libc.mount(
            os.fsencode(source), os.fsencode(target), kind and kind.encode(), ctypes.c_ulong(flags), os.fsencode(data)
        ),
        target,
    )


def unmount(target: Path) -> None:
    """Unmount everything that is mounted at and below a path, even while it is in use; nothing mounted is no error."""
    while _libc.umount2(os.fsencode(target), MNT_DETACH) == 0:
        pass


def mounted(below: Path) -> list[Path]:
    """The mount points at and below a path in this mount namespace, innermost first."""
    prefix = os.fsencode(below)
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        path = line.split()[4].decode("unicode_escape").encode("latin-1")  # proc(5): octal escapes
        if path == prefix or path.startswith(prefix + b"/"):
            found.append(Path(os.fsdecode(path)))
    return found[::-1]


def private(call: Callable[[], T]) -> T:
    """Call in a mount namespace of its own, which goes with all that was mounted in it once nobody holds it.

    It is a slave of this machine's: what is unmounted there goes here too, and nothing that is mounted here is seen
    there. Descriptors of directories that were opened outside are of the other namespace, where nothing can be mounted
    from here, and from where nothing can be cloned here; detached copies can be attached in either.
    """
    future: Future[T] = Future()

    def run() -> None:  # a thread can change its namespace alone, and is of no use afterwards
        try:
            _check(_libc.unshare(CLONE_NEWNS))
            mount("none", Path("/"), None, MS_SLAVE | MS_REC)
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="mounts")
    thread.start()
    thread.join()
    return future.result()


def namespace() -> int:
    """A descriptor of the calling thread's mount namespace."""
    return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


def remove_tree(path: Path) -> None:
    """Delete a directory with all that is in it, but nothing of what is mounted in it. Silent if there is none.

    Raises OSError EBUSY, having deleted nothing, when something stays mounted.
    """
    for point in mounted(path):
        unmount(point)
    if mounted(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fspath(path))
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except RecursionError:  # a tree deeper than Python's stack: whoever was inside could make one
        if subprocess.run(["rm", "-rf", "--one-file-system", "--", path], capture_output=True, check=False).returncode:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), os.fspath(path)) from None


def clone(source: str, *, attributes: int = 0, userns: int = -1, recursive: bool = False) -> int:
    """A descriptor of a detached copy of the mount at source, with these ATTR_ flags; idmapped when userns is given.

    A recursive one is a slave: mounts that come and go below a shared source later do so in the copy too, with the
    flags that they have there. Unmounting the source lifts the lock that keeps copies of a user namespace in place
    (`propagate_mount_unlock` in the kernel), so that no sandbox pins it.
    """
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    tree = _check(_libc.syscall(OPEN_TREE, AT_FDCWD, os.fsencode(source), flags), source)
    try:
        if attributes or userns >= 0 or recursive:
            idmap = ATTR_IDMAP if userns >= 0 else 0
            # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
            attr = struct.pack("QQQQ", attributes | idmap, 0, MS_SLAVE if recursive else MS_PRIVATE, max(userns, 0))
            flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
            _check(_libc.syscall(MOUNT_SETATTR, tree, b"", flags, attr, ctypes.c_size_t(len(attr))), source)
    except BaseException:
        os.close(tree)
        raise
    return tree


def attach(tree: int, target: int) -> None:
    """Mount a detached copy onto the directory or file that the O_PATH descriptor target stands for."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    _check(_libc.syscall(MOVE_MOUNT, tree, b"", target, b"", flags))


def open_in(root: int, path: str, flags: int, mode: int = 0) -> int:
    """Open a path as if root were `/`: no link in it, however made, leads out."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    return _check(_libc.syscall(OPENAT2, root, os.fsencode(path), how, ctypes.c_size_t(len(how))), path)


@contextlib.contextmanager
def opened(fd: int) -> Iterator[int]:
    """Closes a descriptor at the end of a block."""
    try:
        yield fd
    finally:
        os.close(fd)


def make(root: int, path: str, owner: tuple[int, int], *, directory: bool) -> int:
    """An O_PATH descriptor of a mount point below root, made with its parents when missing.

    Raises OSError EXDEV rather than make anything in what is mounted below root already, whatever links lead there.
    """
    at = os.dup(root)
    seen = ""
    parts = [part for part in path.split("/") if part]
    for number, part in enumerate(parts):
        seen += "/" + part
        try:
            below = open_in(root, seen, os.O_PATH)
        except FileNotFoundError:
            if os.fstat(at).st_dev != os.fstat(root).st_dev:
                os.close(at)
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path) from None
            if directory or number < len(parts) - 1:
                os.mkdir(part, dir_fd=at)
                os.chmod(part, 0o755, dir_fd=at)
            else:
                os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=at))
            os.chown(part, *owner, dir_fd=at, follow_symlinks=False)
            below = open_in(root, seen, os.O_PATH)
        os.close(at)
        at = below
    return at


def overlay(target: Path, layers: Iterable[Path], base: Path, userns: int = -1) -> None:
    """Mount a writable overlay at target over image layers, topmost first.

    base: a directory with `upper` and `work`, where `lower` is made. userns: of the id map that the layers are seen
    through, none by default. The layers' own mounts are gone when this returns: an overlay keeps copies of its own.
    Nothing is synced to disk (`volatile`), because nothing here is to outlive a crash of the machine. Device files have
    no effect. It is private: what is mounted on it is shared with nobody, and unmounting that ends no copy.
    """
    lower = base / "lower"
    lower.mkdir()
    mount("none", lower, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0700,size=1m")
    try:
        mount("none", lower, None, MS_PRIVATE)
        names = []
        for number, layer in enumerate(layers):
            (lower / str(number)).mkdir()
            with (
                opened(clone(os.fspath(layer), attributes=ATTR_RDONLY, userns=userns)) as tree,
                opened(os.open(lower / str(number), os.O_PATH | os.O_CLOEXEC)) as point,
            ):
                attach(tree, point)
            names.append(str(number))
        if not names:  # an image may be empty, an overlay has a layer
            (lower / "0").mkdir()
            names = ["0"]
        with opened(os.open(lower, os.O_PATH)) as below, opened(os.open(base, os.O_PATH)) as own:
            # By descriptor: mount(2) takes one page of options, and a path could hold a colon or a comma.
            lowers = ":".join(f"/proc/self/fd/{below}/{name}" for name in names)
            data = f"lowerdir={lowers},upperdir=/proc/self/fd/{own}/upper,workdir=/proc/self/fd/{own}/work,volatile"
            if len(data) >= os.sysconf("SC_PAGE_SIZE"):  # else the kernel would leave the lowest layers out, silently
                raise OSError(errno.E2BIG, f"an overlay of {len(names)} layers")
            mount("overlay", target, "overlay", MS_NODEV, data)
            mount("none", target, None, MS_PRIVATE)
    finally:
        unmount(lower)
        lower.rmdir()


def user_namespace(ids: IdMap, gids: IdMap) -> int:
    """A descriptor of a new user namespace with these maps, in which nothing runs; for `clone`."""
    # A process of its own: a fork of this one, which has threads, could not safely run Python. Its echo says that it
    # has changed its namespace.
    with subprocess.Popen(["unshare", "--user", "--", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"\n")
        process.stdin.flush()
        if process.stdout.read(1) != b"\n":
            raise OSError("unshare --user failed")
        for kind, entries in (("uid", ids), ("gid", gids)):
            with open(f"/proc/{process.pid}/{kind}_map", "w") as file:
                file.write("".join(f"{inside} {outside} {count}\n" for inside, outside, count in entries))
        return os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
