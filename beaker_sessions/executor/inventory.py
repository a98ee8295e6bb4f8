"""What this machine has: CPUs, memory, GPUs and the Unix users' identities. Reads the machine, decides nothing."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import socket
import threading
from dataclasses import dataclass

from ..errors import Error
from ..model import Gpu, Identity, Resources
from ..sandbox import cdi
from ..settings import ExecutorSettings

# What the machine's own services need is never given to sessions: a twentieth of the memory.
SYSTEM_SHARE = 0.05


@dataclass(frozen=True)
class Inventory:
    """A node's identity and all that it can give to sessions."""

    hostname: str
    cpus: float
    memory: int
    gpus: tuple[Gpu, ...]

    @property
    def capacity(self) -> Resources:
        return Resources(len(self.gpus), self.cpus, self.memory)


def read(settings: ExecutorSettings) -> Inventory:
    """Take stock. Raises Error invalid when `resources.gpus` names a GPU that is not there."""
    found = _gpus(settings)
    if settings.gpus is not None:
        by_id = {gpu.id: gpu for gpu in found}
        missing = [id for id in settings.gpus if id not in by_id]
        if missing:
            raise Error(
                "invalid", f"resources.gpus names {', '.join(missing)}, which no CDI specification defines",
                f"known here: {', '.join(by_id) or 'none'}",
            )  # fmt: skip
        found = [by_id[id] for id in settings.gpus]
    return Inventory(
        hostname=settings.hostname or socket.gethostname(),
        cpus=float(len(os.sched_getaffinity(0))),
        memory=int(_memory_total() * (1 - SYSTEM_SHARE)),
        gpus=tuple(found),
    )


def _gpus(settings: ExecutorSettings) -> list[Gpu]:
    nvidia = _nvidia()
    result = []
    for id in cdi.gpus(cdi.load(settings.cdi_paths, settings.cdi_hooks)):
        kind, _, name = id.partition("=")
        type, memory = nvidia.get(name, ("", 0)) if kind == "nvidia.com/gpu" else ("", 0)
        result.append(Gpu(id, type or kind, memory))
    return result


def _nvidia() -> dict[str, tuple[str, int]]:
    """Index and UUID of each NVIDIA GPU -> (product name, bytes of memory); empty without the driver's library."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        result = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            facts = (str(pynvml.nvmlDeviceGetName(handle)), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
            result[str(index)] = result[str(pynvml.nvmlDeviceGetUUID(handle))] = facts
        return result
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()


def _memory_total() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def unix_user(uid: int, session_home: str = "") -> Identity:
    """The account-database entry of `uid`, with every group it is a member of but root's, which no session has.

    session_home: the parent directory of roaming homes, which then take the place of the user's own.
    Raises Error not_found for a uid without an entry.
    """
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        raise Error("not_found", f"no Unix user has the uid {uid}", "ask the administrator for a login") from None
    groups = {}
    for gid in os.getgrouplist(user.pw_name, user.pw_gid):
        if gid == 0:
            continue
        try:
            groups[gid] = grp.getgrgid(gid).gr_name
        except KeyError:
            groups[gid] = f"group{gid}"
    home = os.path.join(session_home, user.pw_name) if session_home else user.pw_dir
    return Identity(user.pw_name, uid, user.pw_gid, home, groups)


def unix_name(name: str) -> int | None:
    """The uid of a Unix user, None when there is none."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def pin(path: str, identity: Identity) -> int:
    """An O_PATH descriptor of the directory `path`, resolved with the user's own rights and never root's.

    So a symbolic link leads only where its owner may go, homes on root-squashed NFS work, and what is mounted is what
    was checked even if a directory is swapped meanwhile. Raises OSError.
    """
    # "/." because that takes the right to enter the directory itself, not only to find it.
    return opened(f"{path}/.", identity, os.O_PATH | os.O_DIRECTORY)


def opened(path: str, identity: Identity, flags: int) -> int:
    """A descriptor of `path`, opened with the user's own rights. Raises OSError."""
    result: list[int | OSError] = []

    def resolve() -> None:
        # File-system ids and groups belong to a thread in Linux; this one ends with them. The raw call is needed as
        # glibc's setgroups would change every thread.
        libc = ctypes.CDLL(None, use_errno=True)
        groups = (ctypes.c_uint32 * len(identity.groups))(*identity.groups)
        if libc.syscall(_SETGROUPS[os.uname().machine], len(groups), groups) != 0:
            result.append(OSError(ctypes.get_errno(), "setgroups"))
            return
        libc.setfsgid(identity.gid)
        libc.setfsuid(identity.uid)
        try:
            result.append(os.open(path, flags | os.O_CLOEXEC))
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=resolve)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


_SETGROUPS = {"x86_64": 116, "aarch64": 159}  # asm/unistd.h
