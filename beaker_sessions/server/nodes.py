"""Clusters and the directory of nodes: rules and answers. A node's resources are its own; this is what it said last."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timedelta

from .. import ids, wire
from ..bodies import ClusterBody, ClusterPatch, Heartbeat, NodeBody, NodePatch
from ..errors import Error
from ..integrity import MEND
from ..model import Scope
from . import tables
from .accounts import add_token
from .rules import JSON, Caller, Rules, found, page
from .samples import keep_samples
from .store import Row, Rows

log = logging.getLogger(__name__)
HANDED = 100  # how many new sessions one heartbeat hands over
WATCHED = timedelta(seconds=60)  # after a look at its output, for how long a running session's is sent
SILENCE = timedelta(seconds=30)  # a node not heard from for this long is "not reporting"


class Nodes(Rules):
    def list_clusters(self, caller: Caller, org: str) -> JSON:  # noqa: ARG002
        with self.store.read() as rows:
            organization = found(rows.organization(org), "organization", org)
            return page([cluster_json(row) for row in rows.clusters(organization_id=organization.id, deleted=None)])

    def create_cluster(self, caller: Caller, org: str, body: ClusterBody) -> JSON:
        caller.need_admin()

        def make(rows: Rows) -> JSON:
            organization = found(rows.organization(org), "organization", org)
            if body.name == "nodes" or ids.is_ulid(body.name):
                raise Error("invalid", f"name: {body.name!r} is not free for clusters", "choose another name")
            if rows.clusters(full_name=f"{organization.name}/{body.name}"):
                raise Error("conflict", f"there is a cluster {organization.name}/{body.name} already", "choose another")
            id = add_cluster(rows, organization.id, body)
            self.record(rows, caller, "create_cluster", id, name=f"{organization.name}/{body.name}")
            return cluster_json(cluster_of(rows, id))

        return self.once(caller, f"create_cluster {org}", body.model_dump(), make)

    def is_cluster(self, id: str) -> bool:
        with self.store.read() as rows:
            return bool(rows.clusters(id=id, deleted=None))

    def get_cluster(self, caller: Caller, cluster: str) -> JSON:  # noqa: ARG002
        with self.store.read() as rows:
            return cluster_json(cluster_of(rows, cluster))

    def update_cluster(self, caller: Caller, cluster: str, body: ClusterPatch) -> JSON:
        caller.need_admin()
        with self.store.write() as rows:
            row = cluster_of(rows, cluster)
            if body.capacity is not None:
                rows.update(tables.clusters, row.id, capacity=body.capacity)
                self.record(rows, caller, "update_cluster", row.id, capacity=body.capacity)
            return cluster_json(cluster_of(rows, row.id))

    def delete_cluster(self, caller: Caller, cluster: str) -> None:
        caller.need_admin()
        with self.store.write() as rows:
            row = cluster_of(rows, cluster)
            if there := rows.nodes(cluster_id=row.id):
                names = ", ".join(node.hostname for node in there[:5])
                raise Error("conflict", f"cluster {cluster} still has nodes: {names}", "delete them first")
            rows.update(tables.clusters, row.id, deleted=rows.now)
            self.record(rows, caller, "delete_cluster", row.id)

    def list_nodes(self, caller: Caller, cluster: str) -> JSON:  # noqa: ARG002
        with self.store.read() as rows:
            return page([node_json(row, rows.now) for row in rows.nodes(cluster_id=cluster_of(rows, cluster).id)])

    def fallen_silent(self, since: datetime) -> set[str]:
        """Ids of nodes that stopped reporting since then, and of their clusters: what no commit tells."""
        with self.store.read() as rows:
            return rows.fallen_silent(since)

    def get_node(self, caller: Caller, node: str) -> JSON:  # noqa: ARG002
        with self.store.read() as rows:
            return node_json(node_of(rows, node), rows.now)

    def register_node(self, caller: Caller, cluster: str, body: NodeBody) -> JSON:
        """The node with this hostname, made when missing. From now on only `instance` may speak for it.

        A token is for the machine that it was made for, else for the first that it registers, which must be one that
        nobody knows yet: so no machine can speak for another.
        """
        if caller.scope != Scope.EXECUTOR:
            raise Error("forbidden", "only an executor can register a node", "use a token of scope executor")
        with self.store.write() as rows:
            home = cluster_of(rows, cluster)
            known = next(iter(rows.nodes(hostname=body.hostname)), None)
            token = rows.the(tables.tokens, caller.token_id)  # as it is now, after whatever else it was just used for
            of_another = token.node_id is not None and (known is None or known.id != token.node_id)
            if of_another or token.hostname not in (None, body.hostname):
                hint = "give each machine a token of its own, or rename the node"
                raise Error("conflict", f"this token belongs to another node than {body.hostname}", hint)
            if known is not None and token.hostname is None:
                hint = (
                    f"make one for it: `beaker account generate-token --executor {body.hostname}`; or delete the node"
                )
                raise Error("conflict", f"this token was not made for {body.hostname}, which is known already", hint)
            values = {
                "cluster_id": home.id,
                "limits": json.dumps(body.limits.as_json()),
                "instance": body.instance or "",
            }
            values |= {"seen": rows.now, "expiry": rows.now + SILENCE}
            if known is None:
                id = ids.ulid()
                fixed = {"hostname": body.hostname, "account_id": caller.account_id, "created": rows.now}
                blank = {"version": "", "free": "{}", "queue": 0, "cordon_reason": ""}
                rows.insert(tables.nodes, id=id, **fixed, **blank, **values)
            else:
                id = known.id
                rows.update(tables.nodes, id, **values)
            rows.update(tables.tokens, caller.token_id, node_id=id, hostname=body.hostname)
            rows.touch(home.id)
            self.record(rows, caller, "register_node", id, hostname=body.hostname, instance=body.instance or "")
            return node_json(node_of(rows, id), rows.now) | {"epoch": self.store.epoch}

    def update_node(self, caller: Caller, node: str, body: NodePatch) -> JSON:
        """By administrators, and by the node's own executor, which may drain itself."""
        with self.store.write() as rows:
            row = node_of(rows, node)
            if caller.scope == Scope.EXECUTOR:
                caller.need_node(row.id)
                if body.hostname not in (None, row.hostname):
                    raise Error("forbidden", "hostname: an executor cannot rename its node", "ask an administrator")
            else:
                caller.need_admin()
            if body.hostname not in (None, row.hostname) and rows.nodes(hostname=body.hostname):
                raise Error("conflict", f"there is a node {body.hostname} already", "choose another hostname")
            values: JSON = {}
            if body.hostname is not None:
                values["hostname"] = body.hostname
                rows.rename_node_of_tokens(row.id, body.hostname)
            if body.limits is not None:
                values["limits"] = json.dumps(body.limits.as_json())
            if body.ttl is not None:
                values["expiry"] = rows.now + timedelta(seconds=body.ttl)
            if body.cordoned is not None:
                values["cordoned"] = (row.cordoned or rows.now) if body.cordoned else None
                values["cordon_reason"] = (body.cordon_reason or "") if body.cordoned else ""
            if values:
                rows.update(tables.nodes, row.id, **values)
                rows.touch(row.cluster_id)
                said = body.model_dump(exclude_none=True, by_alias=True, exclude={"limits"})
                self.record(rows, caller, "update_node", row.id, **{"hostname": row.hostname, **said})
            return node_json(node_of(rows, row.id), rows.now)

    def delete_node(self, caller: Caller, node: str) -> None:
        """Take a node out of the directory; its executor's tokens end."""
        caller.need_admin()
        with self.store.write() as rows:
            row = node_of(rows, node)
            if count := len(rows.jobs(node_id=row.id, final=False)):
                what = f"node {row.hostname} has {count} sessions that have not ended"
                raise Error("conflict", what, "stop them first: `beaker session list --node`")
            rows.update(tables.nodes, row.id, deleted=rows.now)
            rows.revoke_tokens_of_node(row.id)
            rows.touch(row.cluster_id)
            self.record(rows, caller, "delete_node", row.id, hostname=row.hostname)

    def heartbeat(self, caller: Caller, node: str, body: Heartbeat) -> JSON:
        """The node is alive: hand it what it should take and cancel, and say what its neighbours have free."""
        with self.store.write() as rows:
            row = node_of(rows, node)
            caller.need_node(row.id)
            fence(row, body.instance)
            free = json.dumps(body.free.as_json())
            values = {"version": body.version, "free": free, "queue": body.queue, "drained": body.drained}
            rows.update(tables.nodes, row.id, seen=rows.now, expiry=rows.now + SILENCE, **values)
            if row.expiry <= rows.now or (row.free, row.queue, row.drained) != (free, body.queue, body.drained):
                rows.touch(row.id, row.cluster_id)
            keep_samples(rows, row.id, body.samples)
            waiting = [] if row.cordoned or body.drained else rows.waiting(row.id)[:HANDED]
            for job in waiting:
                if job.handed is None:
                    rows.update(tables.jobs, job.id, handed=rows.now)
            others = [other for other in rows.nodes(cluster_id=row.cluster_id) if usable(other, rows.now)]
            return {
                "epoch": self.store.epoch,
                "jobs": [said | {"token": session_token(rows, caller, job)} for job in waiting if (said := _body(job))],
                "cancel": list(rows.to_cancel(row.id)),
                "refused": rows.refused(body.vouched),
                "output": {id: wire.time(at) for id, at in rows.watched(row.id, rows.now - WATCHED).items()},
                "cordoned": row.cordoned is not None,
                "cordonReason": row.cordon_reason,
                "nodes": [
                    {"hostname": other.hostname, "free": json.loads(other.free)}
                    for other in others
                    if other.id != row.id
                ],
            }


