"""Archives of images, as people bring them: what kind one is, and its files taken out without following anything.

Owns reading a tar that somebody else wrote. skopeo would unpack an OCI archive as root, links and all; here only
regular files with the names of an image layout come out, into a directory that was empty.

Sources: https://github.com/opencontainers/image-spec, `image-layout.md`; `docker save` for the other kind.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ...errors import Error

LAYOUT = re.compile(r"(?:\./)?(oci-layout|index\.json|blobs/sha256/[0-9a-f]{64})")
MEMBERS = 65536  # more than any image has
HEADER = 1 << 20  # bytes of a header, which are read into memory
CHUNK = 1 << 20
COMPRESSED: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open,
}  # fmt: skip


def kind(path: Path) -> str:
    """`oci` or `docker`, the latter for both in one. Raises Error invalid for what is neither."""
    names = set()
    for member, _ in _members(path):
        names.add(member.name.removeprefix("./"))
        if "manifest.json" in names:
            return "docker"
    if "oci-layout" in names:
        return "oci"
    raise _wrong("")


def unpack(path: Path, target: Path, look: Callable[[int], None]) -> None:
    """Take the files of an OCI archive out into an empty directory. look: is told how many bytes more are written, and
    ends it by raising. Raises Error invalid.
    """
    (target / "blobs/sha256").mkdir(parents=True)
    for member, content in _members(path):
        match = LAYOUT.fullmatch(member.name)
        if not match or not member.isreg() or member.issparse():
            continue
        try:
            with open(target / match[1], "xb") as file:
                left = member.size
                while left:
                    chunk = content(min(left, CHUNK))
                    if not chunk:
                        raise _wrong("it ends early")
                    look(len(chunk))
                    file.write(chunk)
                    left -= len(chunk)
        except FileExistsError:
            raise _wrong(f"{match[1]} is in it twice") from None


class _Bounded:
    """A file whose headers are bounded: tarfile reads as much into memory as one says that it is long."""

    def __init__(self, file: Any) -> None:
        self.file, self.reads = file, 0

    def read(self, size: int) -> bytes:
        self.reads += 1
        if size > HEADER or self.reads > 4 * MEMBERS:
            raise _wrong("its headers are too long")
        data: bytes = self.file.read(size)
        return data

    def seek(self, position: int) -> int:
        result: int = self.file.seek(position)
        return result

    def tell(self) -> int:
        result: int = self.file.tell()
        return result


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, Callable[[int], bytes]]]:
    """Each member with a way to read its content on from where it is."""
    with _opened(path) as file:
        bounded = _Bounded(file)
        try:
            with tarfile.open(fileobj=bounded, mode="r:") as tar:  # type: ignore[call-overload]
                number = 0
                while member := tar.next():
                    number += 1
                    if number > MEMBERS:
                        raise _wrong("it has too many files")
                    tar.members = []  # which it keeps otherwise
                    file.seek(member.offset_data)
                    yield member, file.read
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, lzma.LZMAError, zlib.error) as error:
            raise _wrong(str(error)) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with open(path, "rb") as plain:
        start = plain.read(5)
        plain.seek(0)
        for magic, open_ in COMPRESSED.items():
            if start.startswith(magic):
                with open_(plain) as file:
                    yield file
                return
        yield plain


def _wrong(why: str) -> Error:
    what = "the file is no archive of an image" + (f": {why}" if why else "")
    return Error("invalid", what, "write one: docker save --output FILE IMAGE")
