"""`session list`, `get`, `describe`, `stop` and `logs`: what is said about sessions without entering them.

Owns where each question goes: to the executor of this machine if there is one and it knows, else to the server.
"""

from __future__ import annotations

import os
import time
from calendar import timegm

from ..errors import Error
from . import config, door, output
from .args import ANY, Flag, Options, command
from .session import SESSION, require_token, target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from ..client import Client

    T = TypeVar("T")

STOPPING = 180.0  # seconds: a process that will not die takes an executor up to 90
LOOK = 0.5  # seconds between questions to the server whether a session has ended
HEADING = ("ID", "NAME", "AUTHOR", "NODE", "GPUS", "STATUS", "DURATION")


@command(
    "",
    Flag("all", "switch", "everyone's on this node, not only yours"),
    Flag("cluster", "text", "those of a cluster", value="CLUSTER"),
    Flag("node", "text", "those of another node", value="NODE"),
    Flag("author", "text", "those of this account", value="ACCOUNT"),
    Flag("finalized", "switch", "those that have ended"),
)
def list_jobs(options: Options) -> int:
    settings = config.load()
    token = require_token(settings)
    filters = {key: options[key] for key in ("cluster", "node", "author") if options[key]}
    if filters or not os.path.exists(door.path()):
        jobs = _from_server(settings, filters, options)
    else:
        frames = door.ask_all("list", token, all=options["all"], finalized=options["finalized"])
        jobs = [frame["job"] for frame in frames]
    return _print(options, jobs)


def _from_server(settings: config.Config, filters: dict[str, str], options: Options) -> list[dict[str, Any]]:
    from . import rest

    server = rest.client(settings)
    if not filters and not options["all"]:
        filters = {"author": server.whoami()["name"]}
    if "node" in filters:
        filters["node"] = server.get_node(filters["node"])["id"]
    return list(server.jobs(kind="session", finalized=bool(options["finalized"]), **filters))


@command("ID...", words=(1, ANY))
def get(options: Options) -> int:
    return _print(options, [_job(id) for id in options.words])


@command("[ID]", SESSION, words=(0, 1))
def describe(options: Options) -> int:
    job = _job(target(options))
    if options.json:
        output.json(job)
        return 0
    if options.quiet:
        output.line(job["id"])
        return 0
    status, session, requests = job.get("status", {}), job.get("session", {}), job.get("requests", {})
    limits, author = job.get("limits") or {}, job.get("author") or {}
    host = job.get("hostname") or job.get("nodeHostname") or "0.0.0.0"
    output.fields(
        [
            ("ID", job["id"]),
            ("Name", job.get("name")),
            ("Status", word(job)),
            ("Author", author.get("name")),
            ("Workspace", job.get("workspace")),
            ("Cluster", job.get("cluster")),
            ("Node", job.get("hostname") or job.get("node")),
            ("Place in the queue", job.get("queuePosition")),
            ("Reason", job.get("reason")),
            *([("Notice", job["notice"])] if job.get("notice") else []),
            ("Image", "".join((session.get("image") or {}).values())),
            ("Command", " ".join(session.get("command") or [])),
            ("GPUs", ", ".join(limits.get("gpus") or []) or requests.get("gpuCount")),
            ("Ports", output.ports(job.get("portMappings") or {}, host)),
            ("CPUs", limits.get("cpuCount") or requests.get("cpuCount")),
            ("Memory", output.memory(limits.get("memory") or requests.get("memory"))),
            *(
                (name.capitalize(), status.get(name))
                for name in ("created", "scheduled", "started", "exited", "finalized")
            ),
            *stages(status),
            ("Canceled", status.get("canceledFor") or status.get("canceled")),
            ("Duration", duration(status)),
            ("Exit code", status.get("exitCode")),
            ("Message", status.get("message")),
        ]
    )
    return 0


@command("[ID]", SESSION, words=(0, 1))
def stop(options: Options) -> int:
    settings, id = config.load(), target(options)
    token = require_token(settings)

    asked: list[Client] = []

    def through_server(server: Client, id: str) -> dict[str, Any]:
        asked.append(server)
        return server.update_job(id, {"status": {"canceled": True, "canceledFor": "stopped by its user"}})

    job = _here_or_elsewhere(settings, id, lambda: door.ask("stop", token, STOPPING, id=id)["job"], through_server)
    for server in asked:
        job = _ended(server, job)
    if options.json:
        output.json(job)
    elif options.quiet:
        output.line(job["id"])
    else:
        # From inside, where whoever waited for the end would be ended themselves, it is only on its way.
        done = "Stopped" if job.get("status", {}).get("finalized") else "Stopping"
        output.line(f"{done} session {job['id']}")
    return 0