def _body(job: Row) -> JSON | None:
    """What the node is handed; nothing of a record that is damaged, so that the node gets the others."""
    try:
        return dict(json.loads(job.body))
    except ValueError as error:
        log.error("session %s is not handed on: its record is damaged: %s; %s", job.id, error, MEND)
        return None


def session_token(rows: Rows, caller: Caller, job: Row) -> str:
    """The token of a session that the node is handed, the same each time: what it may do in its author's name."""
    token = ids.mint_token(caller.secret, f"session {job.id}")
    if rows.token(ids.hash_token(token)) is None:
        add_token(rows, job.account_id, token, f"session {job.id}", Scope.SESSION, session=job.id)
    return token


def fence(node: Row, instance: str) -> None:
    """Raises Error conflict unless `instance` is the executor that registered the node last.

    not_found for one that started after that: the database is older than its registration, so it is to register again.
    """
    if instance > node.instance:
        hint = "register the node again"
        raise Error("not_found", f"this executor of {node.hostname} is not registered: the database was restored", hint)
    if node.instance != instance:
        hint = "only one executor may run on a machine: stop this one"
        raise Error("conflict", f"another executor registered {node.hostname} after this one", hint)


def usable(node: Row, now: datetime) -> bool:
    return node.cordoned is None and not node.drained and node.expiry > now


