"""What a session uses, from its control group to the server and to `session top`."""

from __future__ import annotations

from tests.stack import Stack, User, wait_for

BUSY = 0.05  # cores; one that is idle uses less than 0.01, and one that spins all that others leave it


def test_a_busy_session_is_seen_to_be_busy(stack: Stack, ada: User) -> None:
    spin = "x = bytearray(1 << 27)\nwhile True: pass"
    id = ada.beaker("session", "create", "--gpus", "1", "--detach", "--", "python3", "-c", spin).stdout.decode().strip()

    def busy() -> bool:
        known = [point for point in stack.admin.job_metrics(id)["data"] if point.get("cpu", 0) > BUSY]
        return bool(known and known[-1]["memory"] > 1 << 27)

    wait_for("a sample of the busy session", busy, 60)
    points = stack.admin.job_metrics(id)["data"]
    assert all(point["gpus"] == {} for point in points), "made-up GPUs say nothing about their use"
    shown = ada.beaker("session", "top").stdout.decode()
    row = next(line.split() for line in shown.splitlines() if line.startswith(id))
    used = [point["cpu"] for point in stack.admin.job_metrics(id)["data"] if "cpu" in point]
    assert any(abs(float(row[-4]) - cpu) < 0.06 for cpu in used), (row, used)
    assert "[??????????]" in shown
    node = stack.admin.node_metrics("node-1.lab", hours=1)["data"][-1]["node"]
    assert node["cpu"] > 0.3
    assert {"memory", "disk"} <= node.keys()
