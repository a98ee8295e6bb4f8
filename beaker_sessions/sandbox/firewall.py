"""The firewall around the sessions' bridge: one table of nftables, named after the bridge.

Owns: the rules, as text that is computed from their arguments, and the table that is replaced by it in one step. Says
who may speak with sessions, never anything about other packets. Published ports need no rule: forwarders' sockets
carry a mark, which the kernel itself looks up, so that no rule can outlive the session it was made for.

Sources: nft(8); https://wiki.nftables.org.
"""

from __future__ import annotations

import ipaddress
import re
import subprocess
from collections.abc import Iterable

from ..errors import Error
from . import MARK, netns

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,14}")  # of an interface, and of a table
HIGHEST = 65535
# Of clouds: link-local; Alibaba's; Azure's, which is a resolver as well. Those of IPv6 are closed with all of it.
METADATA = "169.254.0.0/16, 100.100.100.200, 168.63.129.16"


def rules(
    bridge: str, network: str, resolvers: Iterable[str], access: Iterable[str], uplinks: Iterable[str] = ()
) -> str:
    """The commands of nft that make the table, whether or not there is one.

    network: the sessions' own, as `10.0.0.0/22`, which speaks with the world as this machine; "" where another sees to
    that. resolvers: addresses of DNS servers, of this machine or not. access:
    TCP ports of this machine that sessions may reach, as `PORT` or `ADDRESS:PORT`. uplinks: interfaces that lead beyond
    this machine though they are bridges or of a pair. Raises Error invalid for another access.
    """
    if not NAME.fullmatch(bridge):
        raise Error("invalid", f"bridge: {bridge!r} cannot be the name of an interface", "correct the settings")
    access = list(access)
    allowed = "\n".join(f"        {rule} accept" for rule in map(_access, access))
    # What the machine leads on to a container of its own, by the address and port that were called.
    led_on = [f"        {rule} accept" for rule in map(_led_on, access)]
    names = ", ".join(sorted({address for address in resolvers if _is_ipv4(address)}))
    dns = f"ip daddr {{ {names} }} meta l4proto {{ tcp, udp }} th dport 53 accept" if names else ""
    # Of each protocol apart: nft 1.0.6 does not know the port's type else.
    original = f"ct original ip daddr {{ {names} }} meta l4proto"
    dns_led_on = [f"        {original} {protocol} ct original proto-dst 53 accept" for protocol in ("tcp", "udp")]
    opened = "\n".join([*(dns_led_on if names else ()), *led_on])
    beyond = ", ".join(f'"{name}"' for name in sorted(uplinks))
    within = f"oifname != {{ {beyond} }} " if beyond else ""
    masquerade = f"""    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {network} oifname != "{bridge}" masquerade
    }}
"""
    # -10: before those of others, whose `accept` is not the last word; a `drop` or `reject` of ours is. What calls by
    # TCP gets a reset, because the kernel sends few of the other answers, and callers that are busy miss them. But one
    # for what was led on would come from an address that was not called.
    return f"""table inet {bridge} {{}}
delete table inet {bridge}
table inet {bridge} {{
    chain refuse {{
        meta l4proto tcp reject with tcp reset
        reject
    }}
    chain input {{
        type filter hook input priority -10; policy accept;
        iifname != "{bridge}" accept
        ct state established,related accept
        meta l4proto tcp socket mark {MARK} accept
        {dns}
{allowed}
        goto refuse
    }}
    chain forward {{
        type filter hook forward priority -10; policy accept;
        oifname "{bridge}" ct state established,related accept
        oifname "{bridge}" drop
        iifname != "{bridge}" accept
        meta nfproto ipv6 goto refuse
{opened}
        ct status dnat reject
        {within}meta oifkind {{ "bridge", "veth" }} goto refuse
        ip daddr {{ {METADATA} }} goto refuse
    }}
    chain output {{
        type filter hook output priority -10; policy accept;
        oifname != "{bridge}" accept
        ct state established,related accept
        meta skuid != 0 goto refuse
    }}
{masquerade if network else ""}}}
"""


def apply(text: str, prefix: Iterable[str] = ()) -> None:
    """Put the rules in force, all at once. prefix: of the command, to run it elsewhere. Raises Error unavailable."""
    done = subprocess.run([*prefix, "nft", "-f", "-"], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = " ".join(done.stderr.split())
        raise Error("unavailable", f"the firewall of sessions cannot be set up: {why}", "apt-get install nftables")


class Table:
    """The table of a bridge as this process set it up, to see whether it is still that."""

    def __init__(self, bridge: str) -> None:
        self.bridge = bridge
        self._text, self._listed = "", ""

    @property
    def known(self) -> bool:
        """Whether it was ever set up by this process."""
        return bool(self._text)

    def ensure(self, text: str, prefix: Iterable[str] = ()) -> bool:
        """Have the rules in force; whether somebody else had changed or removed them. Raises Error unavailable."""
        known = text == self._text
        if not known:
            # Tried where nobody else changes rules, as what is listed after that is what every later look compares.
            self._listed = netns.new(lambda: apply(text) or _listing(self.bridge, ()))  # type: ignore[func-returns-value]
            self._text = text
        if known and _listing(self.bridge, prefix) == self._listed:
            return False
        apply(text, prefix)
        return known


def _listing(bridge: str, prefix: Iterable[str]) -> str:
    """What the kernel has, "" for no table."""
    command = [*prefix, "nft", "--stateless", "list", "table", "inet", bridge]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def remove(bridge: str, prefix: Iterable[str] = ()) -> None:
    """Silent when there is none."""
    subprocess.run([*prefix, "nft", "delete", "table", "inet", bridge], capture_output=True, check=False)


def _access(item: str) -> str:
    address, _, port = item.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) <= HIGHEST or (address and not _is_ipv4(address)):
        raise Error("invalid", f"sessionAccess: {item!r} is neither PORT nor ADDRESS:PORT", "correct the settings")
    return f"{f'ip daddr {address} ' if address else ''}tcp dport {int(port)}"


def _led_on(item: str) -> str:
    address, _, port = item.rpartition(":")
    called = f"ct original ip daddr {address}" if address else "ct status dnat"
    return f"{called} meta l4proto tcp ct original proto-dst {int(port)}"


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True
