"""The tables as SQLAlchemy sees them. Owns names and types of columns; must hold no query.

A change here needs a migration in `migrations/versions`; a test compares the two. JSON is kept as ASCII text, so that a
command line with undecodable bytes survives in any database.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from ..errors import Error
from ..integrity import MEND

METADATA = sa.MetaData()


class Time(sa.TypeDecorator[datetime]):
    """A moment in UTC; SQLite itself knows no time zones."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

    def result_processor(self, dialect: Any, coltype: Any) -> Any:
        read = super().result_processor(dialect, coltype)

        def checked(value: Any) -> Any:
            try:
                return read(value) if read else value
            except (TypeError, ValueError) as error:
                raise Error("unavailable", f"the server's database is damaged: {value!r} is no time", MEND) from error

        return checked


def _id() -> sa.Column[str]:
    return sa.Column("id", sa.String(26), primary_key=True)


def _ref(table: str, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(f"{table.removesuffix('s')}_id", sa.String(26), sa.ForeignKey(f"{table}.id"), nullable=nullable)


def _live(name: str, *columns: str) -> sa.Index:
    """Unique among the rows that are not deleted."""
    live = sa.text("deleted IS NULL")
    return sa.Index(name, *columns, unique=True, sqlite_where=live, postgresql_where=live)


accounts = sa.Table(
    "accounts",
    METADATA,
    _id(),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("display_name", sa.Text, nullable=False),
    sa.Column("email", sa.Text, nullable=False),
    sa.Column("institution", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("created", Time, nullable=False),
)
organizations = sa.Table(
    "organizations",
    METADATA,
    _id(),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("display_name", sa.Text, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("created", Time, nullable=False),
)
members = sa.Table(
    "members",
    METADATA,
    sa.Column("organization_id", sa.String(26), sa.ForeignKey("organizations.id"), primary_key=True),
    sa.Column("account_id", sa.String(26), sa.ForeignKey("accounts.id"), primary_key=True),
)
clusters = sa.Table(
    "clusters",
    METADATA,
    _id(),
    _ref("organizations"),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("capacity", sa.Integer, nullable=False),
    sa.Column("preemptible", sa.Boolean, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),  # JSON
    sa.Column("created", Time, nullable=False),
    sa.Column("deleted", Time),
    _live("clusters_name", "organization_id", "name"),
)
nodes = sa.Table(
    "nodes",
    METADATA,
    _id(),
    _ref("clusters"),
    _ref("accounts"),
    sa.Column("hostname", sa.Text, nullable=False),
    sa.Column("limits", sa.Text, nullable=False),  # JSON
    sa.Column("instance", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("free", sa.Text, nullable=False),  # JSON
    sa.Column("queue", sa.Integer, nullable=False),
    sa.Column("cordoned", Time),
    sa.Column("cordon_reason", sa.Text, nullable=False),
    sa.Column("drained", sa.Text, nullable=False, server_default=""),
    sa.Column("created", Time, nullable=False),
    sa.Column("seen", Time),
    sa.Column("expiry", Time, nullable=False),
    sa.Column("deleted", Time),
    _live("nodes_hostname", "hostname"),
)
tokens = sa.Table(
    "tokens",
    METADATA,
    _id(),
    _ref("accounts"),
    _ref("nodes", nullable=True),  # an executor's token: the node that it registered
    sa.Column("hostname", sa.Text),  # and the machine that it is for; null: for one that is not known yet
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("session", sa.String(26)),  # whose token it is; reported by its node a little later, hence no reference
    sa.Column("parent", sa.String(26)),  # the token that a session's was made with, and ends with; null: by the server
    # made by a sign-in through a provider: nobody knows it, and it ends when its browser signs out
    sa.Column("browser", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("created", Time, nullable=False),
    sa.Column("expiry", Time),
    sa.Column("revoked", Time),
)
signins = sa.Table(  # browsers that are signed in, and one-time links that will sign one in
    "signins",
    METADATA,
    sa.Column("hash", sa.String(64), primary_key=True),  # of the cookie's or link's secret, which is not kept
    _ref("tokens"),  # what it may do is what this token may, as long as it may
    sa.Column("link", sa.Boolean, nullable=False),
    sa.Column("created", Time, nullable=False),
    sa.Column("expiry", Time, nullable=False),
    sa.Index("signins_expiry", "expiry"),
)
jobs = sa.Table(
    "jobs",
    METADATA,
    _id(),
    _ref("accounts"),
    _ref("clusters"),
    _ref("nodes"),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("handed", Time),  # first given to the node in an answer to its heartbeat
    sa.Column("taken", Time),  # first reported by the node
    sa.Column("cancel_asked", Time),
    sa.Column("canceled_for", sa.Text, nullable=False),
    sa.Column("watched", Time),  # when its author last looked at its output while it ran
    sa.Column("body", sa.Text, nullable=False),  # JSON: `wire.job`
    sa.Index("jobs_node", "node_id", "state"),
    sa.Index("jobs_account", "account_id"),
)
workspaces = sa.Table(
    "workspaces",
    METADATA,
    _id(),
    _ref("accounts"),
    sa.Column("full_name", sa.Text, nullable=False, unique=True),
    sa.Column("created", Time, nullable=False),
    sa.Column("modified", Time, nullable=False),
    sa.Column("archived", sa.Boolean, nullable=False),
)
secrets = sa.Table(
    "secrets",
    METADATA,
    sa.Column("workspace_id", sa.String(26), sa.ForeignKey("workspaces.id"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("sealed", sa.LargeBinary, nullable=False),  # by `seal.Seal`
    sa.Column("created", Time, nullable=False),
    sa.Column("updated", Time, nullable=False),
)
logs = sa.Table(
    "logs",
    METADATA,
    sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("output", sa.LargeBinary, nullable=False),
    sa.Column("at", Time),  # when the node sent it
)
samples = sa.Table(  # what nodes used, ever coarser the older
    "samples",
    METADATA,
    sa.Column("node_id", sa.String(26), sa.ForeignKey("nodes.id"), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),  # seconds
    sa.Column("at", sa.BigInteger, primary_key=True),  # seconds since the epoch, a multiple of step
    sa.Column("body", sa.Text, nullable=False),  # JSON: `metrics.Point`
    sa.Index("samples_age", "step", "at"),
)
answers = sa.Table(  # what was answered to a create with an idempotency key
    "answers",
    METADATA,
    sa.Column("account_id", sa.String(26), sa.ForeignKey("accounts.id"), primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("answer", sa.Text, nullable=False),  # JSON, without secrets
    sa.Column("created", Time, nullable=False),
    sa.Index("answers_created", "created"),
)
facts = sa.Table(  # about the database itself: `epoch`, which is another one after a restore
    "facts",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
audit = sa.Table(
    "audit",
    METADATA,
    _id(),
    sa.Column("at", Time, nullable=False),
    _ref("accounts"),
    sa.Column("token_id", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("object", sa.Text, nullable=False),
    sa.Column("details", sa.Text, nullable=False),  # JSON
)
