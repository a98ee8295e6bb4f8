"""Tokens at the door: what the server says, for how long that is good, and what a revocation ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from beaker_sessions import ids
from beaker_sessions.errors import Error
from beaker_sessions.executor import access as module
from beaker_sessions.executor.access import Access
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.transport import Endpoint
from tests.stack import wait_for

ADA = {"name": "ada", "role": "user", "scope": "user"}


class Server:
    """Answers who a token's account is, with the `status` as it was when it was asked; at first, once `held` is set."""

    def __init__(self) -> None:
        self.status, self.asked, self.reached, self.held = 200, 0, threading.Event(), threading.Event()
        self.held.set()
        self.epoch = "E1"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/healthz":
                    self.say(200, {"epoch": outer.epoch})
                    return
                outer.asked += 1
                status = outer.status
                if not outer.reached.is_set():
                    outer.reached.set()
                    outer.held.wait(10)
                code = {200: "", 401: "unauthorized", 503: "unavailable"}[status]
                self.say(status, ADA if status == 200 else {"code": status, "error": code, "message": "no"})

            def say(self, status: int, answer: dict) -> None:
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        address = f"http://127.0.0.1:{self.web.server_address[1]}"
        self.endpoint = Endpoint(address, insecure=[address])
        threading.Thread(target=self.web.serve_forever, daemon=True).start()


def ask(access: Access, token: str, errors: list[Error]) -> None:
    try:
        access.check(token, "ada")
    except Error as error:
        errors.append(error)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.held.set()
    server.web.shutdown()
    server.web.server_close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "_now", clock)
    return clock


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.db")
    yield ledger
    ledger.close()


def test_without_the_server_new_sessions_start_for_15_minutes_and_the_rest_goes_on(
    server: Server, clock: Clock, ledger: Ledger
) -> None:
    access, token = Access(ledger, server.endpoint, {}), ids.mint_token()
    access.check(token, "ada", creates=True)
    clock.now += 3600
    access.check(token, "ada", creates=True)  # the server knows it still
    server.status = 503
    clock.now += 14 * 60
    assert access.check(token, "ada", creates=True) == ADA
    clock.now += 2 * 60
    with pytest.raises(Error, match="15 minutes") as error:
        access.check(token, "ada", creates=True)
    assert error.value.code == "unavailable"
    assert access.check(token, "ada") == ADA
    clock.now += 86400
    assert access.check(token, "ada") == ADA
    server.status = 200
    clock.now += module.AWAY
    access.check(token, "ada", creates=True)


def test_an_executor_that_restarts_does_not_begin_to_trust_anew(server: Server, ledger: Ledger) -> None:
    token = ids.mint_token()
    Access(ledger, server.endpoint, {}).check(token, "ada")
    server.status = 503
    Access(ledger, server.endpoint, {}).check(token, "ada", creates=True)
    long_ago = (datetime.now(UTC) - timedelta(minutes=16)).isoformat()
    with ledger.transaction() as db:
        db.execute("UPDATE accounts SET seen = ?", (long_ago,))
    restarted = Access(ledger, server.endpoint, {})
    assert restarted.check(token, "ada") == ADA
    with pytest.raises(Error, match="15 minutes"):
        restarted.check(token, "ada", creates=True)


def test_the_ledger_learns_that_the_server_still_knows_a_token(server: Server, clock: Clock, ledger: Ledger) -> None:
    access, token = Access(ledger, server.endpoint, {}), ids.mint_token()
    access.check(token, "ada")
    with ledger.transaction() as db:
        db.execute("UPDATE accounts SET seen = '2020-01-01T00:00:00+00:00'")
    clock.now += 61
    access.check(token, "ada")
    known = ledger.vouched(ids.hash_token(token))
    assert known is not None
    assert datetime.now(UTC) - known[1] < timedelta(minutes=1)


@pytest.mark.parametrize("away", [200, 503])
def test_a_revocation_ends_a_token_everywhere(server: Server, ledger: Ledger, away: int) -> None:
    access, token = Access(ledger, server.endpoint, {}), ids.mint_token()
    access.check(token, "ada")
    access.revoke([ids.hash_token(token), "of somebody else"])
    server.status = 401 if away == 200 else away
    for asks in (access, Access(ledger, server.endpoint, {})):
        with pytest.raises(Error) as error:
            asks.check(token, "ada")
        assert error.value.code == ("unauthorized" if away == 200 else "unavailable")


