"""Who of the queue may start, on which GPUs, and why the others wait. Pure functions; the ledger writes what they
decide.

The rule: first come, first served. A later request may start ahead only if that cannot delay anybody before it, in
whatever order the running sessions happen to end. Nothing is known of how long a session will run, so the only safe
room is what would be left over if all that wait ahead were started right now.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..model import Claim, Gpu, Resources


def free(capacity: Resources, claims: Iterable[Claim]) -> Resources:
    """What is left of `capacity` beside these claims; may be negative when the machine shrank under live sessions."""
    return sum((_negative(claim.amount) for claim in claims), capacity)


def startable(queue: Sequence[Resources], available: Resources) -> list[int]:
    """The positions in `queue` (in order of arrival) that may start now, given what is `available`.

    In each dimension that a request uses, it must fit beside everything still waiting ahead of it: then it takes
    nothing that anyone ahead could have waited for.
    """
    starts = []
    ahead = Resources()
    for index, request in enumerate(queue):
        if _fits_beside(request, ahead, available):
            starts.append(index)
            available = available - request
        else:
            ahead = ahead + request
    return starts


def _fits_beside(request: Resources, ahead: Resources, available: Resources) -> bool:
    left = available - ahead
    return (
        (request.gpus == 0 or request.gpus <= left.gpus)
        and (request.cpus == 0 or request.cpus <= left.cpus + 1e-3)
        and (request.memory == 0 or request.memory <= left.memory)
    )


def pick(count: int, gpus: Sequence[Gpu], taken: Iterable[str]) -> tuple[str, ...]:
    """The ids of the first `count` GPUs that nobody holds. Raises ValueError when there are fewer."""
    held = set(taken)
    chosen = tuple(gpu.id for gpu in gpus if gpu.id not in held)[:count]
    if len(chosen) < count:
        raise ValueError(f"{count} GPUs asked for, {len(chosen)} free")
    return chosen


def reason(queue: Sequence[Resources], position: int, available: Resources) -> str:
    """Why the request at `position` waits, in a few words for people."""
    request = queue[position]
    lacks = []
    if request.gpus > max(available.gpus, 0):
        lacks.append(f"needs {_count(request.gpus, 'GPU')}, {max(available.gpus, 0)} free")
    if request.cpus > available.cpus + 1e-3:
        lacks.append(f"needs {request.cpus:g} CPUs, {max(available.cpus, 0):g} free")
    if request.memory > available.memory:
        lacks.append(
            f"needs {request.memory / 2**30:.1f} GiB of memory, {max(available.memory, 0) / 2**30:.1f} GiB free"
        )
    if lacks:
        return "; ".join(lacks)
    return f"{_count(position, 'session')} ahead in the queue would be delayed"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _negative(amount: Resources) -> Resources:
    return Resources() - amount
