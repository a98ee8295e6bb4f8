"""How long the console's lists take, and how big they are, with 1,000 nodes and 8,000 GPUs in the database.

`python -m bench.console` prints a table: median milliseconds in the server over HTTP on loopback, and kilobytes.
"""

from __future__ import annotations

import http.client
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from beaker_sessions import ids, wire
from beaker_sessions.model import Claim, Request, Session, State
from beaker_sessions.server import tables
from tests.lab import Lab

NODES, GPUS, ROUNDS = 1000, 8, 20


def fill(lab: Lab) -> None:
    """Straight into the database: a thousand executors are another bench's subject. Each account has ten nodes."""
    now = datetime.now(UTC)
    gpus = [f"nvidia.com/gpu={number}" for number in range(GPUS)]
    with lab.service.store.write() as rows:
        cluster = rows.clusters(full_name="lab/main")[0]
        accounts = rows.all(tables.accounts)
        for number in range(NODES):
            id, account = ids.ulid(), accounts[number % len(accounts)]
            limits = {"cpuCount": 192, "memory": "2TiB", "gpuCount": GPUS, "gpuType": "NVIDIA H200", "gpuIds": gpus}
            values = {"hostname": f"gpu-{number}.lab", "limits": json.dumps(limits), "free": '{"gpuCount": 0}'}
            values |= {"instance": "", "version": "1", "queue": 0, "cordon_reason": "", "created": now, "seen": now}
            values |= {"cluster_id": cluster.id, "account_id": account.id, "expiry": now + timedelta(hours=1)}
            rows.insert(tables.nodes, id=id, **values)
            used = {"gpus": {gpu: {"use": 71.0, "memory": 1 << 36, "total": 1 << 37} for gpu in gpus}}
            rows.keep_sample(id, 10, int(now.timestamp()), json.dumps(used))
            for gpu in gpus:
                session = Session(
                    ids.ulid(), account.name, id, Request(gpus=1), State.STARTED, Claim((gpu,), 24.0, 1 << 38),
                    created=now, scheduled=now, started=now, revision=1,
                )  # fmt: skip
                values = {"account_id": account.id, "cluster_id": cluster.id, "node_id": id, "canceled_for": ""}
                values |= {"state": "started", "revision": 1, "taken": now, "body": json.dumps(wire.job(session))}
                rows.insert(tables.jobs, id=session.id, **values)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, Lab(Path(directory)) as lab:
        for number in range(100):
            lab.account(f"user-{number}")
        fill(lab)
        cookie = f"beaker={lab.service.sign_in(lab.admin)}"
        connection = http.client.HTTPConnection(lab.address.removeprefix("http://"), timeout=60)
        print(f"{NODES} nodes, {NODES * GPUS} GPUs, all of them held\n\n| page | ms | kB |\n| --- | --- | --- |")
        for path in ("/clusters", "/cl/lab/main", "/cl/lab/main?page=20", "/cl/lab/main?q=99&sort=free"):
            times = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                connection.request("GET", path, headers={"Cookie": cookie})
                response = connection.getresponse()
                body = response.read()
                times.append(time.perf_counter() - start)
                assert response.status == 200
            print(f"| {path} | {1000 * statistics.median(times):.0f} | {len(body) / 1000:.0f} |")


if __name__ == "__main__":
    main()
