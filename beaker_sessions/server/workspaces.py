"""Workspaces and the secrets in them: rules and answers.

A workspace is its author's: nobody else, administrators included, reads or writes what is in it. Its full name is
`OWNER/NAME`, where the owner is the author's account or an organization of theirs. `ACCOUNT/default` is there without
having been made; so is `ACCOUNT/git`, where the credential helper keeps what Git hosts ask for.
"""

from __future__ import annotations

import contextlib

from .. import ids, wire
from ..bodies import SecretBody, WorkspaceBody, WorkspacePatch, check
from ..errors import Error
from ..model import Scope
from . import tables
from .rules import JSON, Caller, Rules, found, page
from .seal import Seal
from .store import Row, Rows, Store

IMPLICIT = ("default", "git")
CREDENTIALS = "git"  # the only one that a session writes to
LIMIT = 64 << 10  # bytes of a secret
SECRETS = 1000  # of one account
TRIED = 20  # secrets, at most, by which a key is known to be another one
PATH_WORDS = ("secrets",)  # names that a path could not tell from what is in a workspace


class Workspaces(Rules):
    def list_workspaces(self, caller: Caller) -> JSON:
        """The caller's own."""
        caller.need_person()
        with self.store.read() as rows:
            own = rows.all(tables.workspaces, account_id=caller.account_id)
            known = {row.full_name for row in own}
            implicit = [name for name in (f"{caller.account}/{each}" for each in IMPLICIT) if name not in known]
            named = [(row.full_name, workspace_json(row, caller)) for row in own]
            named += [(name, _implicit_json(name, caller)) for name in implicit]
            return page([workspace for _, workspace in sorted(named, key=lambda pair: pair[0])])

    def create_workspace(self, caller: Caller, body: WorkspaceBody) -> JSON:
        """body: a name, of which an owner may be part, as in `lab/vision`."""
        caller.need_user()

        def make(rows: Rows) -> JSON:
            full_name = _full_name(rows, caller, body)
            if rows.one(tables.workspaces, full_name=full_name) is not None:
                raise Error("conflict", f"there is a workspace {full_name!r} already", "choose another name")
            row = _add(rows, caller, full_name)
            self.record(rows, caller, "create_workspace", row.id, name=full_name)
            return workspace_json(row, caller)

        return self.once(caller, "create_workspace", body.model_dump(), make)

    def get_workspace(self, caller: Caller, workspace: str) -> JSON:
        """workspace: an id, a full name, or the name of one of the caller's own, here and below."""
        with self.store.read() as rows:
            row = _own(rows, caller, workspace)
            return _implicit_json(row, caller) if isinstance(row, str) else workspace_json(row, caller)

    def update_workspace(self, caller: Caller, workspace: str, body: WorkspacePatch) -> JSON:
        """Archive it, or take it back. What is archived can be read and not written."""
        caller.need_user()
        with self.store.write() as rows:
            row = _made(rows, caller, workspace)
            if body.archive is not None and body.archive != row.archived:
                rows.update(tables.workspaces, row.id, archived=body.archive, modified=rows.now)
                self.record(rows, caller, "update_workspace", row.id, archive=body.archive)
            return workspace_json(rows.the(tables.workspaces, row.id), caller)

    def list_secrets(self, caller: Caller, workspace: str) -> JSON:
        with self.store.read() as rows:
            row = _own(rows, caller, workspace)
            kept = [] if isinstance(row, str) else rows.all(tables.secrets, workspace_id=row.id)
            return page([secret_json(secret) for secret in sorted(kept, key=lambda secret: str(secret.name))])

    def get_secret(self, caller: Caller, workspace: str, name: str) -> JSON:
        with self.store.read() as rows:
            return secret_json(_secret(rows, caller, workspace, name))

    def read_secret(self, caller: Caller, workspace: str, name: str) -> bytes:
        """The value. Raises Error unavailable when the server's key does not open it."""
        with self.store.read() as rows:
            row = _secret(rows, caller, workspace, name)
            return self.seal.open(bytes(row.sealed), _place(row.workspace_id, name))

    def write_secret(self, caller: Caller, workspace: str, name: str, value: bytes) -> JSON:
        """A new secret, or a new value of one."""
        if len(value) > LIMIT:
            raise Error("invalid", f"the secret has {len(value)} bytes", f"at most {LIMIT}")
        check(SecretBody, {"name": name})
        with self.store.write() as rows:
            row = _made(rows, caller, workspace)
            _need_writer(caller, row)
            if row.archived:
                raise Error("conflict", f"workspace {row.full_name} is archived", "choose another workspace")
            known = rows.one(tables.secrets, workspace_id=row.id, name=name)
            if known is None and rows.count_secrets(row.account_id) >= SECRETS:
                what = f"the account {caller.account} has {SECRETS} secrets, which is the most"
                raise Error("invalid", what, "delete one that is not needed: `beaker secret delete`")
            rows.keep_secret(row.id, name, self.seal.close(value, _place(row.id, name)), known and known.created)
            rows.update(tables.workspaces, row.id, modified=rows.now)
            self.record(rows, caller, "write_secret", row.id, name=name)
            return secret_json(found(rows.one(tables.secrets, workspace_id=row.id, name=name), "secret", name))

    def delete_secret(self, caller: Caller, workspace: str, name: str) -> None:
        with self.store.write() as rows:
            row = _secret(rows, caller, workspace, name)
            _need_writer(caller, rows.the(tables.workspaces, row.workspace_id))
            rows.forget_secret(row.workspace_id, name)
            self.record(rows, caller, "delete_secret", row.workspace_id, name=name)


