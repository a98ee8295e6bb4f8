"""The database: transactions, and every query there is. Only `_sqlite` is SQLite's alone.

Owns SQL and the translation of database failures into `errors.Error`; must not know rules or permissions. A transaction
has one clock, `now`. `write` commits before it returns: what was acknowledged is on the disk.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa

from .. import ids
from ..errors import Error
from ..integrity import MEND, damage, is_damage
from ..model import State
from . import migrations, tables
from .tables import accounts, answers, audit, clusters, jobs, nodes, organizations, tokens

Row = sa.Row[Any]
KEPT = timedelta(days=7)  # how long an idempotency key is remembered
WAIT = 5.0  # seconds that a transaction waits for the one that writes
START = 300.0  # and a server that starts for another that makes or migrates the database
log = logging.getLogger(__name__)


class Rows:
    """One transaction. Rows are SQLAlchemy's; `one` is None where nothing matches."""

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection
        self.now = datetime.now(UTC)
        self.touched: set[str] = set()

    # any table

    def one(self, table: sa.Table, **where: Any) -> Row | None:
        return self.connection.execute(sa.select(table).filter_by(**where)).one_or_none()

    def the(self, table: sa.Table, id: str) -> Row:
        """A row that is known to be there."""
        return self.connection.execute(sa.select(table).where(table.c.id == id)).one()

    def all(self, table: sa.Table, **where: Any) -> Sequence[Row]:
        order = next(iter(table.primary_key))
        return self.connection.execute(sa.select(table).filter_by(**where).order_by(order)).all()

    def insert(self, table: sa.Table, **values: Any) -> None:
        self.connection.execute(sa.insert(table).values(**values))

    def update(self, table: sa.Table, id: str, **values: Any) -> None:
        self.connection.execute(sa.update(table).where(table.c.id == id).values(**values))

    def record(self, account: str, token: str, action: str, object: str, **details: Any) -> None:
        """The audit row of a change, in the change's own transaction."""
        values = {"account_id": account, "token_id": token, "action": action, "object": object}
        self.insert(audit, id=ids.ulid(), at=self.now, details=json.dumps(details, ensure_ascii=False), **values)
        self.touch(object)

    def touch(self, *ids: str) -> None:
        """Say that these things look different from now on, to whoever watches them; after the commit."""
        self.touched.update(ids)

    # accounts

    def token(self, hash: str) -> Row | None:
        """A token with its account's `name` and `role`."""
        query = sa.select(tokens, accounts.c.name.label("account"), accounts.c.role).join(accounts)
        return self.connection.execute(query.where(tokens.c.hash == hash)).one_or_none()

    def signin(self, hash: str, link: bool) -> Row | None:
        """The token behind a browser's cookie or a one-time link, as `token` gives it; None when that has expired."""
        signins = tables.signins
        query = sa.select(tokens, accounts.c.name.label("account"), accounts.c.role).join(accounts).join(signins)
        query = query.where(signins.c.hash == hash, signins.c.link == link, signins.c.expiry > self.now)
        return self.connection.execute(query).one_or_none()

    def add_signin(self, hash: str, token: str, link: bool, life: timedelta) -> None:
        self.connection.execute(sa.delete(tables.signins).where(tables.signins.c.expiry <= self.now))
        values = {"hash": hash, "token_id": token, "link": link, "created": self.now, "expiry": self.now + life}
        self.insert(tables.signins, **values)

    def remove_signin(self, hash: str) -> bool:
        """Whether it was there."""
        gone = self.connection.execute(sa.delete(tables.signins).where(tables.signins.c.hash == hash))
        return gone.rowcount == 1

    def forget_signins(self) -> None:
        self.connection.execute(sa.delete(tables.signins))

    def account(self, ref: str) -> Row | None:
        """By id or name."""
        return self.one(accounts, **{"id" if ids.is_ulid(ref) else "name": ref})

    def organization(self, ref: str) -> Row | None:
        return self.one(organizations, **{"id" if ids.is_ulid(ref) else "name": ref})

    def organizations_of(self, account: str) -> Sequence[Row]:
        query = sa.select(organizations).join(tables.members).where(tables.members.c.account_id == account)
        return self.connection.execute(query.order_by(organizations.c.name)).all()

    def members(self, organization: str) -> Sequence[Row]:
        query = sa.select(accounts).join(tables.members).where(tables.members.c.organization_id == organization)
        return self.connection.execute(query.order_by(accounts.c.name)).all()

    def revoke_tokens_of_node(self, node: str) -> None:
        self.connection.execute(
            sa.update(tokens).where(tokens.c.node_id == node, tokens.c.revoked.is_(None)).values(revoked=self.now)
        )

    def rename_node_of_tokens(self, node: str, hostname: str) -> None:
        self.connection.execute(sa.update(tokens).where(tokens.c.node_id == node).values(hostname=hostname))

    def refused(self, hashes: Sequence[str]) -> list[str]:
        """Those of tokens that have ended. One that is not known is of another database: nothing is said of it."""
        if not hashes:
            return []
        ended = tokens.c.revoked.is_not(None) | (tokens.c.expiry <= self.now)
        query = sa.select(tokens.c.hash).where(tokens.c.hash.in_(hashes), ended)
        return sorted(self.connection.execute(query).scalars())

    # clusters and nodes

    def clusters(self, **where: Any) -> Sequence[Row]:
        """Clusters with their `organization`'s name. where: columns, or `full_name`."""
        full_name = where.pop("full_name", None)
        query = sa.select(clusters, organizations.c.name.label("organization")).join(organizations)
        query = query.where(*(clusters.c[name] == value for name, value in where.items()))
        if full_name is not None:
            org, _, name = full_name.partition("/")
            query = query.where(organizations.c.name == org, clusters.c.name == name, clusters.c.deleted.is_(None))
        return self.connection.execute(query.order_by(clusters.c.name)).all()

    def fallen_silent(self, since: datetime) -> set[str]:
        """Ids of the nodes that became "not reporting" since then, and of their clusters."""
        query = sa.select(nodes.c.id, nodes.c.cluster_id).where(nodes.c.expiry > since, nodes.c.expiry <= self.now)
        return {id for row in self.connection.execute(query) for id in row}

    def nodes(self, **where: Any) -> Sequence[Row]:
        """Nodes that are not deleted, with their cluster's `cluster` and `organization` names."""
        named = (clusters.c.name.label("cluster"), organizations.c.name.label("organization"))
        query = sa.select(nodes, *named).join(clusters, nodes.c.cluster_id == clusters.c.id).join(organizations)
        query = query.where(nodes.c.deleted.is_(None), *(nodes.c[name] == value for name, value in where.items()))
        return self.connection.execute(query.order_by(nodes.c.hostname)).all()

    # jobs

    def jobs(
        self, *, before: str | None = None, final: bool | None = None, limit: int | None = None, **where: Any
    ) -> Sequence[Row]:
        """Jobs, newest first, with the names of their account, node and cluster."""
        query = (
            sa.select(
                jobs,
                accounts.c.name.label("author"),
                accounts.c.display_name.label("author_display_name"),
                nodes.c.hostname,
                nodes.c.expiry,
                clusters.c.name.label("cluster"),
                organizations.c.name.label("organization"),
            )
            .join(accounts, jobs.c.account_id == accounts.c.id)
            .join(nodes, jobs.c.node_id == nodes.c.id)
            .join(clusters, jobs.c.cluster_id == clusters.c.id)
            .join(organizations)
            .where(*(jobs.c[name] == value for name, value in where.items() if name not in ("scheduled", "nodes")))
        )
        if "nodes" in where:
            query = query.where(jobs.c.node_id.in_(where["nodes"]))
        if before is not None:
            query = query.where(jobs.c.id < before)
        if final is not None:
            query = query.where((jobs.c.state == State.FINALIZED) == final)
        if "scheduled" in where:
            query = query.where((jobs.c.state != State.CREATED) == where["scheduled"])
        return self.connection.execute(query.order_by(jobs.c.id.desc()).limit(limit)).all()

    def waiting(self, node: str) -> Sequence[Row]:
        """Jobs that the node has not reported yet, oldest first."""
        return list(reversed(self.jobs(node_id=node, taken=None, final=False)))

    def to_cancel(self, node: str) -> Sequence[str]:
        query = sa.select(jobs.c.id).where(jobs.c.node_id == node, jobs.c.state != State.FINALIZED)
        return self.connection.execute(query.where(jobs.c.cancel_asked.is_not(None))).scalars().all()

    def watched(self, node: str, since: datetime) -> dict[str, datetime]:
        """Running jobs of a node whose output their authors have looked at since then: when the last time."""
        query = sa.select(jobs.c.id, jobs.c.watched).where(jobs.c.node_id == node, jobs.c.state == State.STARTED)
        return {row.id: row.watched for row in self.connection.execute(query.where(jobs.c.watched > since))}

    def keep_logs(self, job: str, output: bytes) -> None:
        self.connection.execute(sa.delete(tables.logs).where(tables.logs.c.job_id == job))
        self.insert(tables.logs, job_id=job, output=output, at=self.now)

    def drop_logs(self, account: str, limit: int) -> None:
        """Of the account's outputs of ended jobs keep the newest that have `limit` bytes together."""
        logs = tables.logs
        newest = (logs.c.at.desc().nulls_last(), logs.c.job_id.desc())
        total = sa.func.sum(sa.func.length(logs.c.output)).over(order_by=newest)
        ended = sa.select(logs.c.job_id, total.label("total")).join(jobs, logs.c.job_id == jobs.c.id)
        ended = ended.where(jobs.c.account_id == account, jobs.c.state == State.FINALIZED)
        sums = ended.subquery()
        old = sa.select(sums.c.job_id).where(sums.c.total > limit)
        self.connection.execute(sa.delete(logs).where(logs.c.job_id.in_(old)))

    # secrets

    def count_secrets(self, account: str) -> int:
        query = sa.select(sa.func.count()).select_from(tables.secrets).join(tables.workspaces)
        return int(self.connection.execute(query.where(tables.workspaces.c.account_id == account)).scalar_one())

    def some_secrets(self, limit: int) -> Sequence[Row]:
        return self.connection.execute(sa.select(tables.secrets).limit(limit)).all()

    def keep_secret(self, workspace: str, name: str, sealed: bytes, created: datetime | None) -> None:
        """created: of the value before, None for a new secret."""
        self.forget_secret(workspace, name)
        values = {"sealed": sealed, "created": created or self.now, "updated": self.now}
        self.insert(tables.secrets, workspace_id=workspace, name=name, **values)

    def forget_secret(self, workspace: str, name: str) -> None:
        secrets = tables.secrets
        self.connection.execute(sa.delete(secrets).where(secrets.c.workspace_id == workspace, secrets.c.name == name))

    def audit(self, text: str, before: str | None, limit: int) -> Sequence[Row]:
        """Audit rows with the names of `account` and `token`, newest first, in which each word of the text occurs."""
        query = sa.select(audit, accounts.c.name.label("account"), tokens.c.name.label("token")).select_from(audit)
        query = query.join(accounts, audit.c.account_id == accounts.c.id)
        query = query.outerjoin(tokens, audit.c.token_id == tokens.c.id)
        for word in text.split():
            columns = (audit.c.action, audit.c.object, accounts.c.name, tokens.c.name, audit.c.details)
            places = [column.contains(word, autoescape=True) for column in columns]
            written = json.dumps(word)[1:-1]  # the details are JSON
            query = query.where(sa.or_(*places, audit.c.details.contains(written, autoescape=True)))
        if before is not None:
            query = query.where(audit.c.id < before)
        return self.connection.execute(query.order_by(audit.c.id.desc()).limit(limit)).all()

    # metrics

    def states(self) -> dict[str, int]:
        """State -> number of jobs that are in it, without those that are final."""
        query = sa.select(jobs.c.state, sa.func.count()).where(jobs.c.state != State.FINALIZED).group_by(jobs.c.state)
        return {row[0]: row[1] for row in self.connection.execute(query)}

    def keep_sample(self, node: str, step: int, at: int, body: str) -> None:
        """In place of the one of that moment, if there is one."""
        samples, key = tables.samples, {"node_id": node, "step": step, "at": at}
        changed = self.connection.execute(sa.update(samples).filter_by(**key).values(body=body))
        if changed.rowcount == 0:
            self.insert(samples, body=body, **key)

    def samples(self, nodes: Sequence[str], step: int, start: int, end: int | None = None) -> Sequence[Row]:
        """Of these nodes from `start` on, before `end`, the oldest first."""
        samples = tables.samples
        query = sa.select(samples).where(samples.c.node_id.in_(nodes), samples.c.step == step, samples.c.at >= start)
        if end is not None:
            query = query.where(samples.c.at < end)
        return self.connection.execute(query.order_by(samples.c.at)).all()

    def forget_samples(self, before: Mapping[int, int]) -> None:
        """before: step -> the oldest moment that is kept."""
        for step, at in before.items():
            self.connection.execute(
                sa.delete(tables.samples).where(tables.samples.c.step == step, tables.samples.c.at < at)
            )

    # the database itself

    def fact(self, name: str) -> str | None:
        row = self.one(tables.facts, name=name)
        return None if row is None else str(row.value)

    def set_fact(self, name: str, value: str) -> None:
        self.connection.execute(sa.delete(tables.facts).where(tables.facts.c.name == name))
        self.insert(tables.facts, name=name, value=value)

    # idempotency

    def keep_answer(self, account: str, key: str, fingerprint: str, answer: dict[str, Any]) -> None:
        self.connection.execute(sa.delete(answers).where(answers.c.created < self.now - KEPT))
        values = {"account_id": account, "key": key, "fingerprint": fingerprint, "created": self.now}
        self.insert(answers, answer=json.dumps(answer), **values)


