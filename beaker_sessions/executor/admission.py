"""Who may have what on this node: one decision, whoever asks: the door, the server's hand-over, and what comes later.

Owns the rules: what a token may do here, whose session may be touched by whom, which Unix user an account's sessions
run as, what a request gets, and how much one account may have at once. Keeps nothing and starts nothing: `sessions`
calls `within` under its lock, so that counting and creating are one step. Beside the home and the account files
nothing of the machine is looked at.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..errors import Error
from ..model import Identity, Request, Resources, Scope, Session, State
from ..sandbox import subordinate
from ..settings import ExecutorSettings
from . import homes, inventory, plan, root


class Right(enum.Enum):
    """Who may do an operation of the door."""

    ACCOUNT = enum.auto()  # whoever has an account here
    OWNER = enum.auto()  # of the session alone: nobody else enters it or reads what it prints
    OWNER_OR_ADMIN = enum.auto()
    ADMIN = enum.auto()


RIGHTS = {
    "create": Right.ACCOUNT,
    "list": Right.ACCOUNT,
    "node": Right.ACCOUNT,
    "attach": Right.OWNER,
    "exec": Right.OWNER,
    "exec_exit": Right.OWNER,
    "logs": Right.OWNER,
    "get": Right.OWNER_OR_ADMIN,
    "stop": Right.OWNER_OR_ADMIN,
    "doctor": Right.ADMIN,
    "images": Right.ADMIN,
    "end_sessions": Right.ADMIN,
}
ROOTS = ("doctor", "images", "end_sessions")  # what root may do without an account
SCOPES = (Scope.USER, Scope.ADMIN)  # of tokens that people have; a session's and an executor's are for the server
ROOT = {"name": "root", "role": "admin", "scope": Scope.ADMIN.value}  # the machine's own, where it needs no account


@dataclass(frozen=True)
class Limits:
    """What one account may have on this node at once; 0: no limit. unreserved: sessions that reserve nothing."""

    sessions: int = 0
    waiting: int = 0
    unreserved: int = 0
    pulls: int = 0
    execs: int = 0

    @classmethod
    def of(cls, settings: ExecutorSettings) -> Limits:
        """Raises Error invalid."""
        limits = cls(
            settings.limit_sessions, settings.limit_waiting, settings.limit_unreserved, settings.limit_pulls,
            settings.limit_execs,
        )  # fmt: skip
        for name, value in limits.__dict__.items():
            if value < 0:
                raise Error("invalid", f"limits.{name}: {value} is not a limit", "0 is none")
        return limits


@dataclass(frozen=True)
class Admitted:
    """A request with the node's defaults in it. warning: what its author should know, "" for nothing."""

    request: Request
    warning: str


def allow(operation: str, account: Mapping[str, object], owner: str | None = None) -> None:
    """Whether an account, as the server told it with its token's scope, may do this, to a session of `owner`.

    Without an owner, what needs none is decided. Raises Error forbidden.
    """
    scope, right = account.get("scope"), RIGHTS[operation]
    if scope not in SCOPES:
        raise Error(
            "forbidden", f"a token of scope {scope} cannot {operation} on a node", "use a token of your own account"
        )
    admin = account.get("role") == "admin" and scope == Scope.ADMIN
    if right is Right.ADMIN:
        if not admin:
            hint = f"sudo beaker executor {operation}"
            raise Error("forbidden", f"{operation} of a node is its administrators' business", hint)
        return
    others = right is not Right.ACCOUNT and owner not in (None, account.get("name"))
    if others and not (admin and right is Right.OWNER_OR_ADMIN):
        raise Error("forbidden", f"the session belongs to {owner}", "only its owner may do that")


def account_of(unix_name: str, accounts: Mapping[str, str]) -> str:
    """The account whose sessions this Unix user may start. accounts: the setting, where the names differ."""
    return accounts.get(unix_name, unix_name)


def caller(uid: int, said: object, session_home: str) -> tuple[str, Identity]:
    """The Unix name that a caller's account must fit, and whom their sessions run as.

    said: the user for whom root asks, since sudo was called by them; believed of nobody but root. Root's own sessions
    run as a system user, since root of the machine is never in a sandbox.
    Raises Error not_found, or invalid for a user that root names and who cannot be.
    """
    if uid != 0:
        identity = inventory.unix_user(uid, session_home)
        return identity.name, identity
    if said is None:
        return "root", root.identity(session_home)
    number = inventory.unix_name(said) if isinstance(said, str) else None
    if not number:  # root, or nobody of this machine
        raise Error("invalid", f"sudo was called by {said!r}, who is no user of this machine", "unset SUDO_USER")
    identity = inventory.unix_user(number, session_home)
    return identity.name, identity