def _full_name(rows: Rows, caller: Caller, body: WorkspaceBody) -> str:
    owner, _, name = body.name.rpartition("/")
    if owner and body.org and owner != body.org:
        raise Error("invalid", f"two owners are named: {owner!r} and {body.org!r}", "name one")
    owner = owner or body.org or caller.account
    if owner not in {caller.account, *(org.name for org in rows.organizations_of(caller.account_id))}:
        raise Error("forbidden", f"{owner!r} is neither your account nor an organization of yours", "name one of yours")
    if name in PATH_WORDS or ids.is_ulid(name):
        raise Error("invalid", f"name: {name!r} cannot be the name of a workspace", "choose another name")
    return f"{owner}/{name}"


def _own(rows: Rows, caller: Caller, ref: str) -> Row | str:
    """The workspace, or the full name of one that is there without having been made."""
    caller.need_person()
    full_name = ref if "/" in ref else f"{caller.account}/{ref}"
    row = rows.one(tables.workspaces, **({"id": ref} if ids.is_ulid(ref) else {"full_name": full_name}))
    if row is None and full_name in [f"{caller.account}/{each}" for each in IMPLICIT]:
        return full_name
    row = found(row, "workspace", ref)
    if row.account_id != caller.account_id:
        raise Error("forbidden", f"workspace {row.full_name} is somebody else's", "use one of `beaker workspace list`")
    return row


def _made(rows: Rows, caller: Caller, ref: str) -> Row:
    """The workspace, made now if it was there without having been made."""
    row = _own(rows, caller, ref)
    return _add(rows, caller, row) if isinstance(row, str) else row


def _add(rows: Rows, caller: Caller, full_name: str) -> Row:
    id = ids.ulid()
    values = {"created": rows.now, "modified": rows.now, "archived": False}
    rows.insert(tables.workspaces, id=id, full_name=full_name, account_id=caller.account_id, **values)
    return rows.the(tables.workspaces, id)


def _secret(rows: Rows, caller: Caller, workspace: str, name: str) -> Row:
    row = _own(rows, caller, workspace)
    secret = None if isinstance(row, str) else rows.one(tables.secrets, workspace_id=row.id, name=name)
    return found(secret, "secret", name)


def _need_writer(caller: Caller, workspace: Row) -> None:
    if caller.scope == Scope.SESSION and workspace.full_name != f"{caller.account}/{CREDENTIALS}":
        hint = "do this outside, where you are logged in"
        raise Error("forbidden", f"a session writes no secrets to {workspace.full_name}", hint)


def check_key(store: Store, seal: Seal) -> None:
    """Raises Error forbidden when there are secrets, and the key opens none that is tried."""
    with store.read() as rows:
        kept = rows.some_secrets(TRIED)
    for row in kept:
        with contextlib.suppress(Error):
            seal.open(bytes(row.sealed), _place(row.workspace_id, row.name))
            return
    if kept:
        why = f"the secrets in the database are sealed with another key than {seal.path}"
        raise Error("forbidden", why, "put the right key there, from where it is kept, with mode 0600")


def _place(workspace: str, name: str) -> str:
    return f"{workspace}/{name}"


def workspace_json(row: Row, caller: Caller) -> JSON:
    """The caller is its author. size: nothing of the kinds that the original counts is kept here."""
    times = {"created": wire.time(row.created), "modified": wire.time(row.modified)}
    return _json(row.id, row.full_name, caller) | times | {"archived": row.archived}


def _implicit_json(full_name: str, caller: Caller) -> JSON:
    return _json("", full_name, caller) | {"archived": False}


def _json(id: str, full_name: str, caller: Caller) -> JSON:
    author = {"id": caller.account_id, "name": caller.account, "displayName": caller.account}
    size = dict.fromkeys(("datasets", "experiments", "groups", "images"), 0)
    return {"id": id, "name": full_name.partition("/")[2], "fullName": full_name, "author": author, "size": size}


def secret_json(row: Row) -> JSON:
    return {"name": row.name, "created": wire.time(row.created), "updated": wire.time(row.updated)}
