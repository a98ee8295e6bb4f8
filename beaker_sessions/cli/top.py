"""`session top`: this machine's GPUs and sessions and what they use, drawn again every few seconds.

Owns the picture, which is a pure function of the executor's answers. What is not known is shown as `?`, never as 0.
"""

from __future__ import annotations

import os
import select
import signal

from ..errors import Error
from . import config, door, output, terminal
from .args import Flag, Options, command
from .jobs import duration, word
from .session import require_token

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PAUSE = 2.0  # seconds; use itself is sampled every 10
BAR = 10  # columns


@command("", Flag("all", "switch", "everyone's sessions on this node, not only yours"))
def top(options: Options) -> int:
    token = require_token(config.load())
    if options.json:
        node, _, jobs = _ask(token, options["all"])
        output.json({"node": node, "jobs": jobs})
        return 0
    if not (terminal.is_terminal() and os.isatty(1)):
        for line in picture(*_ask(token, options["all"])):
            output.line(line)
        return 0
    return _watch(token, options["all"])


def _watch(token: str, everyone: bool) -> int:
    """Until q or Ctrl-C. The terminal is as it was on every way out, SIGTERM and a lost executor included."""
    screen, out = terminal.Terminal(), terminal.Output()
    begin = b"\x1b[?1049h\x1b[?25l"
    before = {number: signal.signal(number, _interrupted) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        screen.raw()
        screen.watch(begin)
        os.write(1, begin)
        while True:
            rows, columns = terminal.size() or (24, 80)
            try:
                lines = picture(*_ask(token, everyone))
            except Error as error:
                if error.code != "unavailable":
                    raise
                lines = [f"{error.message}; trying again"]
            lines = [*lines[: rows - 2], "", "q ends this"]
            drawn = "".join(output.escape(line)[:columns] + "\x1b[K\r\n" for line in lines)
            os.write(1, b"\x1b[H" + drawn.rstrip("\r\n").encode(errors="replace") + b"\x1b[J")
            if select.select([0], [], [], PAUSE)[0] and os.read(0, 64)[:1] in (b"q", b"\x03", b"\x04", b""):
                return 0
    except KeyboardInterrupt:
        return 0
    finally:
        screen.restore(out)
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _ask(token: str, everyone: bool) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The node, all its sessions, and those to list."""
    node: dict[str, Any] = door.ask("node", token)["node"]
    every = [frame["job"] for frame in door.ask_all("list", token, all=True, finalized=False)]
    own = {frame["job"]["id"] for frame in door.ask_all("list", token, all=False, finalized=False)}
    return node, every, [job for job in every if everyone or job["id"] in own]


def picture(node: dict[str, Any], every: list[dict[str, Any]], listed: list[dict[str, Any]]) -> list[str]:
    """The lines of the screen. node: the door's, with `usage`, its last sample."""
    limits, usage = node.get("limits") or {}, node.get("usage") or {}
    holder = {gpu: job for job in every for gpu in (job.get("limits") or {}).get("gpus") or []}
    used, free = usage.get("node") or {}, node.get("free") or {}
    head = [str(node.get("hostname") or "this node")]
    if node.get("cordoned"):
        head.append(f"cordoned: {node.get('cordonReason') or 'no reason given'}")
    head.append(f"{free.get('gpuCount', '?')} of {limits.get('gpuCount', '?')} GPUs free")
    head.append(f"CPU {_number(used.get('cpu'))} of {limits.get('cpuCount') or 0:g}")
    head.append(f"memory {_size(used.get('memory'))} of {output.memory(limits.get('memory')) or '?'}")
    lines = ["   ".join(head), ""]
    for gpu in limits.get("gpuIds") or []:
        lines.append(_gpu(gpu, (usage.get("gpus") or {}).get(gpu) or {}, holder.get(gpu)))
    table: list[tuple[str, ...]] = [
        ("SESSION", "NAME", "AUTHOR", "STATUS", "GPUS", "CPU", "MEMORY", "DISK", "DURATION")
    ]
    table += [_row(job, (usage.get("sessions") or {}).get(job["id"]) or {}) for job in listed]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    return [*lines, "", *(drawn if listed else ["No sessions."])]


def _gpu(id: str, used: dict[str, Any], job: dict[str, Any] | None) -> str:
    use = used.get("use")
    bar = "?" * BAR if use is None else ("#" * round(use / 100 * BAR)).ljust(BAR, ".")
    percent = "   ?" if use is None else f"{use:3.0f}%"
    memory = f"{_size(used.get('memory'))} of {_size(used.get('total'))}" if used else ""
    who = "free" if job is None else f"{(job.get('author') or {}).get('name')}  {job.get('name') or job['id']}"
    return f"GPU {id.rpartition('=')[2]:3} [{bar}] {percent}  {memory:22} {who}"


def _row(job: dict[str, Any], used: dict[str, Any]) -> tuple[str, ...]:
    limits = job.get("limits") or {}
    return (
        job["id"],
        output.shown(job.get("name")),
        output.shown((job.get("author") or {}).get("name")),
        word(job),
        str(len(limits["gpus"]) if "gpus" in limits else (job.get("requests") or {}).get("gpuCount", "?")),
        _number(used.get("cpu")),
        _size(used.get("memory")),
        _size(used.get("disk")),
        duration(job.get("status") or {}) or "",
    )


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"


def _size(value: float | None) -> str:
    return "?" if value is None else output.size(value)
