"""Signing in through an OpenID Connect provider: the protocol, by Authlib and joserfc. Knows no account and no rule.

The authorization code flow with PKCE, https://openid.net/specs/openid-connect-core-1_0.html: the browser is sent to the
provider and comes back with a code, which is exchanged for an ID token. What ties the two together (state, nonce,
verifier) is derived from one secret that only the browser holds, so that the server keeps nothing, and may be several.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import stat
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.requests_client import OAuth2Session
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from ..errors import Error
from ..settings import ServerSettings

# Signatures that the provider alone can make; never "none", nor with a secret that we share with it.
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
SCOPE = "openid profile email"
TIMEOUT = 5.0  # seconds, of each request to the provider
FRESH = 3600.0  # seconds for which what it says of itself is believed
LEEWAY = 60  # seconds by which its clock may differ
log = logging.getLogger(__name__)
JSON = Mapping[str, Any]


@dataclass(frozen=True)
class Person:
    """Who signed in at the provider. Of `account`, a name, and `email`, an address that it vouches for, one is given.

    mapped: the administrator has said that this person is that account.
    """

    issuer: str
    subject: str
    account: str = ""
    email: str = ""
    mapped: bool = False

    @property
    def known_as(self) -> str:
        return self.account or self.email


@dataclass
class Provider:
    """One provider. name: as people call it. claim: what tells their account. accounts: that claim's value -> account.

    Raises Error unavailable while it does not answer, unauthorized when what it says is not accepted.
    """

    issuer: str
    client_id: str
    name: str
    claim: str
    accounts: Mapping[str, str]
    secret: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._known: tuple[float, JSON, KeySet | None] = (0.0, {}, None)

    def begin(self, secret: str, redirect: str) -> str:
        """Where to send the browser that holds `secret`; it comes back to `redirect`."""
        metadata, _ = self._metadata()
        with self._session(metadata, redirect) as session:
            try:
                address, _ = session.create_authorization_url(
                    metadata["authorization_endpoint"],
                    state=derived(secret, "state"),
                    nonce=derived(secret, "nonce"),
                    code_verifier=derived(secret, "verifier"),
                )
            except KeyError as error:
                raise self._broken(f"it names no {error}") from error
        return str(address)

    def finish(self, secret: str, redirect: str, answer: Mapping[str, str]) -> Person:
        """Who came back with `answer`, the parameters of the address that the provider sent the browser to."""
        if not secret or not hmac.compare_digest(answer.get("state", "").encode(), derived(secret, "state").encode()):
            raise Error("unauthorized", "this sign-in was not begun in this browser, or is too old", "begin again")
        if answer.get("iss", self.issuer) != self.issuer:  # RFC 9207
            raise Error("unauthorized", f"this is an answer of another provider than {self.name}", "begin again")
        if "code" not in answer:
            raise Error("unauthorized", f"{self.name} did not sign you in: {answer.get('error', 'no reason')}", "")
        metadata, _ = self._metadata()
        with self._session(metadata, redirect) as session:
            try:
                token = session.fetch_token(
                    metadata["token_endpoint"],
                    grant_type="authorization_code",
                    code=answer["code"],
                    code_verifier=derived(secret, "verifier"),
                )
                claims = self._claims(str(token["id_token"]), derived(secret, "nonce"), str(token["access_token"]))
                if self.claim not in claims and "userinfo_endpoint" in metadata:
                    more = session.get(metadata["userinfo_endpoint"]).json()
                    if more.get("sub") == claims["sub"]:
                        claims = {**more, **claims}
            except requests.RequestException as error:
                raise self._silent(error) from error
            except (AuthlibBaseError, JoseError, KeyError, TypeError, ValueError, AttributeError) as error:
                log.warning("a sign-in through %s failed: %s: %s", self.issuer, type(error).__name__, error)
                raise Error("unauthorized", f"what {self.name} said was not accepted", "begin again") from error
        return self.person(claims)

    def person(self, claims: JSON) -> Person:
        """The account that claims speak of. Raises Error forbidden when they speak of none."""
        value = claims.get(self.claim)
        if not isinstance(value, str) or not value:
            hint = "the administrator may choose another claim, or have the provider send this one"
            raise Error("forbidden", f"{self.name} does not say your {self.claim}", hint)
        if self.claim == "email" and claims.get("email_verified") is not True:
            raise Error("forbidden", f"{self.name} has not verified that {value} is yours", "verify it there")
        subject = str(claims["sub"])
        if value in self.accounts:
            return Person(self.issuer, subject, account=self.accounts[value], mapped=True)
        email = self.claim == "email"
        return Person(self.issuer, subject, account="" if email else value, email=value if email else "")

    def _claims(self, token: str, nonce: str, access: str) -> JSON:
        """Of an ID token that is the provider's, for us, fresh, and of this very sign-in. Raises JoseError."""
        try:
            decoded = jwt.decode(token, self._keys(), algorithms=ALGORITHMS)
        except (JoseError, ValueError):  # perhaps signed with a key that it did not have yet
            decoded = jwt.decode(token, self._keys(again=True), algorithms=ALGORITHMS)
        options: dict[str, Any] = {
            "iss": {"essential": True, "value": self.issuer},
            "aud": {"essential": True, "value": self.client_id},
        }
        params = {"nonce": nonce, "client_id": self.client_id, "access_token": access}
        claims: Any = CodeIDToken(decoded.claims, decoded.header, options, params)
        claims.validate(leeway=LEEWAY)
        return dict(claims)

    def _metadata(self) -> tuple[JSON, KeySet | None]:
        """What the provider says of itself. https://openid.net/specs/openid-connect-discovery-1_0.html"""
        with self._lock:
            since, metadata, keys = self._known
            if not metadata or time.monotonic() - since > FRESH:
                metadata = self._get(f"{self.issuer.rstrip('/')}/.well-known/openid-configuration")
                if metadata.get("issuer") != self.issuer:
                    raise self._broken(f"it calls itself {metadata.get('issuer')!r}")
                keys = None
                self._known = (time.monotonic(), metadata, keys)
            return metadata, keys

    def _keys(self, again: bool = False) -> KeySet:
        metadata, keys = self._metadata()
        if keys is None or again:
            try:
                keys = KeySet.import_key_set(self._get(str(metadata["jwks_uri"])))  # type: ignore[arg-type]
            except (JoseError, KeyError, ValueError) as error:
                raise self._broken(f"its keys cannot be read: {error}") from error
            with self._lock:
                self._known = (self._known[0], metadata, keys)
        return keys

    def _get(self, address: str) -> JSON:
        try:
            answer = requests.get(address, timeout=TIMEOUT)
            answer.raise_for_status()
            found = answer.json()
        except requests.RequestException as error:
            raise self._silent(error) from error
        if not isinstance(found, dict):
            raise self._broken(f"{address} is no JSON object")
        return found

    def _session(self, metadata: JSON, redirect: str) -> Any:
        offered = metadata.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        way = "client_secret_basic" if "client_secret_basic" in offered else "client_secret_post"
        return OAuth2Session(
            self.client_id, self.secret or None, token_endpoint_auth_method=way if self.secret else "none",
            scope=SCOPE, redirect_uri=redirect, code_challenge_method="S256", default_timeout=TIMEOUT,
            leeway=0,
        )  # fmt: skip

    def _silent(self, error: Exception) -> Error:
        log.warning("the provider %s does not answer: %s", self.issuer, error)
        return Error("unavailable", f"{self.name} does not answer", "try again, or sign in with a token")

    def _broken(self, why: str) -> Error:
        log.error("the provider %s cannot be used: %s", self.issuer, why)
        return Error("unavailable", f"{self.name} cannot be used to sign in", "an administrator finds why in the log")


