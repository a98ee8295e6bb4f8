"""Signing in to the console: a browser's cookie stands for a token, and can never do more nor live longer than it.

Owns the secrets of cookies and one-time links; of both only a hash is kept, so the database lets nobody in.
"""

from __future__ import annotations

import secrets
from datetime import timedelta

from .. import ids, wire
from ..errors import Error
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
            self.record(rows, caller, "sign_out", caller.token_id)

    def _let_in(self, caller: Caller, action: str, used: str = "") -> str:
        secret = secrets.token_urlsafe(32)
        with self.store.write() as rows:
            if used and not rows.remove_signin(used):
                raise Error("unauthorized", "this link was used already", "run `beaker login` again")
            rows.add_signin(ids.hash_token(secret), caller.token_id, False, LIFE)
            self.record(rows, caller, action, caller.token_id)
        return secret
