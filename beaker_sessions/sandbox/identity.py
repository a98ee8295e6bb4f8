"""The account files of a sandbox: the caller's user and groups, made to resolve in any image.

Owns: the texts of `/etc/passwd`, `/etc/group`, `/etc/shadow` and `/etc/hosts` inside. Pure: texts in, texts out, in the
formats of passwd(5), group(5), shadow(5) and hosts(5). Must not read this machine's account database: an `Identity`
says it all.

The caller's uid, gid and names are this machine's, because home directories and network file systems know only those;
where the image thinks otherwise, the image gives way.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Error
from ..model import Identity

NOBODY = 65534


def passwd(text: str | None, identity: Identity, shell: str) -> str:
    """The image's passwd (None when it has none) with the caller in it.

    The image's lines of the same uid or the same name make way. `root` and `nobody` always exist.
    Raises Error invalid when a field of the identity cannot be written into such a file.
    """
    _check(identity)
    lines = {(f[0], f[2]): f for f in _fields(text, 7) if f[2] != str(identity.uid) and f[0] != identity.name}
    own = [identity.name, "x", str(identity.uid), str(identity.gid), identity.name, identity.home, shell]
    kept = list(lines.values())
    names, uids = {f[0] for f in kept} | {identity.name}, {f[2] for f in kept} | {str(identity.uid)}
    if "root" not in names:
        kept.insert(0, ["root", "x", "0", "0", "root", "/root", shell])
    if "nobody" not in names and str(NOBODY) not in uids:
        kept.append(["nobody", "x", str(NOBODY), str(NOBODY), "nobody", "/", "/bin/false"])
    # First, so that uid 0 under another name than root is found by that name.
    return _text([own, *kept] if identity.uid == 0 else [*kept, own])


def group(text: str | None, identity: Identity) -> str:
    """The image's group file with all of the caller's groups in it, under the names that this machine gives them.

    A group of the image with one of those names but another gid becomes NAME-GID, so that its files keep an owner.
    The caller is a member of the groups in `identity.groups` and of no other.
    """
    _check(identity)
    groups = {identity.gid: identity.name} | identity.groups
    own = {str(gid): [name or str(gid), "x", str(gid), identity.name] for gid, name in groups.items()}
    names = {f[0] for f in own.values()}
    kept = []
    for name, password, gid, members in _fields(text, 4):
        others = [member for member in members.split(",") if member and member != identity.name]
        if gid in own:
            own[gid][3] = ",".join([identity.name, *others])
        else:
            kept.append([f"{name}-{gid}" if name in names else name, password, gid, ",".join(others)])
    gids = {f[2] for f in kept} | own.keys()
    if "0" not in gids:
        kept.insert(0, ["root-0" if "root" in names else "root", "x", "0", ""])
    if str(NOBODY) not in gids:
        kept.append(["nogroup-65534" if "nogroup" in names else "nogroup", "x", str(NOBODY), ""])
    return _text([*kept, *own.values()])


def shadow(text: str | None, identity: Identity) -> str:
    """The image's shadow file with a line for the caller, without which `sudo` refuses; no password opens it."""
    _check(identity)
    kept = [f for f in _fields(text, 9) if f[0] != identity.name]
    if "root" not in {f[0] for f in kept} | {identity.name}:
        kept.insert(0, _locked("root"))
    return _text([*kept, _locked(identity.name)])


def hosts(hostname: str, address: str = "127.0.1.1") -> str:
    """A hosts file in which the sandbox finds itself; Debian's address for a host without a permanent one."""
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", f"{address}\t{hostname}"]
    return "".join(line + "\n" for line in lines)


def _locked(name: str) -> list[str]:
    return [name, "*", "19000", "0", "99999", "7", "", "", ""]


def _fields(text: str | None, count: int) -> Iterator[list[str]]:
    """The lines that the C library would accept; others (comments, NIS markers) mean nothing in a sandbox."""
    for line in (text or "").split("\n"):
        fields = line.split(":")
        if len(fields) == count and fields[0] and not line.startswith(("#", "+", "-")):
            yield fields


def _text(lines: list[list[str]]) -> str:
    return "".join(":".join(fields) + "\n" for fields in lines)


def _check(identity: Identity) -> None:
    for value in (identity.name, identity.home, *identity.groups.values()):
        if ":" in value or "\n" in value or "\0" in value:
            raise Error("invalid", f"{value!r} cannot stand in an account file", "correct the account on this machine")
    for name in (identity.name, *identity.groups.values()):
        if "," in name:
            raise Error("invalid", f"{name!r} cannot be a member of a group", "correct the account on this machine")
