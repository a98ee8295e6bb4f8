"""A lab without machines: a real server on a free port, and nodes that say what executors would say.

For tests of the console, its pictures and its bench. A `FakeNode` is a client with an executor's token: it heartbeats,
reports sessions and samples over HTTP, and runs nothing.
"""

from __future__ import annotations

import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import uvicorn

from beaker_sessions import ids, wire
from beaker_sessions.client import Client
from beaker_sessions.model import Claim, Request, Scope, Session, State
from beaker_sessions.server.oidc import Provider
from beaker_sessions.server.routes import api
from beaker_sessions.server.seal import Seal
from beaker_sessions.server.service import Service
from beaker_sessions.server.store import Store, sqlite_url
from beaker_sessions.transport import Endpoint


class Lab:
    """A server with SQLite below `directory`, whose administrator is root. Use it with `with`.

    provider: through which people may sign in to the console.
    """

    def __init__(self, directory: Path, provider: Provider | None = None) -> None:
        self.service = Service(Store(sqlite_url(directory / "server.db")), Seal(directory / "server.key"))
        self.app = api(self.service, provider)
        self.admin = ids.mint_token()
        self.service.initialize("root", {Scope.ADMIN: self.admin})
        self.tokens = {"root": self.admin}
        self._clients: list[Client] = []

    def __enter__(self) -> Lab:
        self._listening = socket.socket()
        self._listening.bind(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._web = uvicorn.Server(
            uvicorn.Config(self.app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._web.run, args=([self._listening],))
        self._thread.start()
        while not self._web.started:
            time.sleep(0.005)
        self.root = self.client(self.admin)
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        self.app.state.changes.close()
        self._web.should_exit = True
        self._thread.join()
        self._listening.close()
        self.service.store.close()

    def client(self, token: str) -> Client:
        self._clients.append(Client(Endpoint(self.address, insecure=[self.address]), token))
        return self._clients[-1]

    def account(self, name: str, **more: Any) -> Client:
        self.tokens[name] = self.root.create_account({"name": name, **more})["token"]
        return self.client(self.tokens[name])

    def node(self, hostname: str, gpus: int = 0, type: str = "NVIDIA H200", cluster: str = "lab/main") -> FakeNode:
        return FakeNode(self, hostname, gpus, type, cluster)


class FakeNode:
    """A node that has said nothing since it registered. It takes up what its sessions claim."""

    def __init__(self, lab: Lab, hostname: str, gpus: int, type: str, cluster: str) -> None:
        self.lab, self.hostname, self.gpus = lab, hostname, [f"nvidia.com/gpu={number}" for number in range(gpus)]
        token = lab.root.create_token({"name": hostname, "scope": "executor"})["token"]
        self.client, self.instance = lab.client(token), ids.ulid()
        limits: dict[str, Any] = {"cpuCount": 128, "memory": "1TiB", "gpuCount": gpus, "gpuIds": self.gpus}
        limits |= {"gpuType": type} if gpus else {}
        body = {"hostname": hostname, "limits": limits, "instance": self.instance}
        self.id: str = self.client.register_node(cluster, body)["id"]
        self.sessions: dict[str, Session] = {}

    def beat(self, **more: Any) -> dict[str, Any]:
        live = [one for one in self.sessions.values() if one.state != State.FINALIZED]
        held = sum(len(one.claim.gpus) for one in live if one.claim)
        free = {"gpuCount": len(self.gpus) - held, "cpuCount": 64, "memory": "512GiB"}
        waiting = sum(one.state == State.CREATED for one in live)
        body = {"instance": self.instance, "version": "1.0", "free": free, "queue": waiting}
        return self.client.heartbeat(self.id, body | more)

    def silent(self, seconds: float = 60) -> None:
        """As if it had stopped reporting so long ago, or were to in `-seconds`."""
        from beaker_sessions.server import tables

        moment = datetime.now(UTC) - timedelta(seconds=seconds)
        with self.lab.service.store.write() as rows:
            rows.update(tables.nodes, self.id, seen=moment, expiry=moment)

    def session(
        self,
        account: str,
        held: tuple[int, ...] = (),
        state: State = State.STARTED,
        age: float = 3600.0,
        message: str = "",
        **asked: Any,
    ) -> str:
        """Report a session in that state, created `age` seconds ago, that holds these GPUs; its id."""
        created = datetime.now(UTC) - timedelta(seconds=age)
        passed = list(State)[: list(State).index(state) + 1]
        times = {one.value: created + timedelta(seconds=3 * at) for at, one in enumerate(passed)}
        if "started" in times:  # 2 s for the image, 750 ms to make the sandbox
            times["image_ready"] = times["scheduled"] + timedelta(seconds=2)
            times["made"] = times["scheduled"] + timedelta(seconds=2.75)
        claim = Claim(tuple(self.gpus[gpu] for gpu in held), 16.0 * len(held), len(held) << 37)
        asked.setdefault("gpus", len(held))
        session = Session(
            ids.ulid(), account, self.id, Request(**asked), state, claim if state != State.CREATED else None,
            revision=1, message=message, exit_code=0 if state in (State.EXITED, State.FINALIZED) else None, **times,
        )  # fmt: skip
        self._report(session)
        return session.id

    def change(self, id: str, state: State, **more: Any) -> None:
        """Report that a session is in another state since now."""
        from dataclasses import replace

        now, old = datetime.now(UTC), self.sessions[id]
        passed = list(State)[1 : list(State).index(state) + 1]
        times = {one.value: getattr(old, one.value) or now for one in passed if one != State.EXITED or old.started}
        self._report(replace(old, state=state, revision=old.revision + 1, **times, **more))

    def _report(self, session: Session) -> None:
        self.sessions[session.id] = session
        self.client.report_job(session.id, wire.job(session))
