"""The user's own logins to registries, where `docker login`, `podman login` and `skopeo login` leave them.

Read with the user's rights, when an image is fetched for them. Must not keep them, nor run credential helpers: those
are the user's programs, and would run as root here. Form of the files: `containers-auth.json(5)`.
"""

from __future__ import annotations

import base64
import json
import os
import stat

from ..model import Identity
from . import inventory

LONGEST = 1 << 20  # bytes of such a file
HUB = "docker.io"


def find(identity: Identity, image: str) -> tuple[str, str] | None:
    """The name and password for `HOST/PATH`; what is said of a longer part of it comes first."""
    files = [
        f"/run/user/{identity.uid}/containers/auth.json",
        f"{identity.home}/.config/containers/auth.json",
        f"{identity.home}/.docker/config.json",
    ]
    for path in files:
        known = _read(path, identity)
        parts = image.split("/")
        for length in range(len(parts), 0, -1):
            if found := known.get("/".join(parts[:length])):
                return found
    return None


def _read(path: str, identity: Identity) -> dict[str, tuple[str, str]]:
    """By registry, or by a path in it. Empty for what is no such file: then it is as if nobody were logged in."""
    try:
        fd = inventory.opened(path, identity, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return {}
            auths = json.loads(file.read(LONGEST))["auths"]
        result = {}
        for name, entry in auths.items():
            user, _, password = base64.b64decode(entry.get("auth") or "").decode().partition(":")
            if user:
                result[_plain(name)] = (user, password)
        return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _plain(name: str) -> str:
    """Docker writes old entries as URLs, its own registry's as https://index.docker.io/v1/."""
    bare = name.partition("://")[2].partition("/")[0] if "://" in name else name
    return HUB if bare == "index.docker.io" else bare
