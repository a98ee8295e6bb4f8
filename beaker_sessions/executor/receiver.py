"""Takes and drops what callers pass by descriptor, in processes that may hang: `receiver.py CONTROL`.

To close a file may take as long as whoever passed it likes: a socket that lingers, a file of somebody's own FUSE mount.
So the executor never has such a file in its table before this process has looked at it, and never closes one last.
CONTROL is a socket; each packet on it is a job, done by a process of its own, which closes nothing itself: it ends. The
kernel does not wait for a socket's unsent data then. Must import nothing of the project and no more of the standard
library than it needs, as each job is a copy of it.

Jobs: `take` with a connection and a socket for the answer, and `drop` with descriptors, of which the last is a socket
that the executor closes when it has closed the others. The answer to `take` is a byte,
b"T" for a packet that was too long and b"F" else, then the packet, with its first descriptor if that is one of the
two kinds that the executor takes. The answer's socket is closed when the process has ended.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import sys
import time

FRAME = 128 * 1024  # bytes of a packet
MOST = 253  # descriptors in a packet (SCM_MAX_FD in Linux)
LAST = 10_000  # the answer's descriptor: a process that ends closes the highest last
FUSE = 0x65735546  # statfs(2)


def main(control: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        job, descriptors, _, _ = socket.recv_fds(control, 16, MOST, socket.MSG_CMSG_CLOEXEC)
        if not job:
            return
        begin, let_go = os.pipe()
        while (child := _fork()) < 0:
            time.sleep(0.1)
        if child == 0:
            try:
                os.close(let_go)
                os.read(begin, 1)  # the end, when this process is the last that holds them
                if job == b"take":
                    take(*descriptors)
                else:
                    wait(descriptors[-1])
            finally:
                os._exit(0)
        for descriptor in (*descriptors, begin, let_go):
            os.close(descriptor)


def _fork() -> int:
    try:
        return os.fork()
    except OSError:
        return -1  # no process is left for now


def wait(released: int) -> None:
    """Until the executor has closed its own copies, of which this process's must not be closed before."""
    with socket.socket(fileno=os.dup(released)) as end:
        end.recv(1)


def take(connection: int, answer: int) -> None:
    last = fcntl.fcntl(answer, fcntl.F_DUPFD_CLOEXEC, min(LAST, os.sysconf("SC_OPEN_MAX") - 10))
    os.close(answer)
    with socket.socket(fileno=os.dup(connection)) as caller:
        packet, passed, flags, _ = socket.recv_fds(caller, FRAME, MOST, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
    head = b"T" if flags & socket.MSG_TRUNC else b"F"
    with socket.socket(fileno=os.dup(last)) as said:
        socket.send_fds(said, [head, packet], [fd for fd in passed[:1] if _wanted(fd)])


def _wanted(descriptor: int) -> bool:
    """Whether it is a connection to an agent, or an archive that can be closed without asking a user's process."""
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return not _fuse(descriptor)
    if not stat.S_ISSOCK(kind):
        return False
    with socket.socket(fileno=os.dup(descriptor)) as passed:
        if (passed.family, passed.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            return False
        try:
            passed.getpeername()  # one that is not connected may be made to listen later
        except OSError:
            return False
    return True


def _fuse(descriptor: int) -> bool:
    import ctypes

    about = (ctypes.c_long * 64)()
    return ctypes.CDLL(None).fstatfs(descriptor, about) != 0 or about[0] == FUSE


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