def person(account: str, accounts: Mapping[str, str], session_home: str) -> Identity:
    """Whom the sessions of an account run as, when nobody of this machine is at the other end.

    Raises Error not_found, or forbidden where the Unix user of that name is another account's.
    """
    name = next((unix for unix, mapped in accounts.items() if mapped == account), account)
    if account_of(name, accounts) != account:
        mine = f"the Unix user {name} of this node is the account {account_of(name, accounts)!r}'s"
        raise Error("forbidden", f"{mine}, not {account!r}'s", "ask the administrator: `accounts` in the settings")
    uid = inventory.unix_name(name)
    if uid is None:
        raise Error(
            "not_found", f"the account {account!r} has no Unix user on this node", "ask the administrator for a login"
        )
    return caller(uid, None, session_home)[1]


def admit(
    wanted: Request, identity: Identity, settings: ExecutorSettings, capacity: Resources, here: Mapping[str, str], *,
    node: object = None, cluster: object = None, ranges: subordinate.Ranges = subordinate.NONE,
) -> Admitted:  # fmt: skip
    """What a person gets who asks for this. here: this node's id and hostname. node, cluster: where it shall be.

    ranges: everybody's subordinate ids, where sessions of this node use them. A roaming home is made.
    Raises Error.
    """
    check_person(identity, ranges)
    if node and node not in (here["id"], here["hostname"]):
        raise Error("invalid", f"--node {node}: this is {here['hostname']}", f"connect to it: ssh {node}")
    if cluster and cluster != settings.cluster:
        raise Error("invalid", f"--cluster {cluster}: this node is in {settings.cluster}", "beaker cluster nodes")
    if wanted.host_network and not settings.host_networking:
        raise Error(
            "forbidden", "--host-networking is not allowed on this node", "ask the administrator, or leave it out"
        )
    request = plan.defaults(wanted, capacity, settings.default_image)
    plan.check_mounts(request, identity, settings.mount_paths)
    notes = [root.note(identity)]
    if not request.bare:
        notes.append(homes.look(identity, make=bool(settings.session_home)))
    return Admitted(request, "; ".join(filter(None, notes)))


def check_person(identity: Identity, ranges: subordinate.Ranges = subordinate.NONE) -> None:
    """Whether anybody's sandbox may have these ids: they would be the machine's root's, or somebody's subordinate ids.

    Raises Error forbidden.
    """
    if identity.uid == 0:
        raise Error("forbidden", "root of the machine has no sessions", "stop it, and create another")
    if identity.gid == 0:
        what = f"the primary group of {identity.name} is root's"
        raise Error("forbidden", f"{what}, which no session has", f"ask the administrator: usermod -g {identity.name}")
    subordinate.check_own(identity, ranges)


def within(limits: Limits, request: Request, own: Collection[Session]) -> None:
    """Whether one session more is within an account's limits. own: all of theirs here that are not final.

    Raises Error limit, which says which limit, how many there are, and what to do.
    """
    reserves = plan.amount(request) != Resources()
    counts = [("sessions", "sessions", len(own))]
    if reserves:
        counts.append(("waiting", "sessions that wait", sum(one.state == State.CREATED for one in own)))
    else:
        idle = sum(plan.amount(one.request) == Resources() for one in own)
        counts.append(("unreserved", "sessions without a reservation", idle))
    for name, what, count in counts:
        _below(limits, name, what, count)


def may_pull(limits: Limits, own: Sequence[Session]) -> None:
    """Whether an account may fetch one image more. own: its sessions that fetch one now. Raises Error limit."""
    _below(limits, "pulls", "images on the way", len(own))


def may_exec(limits: Limits, count: int) -> None:
    """Whether an account that has so many second processes may start one more. Raises Error limit."""
    _below(limits, "execs", "processes started by `session exec`", count, "end some, or stop their session")


def _below(limits: Limits, name: str, what: str, count: int, hint: str = "stop some: beaker session list") -> None:
    limit = getattr(limits, name)
    if limit and count >= limit:
        message = f"you have {count} {what} on this node, and {limit} is the most for one account (limits.{name})"
        raise Error("limit", message, f"wait for some to end, or {hint}")
