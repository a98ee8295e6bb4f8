"""The files of a containers-storage, as containers/storage keeps them for its overlay driver.

Owns: reading its records, and removing what a program that was stopped left. Writing images is skopeo's. What is read
here was written by whoever made an image: other shapes than expected are errors, never exceptions of Python's.

Source: https://github.com/containers/storage, `images.go`, `layers.go` and `drivers/overlay`.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from ...errors import Error
from . import documents, mounts
from .documents import Wrong


class Storage:
    """root: its directory, which need not be there yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def images(self) -> list[dict[str, Any]]:
        return self._records("images")

    def chain(self, image: dict[str, Any]) -> list[dict[str, Any]]:
        """The layers of an image, topmost first."""
        layers, found = {layer["id"]: layer for layer in self._records("layers")}, []
        at = image.get("layer")
        while at and at in layers and layers[at] not in found:
            found.append(layers[at])
            at = layers[at].get("parent")
        return found

    def path(self, layer: dict[str, Any]) -> str:
        return str(self.root / "overlay" / layer["id"] / "diff")

    def stored(self) -> int:
        """Bytes of the layers of all images, each layer once."""
        return sum(size(layer) for layer in self._needed().values())

    def env(self, image: dict[str, Any]) -> list[str]:
        """The variables of an image, `NAME=value`. Raises Wrong for an image that is not what its configuration says.

        Its id is the configuration's digest; so one with other layers could else take the place of somebody's image.
        """
        id = image["id"]
        # containers/storage names a file of an image after its key, in Base64 when that has other than letters.
        key = base64.b64encode(f"sha256:{id}".encode()).decode()
        config = documents.json_object((self.root / "overlay-images" / id / f"={key}").read_bytes())
        if documents.layers(config) != [layer.get("diff-digest") for layer in reversed(self.chain(image))]:
            raise Wrong("layers that are not those of its configuration")
        return documents.env(config)

    def sweep(self) -> None:
        """Remove layers that no image has. Nobody may add to the storage meanwhile; if another process does, nothing
        is removed.
        """
        records = self.root / "overlay-layers"
        with contextlib.suppress(FileNotFoundError), open(records / "layers.lock", "r+b") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return
            if why := self._broken():
                raise Error("internal", f"nothing is removed from {self.root}: {why}", "load the images again")
            needed = self._needed()
            if any(layer["id"] not in needed for layer in self._records("layers")):
                temporary = records / f".layers-{os.urandom(4).hex()}"
                temporary.write_text(json.dumps(list(needed.values())))
                temporary.chmod(0o600)
                temporary.replace(records / "layers.json")
            for directory in (self.root / "overlay").iterdir():
                if directory.name not in ("l", *needed) and directory.is_dir():
                    mounts.remove_tree(directory)
            for link in (self.root / "overlay" / "l").iterdir():
                if not link.exists():
                    link.unlink()
            for file in records.glob("*.tar-split.gz"):
                if file.name.partition(".")[0] not in needed:
                    file.unlink()
            known = {image["id"] for image in self.images()}
            for directory in (self.root / "overlay-images").iterdir():
                if directory.is_dir() and directory.name not in known:
                    mounts.remove_tree(directory)

    def _broken(self) -> str:
        """Why its records may be damaged, and what no image seems to have may be live sessions'; "" for no reason."""
        layers = {layer["id"]: layer for layer in self._records("layers")}
        for image in self.images():
            if not (self.root / "overlay-images" / image["id"]).is_dir():
                return f"the image {image['id']} has no files"
            last = (self.chain(image) or [image])[-1]
            if (last.get("layer") or last.get("parent")) not in (None, "", *layers):
                return f"a layer of the image {image['id']} is not there"
        return ""

    def _needed(self) -> dict[str, dict[str, Any]]:
        return {layer["id"]: layer for image in self.images() for layer in self.chain(image)}

    def _records(self, kind: str) -> list[dict[str, Any]]:
        """Raises Error internal for a damaged file."""
        path = self.root / f"overlay-{kind}" / f"{kind}.json"
        try:
            records = json.loads(path.read_text())
        except FileNotFoundError:
            return []
        except (ValueError, RecursionError) as error:
            raise Error("internal", f"{path} is damaged: {error}", "load the images again") from error
        if isinstance(records, list) and all(isinstance(r, dict) and isinstance(r.get("id"), str) for r in records):
            return records
        raise Error("internal", f"{path} is damaged: it is no list of {kind}", "load the images again")


def size(layer: dict[str, Any]) -> int:
    """Bytes of a layer's own files."""
    return layer.get("diff-size") or 0
