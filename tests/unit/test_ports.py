"""Which ports a session may have, and the firewall's text: what does not need a session."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.executor import ports
from beaker_sessions.model import Claim, Request, Session
from beaker_sessions.sandbox import firewall
from beaker_sessions.settings import ExecutorSettings

REQUEST = Request("image", ports=((80, 0), (81, 0)))


def session(request: Request, claim: Claim | None = None) -> Session:
    return Session("OTHER", "ada", "", request, created=datetime.now(UTC), revision=1, claim=claim)


def test_what_was_picked_is_bound_from_then_on() -> None:
    choice = ports.Ports(range(21000, 21100))
    picked = choice.pick("ID", REQUEST, [])
    assert {own for own, _ in picked} == {80, 81}
    for _, port in picked:
        for address in ("127.0.0.1", ""):
            with socket.socket() as thief, pytest.raises(OSError, match="in use"):
                thief.bind((address, port))
    choice.drop({"ID"})
    mapped, sockets = choice.take("ID", REQUEST, Claim(ports=picked), [])
    assert mapped == picked
    for sock, _ in sockets:
        sock.close()


def test_what_nobody_needs_any_more_is_given_up() -> None:
    choice = ports.Ports(range(21100, 21200))
    ((_, port), _) = choice.pick("ID", REQUEST, [])
    choice.drop(())
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", "::"])
@pytest.mark.parametrize("listens", [True, False])
def test_a_port_that_anybody_uses_on_any_address_is_not_had(address: str, listens: bool) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            taken.bind((address, 0))
        port = taken.getsockname()[1]
        if listens:
            taken.listen()
        request = Request("image", ports=((80, port),))
        with pytest.raises(Error, match="another program"):
            ports.Ports().check(request, [])
        choice = ports.Ports()
        picked = choice.pick("ID", request, [])
        with pytest.raises(Error, match="another program"):
            choice.take("ID", request, Claim(ports=picked), [])
        only = ports.Ports(range(port, port + 1))
        with pytest.raises(Error, match="no port"):
            only.pick("ID", Request("image", ports=((80, 0),)), [])


def test_after_a_restart_a_picked_port_that_is_anothers_by_now_is_replaced() -> None:
    choice = ports.Ports(range(21200, 21300))
    request = replace(REQUEST, ports=((80, 0),))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        claim = Claim(ports=((80, taken.getsockname()[1]),))
        mapped, sockets = choice.take("ID", request, claim, [session(request, claim)])
    assert mapped[0][1] in range(21200, 21300)
    for sock, _ in sockets:
        sock.close()


def test_nobody_gets_the_nodes_own_ports_or_those_of_others() -> None:
    settings = ExecutorSettings(address="http://127.0.0.1:8420", metrics="127.0.0.1:9464")
    choice = ports.of(settings)
    for port, why in ((8420, "the server"), (9464, "metrics"), (1023, "below 1024"), (22222, "session OTHER")):
        request = Request("image", ports=((80, port),))
        with pytest.raises(Error, match=why):
            choice.check(request, [session(Request("image", ports=((1, 22222),)))])
    with pytest.raises(Error, match="no port"):
        ports.Ports(range(8420, 8421), {8420: "the server"}).pick("ID", REQUEST, [])


@pytest.mark.parametrize("text", ["", "20000", "30000-20000", "80-90", "20000-70000", "a-b"])
def test_a_range_that_is_none(text: str) -> None:
    with pytest.raises(Error, match="portRange"):
        ports.of(ExecutorSettings(port_range=text))


@pytest.mark.parametrize("item", ["", "x", "0", "70000", "host:80", "::1:80", "1.2.3.4:", "80 accept; drop"])
def test_access_that_is_none(item: str) -> None:
    with pytest.raises(Error, match="sessionAccess"):
        firewall.rules("beaker0", "10.0.0.0/22", [], [item])


def test_the_firewall_says_what_the_settings_say() -> None:
    text = firewall.rules("beaker0", "10.0.0.0/22", ["10.0.0.53", "fd00::53"], ["3128", "10.0.0.5:5432"])
    assert "tcp dport 3128 accept" in text
    assert "ip daddr 10.0.0.5 tcp dport 5432 accept" in text
    assert "ip daddr { 10.0.0.53 } meta" in text
