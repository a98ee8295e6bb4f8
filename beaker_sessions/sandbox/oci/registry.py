"""Registries: how big an image is before it is fetched, and why it could not be fetched.

Owns: manifests, and the one question that is put to a registry directly, because a status says what the exit code of
`skopeo` does not. Sources: https://github.com/opencontainers/distribution-spec, image-spec's `manifest.md` and
`image-index.md`, and Docker's token authentication. Credentials
are for skopeo's eyes: they go by a file that is gone afterwards, never by arguments or into the log.
"""

from __future__ import annotations

import base64
import contextlib
import json
import platform
import re
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import Error
from .. import Login
from .reference import HUB, Reference

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
KINDS = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
]
TIMEOUT = 20.0  # seconds


def options(wanted: Reference) -> list[str]:
    """What skopeo is told about the registry."""
    return ["--tls-verify=false"] if wanted.loopback else []


@contextlib.contextmanager
def authorized(wanted: Reference, login: Login, directory: Path) -> Iterator[str]:
    """A file for skopeo's --authfile with what the user has for this image, and with nothing of root's.

    Its form: https://github.com/containers/image/blob/main/docs/containers-auth.json.5.md
    """
    known = login(f"{wanted.host}/{wanted.path}")
    auths = {wanted.host: {"auth": base64.b64encode(":".join(known).encode()).decode()}} if known else {}
    with tempfile.TemporaryDirectory(dir=directory, prefix="pull-") as name:  # mode 0700
        path = Path(name, "auth.json")
        path.write_text(json.dumps({"auths": auths}))
        yield str(path)


def manifest(wanted: Reference, authfile: str) -> tuple[Reference, list[int]]:
    """The image of this machine's kind behind a name, and the sizes of its layers in bytes.

    Raises Error not_found, unauthorized or unavailable.
    """
    found = _inspect(wanted, authfile)
    if "manifests" in found:
        machine = ARCHITECTURES.get(platform.machine(), platform.machine())
        entries = [
            m
            for m in found["manifests"]
            if (p := m.get("platform") or {}).get("architecture") == machine and p.get("os") == "linux"
        ]
        if not entries:
            raise Error("not_found", f"the image {wanted.name} is not made for Linux on {machine}", "use another image")
        wanted = replace(wanted, tag="", digest=entries[0]["digest"])
        found = _inspect(wanted, authfile)
    return wanted, [layer.get("size") or 0 for layer in found.get("layers") or ()]


def failure(wanted: Reference) -> Error:
    """Why an image cannot be fetched, as its registry says itself without a login."""
    try:
        status = _status(wanted)
    except (OSError, ValueError) as error:
        what = f"its registry {wanted.host} cannot be reached: {getattr(error, 'reason', error)}"
        return Error("unavailable", f"the image {wanted.name} is not on this machine, and {what}", "check the network")
    tried = f"the image {wanted.name} is not on this machine, and {wanted.host}"
    if status in (401, 403):
        hint = f"check the name; a private image needs: docker login {wanted.host}, or skopeo login {wanted.host}"
        return Error("unauthorized", f"{tried} does not give it to you", hint)
    if status == 404:
        return Error("not_found", f"{tried} does not have it", "check the name and the tag")
    if status == 200:
        return Error(
            "unavailable", f"{tried} has it, but fetching it failed", "try again; the executor's log says more"
        )
    return Error("unavailable", f"{tried} answers {status}", "try again later")


def _inspect(wanted: Reference, authfile: str) -> dict[str, Any]:
    command = ["skopeo", "inspect", "--raw", f"--authfile={authfile}", *options(wanted), f"docker://{wanted.name}"]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise failure(wanted) from None
    if done.returncode != 0:
        raise failure(wanted)
    found = json.loads(done.stdout)
    return found if isinstance(found, dict) else {}


def _status(wanted: Reference) -> int:
    """The status of a request for the manifest, after asking for a token if that is demanded."""
    host = "registry-1.docker.io" if wanted.host == HUB else wanted.host
    base = f"{'http' if wanted.loopback else 'https'}://{host}/v2/{wanted.path}/manifests/{wanted.digest or wanted.tag}"
    headers = {"Accept": ", ".join(KINDS)}
    status, challenge = _get(base, headers)
    if status == 401 and challenge.lower().startswith("bearer "):
        fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        if not fields.get("realm", "").startswith(("https://", "http://")):
            return status
        query = urllib.parse.urlencode({k: v for k, v in fields.items() if k in ("service", "scope")})
        with urllib.request.urlopen(f"{fields['realm']}?{query}", timeout=TIMEOUT) as answer:
            token = json.load(answer)
        status, _ = _get(base, headers | {"Authorization": f"Bearer {token.get('token') or token.get('access_token')}"})
    return status


def _get(url: str, headers: dict[str, str]) -> tuple[int, str]:
    """The status, and what authentication is demanded."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers.get("WWW-Authenticate", "")
