"""`node …`: the machines that run sessions, as the server knows them."""

from __future__ import annotations

from . import config, output, rest
from .args import ANY, Flag, Options, command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEADING = ("ID", "HOSTNAME", "CPU COUNT", "GPU COUNT", "GPU TYPE", "MEMORY", "STATUS")


@command(
    "[CLUSTER]", Flag("cluster", "text", "only this cluster's", value="CLUSTER", stands_for_word=True), words=(0, 1)
)
def list_nodes(options: Options) -> int:
    cluster = options["cluster"] or (options.words[0] if options.words else None)
    return print_nodes(options, rest.nodes(rest.client(config.load()), cluster))


@command("NODE...", words=(1, ANY))
def get(options: Options) -> int:
    server = rest.client(config.load())
    return print_nodes(options, [server.get_node(name) for name in options.words])


@command("NODE", Flag("reason", "text", "what to tell those who wait", value="TEXT"), words=(1, 1))
def cordon(options: Options) -> int:
    return _cordon(options, True, options["reason"])


@command("NODE", words=(1, 1))
def uncordon(options: Options) -> int:
    return _cordon(options, False, None)


def _cordon(options: Options, cordoned: bool, reason: str | None) -> int:
    change: dict[str, Any] = {"cordoned": cordoned}
    if reason:
        change["cordonReason"] = reason
    server = rest.client(config.load())
    return print_nodes(options, [server.update_node(server.get_node(options.words[0])["id"], change)])


def print_nodes(options: Options, nodes: list[dict[str, Any]]) -> int:
    if options.json:
        output.json(nodes)
    elif options.quiet:
        for node in nodes:
            output.line(node["id"])
    else:
        output.table(HEADING, [_row(node) for node in nodes])
    return 0


def _row(node: dict[str, Any]) -> tuple[Any, ...]:
    limits = node.get("limits") or {}
    status = node.get("status") or "ok"
    if node.get("cordoned") and node.get("cordonReason"):
        status = f"{status}: {node['cordonReason']}"
    return (
        node["id"],
        node.get("hostname"),
        limits.get("cpuCount"),
        limits.get("gpuCount"),
        limits.get("gpuType"),
        output.memory(limits.get("memory")),
        status,
    )
