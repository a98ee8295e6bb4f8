"""Who may have what: the rules, and that counting and creating are one step."""

from __future__ import annotations

import os
import pwd
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from beaker_sessions import ids, wire
from beaker_sessions.errors import Error
from beaker_sessions.executor import admission, inventory, plan, root
from beaker_sessions.executor.access import Access
from beaker_sessions.executor.admission import RIGHTS, Limits
from beaker_sessions.executor.door import HANDLERS
from beaker_sessions.executor.execs import Execs
from beaker_sessions.executor.inside import Inside
from beaker_sessions.executor.inventory import Inventory
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.executor.lifecycle import Lifecycle
from beaker_sessions.executor.loop import Loop
from beaker_sessions.executor.metrics import Metrics
from beaker_sessions.executor.report import Reporter, _refused
from beaker_sessions.executor.sessions import Sessions
from beaker_sessions.model import Gpu, Identity, Request, Resources, Session, State
from beaker_sessions.sandbox import Image, Progress, Spec, subordinate
from beaker_sessions.sandbox.fake import FakeSandboxes
from beaker_sessions.settings import ExecutorSettings

ADA = Identity("ada", 1500, 1500, "/home/ada", {1500: "ada"})
HERE = {"id": "N1", "hostname": "node-1.lab"}
CAPACITY = Resources(1, 8.0, 1 << 36)
IDLE, GPU = Request(gpus=0, cpus=0.0, memory=0), Request(gpus=1, cpus=0.0, memory=0)

Make = Callable[[Limits], Sessions]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    ledger = Ledger(tmp_path / "ledger.db")
    yield lambda limits: Sessions(ledger, Inventory("n", 8.0, 1 << 36, (Gpu("lab/gpu=0", "made up"),)), limits)
    ledger.close()


