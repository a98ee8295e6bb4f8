"""A small OpenID Connect provider on loopback, which believes whoever asks: for tests of signing in through one.

Discovery, keys, authorization code with PKCE, tokens, user information. It checks what a provider must (the client, its
secret, where it sends people back to, the verifier, each code once), so that a client that errs is found out.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit

from joserfc import jws
from joserfc.jwk import OctKey, RSAKey

CLIENT, SECRET = "console", "s3cret/+ of the client"


class Provider:
    """Use it with `with`. claims: of whoever signs in. forge: the ID token's, in place of true ones."""

    def __init__(self) -> None:
        self.claims: dict[str, Any] = {"sub": "1234", "preferred_username": "ann"}
        self.forge: dict[str, Any] = {}
        self.userinfo: dict[str, Any] = {}
        self.algorithm = "RS256"
        self.back: set[str] = set()  # the addresses that it sends people back to
        self.rotate()
        self._codes: dict[str, dict[str, str]] = {}

    def rotate(self) -> None:
        """Sign with another key from now on."""
        self.key = RSAKey.generate_key(2048, {"kid": secrets.token_hex(4), "use": "sig"})
        self.published = self.key.as_dict(private=False)

    def __enter__(self) -> Provider:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                outer.answer(self, parts.path, dict(parse_qsl(parts.query)))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                outer.answer(self, self.path, {key: values[0] for key, values in parse_qs(body).items()})

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # Another site than 127.0.0.1, to browsers.
        self.issuer = f"http://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, path: str, asked: dict[str, str]) -> None:
        if path == "/authorize":
            self._authorize(handler, asked)
            return
        pages = {
            "/.well-known/openid-configuration": lambda: {
                "issuer": self.issuer,
                "authorization_endpoint": f"{self.issuer}/authorize",
                "token_endpoint": f"{self.issuer}/token",
                "userinfo_endpoint": f"{self.issuer}/userinfo",
                "jwks_uri": f"{self.issuer}/keys",
            },
            "/keys": lambda: {"keys": [self.published]},
            "/token": lambda: self._token(handler.headers.get("Authorization", ""), asked),
            "/userinfo": lambda: self.userinfo if handler.headers["Authorization"] == "Bearer access" else None,
        }
        found = pages.get(path, lambda: None)()
        body = json.dumps(found or {"error": "invalid_request"}).encode()
        _send(handler, 200 if found else 400, "application/json", body)

    def _authorize(self, handler: BaseHTTPRequestHandler, asked: dict[str, str]) -> None:
        wanted = {"response_type": "code", "client_id": CLIENT, "code_challenge_method": "S256"}
        right = wanted.items() <= asked.items() and asked["redirect_uri"] in self.back
        if not right or not {"state", "nonce", "code_challenge"} <= asked.keys() or "openid" not in asked["scope"]:
            _send(handler, 400, "text/plain", b"wrong request")
            return
        code = secrets.token_urlsafe(16)
        self._codes[code] = asked
        back = f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state'], 'iss': self.issuer})}"
        _send(handler, 200, "text/html", f'<a href="{html.escape(back)}">Continue</a>'.encode())

    def _token(self, authorization: str, asked: dict[str, str]) -> dict[str, Any] | None:
        begun = self._codes.pop(asked.get("code", ""), None)
        given = base64.b64decode(authorization.removeprefix("Basic ")).decode()
        challenge = (
            base64.urlsafe_b64encode(hashlib.sha256(asked["code_verifier"].encode()).digest()).decode().rstrip("=")
        )
        client = [unquote(part) for part in given.split(":")]
        if begun is None or begun["code_challenge"] != challenge or client != [CLIENT, SECRET]:
            return None
        if asked["redirect_uri"] != begun["redirect_uri"] or asked["grant_type"] != "authorization_code":
            return None
        now = int(time.time())
        true = {"iss": self.issuer, "aud": CLIENT, "iat": now, "exp": now + 60, "nonce": begun["nonce"]}
        header = {"alg": self.algorithm, "kid": self.key.kid}
        claims = {key: value for key, value in {**true, **self.claims, **self.forge}.items() if value is not None}
        if self.algorithm == "none":
            parts = (json.dumps(part).encode() for part in (header, claims))
            signed = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + "."
        else:  # with HS256, by the secret that the client knows too
            key = OctKey.import_key(SECRET) if self.algorithm == "HS256" else self.key
            signed = jws.serialize_compact(header, json.dumps(claims), key, algorithms=[self.algorithm])
        return {"access_token": "access", "token_type": "Bearer", "expires_in": 60, "id_token": signed}


def _send(handler: BaseHTTPRequestHandler, status: int, type: str, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", type)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
