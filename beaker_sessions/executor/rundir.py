"""What a session sees as /run/beaker: a file system in memory with its socket and the secrets that it asked for.

Owns the directory of these mounts, into which no user of the machine can look, and beside each mount the session's own
token, which the session itself never sees. Must not know what the socket is for. All of it is gone with the session.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import Error
from ..model import Identity

TARGET = "/run/beaker"
SOCKET, AGENT, VARIABLES, SECRETS = "session.sock", "agent.sock", "env", "secrets"
SIZE = 4 << 20  # bytes
MS_NOSUID, MS_NODEV, MS_NOEXEC, MNT_DETACH = 2, 4, 8, 2  # mount(2), umount(2)

_libc = ctypes.CDLL(None, use_errno=True)


class RunDirectories:
    """directory: where they are mounted, one for each session, by its id."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)

    def path(self, id: str) -> Path:
        return self.directory / id

    def make(self, id: str) -> Path:
        """The mount of a session, made unless it is there. Raises Error internal."""
        path = self.path(id)
        path.mkdir(mode=0o755, exist_ok=True)
        if not path.is_mount():
            flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
            if _libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", flags, f"size={SIZE},mode=0755".encode()) != 0:
                reason = os.strerror(ctypes.get_errno())
                raise Error("internal", f"cannot mount a file system in memory at {path}: {reason}")
        return path

    def keep_secrets(
        self, id: str, identity: Identity, variables: Mapping[str, bytes], files: Iterable[bytes]
    ) -> list[Path]:
        """Write secrets where their user alone can read them; the paths of `files`.

        variables: for the environment, which `entry.sh` reads as a shell does. Raises Error invalid for a value that
        no variable can hold.
        """
        for name, value in variables.items():
            if b"\0" in value:
                raise Error("invalid", f"--secret-env {name}: the value has a NUL byte", "use --secret-mount instead")
        quoted = [b"export %s='%s'\n" % (n.encode(), v.replace(b"'", b"'\\''")) for n, v in variables.items()]
        if quoted:
            _write(self.path(id) / VARIABLES, b"".join(quoted), identity)
        folder = self.path(id) / SECRETS
        folder.mkdir(mode=0o755, exist_ok=True)
        paths = []
        for number, value in enumerate(files):
            paths.append(folder / str(number))
            _write(paths[-1], value, identity)
        return paths

    def token(self, id: str) -> str:
        """The session's own token, "" when it has none yet."""
        try:
            return self._token(id).read_text("ascii")
        except (OSError, ValueError):  # there is none, or it is damaged
            return ""

    def keep_token(self, id: str, token: str) -> None:
        new = self._token(id).with_suffix(".new")
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(token)
        new.replace(self._token(id))

    def forget_token(self, id: str) -> None:
        self._token(id).unlink(missing_ok=True)

    def remove(self, id: str) -> None:
        """Silent if there is none."""
        for file in (self._token(id), self._token(id).with_suffix(".new")):
            file.unlink(missing_ok=True)
        path = self.path(id)
        while path.is_mount() and _libc.umount2(os.fsencode(path), MNT_DETACH) == 0:
            pass
        if path.is_dir() and not path.is_mount():
            shutil.rmtree(path)

    def ids(self) -> list[str]:
        """Of all sessions of which anything is here."""
        return sorted({path.name.partition(".")[0] for path in self.directory.iterdir()})

    def _token(self, id: str) -> Path:
        return self.directory / f"{id}.token"


def _write(path: Path, value: bytes, identity: Identity) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400), "wb") as file:
        os.fchown(file.fileno(), identity.uid, identity.gid)
        file.write(value)
