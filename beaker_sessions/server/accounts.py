"""Accounts, their tokens, and organizations: rules and answers."""

from __future__ import annotations

from datetime import timedelta

from .. import ids, wire
from ..bodies import AccountBody, TokenBody
from ..errors import Error
from ..model import Scope
from . import tables
from .rules import JSON, Caller, Rules, found, page
from .store import Row, Rows


class Accounts(Rules):
    def whoami(self, caller: Caller) -> JSON:
        """The caller's account, with `scope`, which is the token's."""
        with self.store.read() as rows:
            return account_json(rows.the(tables.accounts, caller.account_id)) | {"scope": caller.scope.value}

    def list_organizations(self, caller: Caller) -> JSON:
        with self.store.read() as rows:
            return page([organization_json(row) for row in rows.organizations_of(caller.account_id)])

    def get_organization(self, caller: Caller, org: str) -> JSON:  # noqa: ARG002
        with self.store.read() as rows:
            return organization_json(found(rows.organization(org), "organization", org))

    def list_members(self, caller: Caller, org: str) -> JSON:  # noqa: ARG002
        with self.store.read() as rows:
            row = found(rows.organization(org), "organization", org)
            return page([account_json(member) for member in rows.members(row.id)])

    def get_account(self, caller: Caller, account: str) -> JSON:  # noqa: ARG002
        with self.store.read() as rows:
            return account_json(found(rows.account(account), "account", account))

    def list_accounts(self, caller: Caller) -> JSON:
        caller.need_admin()
        with self.store.read() as rows:
            return page([account_json(row) for row in rows.all(tables.accounts)])

    def create_account(self, caller: Caller, body: AccountBody) -> JSON:
        """An account that is a member of every organization, and its first token, which is shown here only."""
        caller.need_admin()
        token = caller.new_token()

        def make(rows: Rows) -> JSON:
            if ids.is_ulid(body.name):
                raise Error("invalid", f"name: {body.name!r} looks like an id", "choose another name")
            if rows.organization(body.name) is not None:  # both own workspaces
                raise Error("conflict", f"there is an organization {body.name!r}", "choose another name")
            if rows.account(body.name) is not None:
                raise Error("conflict", f"there is an account {body.name!r} already", "choose another name")
            id = add_account(rows, body)
            scope = Scope.ADMIN if body.role == "admin" else Scope.USER
            add_token(rows, id, token, "first", scope)
            self.record(rows, caller, "create_account", id, name=body.name, role=body.role)
            return account_json(rows.the(tables.accounts, id))

        return self._with_token(self.once(caller, "create_account", body.model_dump(), make), token)

    def list_tokens(self, caller: Caller, *, account: str | None = None) -> JSON:
        """The caller's tokens that work, or for administrators another's; without the secrets, which nobody has."""
        if account is not None:
            caller.need_admin()
        with self.store.read() as rows:
            id = caller.account_id if account is None else found(rows.account(account), "account", account).id
            valid = rows.all(tables.tokens, account_id=id, revoked=None)
            return page([token_json(row) for row in valid if row.expiry is None or row.expiry > rows.now])

    def create_token(self, caller: Caller, body: TokenBody | None = None) -> JSON:
        """Without a body, a token in place of the caller's, which ends; with one, another token beside it.

        No token outlives the one that made it, unless that was an administrator's. Tokens of running sessions pass on
        to the one that takes the place of theirs.
        """
        caller.need_user()
        if body is not None and (body.scope in ("executor", "admin") or body.account is not None):
            caller.need_admin()
        if body is not None and (body.scope == "session") != (body.session is not None):
            raise Error("invalid", "session: goes with the scope session, and only with it", "name both, or neither")
        if body is not None and body.hostname is not None and body.scope != "executor":
            raise Error("invalid", "hostname: goes with the scope executor alone", "name both, or neither")
        token = caller.new_token()

        def make(rows: Rows) -> JSON:
            asking = rows.the(tables.tokens, caller.token_id)
            if body is None:
                rows.update(tables.tokens, asking.id, revoked=rows.now)
                id = add_token(rows, caller.account_id, token, asking.name, Scope(asking.scope), asking.expiry)
                for child in rows.all(tables.tokens, parent=asking.id, revoked=None):
                    rows.update(tables.tokens, child.id, parent=id)
            else:
                expiry = None if body.expiry is None else rows.now + timedelta(seconds=body.expiry)
                if asking.expiry is not None and not caller.admin:
                    expiry = min(expiry or asking.expiry, asking.expiry)
                session = next(iter(rows.jobs(id=body.session)), None) if body.session else None
                if session is not None and session.account_id != caller.account_id:
                    raise Error("forbidden", f"session {body.session} is {session.author}'s", "name one of yours")
                name = body.account or caller.account
                account = found(rows.account(name), "account", name)
                id = add_token(rows, account.id, token, body.name, Scope(body.scope), expiry, body.session)
                if body.session is not None:
                    rows.update(tables.tokens, id, parent=asking.id)
                if body.hostname is not None:
                    rows.update(tables.tokens, id, hostname=body.hostname)
            host = {"hostname": body.hostname} if body and body.hostname else {}
            scope = body.scope if body else asking.scope
            self.record(rows, caller, "create_token", id, scope=scope, rotated=body is None, **host)
            return token_json(rows.the(tables.tokens, id))

        return self._with_token(self.once(caller, "create_token", body.model_dump() if body else {}, make), token)

    def revoke_token(self, caller: Caller, id: str) -> None:
        """One of the caller's own tokens, or for an administrator anybody's. Revoking it again is no error.

        With it end the tokens of the sessions that were made with it, and of its account's sessions to which the server
        gave one: with which token these were asked for is not known.
        """
        if caller.scope != Scope.SESSION or id != caller.token_id:  # a session's token may end itself
            caller.need_user()
        with self.store.write() as rows:
            row = rows.one(tables.tokens, id=id)
            if row is None or (row.account_id != caller.account_id and not caller.admin):
                raise Error("not_found", f"you have no token {id!r}", "see GET auth/tokens")
            if row.revoked is None:
                rows.update(tables.tokens, id, revoked=rows.now)
                sessions = list(rows.all(tables.tokens, parent=id, revoked=None))
                if row.scope != Scope.SESSION:
                    given = {
                        "account_id": row.account_id,
                        "scope": Scope.SESSION.value,
                        "parent": None,
                        "revoked": None,
                    }
                    sessions += rows.all(tables.tokens, **given)
                for session in sessions:
                    rows.update(tables.tokens, session.id, revoked=rows.now)
                self.record(rows, caller, "revoke_token", id, sessions=[session.session for session in sessions])

    def _with_token(self, answer: JSON, token: str) -> JSON:
        with self.store.read() as rows:
            if rows.token(ids.hash_token(token)) is None:  # repeated with another token than the first time
                raise Error("conflict", "this key's token was already shown to somebody", "use a new Idempotency-Key")
        return answer | {"token": token}


