"""Signing in to the console: a browser's cookie stands for a token, and can never do more nor live longer than it.

Owns the secrets of cookies and one-time links; of both only a hash is kept, so the database lets nobody in.
"""

from __future__ import annotations

import secrets
from datetime import timedelta

from .. import ids, wire
from ..errors import Error
from ..model import Scope
from . import tables
from .accounts import add_token
from .oidc import Person
from .rules import JSON, Caller, Rules, caller_of

LIFE = timedelta(days=14)  # of a cookie
LINK_LIFE = timedelta(minutes=5)


class Signins(Rules):
    def sign_in(self, token: str) -> str:
        """The secret of a new cookie that stands for `token`. Raises Error unauthorized, or forbidden for executors."""
        caller = self.authenticate(token)
        caller.need_user()
        return self._let_in(caller, "sign_in")

    def create_link(self, caller: Caller) -> JSON:
        """A path below the server's address that signs one browser in, once: `path` and `expiry`."""
        caller.need_user()
        secret = secrets.token_urlsafe(32)
        with self.store.write() as rows:
            rows.add_signin(ids.hash_token(secret), caller.token_id, True, LINK_LIFE)
            self.record(rows, caller, "create_link", caller.token_id)
            return {"path": f"/sign-in?link={secret}", "expiry": wire.time(rows.now + LINK_LIFE)}

    def linked(self, link: str) -> Caller:
        """Whom a one-time link would sign in. Raises Error unauthorized when it was used, or is too old."""
        with self.store.read() as rows:
            row = rows.signin(ids.hash_token(link), link=True)
            if row is None:
                raise Error("unauthorized", "this link was used already, or is too old", "run `beaker login` again")
            return caller_of(row, rows.now, link)

    def redeem(self, link: str) -> str:
        """The secret of a new cookie in exchange for a one-time link."""
        return self._let_in(self.linked(link), "redeem_link", used=ids.hash_token(link))

    def admit(self, person: Person, through: str) -> str:
        """The secret of a new cookie for who signed in at a provider called `through`.

        It stands for a token of scope user that nobody knows and that ends with it. Never makes an account, and lets
        nobody into an administrator's unless the settings map them to it: at some providers people choose their names.
        """
        with self.store.write() as rows:
            where = {"name": person.account} if person.account else {"email": person.email}
            found = rows.all(tables.accounts, **where)
            if len(found) != 1:
                hint = "ask an administrator to create it, or to map you to yours"
                raise Error("forbidden", f"there is no account here for {person.known_as!r} of {through}", hint)
            [account] = found
            if account.role == "admin" and not person.mapped:
                hint = "sign in with a token, or have oidc.accounts in the settings say that it is yours"
                raise Error("forbidden", f"{account.name} is an administrator's account", hint)
            name, secret = f"browser, through {through}", secrets.token_urlsafe(32)
            token = add_token(rows, account.id, ids.mint_token(), name, Scope.USER, rows.now + LIFE, browser=True)
            rows.add_signin(ids.hash_token(secret), token, False, LIFE)
            rows.record(account.id, token, "sign_in_through", token, issuer=person.issuer, subject=person.subject)
        return secret

    def visitor(self, cookie: str) -> Caller:
        """Whom a cookie stands for. Raises Error unauthorized, also when its token was revoked or has expired."""
        with self.store.read() as rows:
            row = rows.signin(ids.hash_token(cookie), link=False)
            if row is None:
                raise Error("unauthorized", "you are not signed in", "sign in")
            return caller_of(row, rows.now, cookie)

    def sign_out(self, caller: Caller) -> None:
        with self.store.write() as rows:
            rows.remove_signin(ids.hash_token(caller.secret))
            if rows.the(tables.tokens, caller.token_id).browser:
                rows.update(tables.tokens, caller.token_id, revoked=rows.now)
            self.record(rows, caller, "sign_out", caller.token_id)

    def _let_in(self, caller: Caller, action: str, used: str = "") -> str:
        secret = secrets.token_urlsafe(32)
        with self.store.write() as rows:
            if used and not rows.remove_signin(used):
                raise Error("unauthorized", "this link was used already", "run `beaker login` again")
            rows.add_signin(ids.hash_token(secret), caller.token_id, False, LIFE)
            self.record(rows, caller, action, caller.token_id)
        return secret
