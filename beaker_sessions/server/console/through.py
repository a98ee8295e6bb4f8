"""Signing in to the console through a provider: the two addresses that a browser passes, and the cookie in between.

That cookie is `SameSite=Lax`, because the provider's site sends the browser back; it is good for this alone, and for
ten minutes. What it means is `oidc`'s business; whom it lets in is the service's.
"""

from __future__ import annotations

import secrets
from urllib.parse import quote, unquote

from starlette.responses import Response

from ...errors import Error
from ..oidc import Provider
from .visit import Visit, cookie, local

BEGIN, BACK = "/sign-in/through", "/sign-in/back"
LIFE = 600  # seconds to sign in at the provider


def begin(visit: Visit) -> Response:
    """Send the browser to the provider."""
    secret = secrets.token_urlsafe(32)
    response = visit.go(_provider(visit).begin(secret, _address(visit)))
    value = f"{secret}.{quote(local(visit.ask('next')), safe='')}"
    response.set_cookie(
        f"{cookie(visit.request)}-through", value, max_age=LIFE, path="/", httponly=True, secure=visit.secure,
        samesite="lax",
    )  # fmt: skip
    return response


def back(visit: Visit) -> Response:
    """It came back: sign it in."""
    name, provider = f"{cookie(visit.request)}-through", _provider(visit)
    secret, _, next = visit.request.cookies.get(name, "").partition(".")
    next = local(unquote(next))
    try:
        person = provider.finish(secret, _address(visit), visit.request.query_params)
        response = visit.let_in(visit.service.admit(person, provider.name), next)
    except Error as error:
        visit.fresh = False  # who is signed in here stays so
        response = visit.page("not_through.html", error.status, error=error, next=next)
    response.delete_cookie(name, path="/", httponly=True, secure=visit.secure, samesite="lax")
    return response


def _provider(visit: Visit) -> Provider:
    assert visit.provider is not None  # or there would be no such path
    return visit.provider


def _address(visit: Visit) -> str:
    """Where the provider sends the browser back to; it knows this address, and sends nobody to another."""
    return f"{visit.request.url.scheme}://{visit.request.headers.get('host', '')}{BACK}"
