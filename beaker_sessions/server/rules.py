"""Who is asking, and what every rule needs: permissions, idempotency, audit. No HTTP, no SQL.

Owns `Caller` and the transaction in which a change, its audit row and its remembered answer are written together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from .. import ids
from ..errors import Error
from ..model import Scope, State
from . import tables
from .seal import Seal
from .store import Row, Rows, Store

JSON = dict[str, Any]
LOG_IN = "log in with a valid token: see `beaker account token`, or ask an administrator"
LISTED = {
    "account": "beaker account list",
    "organization": "beaker account organizations",
    "cluster": "beaker cluster list",
    "node": "beaker node list",
    "session": "beaker session list --all",
    "workspace": "beaker workspace list",
    "secret": "beaker secret list",
}


@dataclass(frozen=True)
class Caller:
    """The account and the token behind a request. node: the one that an executor's token registered.

    secret: the token itself. key: the request's Idempotency-Key, or "". session: the one that a session's token is of.
    """

    account_id: str
    account: str
    role: str
    token_id: str
    scope: Scope
    node: str | None
    expiry: datetime | None
    secret: str = field(repr=False)
    key: str
    session: str | None = None

    @property
    def admin(self) -> bool:
        return self.scope == Scope.ADMIN and self.role == "admin"

    def need_user(self) -> None:
        if self.scope in (Scope.EXECUTOR, Scope.SESSION):
            raise Error("forbidden", f"a token of scope {self.scope} cannot do this", "use a token of your own account")

    def need_person(self) -> None:
        """A user, here or in a session of theirs."""
        if self.scope != Scope.SESSION:
            self.need_user()

    def need_admin(self) -> None:
        if not self.admin:
            who = f"account {self.account} with a token of scope {self.scope}"
            raise Error("forbidden", f"{who} is not an administrator", "ask an administrator")

    def need_node(self, node: str | None = None) -> str:
        """The node that this executor's token registered, which must be `node` if there is one."""
        if self.scope != Scope.EXECUTOR:
            raise Error("forbidden", "only a node's executor can do this", "use a token of scope executor")
        if self.node is None or (node is not None and node != self.node):
            raise Error("forbidden", "this token belongs to another node, or to none yet", "register the node first")
        return self.node

    def new_token(self) -> str:
        return ids.mint_token(self.secret, self.key)


class Rules:
    """What the parts of `Service` share."""

    def __init__(self, store: Store, seal: Seal) -> None:
        self.store, self.seal = store, seal

    def authenticate(self, token: str, key: str = "") -> Caller:
        """The caller with this token. Raises Error unauthorized, which does not say whether the token ever existed."""
        if not token:
            raise Error("unauthorized", "no token was given", LOG_IN)
        if not ids.looks_like_token(token):
            raise Error("unauthorized", "this is not a token, or it was not copied whole", LOG_IN)
        if len(key) > 128 or not key.isascii() or not key.isprintable():
            raise Error("invalid", "the Idempotency-Key is not up to 128 printable characters", "use a random one")
        with self.store.read() as rows:
            caller = caller_of(rows.token(ids.hash_token(token)), rows.now, token, key)
            job = rows.one(tables.jobs, id=caller.session) if caller.session else None
        if job is not None and (job.state == State.FINALIZED or job.account_id != caller.account_id):
            raise Error("unauthorized", f"the session {caller.session} of this token has ended", LOG_IN)
        return caller

    def once(self, caller: Caller, action: str, request: JSON, make: Callable[[Rows], JSON]) -> JSON:
        """The answer of `make`, or the one it gave when the caller first sent this request with the same key."""
        with self.store.write() as rows:
            if not caller.key:
                return make(rows)
            text = json.dumps([action, request], sort_keys=True, default=str)
            fingerprint = hashlib.sha256(text.encode()).hexdigest()
            kept = rows.one(tables.answers, account_id=caller.account_id, key=caller.key)
            if kept is None:
                answer = make(rows)
                rows.keep_answer(caller.account_id, caller.key, fingerprint, answer)
            elif kept.fingerprint == fingerprint:
                answer = json.loads(kept.answer)
            else:
                hint = "use a new key for a new request"
                raise Error("conflict", f"the Idempotency-Key {caller.key} was used for another request", hint)
            return answer

    def record(self, rows: Rows, caller: Caller, action: str, object: str, **details: Any) -> None:
        rows.record(caller.account_id, caller.token_id, action, object, **details)


def caller_of(row: Row | None, now: datetime, secret: str, key: str = "") -> Caller:
    """The caller with a token's row, as `Rows.token` gives it. Raises Error unauthorized unless it works."""
    if row is None or row.revoked is not None:
        raise Error("unauthorized", "the token is not valid, or was revoked", LOG_IN)
    if row.expiry is not None and row.expiry <= now:
        raise Error("unauthorized", f"the token expired at {row.expiry:%Y-%m-%d %H:%M} UTC", LOG_IN)
    scope = Scope(row.scope)
    values = (row.account_id, row.account, row.role, row.id, scope, row.node_id, row.expiry, secret, key)
    return Caller(*values, session=row.session)


def found(row: Row | None, what: str, ref: str) -> Row:
    """The row, or Error not_found."""
    if row is None:
        raise Error("not_found", f"there is no {what} {ref!r}", f"see which there are with `{LISTED[what]}`")
    return row


def page(items: list[JSON]) -> JSON:
    """One page that holds everything."""
    return {"data": items}