def test_a_server_with_another_database_ends_no_token(server: Server, clock: Clock, ledger: Ledger) -> None:
    """As when its database was lost: it knows nobody, and whoever was let in before goes on as without a server."""
    access, token = Access(ledger, server.endpoint, {}), ids.mint_token()
    ledger.fact("epoch", "E1")
    access.check(token, "ada")
    clock.now += 3600
    server.status, server.epoch = 401, "E2"
    assert access.check(token, "ada") == ADA
    with pytest.raises(Error, match="15 minutes"):
        access.check(token, "ada", creates=True)
    with pytest.raises(Error) as caught:
        access.check(ids.mint_token(), "ada")
    assert caught.value.code == "unauthorized"
    assert ledger.vouched(ids.hash_token(token))
    server.epoch = "E1"  # the right one is back, and the token was revoked there
    clock.now += module.AWAY
    with pytest.raises(Error) as caught:
        access.check(token, "ada")
    assert caught.value.code == "unauthorized"
    assert not ledger.vouched(ids.hash_token(token))


def test_an_answer_that_was_under_way_brings_no_revoked_token_back(server: Server, ledger: Ledger) -> None:
    access, token = Access(ledger, server.endpoint, {}), ids.mint_token()
    errors: list[Error] = []
    server.held.clear()
    thread = threading.Thread(target=ask, args=(access, token, errors))
    thread.start()
    assert server.reached.wait(10)
    server.status = 401  # for all that is asked from now on
    access.revoke([ids.hash_token(token)])
    server.held.set()
    thread.join(10)
    assert [error.code for error in errors] == ["unauthorized"]
    assert ledger.vouched(ids.hash_token(token)) is None
    server.status = 503
    with pytest.raises(Error):
        access.check(token, "ada")


def test_a_refusal_is_not_undone_by_an_older_answer(server: Server, ledger: Ledger) -> None:
    access, token = Access(ledger, server.endpoint, {}), ids.mint_token()
    server.held.clear()
    errors: list[Error] = []
    thread = threading.Thread(target=ask, args=(access, token, errors))
    thread.start()
    assert server.reached.wait(10)
    server.status = 401
    with pytest.raises(Error):
        access.check(token, "ada")
    server.held.set()
    thread.join(10)
    assert [error.code for error in errors] == ["unauthorized"]
    assert ledger.vouched(ids.hash_token(token)) is None


def test_the_server_is_asked_about_every_token_in_turn(
    server: Server, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VOUCHED", 3)
    access, hashes = Access(ledger, server.endpoint, {}), [f"{number:064}" for number in range(5)]
    for hash in hashes:
        ledger.vouch(hash, ADA)
    asked = [access.vouched(), access.vouched()]
    assert [len(some) for some in asked] == [3, 3]
    assert {hash for some in asked for hash in some} == set(hashes)


def test_a_disk_that_does_not_answer_holds_up_nobody_whose_token_is_known(
    server: Server, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    access, known, late, errors = Access(ledger, server.endpoint, {}), ids.mint_token(), ids.mint_token(), list[Error]()
    access.check(known, "ada")
    writes, goes_on, vouch = threading.Event(), threading.Event(), ledger.vouch

    def slow(digest: str, account: dict) -> None:
        writes.set()
        goes_on.wait(20)
        vouch(digest, account)

    monkeypatch.setattr(ledger, "vouch", slow)
    asking = threading.Thread(target=ask, args=(access, late, errors))
    asking.start()
    assert writes.wait(20)
    answers: list[bool] = []
    looking = threading.Thread(target=lambda: answers.append(access.is_fresh(known)))  # as the event loop does
    looking.start()
    revoking = threading.Thread(target=access.revoke, args=([ids.hash_token(late)],))
    try:
        looking.join(5)
        assert answers
        server.status = 401
        revoking.start()
        wait_for("the revocation", lambda: not access.is_fresh(late))
    finally:
        goes_on.set()
        for thread in (asking, looking, *([revoking] if revoking.ident else [])):
            thread.join(20)
    assert ledger.vouched(ids.hash_token(late)) is None, "what was being written down is refused after that"
    assert [error.code for error in errors] == ["unauthorized"]
