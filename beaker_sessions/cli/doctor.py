"""`executor doctor`: what is wrong with this machine, told by its executor or, when none answers, found out by root."""

from __future__ import annotations

import os

from ..errors import Error
from . import config, door, output
from .args import Options, command


@command("")
def doctor(options: Options) -> int:
    try:
        findings = [frame["finding"] for frame in door.ask_all("doctor", config.load().token)]
    except Error as error:
        if error.code != "unavailable" or os.geteuid() != 0:
            raise
        python = _interpreter()
        if not python:
            raise
        output.say(f"beaker: {error.message}; looking at this machine without it")
        arguments = ["--format", "json"] if options.json else []
        # -P: nothing is imported from the directory where root happens to be.
        os.execv(python, [python, "-P", "-m", "beaker_sessions.executor.doctor", *arguments])
    if options.json:
        output.json(findings)
    else:
        for finding in findings:
            mend = f" -> {finding['mend']}" if finding.get("mend") else ""
            output.line(f"{finding['level'].upper():8}{finding['what']}{mend}")
    return int(any(finding["level"] == "error" for finding in findings))


def _interpreter() -> str:
    """The executor's, "" when it is not known: where this package is installed, or in its checkout."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    places = (os.path.join(os.path.dirname(root), "bin/python"), os.path.join(root, ".venv/bin/python"))
    return next((python for python in places if os.access(python, os.X_OK)), "")
