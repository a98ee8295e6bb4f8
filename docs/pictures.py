"""Takes the pictures of the console that the documents show: `python -m docs.pictures`.

A made-up lab, with Chromium at /usr/bin/chromium; the pictures go to docs/img, each below 150 kB.
"""

from __future__ import annotations

import math
import random
import tempfile
from datetime import timedelta
from pathlib import Path

from playwright.sync_api import sync_playwright

from beaker_sessions.bodies import Sample, check
from beaker_sessions.model import State
from beaker_sessions.server.samples import keep_samples
from tests.lab import FakeNode, Lab

IMAGES = Path(__file__).parent / "img"
OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]
HOUR = 3600


def furnish(lab: Lab) -> tuple[str, str]:
    """A lab at work; the ids of the node and of the session to look at."""
    for name in ("ada", "grace", "alan", "barbara"):
        lab.account(name)
    lab.root.create_cluster("lab", {"name": "workstations"})
    nodes = [lab.node(f"gpu-{number}.lab", 8) for number in range(1, 11)]
    desks = [lab.node(f"desk-{number}.lab", 2, "NVIDIA RTX 6000 Ada", "lab/workstations") for number in range(1, 5)]
    ours = nodes[0].session("ada", (0, 1), age=3.1 * HOUR, name="train-2", image="pytorch/pytorch")
    nodes[0].session("grace", (2,), age=0.2 * HOUR)
    nodes[0].session("alan", (3, 4, 5), age=47 * HOUR, name="sweep")
    nodes[0].session("barbara", (), State.CREATED, age=900, gpus=4, name="large")
    nodes[0].session("ada", (), State.CREATED, age=120, gpus=1)
    nodes[1].session("barbara", tuple(range(8)), age=5 * HOUR)
    nodes[2].session("ada", (0,), age=600, name="notebook")
    for number in range(3, 8):
        nodes[number].session(("grace", "alan")[number % 2], tuple(range(number - 1)), age=number * 0.7 * HOUR)
    desks[0].session("grace", (0, 1), age=HOUR)
    for node in (*nodes, *desks):
        node.beat()
    for node in (*nodes[1:8], desks[0]):
        use(lab, node, 0)
    use(lab, nodes[0], 24 * 60)
    lab.root.update_node(nodes[4].id, {"cordoned": True, "cordonReason": "fan is being replaced"})
    nodes[8].silent(700)
    return nodes[0].id, ours


def use(lab: Lab, node: FakeNode, minutes: int) -> None:
    """A sample a minute for so long, but for a while in which nothing was reported."""
    held = {gpu for session in node.sessions.values() if session.claim for gpu in session.claim.gpus}
    with lab.service.store.write() as rows:
        now = rows.now
        for minute in (one for one in range(minutes, -1, -1) if not 700 < one < 800):
            rows.now = now - timedelta(minutes=minute)
            gpus = {}
            for number, gpu in enumerate(node.gpus):
                busy = 72 + 22 * math.sin(minute / 45 + number) + random.gauss(0, 5) if gpu in held else 0
                memory = (90 + 12 * math.sin(minute / 200 + number)) if gpu in held else 0.5
                gpus[gpu] = {"use": min(100, max(0, busy)), "memory": memory * 2**30, "total": 141 * 2**30}
            disk = int(max(0.5, 12 - 9 * minute / 1440) * 2**30)
            sessions = {
                id: {"cpu": 9 + 4 * math.sin(minute / 30), "memory": 80 * 2**30, "disk": disk} for id in node.sessions
            }
            used = {"cpu": 42 + 12 * math.sin(minute / 60), "memory": (380 + 60 * math.sin(minute / 150)) * 2**30}
            sample = {"at": rows.now.isoformat(), "node": used, "gpus": gpus, "sessions": sessions}
            keep_samples(rows, node.id, [check(Sample, sample)])


def main() -> None:
    random.seed(1)
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, Lab(Path(directory)) as lab, sync_playwright() as playwright:
        node, session = furnish(lab)
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=OPTIONS)
        shots = [
            ("clusters", "/clusters", "light", 1120, 460),
            ("cluster", "/cl/lab/main", "light", 1120, 640),
            ("node", f"/node/{node}", "dark", 1120, 880),
            ("session", f"/job/{session}", "light", 1120, 760),
            ("phone", "/cl/lab/main", "dark", 360, 720),
        ]
        for name, path, scheme, width, height in shots:
            viewport = {"width": width, "height": height}
            context = browser.new_context(base_url=lab.address, color_scheme=scheme, viewport=viewport)
            page = context.new_page()
            page.goto(path)
            page.get_by_label("Token").fill(lab.tokens["ada"])
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_url(lab.address + path)
            page.get_by_text("Live", exact=True).wait_for()
            page.screenshot(path=IMAGES / f"{name}.png")
            context.close()
        browser.close()
    for picture in sorted(IMAGES.glob("*.png")):
        print(f"{picture.name}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
