"""One request of a browser: who it is from, whether it may change anything, and the headers of the answer.

Owns the cookie, CSRF tokens, Origin checks and security headers; knows no page. A form needs both a token that only our
pages hold and an Origin that is ours.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ... import ids
from ...errors import Error
from ..oidc import Provider
from ..rules import Caller
from ..service import Service
from ..signins import LIFE
from . import templates

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: with that, browsers send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
log = logging.getLogger(__name__)


@dataclass
class Visit:
    """A request and, when its cookie stands for a token that works, its caller. secret: the cookie's value."""

    request: Request
    service: Service
    form: dict[str, str] = field(default_factory=dict)
    caller: Caller | None = None
    secret: str = field(default="", repr=False)
    fresh: bool = False  # the cookie is to be sent
    provider: Provider | None = None  # through which one may sign in

    @property
    def who(self) -> Caller:
        """Raises Error unauthorized when nobody is signed in."""
        if self.caller is None:
            raise Error("unauthorized", "you are not signed in", "sign in")
        return self.caller

    @property
    def key(self) -> str:
        """For a form that shall be acted on once."""
        return ids.ulid()

    @property
    def once(self) -> Caller:
        """Who, with the key of the form: one that a reload sends again is answered again, and changes nothing."""
        key = self.form.get("key", "")
        return replace(self.who, key=key if ids.is_ulid(key) else "")

    @property
    def secure(self) -> bool:
        return self.request.url.scheme == "https"

    @property
    def crossed(self) -> bool:
        """Whether the browser came by a link on another site, and so left its SameSite=Strict cookie at home."""
        return self.fresh and self.request.headers.get("sec-fetch-site") == "cross-site"

    @property
    def csrf(self) -> str:
        """What a form must send back; a function of the cookie, so that nothing is kept."""
        return hmac.digest(self.secret.encode(), b"csrf", hashlib.sha256).hex()

    def ask(self, name: str, default: str = "") -> str:
        return self.request.query_params.get(name, default)

    def page(self, template: str, status: int = 200, **values: Any) -> Response:
        return HTMLResponse(templates.render(template, visit=self, **values), status)

    def go(self, path: str) -> Response:
        return RedirectResponse(path, 303)

    def let_in(self, secret: str, path: str) -> Response:
        """Continue at `path` as whoever the new cookie stands for."""
        self.secret, self.fresh = secret, True
        return self.go(path)


def cookie(request: Request) -> str:
    """Its name: under TLS one that no other host and no plain connection can set."""
    return "__Host-beaker" if request.url.scheme == "https" else "beaker"


def begin(request: Request, service: Service, provider: Provider | None) -> Visit:
    """The visit that a request makes."""
    visit = Visit(request, service, secret=request.cookies.get(cookie(request), ""), provider=provider)
    if visit.secret:
        try:
            visit.caller = service.visitor(visit.secret)
        except Error as error:
            if error.code != "unauthorized":
                raise
    if request.method != "POST" and not visit.secret:
        visit.secret, visit.fresh = secrets.token_urlsafe(32), True
    return visit


def receive(visit: Visit, body: bytes) -> None:
    """Take a form. Raises Error forbidden for one that is not from one of our own pages."""
    request = visit.request
    visit.form = dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
    try:
        parts = urlsplit(request.headers.get("origin", ""))
    except ValueError:
        parts = urlsplit("")
    ours = (parts.scheme, parts.netloc) == (request.url.scheme, request.headers.get("host", ""))
    if (
        not ours
        or not visit.secret
        or not hmac.compare_digest(visit.form.get("csrf", "").encode(), visit.csrf.encode())
    ):
        raise Error("forbidden", "this form was not sent by a page of ours, or is too old", "load the page again")


def finish(visit: Visit | None, response: Response) -> Response:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    if visit and visit.secure:
        response.headers["Strict-Transport-Security"] = "max-age=31536000"
    if visit and visit.fresh:
        response.set_cookie(
            cookie(visit.request), visit.secret, max_age=int(LIFE.total_seconds()), path="/", httponly=True,
            secure=visit.secure, samesite="strict",
        )  # fmt: skip
    return response


def again(visit: Visit) -> Response:
    """A page that loads itself again, and brings the cookie along that a link on another site does not."""
    visit.fresh = False  # or a new one would replace the one that is there
    return visit.page("again.html")


def sign_in_first(visit: Visit) -> Response:
    """For a page that nobody is signed in for."""
    request = visit.request
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return visit.go("/sign-in" + ("" if request.method != "GET" or here == "/" else f"?next={quote(here, safe='/')}"))


def local(path: str) -> str:
    """A path of this site as it was given, else the first page: nobody is sent elsewhere after signing in."""
    plain = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isascii() and path.isprintable()
    return path if plain and "\\" not in path else "/clusters"
