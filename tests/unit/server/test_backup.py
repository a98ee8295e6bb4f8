"""Backup and restore of the server's database: whole or refused, whatever the file, and whoever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from beaker_sessions import ids, wire
from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from beaker_sessions.integrity import damage
from beaker_sessions.model import Request, Session
from beaker_sessions.server import backup, store, tables
from beaker_sessions.server.main import main
from beaker_sessions.server.store import Store, sqlite_url
from beaker_sessions.transport import Endpoint

from .test_faults import end, initialize, serve

ROOT = Path(__file__).parents[3]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The state of a server that was set up."""
    (tmp_path / "state").mkdir()
    initialize(tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command; what it says, which is never a traceback, after its exit code."""

    def run(*words: object) -> str:
        capsys.readouterr()
        code = main(["--storage-path", str(place), *map(str, words)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return f"{code} {said.err}"

    return run


@contextlib.contextmanager
def serving(place: Path, token: str = "token") -> Iterator[Client]:
    process, port = serve(place)
    plain = f"http://127.0.0.1:{port}"
    client = Client(Endpoint(plain, insecure=[plain]), (place / token).read_text().strip())
    try:
        yield client
    finally:
        client.close()
        end(process, signal.SIGKILL)


def whole(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return damage(database) == ""


def names(place: Path) -> list[str]:
    """The accounts, by a start of the server's."""
    opened = Store(sqlite_url(place / "server.db"), new=False)
    try:
        with opened.read() as rows:
            return [row[0] for row in rows.connection.exec_driver_sql("SELECT name FROM accounts ORDER BY name")]
    finally:
        opened.close()


def init(place: Path, name: str) -> None:
    words = ("--token-file", place / name, "--executor-token-file", place / "executor.token")
    assert main(["--storage-path", str(place), "init", "--account", name, *map(str, words)]) == 0


def test_what_a_killed_server_left_does_not_reach_the_restored_database(
    place: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    """The journal of the newer database stays behind when the server is killed: with it, the older is damaged."""
    with serving(place) as client:
        for number in range(20):
            client.create_account({"name": f"a{number}", "email": "x" * 300})
        assert run("backup", tmp_path / "beaker.db").startswith("0")
        late = client.create_account({"name": "late"})["token"]
        for number in range(40):
            client.create_account({"name": f"b{number}", "email": "y" * 300})
    assert (place / "server.db-wal").stat().st_size > 0
    assert run("restore", tmp_path / "beaker.db").startswith("0")
    assert whole(place / "server.db")
    with serving(place) as client:
        assert len(client.list_accounts()["data"]) == 21
        client.token = late
        with pytest.raises(Error) as caught:
            client.whoami()
        assert caught.value.code == "unauthorized"
    [aside] = [path for path in place.glob("server.db.2*") if "-" not in path.name]
    assert whole(aside)
    assert {path.stat().st_mode & 0o777 for path in (aside, tmp_path / "beaker.db", place / "server.db")} == {0o600}
    assert not list(tmp_path.glob(".*")) + list(place.glob(".*"))


def test_a_backup_is_of_one_moment_while_fifty_write(server: SimpleNamespace, tmp_path: Path) -> None:
    admin = server.service.authenticate(server.admin)
    stop, made, lock = threading.Event(), [], threading.Lock()

    def write(worker: int) -> None:
        number = 0
        while not stop.is_set():
            name = f"w{worker}-{number}"
            number += 1
            with contextlib.suppress(Error):  # too busy
                server.service.create_account(admin, SimpleNamespace(
                    name=name, display_name="", email="e" * 200, institution="", role="user",
                    model_dump=dict,
                ))  # fmt: skip
                with lock:
                    made.append(name)

    writers = [threading.Thread(target=write, args=(worker,)) for worker in range(50)]
    for writer in writers:
        writer.start()
    try:
        for number in range(3):
            before = len(made)
            while len(made) < before + 20:
                stop.wait(0.01)
            sure = set(made)
            backup.backup(tmp_path / "server.db", tmp_path / f"{number}.db")
            with contextlib.closing(sqlite3.connect(tmp_path / f"{number}.db")) as copy:
                there = {name for (name,) in copy.execute("SELECT name FROM accounts")}
                alone = "SELECT count(*) FROM accounts WHERE id NOT IN (SELECT account_id FROM tokens)"
                assert copy.execute(alone).fetchone() == (0,)
                assert damage(copy) == ""
            assert there >= sure
    finally:
        stop.set()
        for writer in writers:
            writer.join()


def test_what_is_no_backup_changes_nothing(place: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    good = tmp_path / "beaker.db"
    init(place, "bob")
    assert run("backup", good).startswith("0")
    data, before = good.read_bytes(), (place / "server.db").read_bytes()

    def file(name: str, data: bytes = data, mode: int = 0o600) -> Path:
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(mode)
        return tmp_path / name

    def changed(name: str, sql: str) -> Path:
        with contextlib.closing(sqlite3.connect(file(name))) as database:
            database.executescript(sql)
        return tmp_path / name

    flipped = bytearray(data)
    flipped[4096 * 5] ^= 0x40  # the kind of a page
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    os.mkfifo(tmp_path / "fifo", 0o600)
    file("journal.db-wal", b"x" * 100)
    os.symlink(file("open/theirs"), tmp_path / "link")
    for wrong, code, says in (
        (file("half", data[: len(data) // 2]), 69, "damaged"),
        (file("flipped", bytes(flipped)), 69, "damaged"),
        (file("text", b"no database\n" * 1000), 69, "damaged: file is not a database"),
        (file("empty", b""), 64, "is no backup of a server"),
        (changed("foreign", "DROP TABLE alembic_version"), 64, "is no backup of a server"),
        (changed("newer", "UPDATE alembic_version SET version_num = '9999'"), 69, "version 9999"),
        (changed("orphan", "DELETE FROM accounts"), 69, "a row of"),
        (file("journal.db"), 64, "as a journal is beside it"),
        (tmp_path / "none", 66, "there is no database"),
        (tmp_path, 64, "is no backup"),
        (tmp_path / "fifo", 64, "is no backup"),
        (place / "server.db", 64, "is no backup"),
        (file("everybodys", mode=0o666), 77, "others can change"),
        (tmp_path / "link", 77, "others can change"),
    ):
        said = run("restore", wrong)
        assert said.startswith(f"{code} "), said
        assert says in said
        assert (place / "server.db").read_bytes() == before, wrong
        assert names(place) == ["ann", "bob"]
        assert not [path for path in place.iterdir() if path.name.startswith((".", "server.db.2"))]
    older = changed("older", "DROP TABLE facts; UPDATE alembic_version SET version_num = '0008'")
    for right in (older, good):
        assert run("restore", right).startswith("0")
        assert names(place) == ["ann", "bob"]


def test_a_restore_over_a_damaged_database_keeps_it(place: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Also where the database is elsewhere, by a link."""
    assert run("backup", tmp_path / "beaker.db").startswith("0")
    database = tmp_path / "elsewhere.db"
    database.write_bytes(b"damaged " * 1024)
    (place / "server.db").unlink()
    os.symlink(database, place / "server.db")
    assert "is damaged" in run("serve")
    assert run("restore", tmp_path / "beaker.db").startswith("0")
    assert (place / "server.db").is_symlink()
    assert whole(database)
    assert names(place) == ["ann"]
    [aside] = [path for path in tmp_path.glob("elsewhere.db.2*") if "-" not in path.name]
    assert aside.read_bytes() == b"damaged " * 1024


def test_every_flipped_bit_is_refused_or_harmless(place: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """By backup, restore and start alike: a line that says what is damaged, or all as it was."""
    assert run("backup", tmp_path / "beaker.db").startswith("0")
    data, seed = (tmp_path / "beaker.db").read_bytes(), random.randrange(1 << 32)
    dice, damaged = random.Random(seed), 0
    for number in range(10):
        flipped = bytearray(data)
        page = dice.randrange(len(data) // 4096) * 4096
        if number:
            flipped[page + dice.randrange(16 if number % 2 else 4096)] ^= 1 << dice.randrange(8)
        else:
            flipped[4096] ^= 0x80  # the kind of a page, which is damage in any case
        (tmp_path / "flipped").write_bytes(flipped)
        (tmp_path / "flipped").chmod(0o600)
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "copy").unlink()
        for words in (["restore", tmp_path / "flipped"], ["backup", tmp_path / "copy"], ["init", "--account", "ann"]):
            if words[0] != "restore":
                shutil.copyfile(tmp_path / "flipped", place / "server.db")
            if words[0] == "init":
                words += ["--token-file", place / "token", "--executor-token-file", place / "executor.token"]
            said = run(*words)
            assert said.startswith(("0 ", "69 ", "64 ", "77 ")), (seed, number, words, said)
            if said.startswith("69 ") and "damaged" in said:
                damaged += 1
                assert "restore" in said or "another backup" in said
            for journal in backup.JOURNALS:
                Path(f"{place / 'server.db'}{journal}").unlink(missing_ok=True)
    assert damaged > 2


def test_another_key_is_refused(place: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    with serving(place) as client:
        client.create_workspace({"name": "ann/w"})
        client.write_secret("ann/w", "KEEP", b"kept")
        assert run("backup", tmp_path / "beaker.db").startswith("0")
    assert (place / "server.key").read_bytes() not in (tmp_path / "beaker.db").read_bytes()
    right = (place / "server.key").read_bytes()
    (place / "server.key").write_bytes(os.urandom(32))
    refused = "sealed with another key"
    assert refused in run("restore", tmp_path / "beaker.db")
    assert refused in run("init", "--account", "x", "--token-file", "/none", "--executor-token-file", "/none")
    (place / "server.key").unlink()
    assert "is missing" in run("restore", tmp_path / "beaker.db")
    assert not (place / "server.key").exists()
    (place / "server.key").write_bytes(right)
    assert run("restore", tmp_path / "beaker.db").startswith("0")
    with serving(place) as client:
        assert client.read_secret("ann/w", "KEEP") == b"kept"


def test_what_was_revoked_since_stays_so(place: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    with serving(place) as client:
        brief = client.create_token({"name": "brief"})
        link = client.create_link()
        assert run("backup", tmp_path / "beaker.db").startswith("0")
        client.revoke_token(brief["id"])
    before = epoch(place)
    assert run("restore", tmp_path / "beaker.db").startswith("0")
    assert epoch(place) != before
    assert link
    with contextlib.closing(sqlite3.connect(place / "server.db")) as database:
        assert database.execute("SELECT count(*) FROM signins").fetchone() == (0,)
        shown = database.execute("SELECT revoked FROM tokens WHERE id = ?", (brief["id"],)).fetchone()
    assert shown[0]
    with serving(place) as client:
        assert client.whoami()["name"] == "ann"
        client.token = brief["token"]
        with pytest.raises(Error, match="revoked"):
            client.whoami()


def epoch(place: Path) -> str:
    opened = Store(sqlite_url(place / "server.db"))
    opened.close()
    assert ids.is_ulid(opened.epoch)
    return opened.epoch


def test_nobody_uses_the_database_during_a_restore(place: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    assert run("backup", tmp_path / "beaker.db").startswith("0")
    with serving(place):
        assert "73 beaker-server: a server or a backup uses" in run("restore", tmp_path / "beaker.db")
    with contextlib.closing(sqlite3.connect(place / "server.db")) as other:  # a program that knows nothing of the lock
        other.execute("SELECT count(*) FROM accounts").fetchone()
        assert "73 beaker-server: a program uses" in run("restore", tmp_path / "beaker.db")
    with backup.in_use(place / "server.db", alone=True):
        for words in (["backup", tmp_path / "2.db"], ["serve"], ["restore", tmp_path / "beaker.db"]):
            assert run(*words).startswith("73 ")
    assert run("restore", tmp_path / "beaker.db").startswith("0")


def test_a_backup_is_written_where_nobody_else_can(tmp_path: Path, run: Callable[..., str]) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    os.symlink(victim, tmp_path / "link")
    os.symlink(tmp_path / "nothing", tmp_path / "dangling")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, 12345)
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky").chmod(0o1777)
    (tmp_path / "sticky/.caught.partial").mkdir(mode=0o700)
    os.chown(tmp_path / "sticky/.caught.partial", 12345, 12345)
    (tmp_path / "sticky/.caught.partial/precious").touch()
    os.symlink(tmp_path / "theirs", tmp_path / "sticky/.led.partial")
    for target, code in (
        (victim, 73), (tmp_path / "link", 73), (tmp_path / "dangling", 73), (tmp_path / "open/b.db", 77),
        (tmp_path / "theirs/b.db", 77), (tmp_path / "sticky/caught", 77), (tmp_path / "sticky/led", 69),
        (tmp_path / "none/b.db", 69), (tmp_path, 73),
    ):  # fmt: skip
        said = run("backup", target)
        assert said.startswith(f"{code} "), (target, said)
    assert victim.read_text() == "kept"
    assert not (tmp_path / "nothing").exists()
    assert (tmp_path / "sticky/.caught.partial/precious").exists()
    assert not list((tmp_path / "theirs").iterdir()) + list((tmp_path / "open").iterdir())
    assert run("backup", tmp_path / "sticky/b.db").startswith("0")
    assert (tmp_path / "sticky/b.db").stat().st_mode & 0o777 == 0o600
    assert run("--database", "postgresql://u:geheim@db/beaker", "backup", tmp_path / "p").startswith("64 ")


def test_a_full_disk_is_said_and_changes_nothing(place: Path, tmp_path: Path) -> None:
    """On a file system with room for little."""
    (tmp_path / "small").mkdir()
    script = f"""
        mount -t tmpfs -o size=64k,mode=755 tmpfs {tmp_path}/small
        beaker="{sys.executable} -m beaker_sessions.server.main"
        $beaker --storage-path {place} backup {tmp_path}/good.db || exit 1
        $beaker --storage-path {place} backup {tmp_path}/small/b.db; echo "$? $(ls -A {tmp_path}/small)"
        mkdir {tmp_path}/small/state
        $beaker --storage-path {tmp_path}/small/state restore {tmp_path}/good.db
        echo "$? $(ls -A {tmp_path}/small/state)"
    """
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[1:] == ["74 ", "74 server.db.lock"], (done.stdout, done.stderr)
    assert done.stderr.count("is full") == 2
    assert names(place) == ["ann"]


def test_a_database_that_is_gone_is_not_begun_anew(place: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    again = ["init", "--account", "ann", "--token-file", place / "token", "--executor-token-file", place / "e"]
    assert run("backup", tmp_path / "beaker.db").startswith("0")
    database = place / "server.db"
    for lose in (database.unlink, lambda: database.write_bytes(b""), lambda: emptied(database)):
        lose()
        for words in (again, ["serve"]):
            said = run(*words)
            assert said.startswith("69 "), said
            assert "there was one" in said
            assert "beaker-server restore FILE" in said
        assert run("restore", tmp_path / "beaker.db").startswith("0")
        assert names(place) == ["ann"]
    database.unlink()
    (place / "server.made").unlink()
    assert run(*again).startswith("0")


def emptied(database: Path) -> None:
    database.unlink()
    with contextlib.closing(sqlite3.connect(database)) as made:
        made.executescript("PRAGMA journal_mode=WAL; CREATE TABLE x (y); DROP TABLE x")


def test_a_newer_database_gets_one_line(place: Path, run: Callable[..., str]) -> None:
    with contextlib.closing(sqlite3.connect(place / "server.db")) as database:
        database.executescript("UPDATE alembic_version SET version_num = '9999'")
    said = run("serve")
    assert said.startswith("69 beaker-server: the database is of version 9999")
    assert len(said.strip().splitlines()) == 2  # what is wrong, and what to do


def test_damage_that_shows_later_names_the_command(server: SimpleNamespace, tmp_path: Path) -> None:
    root = server.client(server.admin)
    with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
        page = database.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'organizations'").fetchone()[0]
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(tmp_path / "server.db", "r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 100)
    server.service.store.engine.dispose()  # with what it keeps in memory
    with pytest.raises(Error, match="is damaged") as caught:
        root.get_organization("lab")
    assert "beaker-server restore FILE" in caught.value.hint
    assert caught.value.code == "unavailable"


def test_a_damaged_record_holds_nobody_up(server: SimpleNamespace, node: SimpleNamespace) -> None:
    """Its node gets the others, and what the node reports takes its place; until then it is told for what it is."""
    ann = server.client(server.ann)
    first, second = (ann.create_job({"session": {"node": "gpu-1"}}) for _ in range(2))
    with server.service.store.write() as rows:
        rows.update(tables.jobs, first["id"], body=json.dumps(first)[:-9])
    assert [job["id"] for job in node.beat()["jobs"]] == [second["id"]]
    with pytest.raises(Error, match="is damaged") as caught:
        ann.get_job(first["id"])
    assert (caught.value.code, "beaker-server restore" in caught.value.hint) == ("unavailable", True)
    session = Session(first["id"], "ann", node.id, Request(), revision=2)
    node.executor.report_job(first["id"], wire.job(session))
    assert ann.get_job(first["id"])["author"]["name"] == "ann"
    with server.service.store.write() as rows:
        rows.connection.exec_driver_sql("UPDATE accounts SET created = 'y', email = CAST(x'ff' AS TEXT)")
    with pytest.raises(Error, match="is damaged"):
        ann.whoami()


def test_who_starts_waits_for_who_makes_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: longer than a transaction waits."""
    monkeypatch.setattr(store, "WAIT", 0.01)
    made: list[Store] = []
    with contextlib.closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as first:
        first.execute("BEGIN EXCLUSIVE")
        start = threading.Thread(target=lambda: made.append(Store(sqlite_url(tmp_path / "db"))))
        start.start()
        start.join(0.5)
        first.execute("ROLLBACK")
    start.join()
    assert made
    made[0].close()


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_killed_at_every_step(place: Path, tmp_path: Path, command: str) -> None:
    """Before and after each call that changes a file: the database is the old or the new one, and a server starts."""
    with serving(place):
        assert main(["--storage-path", str(place), "backup", str(tmp_path / "beaker.db")]) == 0
        init(place, "bob")  # while the server runs, so that it is in the journal when that is killed
    assert (place / "server.db-wal").stat().st_size > 0
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.server.killed", command, str(place), str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["steps"] > 10
    assert set(seen["states"]) == ({"old", "new"} if command == "restore" else {"old"})