def derived(secret: str, purpose: str) -> str:
    """43 characters that nobody can tell who does not have the secret."""
    digest = hmac.digest(secret.encode(), b"oidc " + purpose.encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def provider(settings: ServerSettings) -> Provider | None:
    """The one that the settings name, if any. Raises Error invalid for settings that are not safe, or no use."""
    issuer, client = settings.oidc_issuer, settings.oidc_client_id
    if not issuer and not client:
        return None
    if not issuer or not client:
        raise Error("invalid", "oidc: issuer and clientId go together", "set both, or none")
    parts = urlsplit(issuer)
    local = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
    if not parts.hostname or not (parts.scheme == "https" or local):
        raise Error("invalid", f"oidc.issuer: {issuer!r} is not an https address", "as the provider writes it")
    secret = _secret(Path(settings.oidc_client_secret_file)) if settings.oidc_client_secret_file else ""
    name = settings.oidc_name or parts.hostname
    return Provider(issuer, client, name, settings.oidc_claim, settings.oidc_accounts, secret)


def _secret(path: Path) -> str:
    what = f"oidc.clientSecretFile: {path}"
    try:
        with path.open() as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise Error("invalid", f"{what} can be read by others: its mode is {mode:04o}", f"chmod 600 {path}")
            secret = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Error("invalid", f"{what} cannot be read: {error}", "a file that holds the secret and no more") from error
    if not secret:
        raise Error("invalid", f"{what} is empty", "write the client's secret to it")
    return secret
