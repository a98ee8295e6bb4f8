"""What processes were started with, read so that no user can hold the reader up; and those that die with us.

A process can lay its arguments, which are in its own memory, on a file system that never answers. Whoever reads them
then waits in the kernel, for ever; `maps` and `environ` are alike. So they are read only of processes that run as a
user whom root alone makes anybody. What `status` says of that comes from the kernel alone (proc(5)).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence

# It has its parent's word of its end only from the moment when it asked for that, so it looks whether it came too late.
TIE = '[ "$PPID" = "$1" ] || exit 1; shift; exec "$@"'


def tied(command: Sequence[str]) -> list[str]:
    """The command, as a program that is killed when the thread which starts it ends, however this process is killed."""
    return ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", TIE, "sh", str(os.getpid()), *command]


def of(uid: int) -> Iterator[tuple[int, list[bytes]]]:
    """Pid and arguments of every process of a user: root, or one that only root can become."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (words := read(int(name), (uid,), "cmdline").split(b"\0")[:-1]):
            yield int(name), words


def read(pid: int, uids: Collection[int], name: str) -> bytes:
    """A file of a process that is one of these users through and through; b"" for another, and one that is gone."""
    try:
        # By its directory it is the same process throughout, should the number be used again meanwhile.
        directory = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        status = _text(directory, "status").splitlines()
        own = next(line for line in status if line.startswith(b"Uid:")).split()[1:]
        return _text(directory, name) if {int(uid) for uid in own} <= set(uids) else b""
    except (OSError, StopIteration):
        return b""
    finally:
        os.close(directory)


def _text(directory: int, name: str) -> bytes:
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory), "rb") as file:
        return file.read()
