"""What a session gets: a node's defaults filled into a request, and the `Spec` of its sandbox. Pure functions.

Must not do input or output: everything that depends on the machine is an argument.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import Error
from ..grammar import format_size
from ..model import Claim, Identity, Request, Resources
from ..sandbox import LABEL, LABEL_OWNER, Image, Mount, Spec

LABEL_JOB = "beaker.job"  # the session without its environment, from which a lost ledger is rebuilt
LABEL_UID = "beaker.uid"
LABEL_IMAGE = "beaker.image"  # its id: while the sandbox is there, so must this be

AGENT = "/run/beaker/agent.sock"
RESERVED = ("/.beaker", "/dev", "/proc", "/run/beaker", "/sys")  # what a session has of the system

# A session that reserved nothing must be the first to yield, to the kernel's CPU scheduler and to its OOM killer alike.
IDLE_WEIGHT, IDLE_OOM_SCORE = 1, 800
LEAST_MEMORY = 6 << 20  # bytes with which a container can be made at all; Docker's limit, too
SESSION_OOM_SCORE = 200  # before the machine's own services


def defaults(request: Request, capacity: Resources, image: str) -> Request:
    """`request` with the node's defaults in place of None: 1 GPU where there are any, `image`, the GPUs' share.

    Without `cpus` and `memory` the session's share of the machine's GPUs is also its share of CPUs and memory.
    Raises Error invalid when it asks for more than the node has, which no waiting could mend.
    """
    gpus = request.gpus if request.gpus is not None else min(1, capacity.gpus)
    share = gpus / capacity.gpus if capacity.gpus else 0.0
    cpus = request.cpus if request.cpus is not None else math.floor(min(share, 1.0) * capacity.cpus * 1000) / 1000
    memory = request.memory if request.memory is not None else int(min(share, 1.0) * capacity.memory)
    if gpus > capacity.gpus:
        has = f"this node has {capacity.gpus}" if capacity.gpus else "this node has none"
        raise Error("invalid", f"--gpus {gpus}: {has}", "ask for fewer GPUs, or choose another node (beaker node list)")
    if cpus > capacity.cpus + 1e-3:
        raise Error("invalid", f"--cpus {cpus:g}: this node has {capacity.cpus:g}", "ask for fewer CPUs")
    if 0 < memory < LEAST_MEMORY:
        raise Error("invalid", f"--memory {memory} bytes: no session runs with less than 6MiB", "ask for more memory")
    if (request.shared_memory or 0) > capacity.memory:
        raise Error(
            "invalid",
            f"--shared-memory {format_size(request.shared_memory or 0)}: this node has {format_size(capacity.memory)}",
            "ask for less memory",
        )
    if memory > capacity.memory:
        raise Error(
            "invalid",
            f"--memory {memory / 2**30:.1f}GiB: this node has {capacity.memory / 2**30:.1f}GiB for sessions",
            "ask for less memory",
        )
    return replace(request, gpus=gpus, cpus=cpus, memory=memory, image=request.image or image)


def check_places(paths: Sequence[str]) -> None:
    """Raises Error invalid for a directory of the machine that no session can have where it is."""
    for path in paths:
        if not path.startswith("/") or path == "/" or posixpath.normpath(path) != path:
            raise Error("invalid", f"mountPaths: {path!r} is not the path of a directory", "for example /net")
        if below := [place for place in RESERVED if path == place or path.startswith(f"{place}/")]:
            raise Error("invalid", f"mountPaths: {path!r}: {below[0]} is each session's own", "take it out")


def check_mounts(request: Request, identity: Identity, taken: Sequence[str]) -> None:
    """Raises Error invalid for a secret's file where one cannot be, or would leave something behind.

    taken: what is mounted from the machine beside the home: the empty file that a mount needs would stay there.
    """
    for secret, path in request.secret_mounts:
        below = [place for place in (*RESERVED, identity.home, *taken) if path == place or path.startswith(f"{place}/")]
        if below or path == "/" or path != "/" + posixpath.normpath(path).lstrip("/"):
            why = f"{below[0]} is not the session's own" if below else "it is not the path of a file"
            raise Error("invalid", f"--secret-mount {secret}={path}: {why}", f"for example /secrets/{secret}")


def amount(request: Request) -> Resources:
    """What a request that went through `defaults` reserves."""
    return Resources(request.gpus or 0, request.cpus or 0.0, request.memory or 0)


def spec(
    id: str,
    request: Request,
    claim: Claim,
    identity: Identity,
    image: Image,
    mounts: Sequence[Mount],
    *,
    capacity: Resources,
    node: Mapping[str, str],
    owner: str,
    job: Mapping[str, object],
    disk: int = 0,
) -> Spec:
    """The sandbox of a session. node: `{"id", "hostname"}`. owner: names the executor. job: its JSON, for the label.

    disk: bytes that it may write outside of its mounts, 0 for no limit.
    """
    weight = max(IDLE_WEIGHT, round(10000 * claim.cpus / capacity.cpus)) if claim.cpus else IDLE_WEIGHT
    return Spec(
        id=id,
        labels={
            LABEL: id,
            LABEL_OWNER: owner,
            LABEL_UID: str(identity.uid),
            LABEL_IMAGE: image.id,
            LABEL_JOB: json.dumps(_without_environment(job), separators=(",", ":")),
        },
        image=image,
        identity=identity,
        command=request.command,
        env=environment(id, request, claim, identity, node),
        workdir=workdir(request, identity),
        # It tells the machine, and still a prompt inside from one outside.
        hostname=request.hostname or f"{node['hostname'].split('.')[0][:58]}-{id[-4:].lower()}",
        mounts=tuple(mounts),
        gpus=claim.gpus,
        cpu_weight=weight,
        memory=claim.memory or capacity.memory,
        shared_memory=request.shared_memory or max(64 << 20, (claim.memory or capacity.memory) // 2),
        oom_score_adj=SESSION_OOM_SCORE if claim.memory else IDLE_OOM_SCORE,
        tty=request.tty,
        stdin=request.stdin,
        host_network=request.host_network,
        disk=disk,
    )


def workdir(request: Request, identity: Identity) -> str:
    """Where the main process starts: home, unless told otherwise or there is none."""
    return request.workdir or ("/" if request.bare else identity.home)


def environment(id: str, request: Request, claim: Claim, identity: Identity, node: Mapping[str, str]) -> dict[str, str]:
    """The variables of the main process; the names starting with BEAKER_ are the original system's.

    `exec` uses the same, so that a second terminal is no stranger.
    """
    return {
        "SSH_AUTH_SOCK": AGENT,
        **dict(request.env),
        "HOME": "/" if request.bare else identity.home,
        "USER": identity.name,
        "LOGNAME": identity.name,
        "BEAKER_JOB_ID": id,
        "BEAKER_JOB_KIND": "session",
        "BEAKER_NODE_ID": node["id"],
        "BEAKER_NODE_HOSTNAME": node["hostname"],
        "BEAKER_ASSIGNED_GPU_COUNT": str(len(claim.gpus)),
        "BEAKER_ASSIGNED_CPU_COUNT": f"{claim.cpus:g}",
        **({"BEAKER_TIME_LIMIT": f"{request.timeout:.0f}"} if request.timeout else {}),  # seconds
    }


def _without_environment(job: Mapping[str, object]) -> dict[str, object]:
    session = job.get("session")
    if not isinstance(session, dict):
        return dict(job)
    return {**job, "session": {key: value for key, value in session.items() if key != "envVars"}}
