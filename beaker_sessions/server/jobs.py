"""Sessions, as jobs of kind session: rules and answers. The node decides their fate; this records what it reports.

Everybody sees that a session is there and what it holds. Its command and its variables are shown to its author and to
administrators only, and its output to its author alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from .. import ids, model, wire
from ..bodies import JobBody, JobPatch, SessionBody
from ..errors import Error
from ..model import Resources, State
from . import tables
from .nodes import cluster_of, fence, node_of, usable
from .rules import JSON, Caller, Rules, found
from .store import Row, Rows

PAGE = 100
LOG_LIMIT = 1 << 20  # bytes of the output of a session that has ended
LOGS_LIMIT = 256 << 20  # and of the outputs of one account's sessions that have ended; the oldest make room
LIVE_LIMIT = 64 << 10  # of the output of one that runs
LOOKED = timedelta(seconds=15)  # between two notes that somebody looks
REPORTED = ("queuePosition",)  # what a report may say beside the session itself


class Jobs(Rules):
    def list_jobs(
        self,
        caller: Caller,
        *,
        kind: str | None = None,
        node: str | None = None,
        nodes: Sequence[str] | None = None,
        cluster: str | None = None,
        author: str | None = None,
        finalized: bool | None = None,
        scheduled: bool | None = None,
        cursor: str | None = None,
        limit: int = PAGE,
    ) -> JSON:
        """One page, newest first. node, cluster, author: ids or names. cursor: `next` of the page before.

        nodes: ids of nodes, for the console, which shows many at once.
        """
        if cursor is not None and not ids.is_ulid(cursor):
            raise Error("invalid", f"cursor: {cursor!r} is not one of ours", "take it from the page before")
        where: dict[str, Any] = {} if scheduled is None else {"scheduled": scheduled}
        with self.store.read() as rows:
            if kind not in (None, "session"):
                return {"data": []}
            if node is not None:
                where["node_id"] = node_of(rows, node).id
            if nodes is not None:
                where["nodes"] = nodes
            if cluster is not None:
                where["cluster_id"] = cluster_of(rows, cluster).id
            if author is not None:
                where["account_id"] = found(rows.account(author), "account", author).id
            limit = max(1, min(limit, 1000))
            result = rows.jobs(before=cursor, final=finalized, limit=limit + 1, **where)
            more = {"next": result[limit - 1].id, "nextCursor": result[limit - 1].id} if len(result) > limit else {}
            return {"data": [job_json(row, caller) for row in result[:limit]]} | more

    def get_job(self, caller: Caller, id: str) -> JSON:
        with self.store.read() as rows:
            return job_json(job_of(rows, id), caller)

    def create_job(self, caller: Caller, body: JobBody) -> JSON:
        """Record a session for the node that was named, or for the best of a cluster; the node fetches it."""
        caller.need_user()

        def make(rows: Rows) -> JSON:
            wanted = body.session.request(tty=True, stdin=True, size=(24, 80))
            node = place(rows, body.session, wanted)
            session = model.Session(ids.ulid(), caller.account, node.id, wanted, created=rows.now)
            values = {"cluster_id": node.cluster_id, "state": session.state.value, "revision": session.revision}
            values |= {"account_id": caller.account_id, "canceled_for": "", "body": json.dumps(wire.job(session))}
            rows.insert(tables.jobs, id=session.id, node_id=node.id, **values)
            self.record(rows, caller, "create_job", session.id, node=node.hostname)
            rows.touch(node.id, node.cluster_id, caller.account_id)
            return job_json(job_of(rows, session.id), caller)

        return self.once(caller, "create_job", body.model_dump(), make)

    def update_job(self, caller: Caller, id: str, body: JobPatch) -> JSON:
        """Cancel: at once when the node never heard of the session, else the node is asked to. Once is enough."""
        if caller.session != id:  # a session may stop itself
            caller.need_user()
        with self.store.write() as rows:
            row = job_of(rows, id)
            if row.account_id != caller.account_id and not caller.admin:
                raise Error("forbidden", f"session {id} is {row.author}'s", "ask them, or an administrator, to stop it")
            status = body.status
            if status is not None and status.canceled is False:
                raise Error("invalid", "status.canceled: what was canceled stays so", "create a new session")
            if status is not None and status.canceled and row.state != State.FINALIZED and row.cancel_asked is None:
                reason = status.canceled_for or ""
                values: JSON = {"cancel_asked": rows.now, "canceled_for": reason}
                if row.handed is None and row.taken is None:
                    session = wire.session(json.loads(row.body))
                    session = replace(session, state=State.FINALIZED, finalized=rows.now, canceled=rows.now)
                    session = replace(session, canceled_for=reason, message="canceled before it started")
                    values |= {"state": session.state.value, "body": json.dumps(wire.job(session))}
                rows.update(tables.jobs, id, **values)
                self.record(rows, caller, "update_job", id, canceled=True, canceledFor=reason)
                rows.touch(row.node_id, row.cluster_id, row.account_id)
            return job_json(job_of(rows, id), caller)

    def report_job(self, caller: Caller, id: str, body: JSON) -> JSON:
        """What the node says about its session. Only a higher revision changes anything, and nothing that is final.

        body: `wire.job`, and optionally the executor's `instance`, which is then checked.
        """
        node = caller.need_node()
        session = wire.session(body)
        if session.id != id:
            raise Error("invalid", f"id: {session.id!r} is not the id in the path", "send the job that the path names")
        if session.node not in ("", node):
            raise Error("forbidden", f"session {id} is not on this node", "only its own node reports it")
        session = replace(session, node=node)
        with self.store.write() as rows:
            here = node_of(rows, node)
            if "instance" in body:
                fence(here, str(body["instance"]))
            row = next(iter(rows.jobs(id=id)), None)
            if row is None:
                account = found(rows.account(session.account), "account", session.account)
                values = {"account_id": account.id, "cluster_id": here.cluster_id, "node_id": node, "canceled_for": ""}
                rows.insert(tables.jobs, id=id, taken=rows.now, **values, **_record(session, body))
            elif row.node_id != node:
                raise Error("forbidden", f"session {id} is not on this node", "only its own node reports it")
            elif row.state == State.FINALIZED or (session.revision <= row.revision and row.taken is not None):
                return job_json(row, caller)
            else:
                created = _created(row)  # when and whose it is was settled then
                session = replace(session, account=row.author, created=created or session.created)
                rows.update(tables.jobs, id, taken=row.taken or rows.now, **_record(session, body))
            if session.state == State.FINALIZED:
                for token in rows.all(tables.tokens, session=id, revoked=None):
                    rows.update(tables.tokens, token.id, revoked=rows.now)
            if row is None or row.state != session.state:
                self.record(rows, caller, "report_job", id, state=session.state.value, revision=session.revision)
            now = job_of(rows, id)
            rows.touch(id, here.id, here.cluster_id, now.account_id)
            return job_json(now, caller)

    def get_logs(self, caller: Caller, id: str) -> bytes:
        """The end of the output, as the node reported it; empty when it has not yet. For its author alone.

        While the session runs, its node is asked at its next heartbeats for what comes: see `logs_due`.
        """
        with self.store.read() as rows:
            row = job_of(rows, id)
            if not _own(row, caller):
                raise Error("forbidden", f"session {id} is {row.author}'s", "ask them for its output")
            kept = rows.one(tables.logs, job_id=id)
            new = row.state == State.STARTED and (row.watched is None or rows.now - row.watched > LOOKED)
        if new:
            with self.store.write() as rows:
                rows.update(tables.jobs, id, watched=rows.now)
        return b"" if kept is None else bytes(kept.output)

    def logs_due(self, id: str) -> bool:
        """Whether the node of a running session has yet to answer the latest look at its output."""
        with self.store.read() as rows:
            row = job_of(rows, id)
            kept = rows.one(tables.logs, job_id=id)
            asked = row.state == State.STARTED and row.watched is not None and row.expiry > rows.now
            return asked and (kept is None or kept.at is None or kept.at < row.watched)

    def put_logs(self, caller: Caller, id: str, output: bytes) -> None:
        """Of a session that runs, for its author who looks; of one that has ended, to keep."""
        with self.store.write() as rows:
            row = job_of(rows, id)
            caller.need_node(row.node_id)
            final = row.state == State.FINALIZED
            limit = LOG_LIMIT if final else LIVE_LIMIT
            if len(output) > limit:
                raise Error("invalid", f"the output has {len(output)} bytes", f"send the last {limit}")
            kept = rows.one(tables.logs, job_id=id)
            rows.keep_logs(id, output)
            if kept is None or bytes(kept.output) != output:
                rows.touch(id)
            if final:
                rows.drop_logs(row.account_id, LOGS_LIMIT)
                # what somebody looks at changes nothing that lasts
                self.record(rows, caller, "put_logs", id, bytes=len(output))


def place(rows: Rows, session: SessionBody, wanted: model.Request) -> Row:
    """The node for a new session: the one named, else that of the cluster with the most free GPUs.

    Raises Error invalid when no node could ever run it, unavailable when none that could is reporting.
    """
    if session.node is not None:
        candidates: Sequence[Row] = [node_of(rows, session.node)]
        if session.cluster is not None and candidates[0].cluster_id != cluster_of(rows, session.cluster).id:
            raise Error("invalid", f"--node: {session.node} is not in cluster {session.cluster}", "name one of the two")
        where = f"node {session.node}"
    elif session.cluster is not None:
        candidates = rows.nodes(cluster_id=cluster_of(rows, session.cluster).id)
        where = f"cluster {session.cluster}"
    else:
        raise Error("invalid", "neither a node nor a cluster was named", "use --node or --cluster")
    able = [node for node in candidates if demand(wanted, _limits(node)).fits(_limits(node))]
    if not able:
        asked = demand(wanted, Resources(gpus=1))
        amount = f"{asked.gpus} GPUs, {asked.cpus:g} CPUs, {wire.format_size(asked.memory)} memory"
        raise Error("invalid", f"{where} has no machine with {amount}", "ask for less: see `beaker cluster nodes`")
    ready = [node for node in able if usable(node, rows.now)]
    if not ready:
        raise Error("unavailable", f"{where} is not reporting, or drained", "try again later, or another node")
    return max(ready, key=lambda node: _free_gpus(rows, node))


def demand(wanted: model.Request, limits: Resources) -> Resources:
    """What a session claims at least on a node with these limits: one GPU by default, where there are any."""
    gpus = min(1, limits.gpus) if wanted.gpus is None else wanted.gpus
    return Resources(gpus, wanted.cpus or 0.0, wanted.memory or 0)


def job_of(rows: Rows, id: str) -> Row:
    return found(next(iter(rows.jobs(id=id)), None), "session", id)


def job_json(row: Row, caller: Caller) -> JSON:
    """The job as this caller may see it; ours beyond the original: nodeHostname, and what `wire` names."""
    job: JSON = json.loads(row.body)
    job["author"] = {"id": row.account_id, "name": row.author, "displayName": row.author_display_name}
    job |= {"cluster": f"{row.organization}/{row.cluster}", "node": row.node_id, "nodeHostname": row.hostname}
    if row.cancel_asked is not None and row.state != State.FINALIZED:
        job["status"].setdefault("canceled", wire.time(row.cancel_asked))
    if row.canceled_for and "canceled" in job["status"]:
        job["status"]["canceledFor"] = row.canceled_for  # the author's words, not the node's
    return job if _private(row, caller) else wire.redacted(job)


def _own(row: Row, caller: Caller) -> bool:
    """Whether the caller is the author, outside or in this very session."""
    if caller.scope == model.Scope.SESSION:
        return bool(caller.session == row.id)
    return caller.scope != model.Scope.EXECUTOR and bool(row.account_id == caller.account_id)


def _private(row: Row, caller: Caller) -> bool:
    """Whether the caller may see what is the business of the author and of administrators."""
    if caller.scope == model.Scope.EXECUTOR:
        return bool(caller.node == row.node_id)
    return _own(row, caller) or caller.admin


def _created(row: Row) -> datetime | None:
    """Of a record; None of a damaged one, which the node's report replaces."""
    try:
        return wire.session(json.loads(row.body)).created
    except (ValueError, Error):
        return None


def _record(session: model.Session, body: JSON) -> JSON:
    said = {key: body[key] for key in REPORTED if body.get(key) is not None}
    kept = json.dumps(wire.job(session, **said))
    return {"state": session.state.value, "revision": session.revision, "body": kept}


def _limits(node: Row) -> Resources:
    return wire.resources(json.loads(node.limits))


def _free_gpus(rows: Rows, node: Row) -> int:
    """What the node said was free, less what it was given since and has not reported."""
    limits = _limits(node)
    given = (demand(wire.session(json.loads(job.body)).request, limits).gpus for job in rows.waiting(node.id))
    return wire.resources(json.loads(node.free)).gpus - sum(given)