class Store:
    """The database at `url`, a SQLAlchemy URL, migrated to the newest version.

    new: whether it may be an empty one, which is then filled with tables. epoch: changes when a backup is restored, and
    with another database. Raises Error invalid or unavailable: for a damaged, a newer or an empty one, too.
    """

    def __init__(self, url: str, *, new: bool = True) -> None:
        self.on_commit: Callable[[set[str]], None] = lambda _: None  # told the ids of what was changed
        try:
            self.engine = sa.create_engine(url, pool_size=8, max_overflow=32, pool_timeout=10, hide_parameters=True)
        except (sa.exc.ArgumentError, ModuleNotFoundError, TypeError) as error:
            hint = "for example sqlite:////var/lib/beaker/server.db"
            raise Error("invalid", f"database: not a URL of a database file or server: {error}", hint) from error
        if self.engine.dialect.name == "sqlite":
            _sqlite(self.engine, WAIT)
        with self._translated():
            self._begin(new)
        with self.read() as rows:
            self.epoch = rows.fact("epoch") or ""

    def _begin(self, new: bool) -> None:
        """Look whether the database is whole, and migrate it, with the patience that several starts at once need."""
        engine = sa.create_engine(self.engine.url, poolclass=sa.NullPool, hide_parameters=True)
        if engine.dialect.name == "sqlite":
            _sqlite(engine, START)
            with engine.connect().execution_options(beaker_read=True) as connection:
                if found := damage(cast(sqlite3.Connection, connection.connection.dbapi_connection), quick=True):
                    raise _damaged(str(engine.url.database), found)
        migrations.upgrade(engine, new=new)

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Rows]:
        with self._translated(), self.engine.connect().execution_options(beaker_read=True) as connection:
            yield Rows(connection)

    @contextmanager
    def write(self) -> Iterator[Rows]:
        """A transaction that is committed at the end of the block, and rolled back by any exception."""
        with self._translated(), self.engine.begin() as connection:
            rows = Rows(connection)
            yield rows
        self.on_commit(rows.touched)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.IntegrityError as error:
            raise Error("conflict", "somebody else just made the same thing", "look at it, then try again") from error
        except json.JSONDecodeError as error:  # what callers send was read before
            raise _damaged(str(self.engine.url.database), f"a record is no JSON: {error}") from error
        except (sa.exc.DBAPIError, sa.exc.TimeoutError, sqlite3.Error) as error:
            cause = getattr(error, "orig", None) or error
            if is_damage(cause):
                log.error("database: damaged: %s", cause)
                raise _damaged(str(self.engine.url.database), str(cause)) from error
            reason = getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or str(cause)
            log.error("database: %s: %s", reason, cause)
            hint = "try again: nothing is done twice; if it stays so, see the server's log"
            raise Error("unavailable", f"the server's database does not answer: {reason}", hint) from error


def sqlite_url(path: Path) -> str:
    return sa.URL.create("sqlite", database=str(path)).render_as_string()


def _damaged(path: str, found: str) -> Error:
    return Error("unavailable", f"the database {path} is damaged: {found}", MEND)


def _write_ahead(connection: Any, wait: float) -> None:
    """Switch a new file to WAL. Of several servers that do so at once SQLite refuses all but one, without waiting."""
    until = time.monotonic() + wait
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.05)


def _sqlite(engine: sa.Engine, wait: float) -> None:
    """Full durability, foreign keys, and writers that wait for each other, for `wait` seconds, instead of failing."""

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # so that the BEGIN below is the only one
        for pragma in (f"busy_timeout={wait * 1000:.0f}", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        _write_ahead(connection, wait)

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        reading = connection.get_execution_options().get("beaker_read")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
