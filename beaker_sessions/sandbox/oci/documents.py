"""What an image says that it is: its index, its manifest and its configuration, read and refused where they are none.

Pure. They come from a registry that somebody chose, or from an archive that somebody wrote: any bytes, of any shape.
skopeo is given the same bytes, and must understand nothing else by them: its JSON takes no regard to the case of keys.

Sources: https://github.com/opencontainers/image-spec, `image-index.md`, `manifest.md`, `config.md` and `layer.md`, and
Docker's image manifest, version 2, schema 2; https://pkg.go.dev/encoding/json for how skopeo reads.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

INDEXES = (
    "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
)  # fmt: skip
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
LAYER = re.compile(
    r"application/vnd\.(oci\.image\.layer\.(nondistributable\.)?v1\.tar(\+(gzip|zstd))?"
    r"|docker\.image\.rootfs\.(foreign\.)?diff\.tar(\.(gzip|zstd))?)"
)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
SIZES = 1 << 50  # bytes of all layers
LONGEST = 4 << 20  # bytes of one of these documents
ENTRIES = 512  # of an index
LAYERS = 128  # about as many as Docker takes; the options of an overlay, one page, have room for them
# The keys that skopeo or we look for, of whole documents and of what describes a blob.
KEYS = ("schemaVersion", "mediaType", "config", "layers", "manifests", "architecture", "os", "rootfs")
PARTS = ("mediaType", "digest", "size", "urls", "platform")
VARIABLE, VARIABLES = 128 << 10, 1 << 20  # bytes of one variable, which is execve(2)'s limit, and of all


class Wrong(ValueError):
    """It is not what it must be. The text, for people, holds nothing of what came."""


@dataclass(frozen=True)
class Blob:
    """digest: `sha256:…`. size: bytes."""

    digest: str
    size: int

    @property
    def file(self) -> str:
        return self.digest.removeprefix("sha256:")


@dataclass(frozen=True)
class Manifest:
    """raw: its text, whose digest is the image's. blobs: the configuration, then the layers."""

    raw: bytes
    blobs: tuple[Blob, ...]


class _Object(dict[str, Any]):
    """names: its keys as they came, those that came twice too."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = [name for name, _ in pairs]


def json_object(raw: bytes) -> dict[str, Any]:
    """Raises Wrong, as all of these do."""
    try:
        found = json.loads(raw, object_pairs_hook=_Object)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Wrong("what is no JSON object")
    return found


def fitting(index: dict[str, Any], machine: str) -> Blob | None:
    """The manifest for a machine, as image indexes call it (`amd64`), None where there is none."""
    _exact(index, KEYS)
    for entry in _objects(index, "manifests", ENTRIES):
        _exact(entry, PARTS)
        platform = entry.get("platform")
        _exact(platform, ("architecture", "os"))
        if isinstance(platform, dict) and (platform.get("architecture"), platform.get("os")) == (machine, "linux"):
            return _blob(entry)
    return None


def manifest(raw: bytes) -> Manifest:
    found = json_object(raw)
    _exact(found, KEYS)
    if found.get("mediaType", MANIFESTS[0]) not in MANIFESTS or found.get("schemaVersion") != 2:
        raise Wrong("a manifest of a kind that is not known")
    config = found.get("config")
    if not isinstance(config, dict) or config.get("mediaType") not in CONFIGS:
        raise Wrong("a manifest of an old kind, or of something that is no image")
    layers = _objects(found, "layers", LAYERS)
    for layer in layers:
        if not isinstance(kind := layer.get("mediaType"), str) or not LAYER.fullmatch(kind):
            raise Wrong("a manifest with a layer of a kind that is not known")
    blobs = (_blob(config), *map(_blob, layers))
    if blobs[0].size > LONGEST or sum(blob.size for blob in blobs) > SIZES:
        raise Wrong("a manifest with a size that cannot be")
    return Manifest(raw, blobs)


def layers(config: dict[str, Any]) -> list[str]:
    """The digests of an image's layers as they are when nothing compresses them, the lowest first."""
    files = config.get("rootfs")
    _exact(config, KEYS)
    _exact(files, ("diff_ids",))
    found = files.get("diff_ids") if isinstance(files, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, str) and DIGEST.fullmatch(one) for one in found):
        raise Wrong("a configuration that names no layers")
    return found


def env(config: dict[str, Any]) -> list[str]:
    """The variables of an image, `NAME=value`."""
    about = config.get("config") or {}
    _exact(config, KEYS)
    _exact(about, ("Env",))
    found = (about.get("Env") or []) if isinstance(about, dict) else None
    if not isinstance(found, list):
        raise Wrong("a configuration without an environment")
    total = 0
    for pair in found:
        try:
            size = len(pair.encode())
        except (AttributeError, UnicodeEncodeError):
            raise Wrong("a configuration with a variable that is none") from None
        total += size
        if pair.find("=") < 1 or "\0" in pair or size >= VARIABLE or total > VARIABLES:
            raise Wrong("a configuration with a variable that is none, or too long")
    return found


def _exact(found: Any, known: tuple[str, ...]) -> None:
    """Refuse keys of an object that are the same, or one of those known, but for their case."""
    names = getattr(found, "names", ())
    meant = {name.casefold(): name for name in known}
    folded = [name.casefold() for name in names]
    if len(set(folded)) < len(folded) or any(
        meant.get(key, name) != name for key, name in zip(folded, names, strict=True)
    ):
        raise Wrong("two keys that differ in nothing but case, or a key in the wrong case")


def _objects(found: dict[str, Any], name: str, most: int) -> list[dict[str, Any]]:
    entries = found.get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Wrong(f"a document whose {name} are no list of objects")
    if len(entries) > most:
        raise Wrong(f"a document with more than {most} {name}")
    return entries


def _blob(entry: dict[str, Any]) -> Blob:
    _exact(entry, PARTS)
    digest, size = entry.get("digest"), entry.get("size")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest) or type(size) is not int or not 0 <= size <= SIZES:
        raise Wrong("a document that names a part without a SHA-256 digest and a size")
    return Blob(digest, size)