def at_once(sessions: Sessions, request: Request, count: int, account: str = "ada") -> list[str]:
    """The codes of the refusals of so many creates at once."""
    refused: list[str] = []
    ready = threading.Barrier(count)

    def create() -> None:
        ready.wait()
        try:
            sessions.create(account, ADA, request, None)
        except Error as error:
            refused.append(error.code)

    threads = [threading.Thread(target=create) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return refused


@pytest.mark.parametrize(
    ("limits", "request_", "left"),
    [
        (Limits(unreserved=5), IDLE, 5),
        (Limits(sessions=7), IDLE, 7),
        (Limits(waiting=5), GPU, 6),
        (Limits(waiting=5), IDLE, 60),
    ],
)
def test_no_number_at_once_passes_a_limit(make: Make, limits: Limits, request_: Request, left: int) -> None:
    sessions = make(limits)
    assert at_once(sessions, request_, 60) == ["limit"] * (60 - left)
    assert len(sessions.live()) == left == len(sessions.ledger.live())
    with suppress(Error):
        sessions.create("ada", ADA, request_, None)
    assert sessions.create("ben", ADA, request_, None).account == "ben", "another account has limits of its own"


def test_a_repeated_create_is_answered_at_the_limit_too_and_an_end_makes_room(make: Make) -> None:
    sessions = make(Limits(sessions=1))
    first = sessions.create("ada", ADA, IDLE, "key")
    assert sessions.create("ada", ADA, IDLE, "key").id == first.id
    with pytest.raises(Error, match=r"1 sessions .* 1 is the most .*limits\.sessions") as error:
        sessions.create("ada", ADA, IDLE, None)
    assert error.value.code == "limit"
    sessions.ended(first.id, 0)
    sessions.release(first.id)
    sessions.create("ada", ADA, IDLE, None)


def test_images_on_the_way_are_counted_by_account(make: Make) -> None:
    sessions = make(Limits(pulls=2))
    made = [sessions.create("ada", ADA, IDLE, None).id for _ in range(4)]
    other = sessions.create("ben", ADA, IDLE, None).id
    for id in made[:2]:
        sessions.progress(id, Progress(0, 100, (0, 1)))
        sessions.progress(id, Progress(50, 100, (0, 1)))
    with pytest.raises(Error, match=r"limits\.pulls") as error:
        sessions.progress(made[2], Progress(0, 100, (0, 1)))
    assert error.value.code == "limit"
    sessions.progress(other, Progress(0, 100, (0, 1)))
    sessions.passed(made[0], "image_ready")
    sessions.progress(made[3], Progress(0, 100, (0, 1)))


def test_second_processes_are_counted_by_account_whoever_follows_them(make: Make) -> None:
    sessions, driver = make(Limits(execs=5)), FakeSandboxes()
    identity = {"env": {}, "identity": ADA, "workdir": "/", "size": (24, 80), "stdin": True}

    def session(account: str) -> Session:
        id = sessions.create(account, ADA, IDLE, None).id
        driver.create(Spec(id, {}, Image("fake:base", "base"), ADA))
        driver.start(id, None)
        sessions.move(id, State.STARTED, started=datetime.now(UTC))
        return sessions.view(id).session

    def run(execs: Execs, session: Session, *command: str) -> str:
        handle, terminal = execs.start(session, lambda: driver.exec(session.id, command, **identity))  # type: ignore[arg-type]
        os.close(terminal.fd)  # its caller leaves at once
        return handle

    first, second, bens = session("ada"), session("ada"), session("ben")
    execs, ready, codes = Execs(sessions, driver), threading.Barrier(60), list[str]()

    def attempt(number: int) -> None:
        ready.wait()
        try:
            run(execs, (first, second)[number % 2])
        except Error as error:
            codes.append(error.code)

    threads = [threading.Thread(target=attempt, args=[number]) for number in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == ["limit"] * 55
    running = [(one, handle) for one in (first, second) for handle in driver.execs(one.id)]
    assert len(running) == 5
    run(execs, bens)
    execs = Execs(sessions, driver)  # the executor was started again
    with pytest.raises(Error, match=r"5 is the most .*limits\.execs"):
        run(execs, first)
    driver.exec_exit(running[0][0].id, running[0][1])  # nobody tells of this end
    run(execs, first, "true")
    run(execs, first)
    with pytest.raises(Error, match=r"limits\.execs"):
        run(execs, first)
    driver.remove(second.id)
    with pytest.raises(Error, match="no sandbox"):  # a start that fails leaves nothing behind
        run(execs, second)
    run(execs, first)


def test_each_operation_of_the_door_says_who_may() -> None:
    assert RIGHTS.keys() == HANDLERS.keys()


@pytest.mark.parametrize("operation", RIGHTS)
def test_scopes_and_owners(operation: str) -> None:
    def may(scope: object, role: str, owner: str | None) -> bool:
        with suppress(Error):
            admission.allow(operation, {"name": "ada", "role": role, "scope": scope}, owner)
            return True
        return False

    for scope in ("session", "executor", None, "", "new"):
        assert not may(scope, "admin", None)
        assert not may(scope, "admin", "ada")
    admins = operation in admission.ROOTS
    assert may("user", "user", "ada") == may("user", "admin", "ada") == (not admins)
    assert may("admin", "admin", "ada")
    assert may("admin", "admin", "ben") == (operation not in ("attach", "exec", "exec_exit", "logs")), (
        "nobody enters another's"
    )
    # An administrator's plain token administers nothing, and a token of scope admin of nobody who is one, neither.
    everybodys = operation in ("create", "list", "node")
    assert may("user", "admin", "ben") == may("admin", "user", "ben") == may("user", "user", "ben") == everybodys


def admit(identity: Identity = ADA, wanted: Request = Request(bare=True), **more: object) -> admission.Admitted:  # noqa: B008
    return admission.admit(wanted, identity, ExecutorSettings(), CAPACITY, HERE, **more)  # type: ignore[arg-type]


def test_defaults_are_filled_in() -> None:
    assert admit() == admission.Admitted(plan.defaults(Request(bare=True), CAPACITY, "beaker-sessions/base"), "")


def test_what_is_refused() -> None:
    for code, refused in (
        ("invalid", lambda: admit(node="other")),
        ("invalid", lambda: admit(cluster="lab/other")),
        ("forbidden", lambda: admit(wanted=Request(bare=True, host_network=True))),
        ("invalid", lambda: admit(wanted=Request(bare=True, gpus=2))),
        ("invalid", lambda: admit(wanted=Request(bare=True, secret_mounts=(("K", "/proc/x"),)))),
        ("not_found", lambda: admit(replace(ADA, home="/no/such/home"), Request())),
        ("forbidden", lambda: admit(Identity("root", 0, 0, "/root"))),
        ("forbidden", lambda: admit(replace(ADA, gid=0))),
    ):
        with pytest.raises(Error) as error:
            refused()
        assert error.value.code == code
    admit(node="N1", cluster="lab/main")


@pytest.mark.parametrize(
    "ranges",
    [
        subordinate.Ranges(uids=(("ben", 1500, 1),)),
        subordinate.Ranges(uids=(("ada", 0, 65536),)),
        subordinate.Ranges(gids=(("ben", 1000, 501),)),
        subordinate.Ranges(gids=(("ben", 2700, 10),)),
    ],
)
def test_nobody_whose_id_is_in_anybodys_range(ranges: subordinate.Ranges) -> None:
    member = replace(ADA, groups={1500: "ada", 2709: "project"})
    with pytest.raises(Error, match="subordinate") as error:
        admit(member, ranges=ranges)
    assert error.value.code == "forbidden"
    admit(member, ranges=subordinate.Ranges((("ben", 1501, 5000),), (("ben", 2710, 9000),)))


def test_an_account_and_a_unix_user_belong_together_in_both_directions() -> None:
    accounts = {"games": "asmith"}
    assert admission.person("asmith", accounts, "").name == "games"
    for account, code in (("games", "forbidden"), ("no-such-user-here", "not_found")):
        with pytest.raises(Error) as error:
            admission.person(account, accounts, "")
        assert error.value.code == code


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who gives homes away")
def test_the_home_of_roots_sessions_is_made_to_the_end(tmp_path: Path) -> None:
    home = tmp_path / "home"
    entry = pwd.struct_passwd((root.NAME, "x", 65534, 65534, "", str(home), ""))

    def owner() -> tuple[int, int, int]:
        found = home.lstat()
        return found.st_uid, found.st_gid, found.st_mode & 0o7777

    home.mkdir(mode=0o755)  # as a kill between making it and giving it away leaves it, or worse
    for _ in range(2):
        root._make_home(entry)
        assert owner() == (65534, 65534, 0o700)
    (home / "work").touch()
    home.chmod(0o777)
    root._make_home(entry)
    assert owner() == (65534, 65534, 0o700)
    os.chown(home, 0, 0)  # with something of root's in it, which nobody gets for that
    for wrong in (lambda: None, lambda: os.chown(home, 1, 1)):
        wrong()
        with pytest.raises(Error, match="is the user") as error:
            root._make_home(entry)
        assert error.value.code == "unavailable"
    home.rename(tmp_path / "other")
    (tmp_path / "empty").mkdir(mode=0o755)
    home.symlink_to(tmp_path / "empty")
    with pytest.raises(Error):
        root._make_home(entry)
    assert (tmp_path / "empty").stat().st_uid == 0


def test_only_root_says_for_whom_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    games = inventory.unix_user(5, "")
    assert admission.caller(games.uid, "root", "") == (games.name, games)
    assert admission.caller(0, games.name, "") == (games.name, games)
    monkeypatch.setattr(admission.root, "identity", lambda _home: games)
    assert admission.caller(0, None, "") == ("root", games)
    for said in ("root", "no-such-user-here", 5, ["games"], ""):
        with pytest.raises(Error) as error:
            admission.caller(0, said, "")
        assert error.value.code == "invalid"


def test_limits_of_the_settings() -> None:
    assert Limits.of(ExecutorSettings()) == Limits(100, 50, 50, 4, 64)
    with pytest.raises(Error, match=r"limits\.waiting"):
        Limits.of(ExecutorSettings(limit_waiting=-1))


@pytest.fixture
def reporter(make: Make, tmp_path: Path) -> Iterator[Reporter]:
    settings = ExecutorSettings(storage_path=str(tmp_path), accounts={"games": "asmith"})
    loop = Loop()  # which does not run
    inside = Inside(loop, tmp_path / "run", settings.endpoint, lambda _: None)
    lifecycle = Lifecycle(make(Limits(sessions=1)), FakeSandboxes(("base",)), settings, inside, "owner")
    lifecycle.sessions.on_start = lambda _id: None
    lifecycle.sessions.cordon("start", "")
    ledger = lifecycle.sessions.ledger
    ledger.fact("node", "N1")
    access = Access(ledger, settings.endpoint, settings.accounts)
    yield Reporter(lifecycle, access, settings, Metrics(lifecycle.sessions, lifecycle.sandboxes, str(tmp_path), dict))
    loop.passing.stop()
    loop.asyncio.close()


def handed(account: str, node: str = "N1", **asked: object) -> dict:
    wanted = replace(IDLE, bare=True, **asked)  # type: ignore[arg-type]
    return wire.job(Session(ids.ulid(), account, node, wanted, created=datetime.now(UTC), revision=1))


@pytest.mark.parametrize(
    ("job", "error"),
    [
        (handed("games"), "forbidden"),  # the Unix user of that name is another account's
        (handed("no-such-user-here"), "not_found"),
        (handed("asmith", host_network=True), "forbidden"),
        (handed("asmith", node="N2"), "invalid"),
        (handed("asmith") | {"cluster": "lab/other"}, "invalid"),
        (handed("asmith", gpus=9), "invalid"),
        ({"id": ids.ulid(), "author": {"name": "asmith"}, "session": {"command": 5}}, "invalid"),
    ],
)
def test_what_the_server_hands_over_is_decided_as_at_the_door(reporter: Reporter, job: dict, error: str) -> None:
    reporter._take(job)
    reporter._take(job)  # as it comes again, until the end is reported
    (ended,) = reporter.ledger.unreported()
    assert (ended.id, ended.state, ended.error) == (job["id"], State.FINALIZED, error)
    assert ended.message
    assert reporter.sessions.live() == []


def test_a_handed_over_session_at_the_limit_ends_with_the_reason(reporter: Reporter) -> None:
    first, second = handed("asmith"), handed("asmith")
    reporter._take(first)
    reporter._take(second)
    assert [one.id for one in reporter.sessions.live()] == [first["id"]]
    (ended,) = [one for one in reporter.ledger.unreported() if one.state == State.FINALIZED]
    assert (ended.id, ended.error) == (second["id"], "limit")
    for rubbish in (
        5,
        None,
        [],
        {},
        {"id": 5, "author": {}},
        {"id": "x", "author": {"name": "y"}},
        {"id": ids.ulid(), "author": "z"},
    ):
        reporter._take(rubbish)  # type: ignore[arg-type]


def test_what_a_hand_over_raises_unexpectedly_ends_that_session_and_stops_no_report(
    reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("pw_name")

    monkeypatch.setattr(admission, "person", fail)
    job = handed("asmith")
    reporter._take(job)
    (ended,) = reporter.ledger.unreported()
    assert (ended.id, ended.state, ended.error) == (job["id"], State.FINALIZED, "internal")
    assert "incident" in ended.message


def test_the_reason_for_a_refusal_travels() -> None:
    now = Session(ids.ulid(), "ada", "N1", GPU, revision=1)
    told = wire.session(wire.job(_refused(now, Error("limit", "you have 50", "stop some"))))
    assert (told.state, told.error, told.message) == (State.FINALIZED, "limit", "you have 50; stop some")
