"""Rules of iptables that versions before the forwarders made for a bridge: published ports were led by them.

Owns nothing but their end. To be deleted once nobody upgrades from such a version.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

TABLES = ("raw", "nat", "filter")


def remove(bridge: str) -> None:
    """Remove every rule that carries the bridge's name as its comment, and the chain of that name."""
    localnet = Path(f"/proc/sys/net/ipv4/conf/{bridge}/route_localnet")
    if not localnet.exists() or localnet.read_text().strip() == "0":
        return  # no such version was here
    for table in TABLES:
        command = ["iptables", "-w", "-t", table]
        listed = subprocess.run([*command, "-S"], capture_output=True, text=True, check=False).stdout
        for words in map(shlex.split, listed.splitlines()):
            if words[0] == "-A" and "--comment" in words and words[words.index("--comment") + 1] == bridge:
                subprocess.run([*command, "-D", *words[1:]], capture_output=True, check=False)
    for action in ("-F", "-X"):
        subprocess.run(["iptables", "-w", "-t", "nat", action, bridge], capture_output=True, check=False)
    localnet.write_text("0")
