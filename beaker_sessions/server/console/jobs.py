"""What the pages show of sessions: view models, pure functions of the service's jobs and of the time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ...grammar import format_size
from .pages import ago, size, span

JSON = Mapping[str, Any]
OUTPUT = 64 << 10  # bytes of a session's output that are looked at
# Escape sequences as in ECMA-48, also those that the end cuts off: CSI to its final byte, OSC and other strings to BEL
# or ST, and those of a character set. Other characters that nobody sees are shown as such by `pages.harmless`.
CONTROL = re.compile(
    r"\x1b(?:\[[\x20-\x3f]*[\x40-\x7e]?|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\|$)?|[\x20-\x2f]+[\x30-\x7e]?|[\x30-\x7e]?)|\x07"
)
STAGES = {  # the moment at which a stage begins -> what the time until the next moment was spent on
    "created": "Queued",
    "scheduled": "Image",
    "imageReady": "Create",
    "made": "Start",
    "started": "Running",
    "exited": "Cleaning up",
    "finalized": "",
}


@dataclass(frozen=True)
class Stage:
    """A stretch of a session's life. share: of the whole, 0 to 100. now: it is still going on."""

    name: str
    time: str
    share: float
    now: bool


@dataclass(frozen=True)
class Job:
    """A session. word: its state for people. place: in its node's queue, 0 when it does not wait. uses: now, "" when
    that is not known.
    """

    id: str
    name: str
    author: str
    mine: bool
    node: str
    hostname: str
    cluster: str
    word: str
    tone: str
    gpus: tuple[str, ...]
    asks: str
    age: str
    image: str
    command: str
    message: str
    exit_code: int | None
    stages: tuple[Stage, ...]
    live: bool
    stopping: bool
    canceled_for: str
    created: str
    place: int = 0
    reason: str = ""
    uses: str = ""

    @property
    def title(self) -> str:
        return self.name or self.id


def job(
    json: JSON, me: str, now: datetime, silent: bool = False, place: int = 0, reason: str = "",
    used: JSON | None = None,
) -> Job:  # fmt: skip
    """me: the account that looks. silent: its node does not report, so that what it does now is not known.

    used: cpu, memory and disk of its last sample, as far as they are known.
    """
    status, claim = json["status"], json.get("limits") or {}
    word, tone = state(status, silent)
    session = json.get("session") or {}
    return Job(
        id=json["id"],
        name=json.get("name") or "",
        author=json["author"]["name"],
        mine=json["author"]["id"] == me,
        node=json["node"],
        hostname=json.get("nodeHostname") or json["node"],
        cluster=json["cluster"],
        word=word,
        tone=tone,
        gpus=tuple(claim.get("gpus") or ()),
        asks=asks(json),
        age=lasted(status, now),
        image="".join((session.get("image") or {}).values()),
        command=" ".join(session.get("command") or ()),
        message=status.get("message") or "",
        exit_code=status.get("exitCode"),
        stages=stages(status, now, silent),
        live=not status.get("finalized"),
        stopping=bool(status.get("canceled")) and not status.get("finalized"),
        canceled_for=status.get("canceledFor") or "",
        created=status.get("created") or "",
        place=place,
        reason=reason,
        uses="" if silent else uses(used or {}),
    )


def uses(used: JSON) -> str:
    """What of a session's last sample is known."""
    known = [f"{used['cpu']:.1f} CPUs"] if "cpu" in used else []
    return ", ".join(known + [f"{format_size(int(used[what]))} {what}" for what in ("memory", "disk") if what in used])


def state(status: JSON, silent: bool = False) -> tuple[str, str]:
    """A session's state in a word for people, as the command line has it, and one for style sheets."""
    if status.get("finalized"):
        if status.get("canceled") and not status.get("started"):
            return "canceled", "done"
        return ("succeeded", "done") if status.get("exitCode") == 0 else ("failed", "failed")
    if silent:
        return "unknown", "unknown"
    for name, word in (("exited", "uploading"), ("started", "running"), ("scheduled", "starting")):
        if status.get(name):
            return word, "running" if name == "started" else "waiting"
    return "pending", "waiting"


def lasted(status: JSON, now: datetime) -> str:
    """How long it ran or has run; before that, how long it waits."""
    end = status.get("exited") or status.get("finalized")
    return ago(status.get("started") or status.get("created"), datetime.fromisoformat(end) if end else now)


def asks(json: JSON) -> str:
    """The resources it holds, or else asks for."""
    claim, wanted = json.get("limits") or {}, json.get("requests") or {}
    count = len(claim["gpus"]) if "gpus" in claim else wanted.get("gpuCount")
    parts = [] if count is None else [f"{count} GPU{'' if count == 1 else 's'}"]
    if cpus := claim.get("cpuCount") or wanted.get("cpuCount"):
        parts.append(f"{cpus:g} CPUs")
    memory = size(claim.get("memory") or wanted.get("memory"))
    if memory and memory != "0B":
        parts.append(memory)
    return ", ".join(parts)


def stages(status: JSON, now: datetime, silent: bool = False) -> tuple[Stage, ...]:
    """The life so far. What a silent node's session does now is not known, so that nothing goes on then."""
    passed = [name for name in STAGES if status.get(name)]
    spans: list[tuple[str, float, bool]] = []
    for name, after in zip(passed, [*passed[1:], ""], strict=True):
        if name == "finalized" or (not after and silent):
            continue
        # A start that was taken up again after the executor's end has no moments of its own.
        what = "Starting" if after == "started" and name in ("scheduled", "imageReady") else STAGES[name]
        end = datetime.fromisoformat(status[after]) if after else now
        spans.append((what, max(0.0, (end - datetime.fromisoformat(status[name])).total_seconds()), not after))
    whole = sum(seconds for _, seconds, _ in spans) or 1.0
    return tuple(Stage(what, precise(seconds), 100 * seconds / whole, going) for what, seconds, going in spans)


def precise(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else span(seconds)


def queue(waiting: Sequence[JSON], free: int | None, me: str, now: datetime, closed: str = "") -> list[Job]:
    """The sessions that wait on one node, in their order, each with its place and why it waits.

    closed: why the node starts nothing new, "" when it does.
    """
    result = []
    for place, json in enumerate(sorted(waiting, key=lambda one: (one["status"].get("created") or "", one["id"])), 1):
        count = (json.get("requests") or {}).get("gpuCount")
        if free is None:
            reason = "its node is not reporting"
        elif closed:
            reason = f"its node is cordoned: {closed}"
        elif place > 1:
            reason = f"after {place - 1} other{'' if place == 2 else 's'}"
        elif count is not None and count > free:
            reason = f"needs {count} GPU{'' if count == 1 else 's'}, {free} free"
        else:
            reason = "its node is about to take it, or lacks CPUs or memory"
        result.append(job(json, me, now, free is None, place, json["status"].get("message") or reason))
    return result


def output(data: bytes, lines: int = 200) -> list[str]:
    """The last lines of a terminal's output as text without escape sequences; what was written over is left out."""
    text = CONTROL.sub("", data[-OUTPUT:].decode(errors="replace")).replace("\r\n", "\n")
    shown = text.rstrip("\n").split("\n")[-lines:]
    return [_typed(line.rstrip("\r").rpartition("\r")[2]).replace("\t", "    ") for line in shown]


def _typed(line: str) -> str:
    """A line after its backspaces, which line editors write."""
    if "\b" not in line:
        return line
    left: list[str] = []
    for char in line:
        if char != "\b":
            left.append(char)
        elif left:
            left.pop()
    return "".join(left)