def cluster_of(rows: Rows, ref: str) -> Row:
    """By id or `org/name`."""
    where = {"id": ref, "deleted": None} if ids.is_ulid(ref) else {"full_name": ref}
    return found(next(iter(rows.clusters(**where)), None), "cluster", ref)


def node_of(rows: Rows, ref: str) -> Row:
    """By id or hostname."""
    return found(next(iter(rows.nodes(**{"id" if ids.is_ulid(ref) else "hostname": ref})), None), "node", ref)


def add_cluster(rows: Rows, organization: str, body: ClusterBody) -> str:
    id = ids.ulid()
    values = {"name": body.name, "capacity": body.capacity, "preemptible": body.preemptible, "created": rows.now}
    spec = json.dumps(body.spec.as_json() if body.spec else {})
    rows.insert(tables.clusters, id=id, organization_id=organization, spec=spec, **values)
    return id


def cluster_json(row: Row) -> JSON:
    spec = json.loads(row.spec)
    return {
        "id": row.id,
        "name": row.name,
        "fullName": f"{row.organization}/{row.name}",
        "created": wire.time(row.created),
        "autoscale": False,
        "capacity": row.capacity,
        "preemptible": row.preemptible,
        "status": "active",
    } | ({"nodeSpec": spec} if spec else {})


def node_json(row: Row, now: datetime) -> JSON:
    """Ours beyond the original: status, cluster, free, queue, version, drained. expiry: when silence becomes "not
    reporting". drained: the part of its cordon's reason that the node itself gave, which no administrator can lift.
    """
    reason = row.drained or row.cordon_reason
    if row.cordoned and row.drained:
        reason = f"{row.cordon_reason or 'an administrator has cordoned it'}; {row.drained}"
    return {
        "id": row.id,
        "hostname": row.hostname,
        "created": wire.time(row.created),
        "expiry": wire.time(row.expiry),
        "cordoned": row.cordoned is not None or bool(row.drained),
        "cordonReason": reason,
        "drained": row.drained,
        "clusterId": row.cluster_id,
        "cluster": f"{row.organization}/{row.cluster}",
        "accountId": row.account_id,
        "limits": json.loads(row.limits),
        "free": json.loads(row.free),
        "queue": row.queue,
        "version": row.version,
        "status": "not reporting" if row.expiry <= now else "cordoned" if row.cordoned or row.drained else "ok",
    }
