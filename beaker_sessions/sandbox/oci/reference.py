"""Image references: a strict grammar, and the one full name that each has.

Pure. The grammar is that of https://github.com/distribution/reference; a name without a registry means Docker Hub's, as
people are used to.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from ...errors import Error

HUB = "docker.io"
PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REFERENCE = re.compile(
    r"(?:(?P<host>(?:(?=[^/]*[.:]|localhost/)[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])"
    r"(?::[0-9]{1,5})?)/)?"
    rf"(?P<path>{PART}(?:/{PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
SCHEMES = ("docker://", "beaker://")


@dataclass(frozen=True)
class Reference:
    """host: of the registry, with its port. tag: "" when there is a digest."""

    host: str
    path: str
    tag: str
    digest: str

    @property
    def name(self) -> str:
        """In full, as the tools of containers-storage write it."""
        return f"{self.host}/{self.path}" + (f"@{self.digest}" if self.digest else f":{self.tag}")

    @property
    def loopback(self) -> bool:
        """Whether the registry is on this machine, where Docker's tools take it without TLS."""
        host = re.sub(r":[0-9]+$", "", self.host)  # of `[::1]` the brackets stay
        try:
            return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
        except ValueError:  # a name, such as 127.example.com
            return False


def parse(text: str) -> Reference:
    """Raises Error invalid for what is not a reference."""
    bare = text
    for scheme in SCHEMES:
        bare = bare.removeprefix(scheme)
    match = REFERENCE.fullmatch(bare)
    if not match or len(bare) > 512:
        raise Error(
            "invalid", f"{text!r} is not an image reference", "use NAME, NAME:TAG or HOST/NAME:TAG, in lower case"
        )
    host, path, tag, digest = match["host"] or HUB, match["path"], match["tag"] or "", match["digest"] or ""
    if host == HUB and "/" not in path:
        path = f"library/{path}"
    return Reference(host, path, "" if digest else tag or "latest", digest)
