"""What the user reads on standard error while a session waits, its image is fetched, and it starts.

Owns the wording of the door's events. Must not read from anything.
"""

from __future__ import annotations

import os
import sys

from . import output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BAR = 24  # columns
STEP = 10  # percent between two lines of a pull when they cannot be redrawn


class Progress:
    """Says what happens to a session until its terminal is there. quiet: says nothing at all."""

    def __init__(self, quiet: bool, gpus_given: bool = True) -> None:
        self._quiet, self._gpus_given = quiet, gpus_given
        self._redraws = os.isatty(2)
        self._drawn = False
        self._percent = -STEP
        self._gpus = 0
        self._queued: tuple[Any, ...] = ()
        self._told: set[str] = set()  # what needs no repetition by another executor

    def tell(self, event: dict[str, Any]) -> None:
        """Say what an event of the door means; those of a newer executor that are not known mean nothing."""
        known = {"created": self._created, "queued": self._wait, "pull": self._pull, "reserved": self._reserved}
        if event.get("event") in known:
            known[event["event"]](event)

    def _created(self, event: dict[str, Any]) -> None:
        job = event["job"]
        self._gpus = (job.get("requests") or {}).get("gpuCount") or 0
        if not self._gpus and not self._gpus_given:
            self.say("This node has no GPUs, so this session gets none.")
        least = f" with at least {output.count(self._gpus, 'GPU')}" if self._gpus else ""
        self.say(f"Starting session {job['id']}{least}... (Press Ctrl+C to cancel)")
        if event.get("warning"):
            self.say(f"beaker: warning: {event['warning']}")

    def _wait(self, event: dict[str, Any]) -> None:
        position, reason, nodes = event.get("position"), event.get("reason") or "", event.get("nodes") or []
        if not self._queued:
            lacking = "GPUs" if self._gpus and (not reason or "GPU" in reason) else "resources"
            self.say(f"This session is unlikely to start soon because there are not enough available {lacking}.")
            self.say("You may continue waiting to hold your place in the queue.")
        if self._queued[:2] != (position, reason):
            self.say(f"Place in the queue: {position}" + (f" ({reason})" if reason else ""))
        if nodes and self._queued[2:] != (nodes,):
            self.say("You could also try one of the following available nodes:")
            for name in nodes:
                self.say(f"    {name}")
        self._queued = (position, reason, nodes)

    def _pull(self, event: dict[str, Any]) -> None:
        done, total = event.get("done") or 0, event.get("total") or 0
        layers, known = event.get("layers") or (0, 0)
        share = min(done / total, 1.0) if total else 0.0
        text = f"{output.size(done)} of {output.size(total)}, {layers} of {output.count(known, 'layer')}"
        if self._quiet:
            return
        if self._redraws:
            filled = round(BAR * share)
            bar = f"Pulling image [{'#' * filled}{'.' * (BAR - filled)}] {text}"
            sys.stderr.write(
                "\r\x1b[K" + bar[: os.get_terminal_size(2).columns - 1]
            )  # a wrapped line cannot be redrawn
            sys.stderr.flush()
            self._drawn = True
        elif share * 100 >= self._percent + STEP:
            self._percent = int(share * 100)
            self.say(f"Pulling image: {text}")

    def _reserved(self, event: dict[str, Any]) -> None:
        parts = []
        if event.get("gpus"):
            parts.append(output.count(len(event["gpus"]), "GPU"))
        if event.get("cpus"):
            parts.append(output.count(event["cpus"], "CPU"))
        if event.get("memory"):
            parts.append(f"{output.size(event['memory'])} of memory")
        if parts:
            self._say_once(f"Reserved {', '.join(parts)}")
        if event.get("ports"):
            self._say_once(f"Exposed Ports: {output.ports(event['ports'], '0.0.0.0')}")

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.say(text)

    def say(self, text: str) -> None:
        self.finish()
        if not self._quiet:
            output.say(text)

    def finish(self) -> None:
        """End the line that is being redrawn, so that what follows starts on its own."""
        if self._drawn:
            self._drawn = False
            sys.stderr.write("\n")
            sys.stderr.flush()
