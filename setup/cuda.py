"""Which CUDA fits this machine's driver. Reads one file; the choice itself is a pure function.

A CUDA program runs on any driver that is as new as its toolkit wants, or newer, so the newest such toolkit is the best.
"""

from __future__ import annotations

import re
from pathlib import Path

from .steps import Failed

# The kernel module's own word: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  …".
VERSION = Path("/proc/driver/nvidia/version")
# Image tag -> the oldest Linux driver that it runs on, newest first. Source: "CUDA Toolkit and Corresponding Driver
# Versions", https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/; tags as at https://hub.docker.com/r/nvidia/cuda.
TABLE = [
    ("13.0.1", (580, 65, 6)),
    ("12.9.1", (575, 51, 3)),
    ("12.8.1", (570, 26)),
    ("12.6.3", (560, 28, 3)),
    ("12.5.1", (555, 42, 2)),
    ("12.4.1", (550, 54, 14)),
    ("12.3.2", (545, 23, 6)),
    ("12.2.2", (535, 54, 3)),
    ("12.1.1", (530, 30, 2)),
    ("12.0.1", (525, 60, 13)),
    ("11.8.0", (520, 61, 5)),
]
_IMAGE = "nvidia/cuda:{}-runtime-ubuntu22.04"


def base() -> str:
    """The image with the newest CUDA libraries that this machine's driver supports. Raises Failed without a driver."""
    try:
        text = VERSION.read_text()
    except OSError:
        raise Failed(
            f"no NVIDIA driver is loaded here ({VERSION}): name the base, as in BASE={_IMAGE.format(TABLE[0][0])}"
        ) from None
    return choose(text)


def choose(version: str) -> str:
    """The image for a driver. version: the text of VERSION. Raises Failed for one too old, or not understood."""
    found = re.search(r"\b(\d+)\.(\d+)(?:\.(\d+))?\b", version.partition("\n")[0])
    if not found:
        raise Failed(f"{VERSION} does not say the driver's version: name the base with BASE=nvidia/cuda:…")
    driver = tuple(int(part) for part in found.groups(default="0"))
    for tag, oldest in TABLE:
        if driver >= oldest:
            return _IMAGE.format(tag)
    raise Failed(f"the driver {found[0]} is older than {'.'.join(map(str, TABLE[-1][1]))}: update it, or name the base")