def add_account(rows: Rows, body: AccountBody) -> str:
    id = ids.ulid()
    rows.insert(
        tables.accounts,
        id=id,
        name=body.name,
        display_name=body.display_name or body.name,
        email=body.email or "",
        institution=body.institution or "",
        role=body.role,
        created=rows.now,
    )
    for organization in rows.all(tables.organizations):
        rows.insert(tables.members, organization_id=organization.id, account_id=id)
    return id


def add_token(
    rows: Rows, account: str, token: str, name: str, scope: Scope, expiry: object = None, session: str | None = None,
    browser: bool = False,
) -> str:  # fmt: skip
    id = ids.ulid()
    values = {"id": id, "account_id": account, "name": name, "scope": scope.value, "expiry": expiry, "session": session}
    rows.insert(tables.tokens, hash=ids.hash_token(token), created=rows.now, browser=browser, **values)
    return id


def account_json(row: Row) -> JSON:
    return {
        "id": row.id,
        "name": row.name,
        "displayName": row.display_name,
        "email": row.email,
        "institution": row.institution,
        "role": row.role,
    }


def organization_json(row: Row) -> JSON:
    return {
        "id": row.id,
        "name": row.name,
        "displayName": row.display_name,
        "description": row.description,
        "created": wire.time(row.created),
    }


def token_json(row: Row) -> JSON:
    times = {"created": wire.time(row.created)} | ({"expiry": wire.time(row.expiry)} if row.expiry else {})
    host = {"hostname": row.hostname} if row.hostname else {}
    return {"id": row.id, "name": row.name, "scope": row.scope} | host | times
