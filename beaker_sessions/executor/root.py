"""The system user as whom root's own sessions run, so that no image ever acts as root of the machine.

Owns that user and its home. It has no password and no shell outside, and cannot log in.
"""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import stat
import subprocess
import threading
from contextlib import suppress

from ..errors import Error
from ..model import Identity
from . import inventory

NAME = "beaker-root"
HOME = "/var/lib/beaker-root"

log = logging.getLogger(__name__)
_making = threading.Lock()


def identity(session_home: str) -> Identity:
    """The user, made when it is missing. Raises Error unavailable."""
    with _making:
        try:
            entry = pwd.getpwnam(NAME)
        except KeyError:
            _make()
            entry = pwd.getpwnam(NAME)
        if not session_home:
            _make_home(entry)
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise Error("forbidden", f"the user {NAME} of this machine is root", f"remove it: userdel {NAME}")
    return inventory.unix_user(entry.pw_uid, session_home)


def note(person: Identity) -> str:
    """What root should know of its session, "" for everybody else."""
    what = f"root's session runs as the system user {NAME}, whose home is {person.home}"
    return what if person.name == NAME else ""


def _make() -> None:
    search = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    program = shutil.which("useradd", path=search)
    words = ["--system", "--user-group", "--no-create-home", "--home-dir", HOME, "--shell", "/usr/sbin/nologin"]
    command = [program or "useradd", *words, "--comment", "sessions of root", NAME]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        log.error("the system user %s cannot be made: %s", NAME, problem)
        raise Error("unavailable", f"the system user {NAME} of root's sessions cannot be made: {problem}", "make it")
    log.info("made the system user %s, as whom root's sessions run", NAME)


def _make_home(entry: pwd.struct_passwd) -> None:
    """Safe to repeat: one that was made and not yet given away is an empty directory of root's."""
    try:
        with suppress(FileExistsError):
            os.mkdir(entry.pw_dir, 0o700)
        home = os.open(entry.pw_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(home)
            if found.st_uid == 0 and not os.listdir(home):
                os.fchown(home, entry.pw_uid, entry.pw_gid)
            elif found.st_uid != entry.pw_uid:
                what = f"the home {entry.pw_dir} of {NAME} is the user {found.st_uid}'s"
                raise Error("unavailable", what, f"move it away, or: chown -R {NAME}: {entry.pw_dir}")
            if stat.S_IMODE(found.st_mode) != 0o700:
                os.fchmod(home, 0o700)
        finally:
            os.close(home)
    except OSError as error:
        raise Error("unavailable", f"the home {entry.pw_dir} of {NAME} cannot be made: {error.strerror}") from error
