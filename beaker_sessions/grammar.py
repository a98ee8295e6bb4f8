"""The grammars of what people type: names, image references, paths, sizes, durations. Pure functions of one value.

Each function returns the parsed value, or raises a ValueError such as `'5parsecs' is not a size, such as 6.5GiB`;
`wire` puts the field's name in front. Must not look at the machine.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
REFERENCE = re.compile(rf"{NAME.pattern}(/{NAME.pattern})?")  # `org/name`, a name or an id
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # POSIX 2018, 3.235 Name
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOSTNAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")  # RFC 1123
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGTP]?)(I?)(B?)", re.IGNORECASE)
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h|d))+")
_SECONDS = {"ns": "1e-9", "us": "1e-6", "µs": "1e-6", "ms": "1e-3", "s": "1", "m": "60", "h": "3600", "d": "86400"}

# https://github.com/distribution/reference: [domain/]path[:tag][@digest]
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_DOMAIN = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_IMAGE = re.compile(
    rf"(?P<name>(?:{_DOMAIN}/)?{_PART}(?:/{_PART})*)(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?"
)
_IMAGE_ID = re.compile(r"sha256:[0-9a-f]{64}")


def text(value: Any) -> str:
    """Any bytes but NUL, in the form of Python's file names: undecodable ones are U+DC80 to U+DCFF."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    if "\0" in value:
        raise ValueError(f"{value!r} contains a NUL byte")
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"{value!r} contains half a surrogate pair") from None
    return value


def line(value: Any) -> str:
    """Text without control characters, as long as a message may be."""
    if any(ord(char) < 32 or 0x7F <= ord(char) < 0xA0 for char in text(value)) or len(value) > 4096:
        raise ValueError(f"{value[:80]!r} is not one line of text")
    return str(value)


def name(value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a name: use up to 63 letters, digits, '_', '.' and '-', a letter or digit first"
        )
    return value


def reference(value: Any) -> str:
    """A name, an id, or `org/name`."""
    if not isinstance(value, str) or not REFERENCE.fullmatch(value):
        raise ValueError(f"{value!r} is neither a name nor an id, such as lab/main")
    return value


def env_name(value: Any) -> str:
    if not isinstance(value, str) or not _ENV_NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not the name of a variable: use letters, digits and '_', no digit first")
    return value


def hostname(value: Any) -> str:
    """Up to 64 characters, Linux's HOST_NAME_MAX."""
    if not isinstance(value, str) or not _HOSTNAME.fullmatch(value) or len(value) > 64:
        raise ValueError(f"{value!r} is not a host name, such as gpu-1.lab")
    return value


def image(value: Any) -> str:
    """A Docker reference without its `docker://`, an id `sha256:…`, or `beaker://NAME` as it is."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not an image")
    if value.startswith("beaker://"):
        if REFERENCE.fullmatch(value[9:]):
            return value
    else:
        bare: str = value.removeprefix("docker://")
        match = _IMAGE.fullmatch(bare)
        if (match and len(match["name"]) <= 255) or _IMAGE_ID.fullmatch(bare):
            return bare
    raise ValueError(f"{value!r} is not the name of an image, such as debian:12 or docker://debian:12")


def path(value: Any) -> str:
    """An absolute path that does not go up."""
    if not text(value).startswith("/") or ".." in value.split("/"):
        raise ValueError(f"{value!r} is not an absolute path without '..'")
    return str(value)


def count(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value, re.ASCII):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**9:
        raise ValueError(f"{value!r} is not a whole number, 0 or more")
    return value


def port(value: Any) -> tuple[int, int]:
    """(port of the session, port of the node) of `8000:80`; `80` alone, also as a number, leaves the node's open: 0."""
    match = re.fullmatch(r"(?:(\d{1,5}):)?(\d{1,5})", str(value), re.ASCII) if isinstance(value, (str, int)) else None
    inside, outside = (int(match[2]), int(match[1] or 0)) if match else (0, 0)
    if not 0 < inside < 65536 or outside > 65535 or (match and match[1] and not outside):
        raise ValueError(f"{value!r} is not a port to publish, such as 8000 or 8080:8000")
    if 0 < outside < 1024:
        raise ValueError(f"{value!r}: the ports below 1024 are for the node's own services")
    return inside, outside


def cores(value: Any) -> float:
    """A number of CPUs: finite, at least 0."""
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < 1e6:
        raise ValueError(f"{value!r} is not a number of CPUs, such as 7.5")
    return number


def parse_size(value: Any) -> int:
    """Bytes of `6.5GiB`, `512MB` (10**6), `1024` or an integer; `8g` alone is binary, as in `docker run --memory`."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    match = _SIZE.fullmatch(value) if isinstance(value, str) and value.isascii() and len(value) < 40 else None
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{value!r} is not a size, such as 6.5GiB or 512MB")
    base = 1000 if match[4] and not match[3] else 1024
    size = int(Decimal(match[1]) * base ** " KMGTP".index(match[2].upper() or " "))
    if size > 1 << 60:
        raise ValueError(f"{value!r} is more than any machine has")
    return size


def format_size(size: int) -> str:
    """A size for people, to a tenth: `62.5GiB`, `512MiB`, `17B`."""
    for power, unit in reversed(list(enumerate(("B", "KiB", "MiB", "GiB", "TiB", "PiB")))):
        if size >= 1024**power:
            return f"{round(size / 1024**power, 1):g}{unit}"
    return f"{size}B"


def exact_size(size: int) -> str:
    """A size for programs: as `format_size` where that loses nothing, else the number of bytes."""
    return short if parse_size(short := format_size(size)) == size else str(size)


def parse_duration(value: Any) -> float:
    """Seconds of `8h`, `90m`, `1h30m`, or of an integer of nanoseconds (Go's JSON form of a duration)."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        seconds = Decimal(value) / 10**9
    elif isinstance(value, str) and len(value) < 40 and value.isprintable() and _DURATION.fullmatch(value):
        parts = re.findall(r"([\d.]+)([a-zµ]+)", value)
        seconds = sum((Decimal(number) * Decimal(_SECONDS[unit]) for number, unit in parts), Decimal(0))
    else:
        seconds = Decimal(0)
    if not 0 < seconds <= 366 * 86400:
        raise ValueError(f"{value!r} is not a duration of up to a year, such as 8h or 1h30m")
    return float(seconds)
