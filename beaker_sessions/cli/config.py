"""`~/.beaker/config.yml`: the user's address, token and defaults, with the environment above it.

Owns reading and writing that file, under sudo that of who called it, with no more than their rights. Its grammar is the
flat part of YAML, `key: value` a line; other lines belong to keys that are not ours and are kept as they are. The file
holds a token: mode 0600, replaced atomically.
"""

from __future__ import annotations

import os
import stat

from ..errors import Error
from . import output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pwd import struct_passwd

KEYS = {
    "agent_address": "address of the server",
    "user_token": "your token",
    "default_workspace": "workspace of new sessions",
    "default_image": "image of new sessions",
    "default_org": "organization to look in",
    "insecure_addresses": "addresses of servers that may be reached without encryption",
}
ENVIRONMENT = {
    "agent_address": "BEAKER_ADDR",
    "user_token": "BEAKER_TOKEN",
    "insecure_addresses": "BEAKER_INSECURE_ADDRESSES",
}
ADDRESS = "http://127.0.0.1:8420"


class Config:
    """The configuration as read from `path`, which is None when there is no home directory to look in.

    owner: the Unix user whose it is and with whose rights it is written, "" for oneself.
    """

    def __init__(self, path: str | None, lines: list[str], owner: str = "") -> None:
        self.path, self.lines, self.owner = path, lines, owner
        self.values: dict[str, str] = {}
        for number, text in enumerate(lines, 1):
            key, colon, rest = text.partition(":")
            if key in KEYS and colon:
                self.values[key] = _parse(rest.strip(), f"{path}: line {number}: {key}")

    def get(self, key: str) -> str:
        """The value in force, or ""."""
        return os.environ.get(ENVIRONMENT.get(key, ""), "") or self.values.get(key, "")

    def source(self, key: str) -> str:
        """Where the value in force comes from: a variable's name, the file's path, or ""."""
        variable = ENVIRONMENT.get(key, "")
        return variable if os.environ.get(variable) else (self.path or "") if key in self.values else ""

    @property
    def address(self) -> str:
        return (self.get("agent_address") or ADDRESS).rstrip("/")

    @property
    def insecure_addresses(self) -> list[str]:
        """Separated by commas."""
        return [each.strip() for each in self.get("insecure_addresses").split(",") if each.strip()]

    @property
    def token(self) -> str:
        return self.get("user_token")

    def set(self, key: str, value: str | None) -> None:
        """Change one value, None removes it, and write the file. Raises Error invalid or storage_full."""
        if value is not None and not value.isprintable():
            raise Error("invalid", f"{key}: the value has control characters", "give it without them")
        lines = [text for text in self.lines if text.partition(":")[0] != key]
        if value is not None:
            place = next((at for at, text in enumerate(self.lines) if text.partition(":")[0] == key), len(lines))
            lines.insert(place, f"{key}: {_format(value)}")
        with _Rights(self.owner):
            _write(self._where(), "".join(text + "\n" for text in lines))
        self.lines = lines
        self.values.pop(key, None)
        if value is not None:
            self.values[key] = value

    def _where(self) -> str:
        if self.path is None:
            raise Error("invalid", "there is no home directory to keep a configuration in", "set HOME or BEAKER_CONFIG")
        return os.path.realpath(self.path)  # a link stays a link


def sudo_user() -> str:
    """Who called sudo, "" without it: sessions and token are theirs, and not root's."""
    name = os.environ.get("SUDO_USER", "") if os.geteuid() == 0 else ""
    return "" if name == "root" else name


