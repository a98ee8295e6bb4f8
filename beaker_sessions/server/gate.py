"""Who may have a connection to the server, and which one goes when there are too many. Decides; touches no socket.

A peer is a user of this machine, by uid, or by whose subordinate id it is, or another machine, by its address (of IPv6
its /64, of which one customer has as many as they like). Each may have so many, and all together so many; some of these
are kept for executors, without whom nothing is reported. A new connection takes the place of one that is waiting for
its peer to say something: of the same peer's, else of whoever has most. So what is held idle or half said keeps nobody
out.

What it cannot do: tell an executor on another machine from the other programs there before it has shown its token, nor
hold out against somebody with thousands of networks.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol

ROOT = "uid 0"
STRANGER = "nobody known"  # a connection of this machine that was closed before it could be asked whose it was
KEPT = 4  # one in so many places is kept for executors
EXECUTORS = 4096  # addresses of theirs that are remembered


class Connection(Protocol):
    """What the gate sees of one."""

    peer: str

    @property
    def waiting(self) -> float | None:
        """Since when its peer owes it something; None while it is being answered, or is an executor's."""


@dataclass
class Gate:
    """each: connections of one peer. all: of all peers but root."""

    each: int
    all: int
    connections: dict[str, list[Connection]] = field(default_factory=dict)
    executors: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def admit(self, new: Connection) -> tuple[bool, Connection | None]:
        """Whether it may stay, and which other one must go for it. It is not counted before `add`."""
        own = self.connections.get(new.peer, [])
        if len(own) >= self.each:
            victim = _longest_waiting(own)
            return victim is not None, victim
        if new.peer == ROOT:
            return True, None
        kept, executor = self.all // KEPT, new.peer in self.executors
        alike = [
            held for peer, held in self.connections.items() if peer != ROOT and (peer in self.executors) == executor
        ]
        if sum(map(len, alike)) < (kept if executor else self.all - kept):
            return True, None
        for held in sorted(alike, key=len, reverse=True):
            if len(held) > len(own) and (victim := _longest_waiting(held)):
                return True, victim
        return False, None

    def add(self, connection: Connection) -> None:
        self.connections.setdefault(connection.peer, []).append(connection)

    def remove(self, connection: Connection) -> None:
        held = self.connections.get(connection.peer, [])
        if connection in held:
            held.remove(connection)
        if not held:
            self.connections.pop(connection.peer, None)

    def executor(self, peer: str) -> None:
        """An executor's token came from there."""
        if peer.startswith("uid"):
            return  # root has its own places, and nobody else on this machine is an executor
        self.executors[peer] = None
        self.executors.move_to_end(peer)
        if len(self.executors) > EXECUTORS:
            self.executors.popitem(last=False)


def network(address: str) -> str:
    """The peer at an IP address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None) or ip
    return str(ipaddress.ip_network((mapped, 64), strict=False)) if mapped.version == 6 else str(mapped)


def _longest_waiting(held: list[Connection]) -> Connection | None:
    waiting = [(since, at) for at, one in enumerate(held) if (since := one.waiting) is not None]
    return held[min(waiting)[1]] if waiting else None
