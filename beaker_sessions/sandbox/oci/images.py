"""Images in containers-storage: found, fetched, and described once each.

Owns: one storage of the executor's own (its layers and their order, as containers/storage keeps them for the overlay
driver), and a small description of each image, so that nothing but the description is read when a session starts. The
work of fetching is skopeo's. Must not choose an image.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import Error
from ...model import Pull
from .. import Image, Progress
from . import mounts

SHELLS = ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh")
PAUSE = 0.1  # seconds between two reports of progress
ACCOUNTS = ("passwd", "group", "shadow")


@dataclass(frozen=True)
class Description:
    """layers: directories, topmost first. env: `NAME=value`. passwd, group, shadow: the image's texts, or None."""

    id: str
    layers: list[str]
    env: list[str]
    size: int
    shell: str
    passwd: str | None
    group: str | None
    shadow: str | None