def _ended(server: Client, job: dict[str, Any]) -> dict[str, Any]:
    """Wait until the server knows that a stopped session has ended. Raises Error unavailable when it takes too long."""
    began, told = time.monotonic(), False
    while not job.get("status", {}).get("finalized"):
        waited = time.monotonic() - began
        if waited > STOPPING:
            what = f"session {job['id']} has not ended yet: its node has not said so for {STOPPING:g} s"
            hint = f"it ends when its node hears of it; whether it did is shown by: beaker session get {job['id']}"
            raise Error("unavailable", what, hint)
        if waited > door.QUIET and not told:
            told = True
            output.say(f"Waiting for the node of session {job['id']}, which ends it. (Press Ctrl+C to leave)")
        time.sleep(LOOK)
        job = server.get_job(job["id"])
    return job


@command("[ID]", SESSION, words=(0, 1))
def logs(options: Options) -> int:
    settings, id = config.load(), target(options)
    token = require_token(settings)

    def here() -> bytes:
        with open(door.ask_descriptor("logs", token, id=id), "rb") as source:
            return source.read()

    with open(1, "wb", closefd=False) as out:  # bytes as they came: this is the session's terminal
        out.write(_here_or_elsewhere(settings, id, here, lambda server, id: server.get_logs(id)))
    return 0


def _job(id: str | None) -> dict[str, Any]:
    settings = config.load()
    token = require_token(settings)
    return _here_or_elsewhere(
        settings, id, lambda: door.ask("get", token, id=id)["job"], lambda server, id: server.get_job(id)
    )


def _here_or_elsewhere(
    settings: config.Config, id: str | None, here: Callable[[], T], elsewhere: Callable[[Client, str], T]
) -> T:
    """Ask the executor of this machine; about a session that it does not know, or when there is none, the server.

    Raises the executor's Error when the server cannot be asked.
    """
    first = None
    if os.path.exists(door.path()):
        try:
            return here()
        except Error as error:
            if id is None or error.code not in ("not_found", "unavailable"):
                raise
            first = error
    if id is None:
        raise Error("unavailable", f"no executor answers at {door.path()}", "name the session")
    from . import rest

    try:
        return elsewhere(rest.client(settings), id)
    except Error as error:
        away = first is not None and first.code == "unavailable" and error.code == "not_found"
        raise (first if first and (away or error.code in ("unavailable", "unauthorized")) else error) from None


def _print(options: Options, jobs: list[dict[str, Any]]) -> int:
    if options.json:
        output.json(jobs)
    elif options.quiet:
        for job in jobs:
            output.line(job["id"])
    else:
        output.table(HEADING, [_row(job) for job in jobs])
    return 0


def _row(job: dict[str, Any]) -> tuple[Any, ...]:
    return (
        job["id"],
        job.get("name"),
        (job.get("author") or {}).get("name"),
        job.get("hostname") or job.get("node"),
        (job.get("requests") or {}).get("gpuCount"),
        word(job),
        duration(job.get("status", {})),
    )


def word(job: dict[str, Any]) -> str:
    """A session's state in one word for people, as in the original system."""
    status = job.get("status", {})
    if status.get("finalized"):
        return "succeeded" if status.get("exitCode") == 0 else "failed"
    for name, shown in (("exited", "uploading"), ("started", "running"), ("scheduled", "starting")):
        if status.get(name):
            return shown
    return "pending"


def duration(status: dict[str, Any]) -> str | None:
    """HH:MM:SS from its start to its end or to now; None before the start."""
    if not status.get("started"):
        return None
    end = status.get("exited") or status.get("finalized")
    return output.duration((_seconds(end) if end else time.time()) - _seconds(status["started"]))


def stages(status: dict[str, Any]) -> list[tuple[str, str]]:
    """What of the way to its prompt took how long, in seconds, as far as it is known."""
    moments = ("created", "scheduled", "imageReady", "made", "started")
    names = ("Queued for", "Image took", "Create took", "Start took")
    known = [(name, status.get(begin), status.get(end)) for name, begin, end in zip(names, moments, moments[1:])]
    return [(name, f"{_seconds(end) - _seconds(begin):.3f} s") for name, begin, end in known if begin and end]


def _seconds(moment: str) -> float:
    """Since the epoch, of RFC 3339 in UTC."""
    return timegm(time.strptime(moment[:19], "%Y-%m-%dT%H:%M:%S")) + float("0" + moment[19:].rstrip("Z"))
