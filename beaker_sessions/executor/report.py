"""The executor's side of the server: registers the node, heartbeats, reports changes once, takes what the server
hands on.

One thread, all outbound. What could not be reported is in the ledger and is reported later; the server being away
changes nothing for the sessions of this node.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__, ids, wire
from ..client import Client
from ..errors import Error
from ..model import Identity, Request, Session, State
from ..settings import ExecutorSettings
from . import admission
from .access import Access
from .incident import incident
from .lifecycle import Lifecycle
from .metrics import Metrics

log = logging.getLogger(__name__)

HEARTBEAT = 3.0  # seconds
SAMPLES = 60  # of metrics, at most, in one heartbeat
REASON = 1000  # characters of what the node says about itself
SHOWN = 64 << 10  # bytes of the output of a session that runs
SETTLE = 0.3  # seconds after a change: a session's start is many, and the machine has better to do just then
BACK_OFF = 15.0  # seconds, at most, between attempts to reach a server that is away
NOBODY = Identity("nobody", 65534, 65534, "/")  # whom a session is of that was refused before it was known whose it is


class Reporter:
    """Wires itself to `lifecycle.sessions`; `run` starts its thread."""

    def __init__(self, lifecycle: Lifecycle, access: Access, settings: ExecutorSettings, metrics: Metrics) -> None:
        self.lifecycle, self.access, self.settings, self.metrics = lifecycle, access, settings, metrics
        self.sessions, self.ledger = lifecycle.sessions, lifecycle.sessions.ledger
        self.instance = ids.ulid()  # of two executors that claim one node, the server heeds the younger
        self.trouble = "the server was not asked yet"  # why it cannot be reached, "" when it can
        self.heard: float | None = None  # when the server answered last, in seconds since the epoch
        self._others: list[dict[str, Any]] = []
        self._shown: dict[str, tuple[str, bytes]] = {}  # session whose author looks -> the look, and what was sent
        self._registered = self._compared = False
        self._node = ""  # its id at the server, which a full disk keeps out of the ledger
        self._due = 0.0  # when the next heartbeat is, of CLOCK_MONOTONIC
        self._changed = threading.Event()
        self.sessions.on_change = self._changed.set
        # Until the server was asked once what of the queue has ended, or does not answer.
        self.sessions.hold_back(any(session.state == State.CREATED for session in self.sessions.live()))

    def run(self) -> None:
        threading.Thread(target=self._loop, name="report", daemon=True).start()

    def nodes(self, gpus: int) -> list[str]:
        """Hostnames of the cluster's other nodes that have so many GPUs free, as of the last heartbeat."""
        own = self.sessions.inventory.hostname
        return [
            node["hostname"]
            for node in self._others
            if node["hostname"] != own and (node.get("free") or {}).get("gpuCount", 0) >= gpus
        ]

    def _loop(self) -> None:
        pause = 1.0
        client: Client | None = None
        while True:
            try:
                client = client or self._connect()
                self._turn(client)
                if self.trouble:
                    log.info("the server at %s answers", self.settings.address)
                self.trouble, pause = "", 1.0
                if self._changed.wait(max(0.0, self._due - time.monotonic())):
                    time.sleep(SETTLE)
                    self._changed.clear()
            except Error as error:
                self._go_on()
                if str(error) != self.trouble:
                    log.warning("cannot report: %s", error)
                self.trouble = str(error)
                client = None  # the token file may have changed
                time.sleep(pause)
                pause = min(pause * 2, BACK_OFF)
            except Exception:
                self._go_on()
                log.exception("reporting failed")
                time.sleep(pause)
                pause = min(pause * 2, BACK_OFF)

    def _go_on(self) -> None:
        """Without the server, the queue is what the ledger says."""
        try:
            self.sessions.hold_back(False)
        except Exception:
            log.exception("the queue does not start")  # it is tried again with the next reconcile

    def _turn(self, client: Client) -> None:
        """The heartbeat comes first: it brings tokens and cordons, and nothing that cannot be read may hold it up."""
        if not self._registered:
            self._register(client)
        if (now := time.monotonic()) >= self._due:
            wanted = self._heartbeat(client)
            self._due = now + HEARTBEAT
            if self.sessions.held_back:
                self._settle(client)
            self._show(client, wanted)
        self._report(client)
        if not self._compared and self.lifecycle.ready.is_set():
            self._compared = self._compare(client)

    def _connect(self) -> Client:
        path = Path(self.settings.token_path)
        try:
            return Client(self.settings.endpoint, path.read_text().strip(), timeout=5)
        except OSError as error:
            raise Error(
                "unavailable", f"cannot read the executor's token {path}: {os.strerror(error.errno or 0)}"
            ) from error

    def _register(self, client: Client) -> None:
        has = self.sessions.inventory
        body = {
            "hostname": has.hostname,
            "limits": wire.limits(has.gpus, has.cpus, has.memory),
            "instance": self.instance,
        }
        node = client.register_node(self.settings.cluster, body)
        self._node = node["id"]
        self.ledger.note("node", self._node)
        self._meets(node)
        self._registered = True

    def _settle(self, client: Client) -> None:
        """What waits here and has ended, says the server, is over: the ledger's latest changes were lost."""
        for waiting in self.sessions.live():
            if waiting.state == State.CREATED:
                try:
                    has = wire.session(client.get_job(waiting.id))
                except Error as error:
                    if error.code not in ("invalid", "not_found"):
                        raise
                    continue
                self._end_again(has)
        self.sessions.hold_back(False)

    def _end_again(self, has: Session) -> None:
        if has.state == State.FINALIZED and not self._runs(has.id) and self.sessions.end_again(has):
            log.warning("session %s has ended, says the server, and the ledger had it in the queue", has.id)

    def _runs(self, id: str) -> bool:
        """Whether it may have a sandbox, which `lifecycle` then takes up."""
        try:
            return self.lifecycle.sandboxes.find(id) is not None
        except Error as error:
            log.warning("session %s may run: %s", id, error)
            return True

    def _compare(self, client: Client) -> bool:
        """Take up again what the server says lives here and the ledger has lost. Whether that is all done.

        What had been queued is queued again, in its order; what had been started is over, as no sandbox of it is left.
        What no node has taken yet, its revision says, comes with a heartbeat.
        """
        if not self._node:
            return False  # all nodes' sessions would be ours
        known, others = [], 0
        for job in client.jobs(kind="session", finalized=False, node=self._node):
            if isinstance(job, dict) and job.get("revision") == 0:
                continue
            if _identified(job):
                known.append(job)
            else:
                others += 1
        if others:
            log.error("the server has %d sessions of this node that cannot be read", others)
        for job in sorted(known, key=lambda job: str(job["id"])):
            id, status = str(job["id"]), job.get("status")
            if self.ledger.get(id) or self.lifecycle.sandboxes.find(id):
                continue
            if not (isinstance(status, dict) and "scheduled" in status):
                self._take(job)
                continue
            why = Error("unavailable", "this node has lost its record of the session, which does not run any more")
            log.warning("session %s is the server's, and the ledger does not know it", id)
            if session := self._read(job):
                self.sessions.adopt(_refused(session, why), NOBODY)
        return all(self.ledger.get(str(job["id"])) for job in known)

    def _meets(self, answer: dict[str, Any]) -> bool:
        """Whether the server has another database than before, as after a restore, so that all is to be told again."""
        epoch = str(answer.get("epoch") or "")
        if not epoch or epoch == self.ledger.fact("epoch"):
            return False
        log.warning("the server has another database than before: all sessions are reported anew")
        self.ledger.report_anew(epoch)
        return True

    def _heartbeat(self, client: Client) -> dict[str, str]:
        """Sessions whose authors look at their output, and when they did so last."""
        waiting = sum(session.state == State.CREATED for session in self.sessions.live())
        samples = self.metrics.pending(SAMPLES)
        body = {
            "instance": self.instance,
            "version": __version__,
            "samples": samples,
            "free": wire.free(self._positive()),
            "queue": waiting,
            "drained": self.sessions.drained[:REASON],
            "vouched": self.access.vouched(),
        }
        try:
            answer = client.heartbeat(self._node, body)
        except Error as error:
            if error.code == "conflict":
                self.sessions.cordon("fence", f"another executor has registered as {self.sessions.inventory.hostname}")
            if error.code == "not_found":
                self._registered = self._compared = False  # the node was deleted, or the database is another one
            raise
        self.heard = time.time()
        self.metrics.sent(samples)
        if self._meets(answer):
            return {}  # what it says is of the past, until it has heard
        self.sessions.cordon("fence", "")
        self.access.revoke(answer.get("refused", []))
        reason = answer.get("cordonReason") or "an administrator has cordoned it"
        self.sessions.cordon("administrator", reason if answer.get("cordoned") else "")
        self._others = answer.get("nodes", [])
        for job in answer.get("jobs", []):
            try:
                self._take(job)
            except Error as error:  # as of a full disk; the server hands it on again
                log.error("a session that the server hands on is not taken: %s", error)
        for id in answer.get("cancel", []):
            if self.sessions.entry(id):
                self.lifecycle.stop(id, "the server")
        return dict(answer.get("output") or {})

    def _show(self, client: Client, wanted: dict[str, str]) -> None:
        """The latest output of running sessions, when it is new or the look is."""
        self._shown = {id: shown for id, shown in self._shown.items() if id in wanted}
        for id, look in wanted.items():
            live = self.sessions.entry(id)
            if live is None or live.session.state != State.STARTED:
                continue  # all that it wrote comes with its end
            now = (look, self.lifecycle.logs(live.session, SHOWN))
            if self._shown.get(id) == now:
                continue
            self._shown[id] = now
            try:
                client.put_logs(id, now[1])
            except Error as error:
                if error.code not in ("invalid", "not_found", "forbidden"):
                    raise
                log.warning("the server refuses the output of session %s: %s", id, error)

    def _positive(self) -> Any:
        free = self.sessions.free()
        return replace(free, gpus=max(free.gpus, 0), cpus=max(free.cpus, 0.0), memory=max(free.memory, 0))

    def _report(self, client: Client) -> None:
        outdone: set[str] = set()
        while changed := self.ledger.unreported():
            for session in changed:
                output = self.lifecycle.output / session.id
                try:
                    if self._send(client, session, output, session.id not in outdone):
                        outdone.add(session.id)
                        continue
                except Error as error:
                    if not self._is_for_ever(client, session.id, error):
                        raise
                    # It would be refused for ever, and hold up all that follow.
                    log.error("the server refuses session %s, which it will not know of: %s", session.id, error)
                if session.state == State.FINALIZED:  # the server has it now; later, nobody would come back for it
                    output.unlink(missing_ok=True)
                self.ledger.reported(session.id, session.revision)

    def _send(self, client: Client, session: Session, output: Path, may_outdo: bool) -> bool:
        """Report a session. True when it is to be reported again, as its revision was too low for the server.

        A ledger that was lost goes on with the revision of its sandbox's labels, and the server had heard of later
        ones. What is final there stays so, and only this node's registered executor is heard.
        """
        directory = {"node": self._node, "cluster": self.settings.cluster, "instance": self.instance}
        answer = client.report_job(session.id, wire.job(session, **directory))
        has = self._read(answer)
        if has and has.state != State.FINALIZED and _is_above(has, session):
            if may_outdo:
                log.warning("session %s: the server has revision %d, from before", session.id, has.revision)
                self.sessions.outdo(session.id, has.revision)
                return True
            log.error("the server does not take session %s: it has revision %d again", session.id, has.revision)
        elif has and has.state == State.FINALIZED and session.state == State.CREATED:
            self._end_again(has)
        elif has and has.state == State.FINALIZED != session.state:
            log.error("session %s is %s here, and has ended, says the server", session.id, session.state)
        if session.state == State.FINALIZED and output.exists():
            client.put_logs(session.id, output.read_bytes())
        return False

    def _is_for_ever(self, client: Client, id: str, error: Error) -> bool:
        """Whether the server will never take a report, as it is another node's session, or of an unknown account.

        What another database does not know it is to be told anew, once the heartbeat has met it.
        """
        if error.code == "forbidden":
            return client.get_job(id).get("node") not in ("", self._node)
        if error.code == "not_found":
            return client.epoch() in ("", self.ledger.fact("epoch"))
        return error.code == "invalid"

    def _read(self, job: Any) -> Session | None:
        """A session as the server has it. One that cannot be read, and is not known here, is ended for saying so."""
        try:
            return wire.session(job)
        except Error as error:
            log.error("the server has a session that cannot be read: %s", error)
            if (known := _identified(job)) and not self.ledger.get(known.id):
                self.sessions.adopt(_refused(known, error), NOBODY)
            return None

    def _take(self, job: dict[str, Any]) -> None:
        """Queue a session that was created at the server. One that cannot run here ends at once, saying why."""
        if (session := self._read(job)) is None or self.ledger.get(session.id):
            return  # taken already; its report is on the way
        before = session.created is not None and session.created.isoformat() < (self.ledger.fact("met") or "")
        if before and self.ledger.had(session.id):  # it ran since the backup that was restored
            why = Error("conflict", "it has ended here before; the server's database was restored since")
            self.sessions.adopt(_refused(session, why), NOBODY)
            return
        if self.sessions.cordoned or self._runs(session.id):
            return  # not now: the server hands it on again, and the token that came first is still good
        inside, identity = self.lifecycle.inside, NOBODY
        inside.keep_token(session.id, str(job.get("token") or ""))
        try:
            identity = admission.person(session.account, self.settings.accounts, self.settings.session_home)
            admitted = admission.admit(
                session.request, identity, self.settings, self.sessions.capacity, self.lifecycle.node(),
                node=session.node, cluster=job.get("cluster"), ranges=self.lifecycle.ranges(),
            )  # fmt: skip
            self.sessions.create(
                session.account, identity, admitted.request, None, session.id, session.revision + 1
            )  # fmt: skip
        except Exception as unexpected:
            why = unexpected if isinstance(unexpected, Error) else incident(log)
            inside.close(session.id)
            if why.code == "unavailable":
                return  # not now; the server hands it on again
            self.sessions.adopt(_refused(session, why), identity)
            return
        self.sessions.notice(session.id, "create", admitted.warning)


def _is_above(has: Session, session: Session) -> bool:
    """Whether the server has something else than what it was told."""
    return has.revision > session.revision or (has.revision == session.revision and has.state != session.state)


def _identified(job: object) -> Session | None:
    """As much of it as its end needs to be told, lest it comes again for ever; None when not even that is there."""
    if not isinstance(job, dict):
        return None
    id, author = job.get("id"), job.get("author")
    account = author.get("name") if isinstance(author, dict) else None
    if not isinstance(id, str) or not ids.is_ulid(id) or not isinstance(account, str):
        return None
    return Session(id, account, "", Request(), created=datetime.now(UTC), revision=1)


def _refused(session: Session, why: Error) -> Session:
    now, revision = datetime.now(UTC), session.revision + 1
    message = f"{why.message}; {why.hint}" if why.hint else why.message
    return replace(session, state=State.FINALIZED, finalized=now, message=message, error=why.code, revision=revision)
