"""The AppArmor profile of sandboxes: a second lock on what namespaces, capabilities and seccomp already keep shut.

Owns the profile and how it is loaded; where the kernel has no AppArmor, or apparmor_parser is missing, there is none.
Language: apparmor.d(5).
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from .. import Finding

NAME = "beaker-session"
PARSER = "apparmor_parser"
ENABLED = Path("/sys/module/apparmor/parameters/enabled")
LOADED = Path("/sys/kernel/security/apparmor/policy/profiles")  # a directory for each, its name and a number
# As docker-default, nothing is mounted and nothing of the kernel's is written; sandboxes signal and debug one another's
# processes no more than their namespaces let them. A deny needs no later allow: it wins over `file`. What follows
# /proc and is no number is the machine's. No abi is named, as the oldest parsers know none.
PROFILE = f"""
profile {NAME} flags=(attach_disconnected,mediate_deleted) {{
  file,
  capability,
  network,
  unix,

  deny mount,
  deny umount,
  deny pivot_root,

  deny /proc/[^0-9]** wkl,
  deny /proc/kcore r,
  deny /sys/** wkl,
  deny /sys/firmware/** r,
  deny /sys/kernel/security/** r,
  deny /sys/devices/virtual/powercap/** r,

  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (send, receive) peer={NAME},
  ptrace peer={NAME},
}}
"""


def enabled() -> bool:
    return ENABLED.exists() and ENABLED.read_text().startswith("Y")


def load() -> str:
    """Load the profile, in the place of another version; what was wrong, "" for nothing."""
    if not shutil.which(PARSER):
        return f"{PARSER} is missing"
    done = subprocess.run(
        [PARSER, "--replace", "--skip-cache"], input=PROFILE, capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else f"{PARSER}: {' '.join(done.stderr.split())}"


def profile() -> str:
    """Its name, loaded again if somebody removed it; "" where there is none."""
    if not enabled():
        return ""
    return NAME if _loaded() or (load() == "" and _loaded()) else ""


def finding() -> Finding:
    if not enabled():
        return Finding("ok", "AppArmor is off; sessions are confined by namespaces, capabilities and seccomp")
    if why := load():
        what = f"sessions have no AppArmor profile: {why}; namespaces, capabilities and seccomp confine them"
        return Finding("warning", what, f"apt-get install apparmor, and look at: {PARSER} --version")
    return Finding("ok", f"AppArmor is on; sessions have its profile {NAME}")


def _loaded() -> bool:
    try:
        return any(entry.name.rpartition(".")[0] == NAME for entry in LOADED.iterdir())
    except OSError:
        return False