class _Rights:
    """With the rights of a Unix user, "" for one's own: their path leads root nowhere that they may not go."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        if self.name:
            user = _user(self.name)
            self.groups, self.gid = os.getgroups(), os.getegid()
            try:
                os.setgroups(os.getgrouplist(self.name, user.pw_gid))
                os.setegid(user.pw_gid)
                os.seteuid(user.pw_uid)
            except OSError as error:  # root of a container that may not
                what = f"cannot read the configuration of {self.name}, who called sudo: {error.strerror}"
                raise Error("forbidden", what, "run beaker without sudo") from None

    def __exit__(self, *_: object) -> None:
        if self.name:
            os.seteuid(0)
            os.setegid(self.gid)
            os.setgroups(self.groups)


def _user(name: str) -> struct_passwd:
    import pwd  # not needed by anybody but root

    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise Error("invalid", f"SUDO_USER: {name!r} is no user of this machine", "unset SUDO_USER") from None


def load() -> Config:
    """The user's configuration; a file that is missing is an empty one. Raises Error invalid for one that is broken."""
    owner = "" if os.environ.get("BEAKER_CONFIG") else sudo_user()
    if owner:
        with _Rights(owner):
            return _load(os.path.join(_user(owner).pw_dir, ".beaker/config.yml"), owner)
    path = os.path.expanduser(os.environ.get("BEAKER_CONFIG") or "~/.beaker/config.yml")
    return Config(None, []) if path.startswith("~") else _load(path, "")


def _load(path: str, owner: str) -> Config:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return Config(path, [], owner)
    except OSError as error:
        raise Error(
            "invalid", f"cannot read {path}: {error.strerror}", "mend its permissions, or set BEAKER_CONFIG"
        ) from None
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise Error("invalid", f"cannot read {path}: it is a directory", "remove it, or set BEAKER_CONFIG")
    with open(fd, encoding="utf-8", errors="surrogateescape") as file:
        try:
            config = Config(path, file.read().splitlines(), owner)
        except OSError as error:
            raise Error("invalid", f"cannot read {path}: {error.strerror}", "it must be a file") from None
        mode = os.fstat(fd).st_mode
        if mode & 0o077 and "user_token" in config.values:
            _close_to_others(fd, path)
    return config


def _close_to_others(fd: int, path: str) -> None:
    try:
        os.fchmod(fd, 0o600)
        output.say(f"beaker: warning: other users could read the token in {path}; its mode is now 0600")
    except OSError:
        output.say(f"beaker: warning: other users can read the token in {path}; run: chmod 600 {path}")


def _parse(text: str, where: str) -> str:
    """A YAML scalar on one line. Raises Error invalid for anything else."""
    if text[:1] in ("'", '"'):
        value, rest = _unquote(text)
        if not rest or rest.startswith("#"):
            return value
    elif text[:1] not in _INDICATORS or not text:
        plain = text.split(" #")[0].strip()
        return "" if plain in ("~", "null") or plain.startswith("#") else plain
    raise Error("invalid", f"{where}: {text!r} is not a plain or quoted value", "correct this line of the file")


def _unquote(text: str) -> tuple[str, str]:
    """The quoted value that `text` starts with, and what follows; all of `text` follows when it is not understood."""
    quote, value, at = text[0], "", 1
    while at < len(text):
        char, pair = text[at], text[at : at + 2]
        if pair == "''" == quote * 2 or (quote == '"' and pair in ('\\"', "\\\\")):
            value += pair[1]
            at += 2
        elif char == quote:
            return value, text[at + 1 :].strip()
        elif char == "\\" and quote == '"':
            break
        else:
            value += char
            at += 1
    return "", text


def _format(value: str) -> str:
    """`value` as it is where YAML reads that as the same text, else in single quotes."""
    safe = value.isascii() and all(char.isalnum() or char in "_-./@+:" for char in value)
    if safe and (value[:1].isalpha() or value[:1] == "/") and value[-1] != ":" and value.lower() not in _WORDS:
        return value
    return "'" + value.replace("'", "''") + "'"


_INDICATORS = "[]{}>|*&!%@`,"  # what starts anything but a plain value
_WORDS = ("true", "false", "null", "yes", "no", "on", "off")  # what YAML reads as something else than text


def _write(path: str, text: str) -> None:
    folder = os.path.dirname(path)
    temporary = f"{path}.{os.getpid()}"
    try:
        if not os.path.isdir(folder):
            os.makedirs(folder, 0o700)
        before = os.stat(path) if os.path.exists(path) else None
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
                if before and before.st_uid != os.geteuid() == 0:  # root mending a user's file must not take it
                    os.fchown(fd, before.st_uid, before.st_gid)
                file.write(text)
                file.flush()
                os.fsync(fd)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise Error("storage_full", f"cannot write {path}: {error.strerror}", "mend that, and try again") from None
