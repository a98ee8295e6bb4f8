"""A browser without a screen, for what HTTP alone shows of the console."""

from __future__ import annotations

import http.client
import re
from urllib.parse import urlencode

from tests.lab import Lab


class Browser:
    """As much of one as is needed: a cookie jar of one cookie, forms with their CSRF token, no redirects followed."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.cookie, self.csrf = lab, "", ""

    def get(self, path: str, **headers: str) -> http.client.HTTPResponse:
        return self._ask("GET", path, None, headers)

    def post(self, path: str, form: dict[str, str] | None = None, **headers: str) -> http.client.HTTPResponse:
        body = {"csrf": self.csrf} | (form or {})
        sent = {"Origin": self.lab.address, "Content-Type": "application/x-www-form-urlencoded"} | headers
        return self._ask("POST", path, urlencode(body), sent)

    def _ask(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.lab.address.removeprefix("http://"), timeout=10)
        sent = {name.replace("_", "-"): value for name, value in headers.items() if value}
        connection.request(method, path, body, sent | ({"Cookie": self.cookie} if self.cookie else {}))
        response = connection.getresponse()
        response.text = response.read().decode()  # type: ignore[attr-defined]
        connection.close()
        if given := response.headers["Set-Cookie"]:
            self.cookie = given.split(";")[0]
        if found := re.search(r'name="csrf" value="(\w+)"', response.text):  # type: ignore[attr-defined]
            self.csrf = found[1]
        return response

    def sign_in(self, who: str) -> Browser:
        self.get("/sign-in")
        assert self.post("/sign-in", {"token": self.lab.tokens[who]}).status == 303
        self.get("/clusters")
        return self
