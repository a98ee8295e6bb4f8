"""REST JSON <-> model, in both directions. With `bodies`, the only place that validates what comes from outside.

Owns the shapes of answers: lowerCamelCase, absent means null, RFC 3339 times, sizes as text. Names and types are those
of the original API, as beaker-py 1.x reads them; `revision`, `queuePosition`, `imageReady`, `made` and what follows
`priority` in `session` are ours. Must not decide who may do what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from . import model
from .bodies import Door, JobReport, Limits, SessionBody, check
from .errors import Error
from .grammar import exact_size, format_size, parse_duration, parse_size

__all__ = ["exact_size", "format_size", "parse_duration", "parse_size"]  # with all that is defined here


def request(session: Any, *, tty: Any = True, stdin: Any = True, size: Any = None) -> model.Request:
    """The `session` object of `POST /jobs`, with what only the door knows. size: [rows, columns] or None.

    Raises Error invalid.
    """
    body = check(SessionBody, session)
    door = check(Door, {"tty": tty, "stdin": stdin} | ({} if size is None else {"size": size}))
    return body.request(tty=door.tty, stdin=door.stdin, size=door.size)


def window(size: Any) -> tuple[int, int]:
    """(rows, columns) of a frame. Raises Error invalid."""
    return check(Door, {"size": size}).size


def signal(number: Any) -> int:
    """A signal's number as Linux has them. Raises Error invalid."""
    if type(number) is not int or not 1 <= number <= 64:
        raise Error("invalid", f"signal: {number!r} is not a signal", "a number from 1 to 64")
    return number


def redacted(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job as everybody may see it: without its command, its environment and where it works."""
    session = {
        key: value
        for key, value in job.get("session", {}).items()
        if key not in ("command", "datasets", "envVars", "workDir")
    }
    return {**job, "session": session}


def job(session: model.Session, **directory: Any) -> dict[str, Any]:
    """The job of the REST API and the door. directory: fields to add or replace: author, cluster, queuePosition."""
    wanted, claim = session.request, session.claim
    if _state(session) != session.state:
        raise ValueError(f"session {session.id} is {session.state} but its times say {_state(session)}")
    image = wanted.image or ""
    kind = "beaker" if image.startswith("beaker://") else "docker"
    body: dict[str, Any] = {
        "id": session.id,
        "kind": "session",
        "name": wanted.name,
        "author": {"id": session.account, "name": session.account, "displayName": session.account},
        "workspace": wanted.workspace or "",
        "cluster": "",
        "node": session.node,
        "requests": {
            "gpuCount": wanted.gpus,
            "cpuCount": wanted.cpus,
            "memory": None if wanted.memory is None else exact_size(wanted.memory),
            "sharedMemory": None if wanted.shared_memory is None else exact_size(wanted.shared_memory),
        },
        "limits": claim and {"gpus": list(claim.gpus), "cpuCount": claim.cpus, "memory": exact_size(claim.memory)},
        "status": {
            **{key: time(getattr(session, name)) for name, key in TIMES.items()},
            "canceledFor": session.canceled_for or None,
            "exitCode": session.exit_code,
            "message": session.message or None,
            "error": session.error or None,
        },
        "session": {
            "command": list(wanted.command) or None,
            "envVars": [
                *({"name": name, "value": value} for name, value in wanted.env),
                *({"name": name, "secret": secret} for name, secret in wanted.secret_env),
            ]
            or None,
            "datasets": [{"mountPath": path, "source": {"secret": secret}} for secret, path in wanted.secret_mounts]
            or None,
            "image": {kind: image.removeprefix("beaker://")} if image else None,
            "workDir": wanted.workdir,
            "priority": wanted.priority,
            "pull": wanted.pull.value,
            "timeout": None if wanted.timeout is None else round(Fraction(wanted.timeout) * 10**9),
            "hostname": wanted.hostname,
            "ports": [f"{node}:{own}" if node else str(own) for own, node in wanted.ports] or None,
            "bare": wanted.bare or None,
            "tty": wanted.tty,
            "stdin": wanted.stdin,
            "size": list(wanted.size),
        },
        "portMappings": mappings(claim) or None,
        "hostNetworking": wanted.host_network,
        "preemptible": False,
        "revision": session.revision,
    }
    present: dict[str, Any] = _present(body | directory)
    return present


def session(job: Any) -> model.Session:
    """The inverse of `job`, whatever its directory was. Raises Error invalid."""
    body = check(JobReport, job)
    door = {key: body.session[key] for key in ("tty", "stdin", "size") if key in body.session}
    inner = {key: value for key, value in body.session.items() if key in _SESSION_FIELDS}
    inner |= {"name": job.get("name"), "workspace": job.get("workspace") or None, "requests": job.get("requests")}
    wanted = request(inner | {"hostNetworking": bool(job.get("hostNetworking"))}, **door)
    status, claim = body.status, body.limits
    result = model.Session(
        id=body.id,
        account=body.author.name,
        node=body.node,
        request=wanted,
        claim=model.Claim(tuple(claim.gpus), claim.cpu_count, claim.memory, tuple(body.port_mappings.items()))
        if claim
        else None,
        canceled_for=status.canceled_for,
        exit_code=status.exit_code,
        message=status.message,
        error=status.error,
        revision=body.revision,
        **{name: getattr(status, name) for name in TIMES},
    )
    return replace(result, state=_state(result))


def mappings(claim: model.Claim | None) -> dict[str, int]:
    """`portMappings`: the session's port to the node's."""
    return {str(own): node for own, node in claim.ports} if claim else {}


_SESSION_FIELDS = {field.alias for field in SessionBody.model_fields.values()}
TIMES = {  # moments of a session: as the model calls them, and as `status` does
    "created": "created", "scheduled": "scheduled", "image_ready": "imageReady", "made": "made", "started": "started",
    "exited": "exited", "finalized": "finalized", "canceled": "canceled",
}  # fmt: skip


def time(moment: datetime | None) -> str | None:
    """RFC 3339 in UTC, with Z."""
    return None if moment is None else moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def limits(gpus: Sequence[model.Gpu], cpus: float, memory: int) -> dict[str, Any]:
    """A node's `limits`: everything it has. gpuType: of the first GPU."""
    return {
        "cpuCount": cpus,
        "memory": exact_size(memory),
        "gpuCount": len(gpus),
        "gpuIds": [gpu.id for gpu in gpus],
    } | ({"gpuType": gpus[0].type} if gpus else {})


def free(amount: model.Resources) -> dict[str, Any]:
    """A node's `free`: what could be claimed now."""
    return {"cpuCount": amount.cpus, "memory": exact_size(amount.memory), "gpuCount": amount.gpus}


def resources(limits: Any) -> model.Resources:
    """The amount in `limits` or `free`. Raises Error invalid."""
    return check(Limits, limits).resources()


def _state(session: model.Session) -> model.State:
    return next((state for state in reversed(model.State) if getattr(session, state.value)), model.State.CREATED)


def _present(value: Any) -> Any:
    """Without what is null, to any depth: absent means null."""
    if isinstance(value, Mapping):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return value
