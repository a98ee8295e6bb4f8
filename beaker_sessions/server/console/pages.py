"""What the pages show: view models, pure functions of the service's answers and of the time.

Owns words, order and grouping. Must not ask anything: what somebody may see was decided by the service. What is not
known is None or a state of its own, and never 0 or "free".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ...grammar import format_size, parse_size

JSON = Mapping[str, Any]
PAGE = 50  # nodes on a page of a cluster
SORTS = {"name": "Hostname", "free": "Most free GPUs", "queue": "Longest queue"}
SHOWS = {"all": "All", "free": "With free GPUs", "trouble": "Not usable"}


@dataclass(frozen=True)
class Gpu:
    """One GPU. state: free, held, mine, claimed (by a session that is not reported yet), closed (free, but its node
    takes nothing new), or unknown (its node does not report). use: 0 to 100, None when unknown; used: bytes.
    """

    id: str
    state: str
    job: str = ""
    by: str = ""
    since: str = ""
    use: float | None = None
    used: int | None = None

    @property
    def label(self) -> str:
        return self.id.rpartition("=")[2]

    @property
    def words(self) -> str:
        """What the picture says."""
        said = {
            "free": "free",
            "claimed": "claimed, by whom is not reported yet",
            "closed": "not held, but its node takes nothing new",
            "unknown": "not reporting",
        }.get(self.state, f"held by {'you' if self.state == 'mine' else self.by}")
        if self.state == "unknown" and self.by:
            said += f", last held by {self.by}"
        return said + (f" for {self.since}" if self.since else "") + self.usage

    @property
    def usage(self) -> str:
        if self.state in ("unknown", "claimed") or (self.use is None and self.state in ("free", "closed")):
            return ""
        return ", utilisation unknown" if self.use is None else f", {self.use:.0f} % busy"


@dataclass(frozen=True)
class Holder:
    """A session that holds `count` GPUs."""

    name: str
    mine: bool
    since: str
    count: int


@dataclass(frozen=True)
class Node:
    """A node and its GPUs. free: claimable GPUs, None when nobody knows. cordoned: by an administrator."""

    id: str
    hostname: str
    cluster: str
    status: str
    cordoned: bool
    reason: str
    type: str
    gpus: tuple[Gpu, ...]
    free: int | None
    total: int
    queue: int
    cpus: float | None
    memory: str
    version: str
    seen: str

    @property
    def holders(self) -> list[Holder]:
        """The sessions that hold GPUs here, in the order of the GPUs."""
        found: dict[str, Holder] = {}
        for gpu in self.gpus:
            if gpu.job:
                before = found.get(gpu.job)
                found[gpu.job] = Holder(gpu.by, gpu.state == "mine", gpu.since, before.count + 1 if before else 1)
        return list(found.values())

    @property
    def tone(self) -> str:
        """A word for style sheets."""
        return {"ok": "ok", "cordoned": "closed"}.get(self.status, "unknown")


@dataclass(frozen=True)
class GpuType:
    """All GPUs of one product in a cluster. unknown: those of nodes that do not report."""

    name: str
    free: int
    total: int
    unknown: int


@dataclass(frozen=True)
class Cluster:
    name: str
    nodes: int
    silent: int
    cordoned: int
    types: tuple[GpuType, ...]
    queue: int
    free: int


def cluster(json: JSON, nodes: Sequence[JSON]) -> Cluster:
    """A cluster's card, from all its nodes."""
    free: dict[str, int] = {}
    total: dict[str, int] = {}
    unknown: dict[str, int] = {}
    for node in nodes:
        type, count = _type(node), gpu_count(node)
        if not count:
            continue
        total[type] = total.get(type, 0) + count
        if node["status"] == "not reporting":
            unknown[type] = unknown.get(type, 0) + count
        free[type] = free.get(type, 0) + (free_gpus(node) or 0)
    types = tuple(GpuType(type, free[type], total[type], unknown.get(type, 0)) for type in sorted(total))
    statuses = [node["status"] for node in nodes]
    return Cluster(
        name=json["fullName"],
        nodes=len(nodes),
        silent=statuses.count("not reporting"),
        cordoned=statuses.count("cordoned"),
        types=types,
        queue=sum(node["queue"] for node in nodes if node["status"] != "not reporting"),
        free=sum(type.free for type in types),
    )


def node(json: JSON, jobs: Iterable[JSON], me: str, now: datetime, usage: Mapping[str, Any] | None = None) -> Node:
    """jobs: the node's sessions that may hold something. me: the account that looks.

    usage: GPU -> {use, memory} of its last sample, {} or None when there is none that is fresh.
    """
    limits = json["limits"]
    return Node(
        id=json["id"],
        hostname=json["hostname"],
        cluster=json["cluster"],
        status=json["status"],
        cordoned=json["cordonReason"] != json["drained"] if json["drained"] else json["cordoned"],
        reason=json["cordonReason"],
        type=_type(json) if gpu_count(json) else "",
        gpus=_gpus(json, jobs, me, now, usage or {}),
        free=free_gpus(json),
        total=gpu_count(json),
        queue=json["queue"],
        cpus=limits.get("cpuCount"),
        memory=format_size(parse_size(limits["memory"])) if limits.get("memory") else "",
        version=json["version"],
        seen=ago(json["expiry"], now) if json["status"] == "not reporting" else "",
    )


