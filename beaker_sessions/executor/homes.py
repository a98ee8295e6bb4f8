"""Homes of sessions: opened as their users, made where homes roam, and whether there is room in them.

Owns no file but the homes that it makes, which are their users' from then on.
"""

from __future__ import annotations

import errno
import os

from ..errors import Error
from ..model import Identity
from . import inventory

ROOM = 1 << 20  # bytes below which a home counts as full


def home(identity: Identity, *, make: bool = False) -> int:
    """The caller's home, pinned. make: if it is not there, make it: it is one of `sessionHome`.

    Raises Error not_found, forbidden, or storage_full.
    """
    try:
        try:
            return inventory.pin(identity.home, identity)
        except FileNotFoundError:
            if not make:
                raise
            _make(identity)
            return inventory.pin(identity.home, identity)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Error(
            "not_found",
            f"the home {identity.home} of {identity.name} does not exist",
            "ask the administrator for it, or use --bare",
        ) from error
    except OSError as error:
        raise Error(
            "forbidden", f"{identity.name} cannot enter the home {identity.home}: {error.strerror}", "or use --bare"
        ) from error


def look(identity: Identity, *, make: bool = False) -> str:
    """Whether a session could have its home, before it is queued: what its user should know, "" for nothing.

    Raises what `home` does.
    """
    fd = home(identity, make=make)
    try:
        found = os.fstatvfs(fd)
    except OSError:
        return ""
    finally:
        os.close(fd)
    if found.f_blocks and found.f_bavail * found.f_frsize < ROOM:
        return f"your home {identity.home} is full: nothing can be written there until you delete something"
    return ""


def _make(identity: Identity) -> None:
    """As root, since nobody else may write there; where not even root may, it is for the administrator to do."""
    hint = "ask the administrator for it, or use --bare"
    try:
        os.mkdir(identity.home, 0o700)
        fd = os.open(identity.home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchown(fd, identity.uid, identity.gid)
            os.fchmod(fd, 0o700)
        finally:
            os.close(fd)
    except FileExistsError:
        pass  # another session's start was faster
    except FileNotFoundError:
        raise Error(
            "not_found", f"the directory of homes, {os.path.dirname(identity.home)}, is not there", hint
        ) from None
    except OSError as error:
        code = "storage_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "forbidden"
        raise Error(code, f"the home {identity.home} cannot be made: {error.strerror}", hint) from error
