"""The audit log: who changed what, when, with which token. Rules and answers; its rows are written with the changes."""

from __future__ import annotations

import json

from .. import ids, wire
from ..errors import Error
from .rules import JSON, Caller, Rules
from .store import Row

PAGE = 100


class Audit(Rules):
    def list_audit(self, caller: Caller, *, text: str = "", cursor: str | None = None, limit: int = PAGE) -> JSON:
        """One page, newest first. text: a part of the action, the object's id, the account's name or the details."""
        caller.need_admin()
        if cursor is not None and not ids.is_ulid(cursor):
            raise Error("invalid", f"cursor: {cursor!r} is not one of ours", "take it from the page before")
        limit = max(1, min(limit, 1000))
        with self.store.read() as rows:
            found = rows.audit(text, cursor, limit + 1)
        more = {"nextCursor": found[limit - 1].id} if len(found) > limit else {}
        return {"data": [audit_json(row) for row in found[:limit]]} | more


def audit_json(row: Row) -> JSON:
    return {
        "id": row.id,
        "at": wire.time(row.at),
        "account": row.account,
        "tokenId": row.token_id,
        "token": row.token or "",
        "action": row.action,
        "object": row.object,
        "details": json.loads(row.details),
    }
