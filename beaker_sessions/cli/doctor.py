"""`executor doctor`: what is wrong with this machine, told by its executor or, when none answers, found out by root."""

from __future__ import annotations

import os
import sys

from ..errors import Error
from . import config, door, output
from .args import Options, command


@command("")
def doctor(options: Options) -> int:
    try:
        findings = [frame["finding"] for frame in door.ask_all("doctor", config.load().token, timeout=120.0)]
    except Error as error:
        if error.code != "unavailable" or os.geteuid() != 0:
            raise
        output.say(f"beaker: {error.message}; looking at this machine without it")
        arguments = ["--format", "json"] if options.json else []
        os.execv(sys.executable, [sys.executable, "-m", "beaker_sessions.executor.doctor", *arguments])
    if options.json:
        output.json(findings)
    else:
        for finding in findings:
            mend = f" -> {finding['mend']}" if finding.get("mend") else ""
            output.line(f"{finding['level'].upper():8}{finding['what']}{mend}")
    return int(any(finding["level"] == "error" for finding in findings))