def _gpus(json: JSON, jobs: Iterable[JSON], me: str, now: datetime, usage: Mapping[str, Any]) -> tuple[Gpu, ...]:
    holders = {gpu: job for job in jobs for gpu in (job.get("limits") or {}).get("gpus", ())}
    ids = list(json["limits"].get("gpuIds") or [str(number) for number in range(gpu_count(json))])
    ids += [gpu for gpu in holders if gpu not in ids]  # one that is still held though its node lost it
    status, nobody = json["status"], sum(gpu not in holders for gpu in ids)
    unreported = max(0, nobody - int(json["free"].get("gpuCount") or 0))  # the node counts them as claimed
    result = []
    for id in ids:
        sample = usage.get(id) or {}
        use, used = (None, None) if status == "not reporting" else (sample.get("use"), sample.get("memory"))
        if job := holders.get(id):
            mine = job["author"]["id"] == me
            state = "unknown" if status == "not reporting" else "mine" if mine else "held"
            since = ago(job["status"].get("scheduled"), now)
            result.append(Gpu(id, state, job["id"], job["author"]["name"], since, use=use, used=used))
        elif status == "not reporting":
            result.append(Gpu(id, "unknown"))
        elif status == "cordoned":
            result.append(Gpu(id, "closed", use=use, used=used))
        elif unreported:
            unreported -= 1
            result.append(Gpu(id, "claimed", use=use, used=used))
        else:
            result.append(Gpu(id, "free", use=use, used=used))
    return tuple(result)


def choose(nodes: Sequence[JSON], text: str = "", show: str = "all", sort: str = "name") -> list[JSON]:
    """The nodes that a cluster's page lists: filtered by a part of hostname or GPU type, and sorted."""
    text = text.strip().lower()
    found = [
        node
        for node in nodes
        if (text in node["hostname"].lower() or text in _type(node).lower())
        and (show != "free" or (free_gpus(node) or 0) > 0)
        and (show != "trouble" or node["status"] != "ok")
    ]
    if sort == "free":
        found.sort(key=lambda node: (-(free_gpus(node) or 0), natural(node["hostname"])))
    elif sort == "queue":
        found.sort(key=lambda node: (-node["queue"], natural(node["hostname"])))
    else:
        found.sort(key=lambda node: natural(node["hostname"]))
    return found


def natural(text: str) -> list[tuple[int, int, str]]:
    """A key that puts gpu-2 before gpu-10."""
    parts: list[tuple[int, int, str]] = []
    for char in text:
        digit = char.isascii() and char.isdigit()
        if digit and parts and parts[-1][0] == 0:
            parts[-1] = (0, parts[-1][1] * 10 + int(char), "")
        else:
            parts.append((0, int(char), "") if digit else (1, 0, char))
    return parts


def silent_nodes(nodes: Iterable[JSON]) -> set[str]:
    """The ids of those that do not report."""
    return {node["id"] for node in nodes if node["status"] == "not reporting"}


def gpu_count(node: JSON) -> int:
    limits = node["limits"]
    return int(limits.get("gpuCount") or len(limits.get("gpuIds") or ()))


def free_gpus(node: JSON) -> int | None:
    """How many GPUs a new session could have at once; None when the node does not report."""
    if node["status"] == "not reporting":
        return None
    return int(node["free"].get("gpuCount") or 0) if node["status"] == "ok" else 0


def _type(node: JSON) -> str:
    return str(node["limits"].get("gpuType") or "GPU")


def ago(moment: str | None, now: datetime) -> str:
    """How long since a time of the REST API: `3 h 12 min`, "" for None."""
    return "" if moment is None else span((now - datetime.fromisoformat(moment)).total_seconds())


def left(moment: str | None, now: datetime) -> str:
    """How long until a time of the REST API; "" for None."""
    return "" if moment is None else span((datetime.fromisoformat(moment) - now).total_seconds())


def span(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    units = (("d", 86400), ("h", 3600), ("min", 60))
    at = next(index for index, (_, size) in enumerate(units) if whole >= size)
    parts = [f"{whole // units[at][1]} {units[at][0]}"]
    if at + 1 < len(units) and (rest := whole % units[at][1] // units[at + 1][1]):
        parts.append(f"{rest} {units[at + 1][0]}")
    return " ".join(parts)


def size(text: str | None) -> str:
    """A size of the REST API for people."""
    return format_size(parse_size(text)) if text else ""


def harmless(value: Any) -> Any:
    """Text with nothing in it that hides, or changes the order of what is read; all that a template prints passes here.

    Characters of Unicode's categories "other" and "separator" but the space are shown as `\\u202e`; None is an error.
    """
    if not isinstance(value, str) or value.isprintable():
        return value
    if hasattr(value, "__html__"):  # a template's own text
        return value
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in value)
