"""`executor end-sessions`: what the machine's shutdown does first, and its administrators may do too."""

from __future__ import annotations

import os

from ..errors import Error
from . import config, door, output
from .args import Options, command

PATIENCE = 75.0  # seconds: the longest grace of a stop, and what comes after it


@command("")
def end_sessions(options: Options) -> int:
    token = "" if os.geteuid() == 0 else config.load().token
    left = [frame["left"] for frame in door.ask_all("end_sessions", token, PATIENCE)]
    if options.json:
        output.json({"left": left})
    if left:
        raise Error("unavailable", f"these sessions have not ended: {', '.join(left)}", "beaker executor doctor")
    return 0
