"""Signing in through an OpenID Connect provider, over HTTP: who gets in as whom, and what is refused."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.server import oidc
from beaker_sessions.settings import ServerSettings
from tests.browser import Browser
from tests.lab import Lab
from tests.provider import CLIENT, SECRET, Provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as provider:
        yield provider


def settings(issuer: str, directory: Path, **more: object) -> ServerSettings:
    secret = directory / "client.secret"
    if not secret.exists():
        secret.touch(mode=0o600)
        secret.write_text(SECRET + "\n")
    values = {"oidc_issuer": issuer, "oidc_client_id": CLIENT, "oidc_client_secret_file": str(secret)}
    return ServerSettings(**{**values, "oidc_name": "The University", **more})  # type: ignore[arg-type]


@pytest.fixture
def lab(tmp_path: Path, provider: Provider, request: pytest.FixtureRequest) -> Iterator[Lab]:
    more = getattr(request, "param", {})
    with Lab(tmp_path, oidc.provider(settings(provider.issuer, tmp_path, **more))) as lab:
        for name in ("ann", "bob"):
            lab.account(name, email=f"{name}@lab.example")
        provider.back = {f"{lab.address}/sign-in/back"}
        yield lab


class Visitor(Browser):
    """A browser with a second cookie, which goes to the provider and comes back."""

    through = ""

    def begin(self, next: str = "") -> str:
        """The address at the provider."""
        answer = self.get(f"/sign-in/through?next={next}")
        assert answer.status == 303
        given = [one for one in answer.headers.get_all("Set-Cookie") if "-through=" in one]
        assert {"HttpOnly", "SameSite=lax", "Max-Age=600"} <= set(given[0].split("; "))
        self.through = given[0].split(";")[0]
        return answer.headers["Location"]

    def provide(self, address: str) -> str:
        """Where the provider sends it to: a path of the console."""
        with urllib.request.urlopen(address) as page:
            back = unescape(re.findall('href="([^"]+)"', page.read().decode())[0])
        parts = urlsplit(back)
        assert f"{parts.scheme}://{parts.netloc}" == self.lab.address
        return f"{parts.path}?{parts.query}"

    def back(self, path: str, through: str | None = None):
        kept, self.cookie = self.cookie, self.through if through is None else through
        answer = self.get(path, Sec_Fetch_Site="cross-site")
        given = [one.split(";")[0] for one in answer.headers.get_all("Set-Cookie") if one.startswith("beaker=")]
        self.cookie = given[0] if given else kept
        return answer

    def enter(self):
        return self.back(self.provide(self.begin("/user")))


def test_in_and_out_again(lab: Lab, provider: Provider) -> None:
    visitor = Visitor(lab)
    page = visitor.get("/sign-in").text
    assert "Sign in with The University" in page
    answer = visitor.enter()
    assert (answer.status, answer.headers["Location"]) == (303, "/user")
    cookies = answer.headers.get_all("Set-Cookie")
    [cookie] = [one for one in cookies if one.startswith("beaker=")]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert any(one.startswith('beaker-through=""') for one in cookies), "the cookie in between has served"
    html = visitor.get("/user").text
    assert "<h1>ann</h1>" in html
    assert "browser, through The University" in html
    assert re.search(r"browser, through The University.*this browser’s</span></th><td[^>]*>user</td>", html)
    [row] = lab.root.list_audit(text="sign_in_through")["data"]
    assert (row["account"], row["details"]) == ("ann", {"issuer": provider.issuer, "subject": "1234"})
    assert visitor.post("/sign-out").status == 303
    assert "through" not in str(lab.client(lab.tokens["ann"]).list_tokens()), "its token ended with it"


def test_revoking_its_token_signs_the_browser_out(lab: Lab) -> None:
    visitor = Visitor(lab)
    visitor.enter()
    assert visitor.get("/clusters").status == 200
    client = lab.client(lab.tokens["ann"])
    [token] = [one for one in client.list_tokens()["data"] if "through" in one["name"]]
    client.revoke_token(token["id"])
    assert visitor.get("/clusters").status == 303


def test_the_secret_is_nowhere(lab: Lab, tmp_path: Path) -> None:
    visitor = Visitor(lab)
    assert SECRET not in visitor.begin()
    visitor.enter()
    for path in tmp_path.glob("server.db*"):
        assert SECRET.encode() not in path.read_bytes()
    assert SECRET not in repr(oidc.provider(settings("http://localhost:1", tmp_path)))


@pytest.mark.parametrize(
    "forged",
    [
        {"nonce": "another"}, {"nonce": None}, {"aud": "another"}, {"aud": [CLIENT, "another"]}, {"azp": "another"},
        {"aud": "another", "azp": CLIENT},
        {"iss": "http://evil.example"}, {"exp": 1}, {"exp": None}, {"sub": None},
        pytest.param({"iat": int(time.time()) + 3600}, id="to come"),
    ],
    ids=str,
)  # fmt: skip
def test_a_token_that_is_not_for_this_sign_in_is_refused(
    lab: Lab, provider: Provider, forged: dict[str, object]
) -> None:
    provider.forge = forged
    visitor = Visitor(lab)
    answer = visitor.enter()
    assert answer.status == 401
    assert "was not accepted" in answer.text
    assert visitor.get("/clusters").status == 303


@pytest.mark.parametrize("algorithm", ["none", "HS256"])
def test_a_signature_that_others_could_make_is_refused(lab: Lab, provider: Provider, algorithm: str) -> None:
    provider.algorithm = algorithm
    assert Visitor(lab).enter().status == 401


def test_another_key_is_asked_for_and_a_strangers_refused(lab: Lab, provider: Provider) -> None:
    assert Visitor(lab).enter().status == 303
    provider.rotate()
    assert Visitor(lab).enter().status == 303
    published = provider.published
    provider.rotate()
    provider.published = published | {"kid": provider.key.kid}
    assert Visitor(lab).enter().status == 401


def test_only_the_browser_that_began_gets_in(lab: Lab) -> None:
    visitor, other = Visitor(lab), Visitor(lab)
    path = visitor.provide(visitor.begin())
    other.begin()
    assert other.back(path).status == 401, "the state is another browser's"
    assert other.back(path, through="x=y").status == 401
    assert visitor.back(path.replace("state=", "state=x")).status == 401
    assert visitor.back(re.sub("iss=[^&]+", "iss=http%3A%2F%2Fevil", path)).status == 401
    assert visitor.back(path).status == 303
    assert visitor.back(path).status == 401, "a code works once"
    assert visitor.back(re.sub("code=[^&]+", "error=access_denied", path)).status == 401


def test_a_failure_leaves_who_is_signed_in(lab: Lab) -> None:
    visitor = Visitor(lab)
    visitor.sign_in("bob")
    kept = visitor.cookie
    assert visitor.back("/sign-in/back?state=x&code=y").status == 401
    assert visitor.cookie == kept


@pytest.mark.parametrize(
    ("lab", "claims", "expected"),
    [
        ({}, {"preferred_username": "bob"}, "bob"),
        ({}, {"preferred_username": "nobody"}, 403),
        ({}, {"preferred_username": "root"}, 403),
        ({}, {"preferred_username": ""}, 403),
        ({}, {"preferred_username": ["ann"]}, 403),
        ({"oidc_accounts": {"r.oot": "root"}}, {"preferred_username": "r.oot"}, "root"),
        ({"oidc_accounts": {"r.oot": "gone"}}, {"preferred_username": "r.oot"}, 403),
        ({"oidc_claim": "sub", "oidc_accounts": {"7": "ann"}}, {"sub": "7"}, "ann"),
        ({"oidc_claim": "email"}, {"email": "bob@lab.example", "email_verified": True}, "bob"),
        ({"oidc_claim": "email"}, {"email": "bob@lab.example"}, 403),
        ({"oidc_claim": "email"}, {"email": "bob@lab.example", "email_verified": "true"}, 403),
        ({"oidc_claim": "email"}, {"email": "bob@evil.example", "email_verified": True}, 403),
    ],
    ids=str,
    indirect=["lab"],
)
def test_who_is_who(lab: Lab, provider: Provider, claims: dict[str, object], expected: str | int) -> None:
    provider.claims = {"sub": "1234", **claims}
    accounts = lab.root.list_accounts()["data"]
    visitor = Visitor(lab)
    answer = visitor.enter()
    if isinstance(expected, int):
        assert answer.status == expected
        assert visitor.get("/clusters").status == 303
    else:
        assert f"<h1>{expected}</h1>" in visitor.get("/user").text
        assert visitor.get("/admin").status == 403, "nobody administers by way of a provider"
    assert lab.root.list_accounts()["data"] == accounts


def test_a_claim_that_only_userinfo_has(lab: Lab, provider: Provider) -> None:
    provider.claims = {"sub": "1234"}
    provider.userinfo = {"sub": "another", "preferred_username": "ann"}
    assert Visitor(lab).enter().status == 403
    provider.userinfo["sub"] = "1234"
    assert Visitor(lab).enter().status == 303


def test_a_silent_provider_is_told(lab: Lab, provider: Provider) -> None:
    provider.__exit__()
    answer = Visitor(lab).get("/sign-in/through")
    assert answer.status == 503
    assert "The University does not answer" in answer.text
    provider.__enter__()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"oidc_client_id": ""}, "go together"),
        ({"oidc_issuer": "http://login.example.com"}, "https"),
        ({"oidc_issuer": "login.example.com"}, "https"),
        ({"oidc_client_secret_file": "/nowhere"}, "/nowhere"),
    ],
    ids=str,
)
def test_settings_that_are_no_use_are_told_at_once(tmp_path: Path, wrong: dict[str, str], said: str) -> None:
    with pytest.raises(Error, match=said):
        oidc.provider(settings("https://login.example.com", tmp_path, **wrong))


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    assert oidc.provider(settings("https://login.example.com", tmp_path))
    (tmp_path / "client.secret").chmod(0o640)
    with pytest.raises(Error, match="0640"):
        oidc.provider(settings("https://login.example.com", tmp_path))
    assert oidc.provider(ServerSettings()) is None
