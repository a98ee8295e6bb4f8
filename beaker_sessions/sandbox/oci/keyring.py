"""The session keyring that all sandboxes have in common: empty, and closed to them.

Owns: that keyring, which is root's and lives as long as a process that has it. A runtime would make one for each
container, charged to its user, of whom the kernel keeps no more than 200 keys (`/proc/sys/kernel/keys/maxkeys`).

Sources: keyctl(2), keyrings(7); numbers from linux/keyctl.h, and of the system call from each architecture's table.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

from ...errors import Error

NUMBERS = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}  # of keyctl(2)
JOIN_SESSION_KEYRING, SETPERM = 1, 5
SESSION = -3  # KEY_SPEC_SESSION_KEYRING
# By who possesses it, as the kernel itself does when it looks for a key. Nothing can be put in. The list of what is
# in it, which is empty, can be read, and it can be invalidated: then no key is found in it, as before.
SEARCH = 0x08000000

_libc = ctypes.CDLL(None, use_errno=True)


def join() -> None:
    """Have the calling thread, and what it starts from now on, leave its session keyring for a new one.

    Silent where the kernel has no keyrings, or nobody here may use them. Raises Error unavailable.
    """
    for arguments in ((JOIN_SESSION_KEYRING, 0), (SETPERM, SESSION, SEARCH)):
        if _libc.syscall(*map(ctypes.c_long, (NUMBERS[platform.machine()], *arguments))) < 0:
            code = ctypes.get_errno()
            if code in (errno.ENOSYS, errno.EPERM):
                return
            raise Error("unavailable", f"no keyring for sessions: {os.strerror(code)}", "see /proc/key-users")
