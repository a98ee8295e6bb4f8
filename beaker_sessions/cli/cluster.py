"""`cluster …`: groups of nodes, as the server knows them."""

from __future__ import annotations

from . import config, output, rest
from .args import ANY, Flag, Options, command
from .node import print_nodes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEADING = ("ID", "NAME", "CAPACITY", "PREEMPTIBLE", "STATUS")


@command("[ORGANIZATION]", Flag("on-prem", "switch", "only those of machines of your own"), words=(0, 1))
def list_clusters(options: Options) -> int:
    settings = config.load()
    server = rest.client(settings)
    organization = options.words[0] if options.words else rest.organization(settings, server)
    found = server.list_clusters(organization)["data"]
    if options["on-prem"]:
        found = [cluster for cluster in found if not cluster.get("autoscale")]
    return _print(options, found)


@command("ORGANIZATION/NAME...", words=(1, ANY))
def get(options: Options) -> int:
    server = rest.client(config.load())
    return _print(options, [server.get_cluster(name) for name in options.words])


@command("ORGANIZATION/NAME", words=(1, 1))
def nodes(options: Options) -> int:
    return print_nodes(options, rest.nodes(rest.client(config.load()), options.words[0]))


@command("[ORGANIZATION/]NAME", words=(1, 1))
def create(options: Options) -> int:
    settings = config.load()
    server = rest.client(settings)
    organization, _, name = options.words[0].rpartition("/")
    return _print(options, [server.create_cluster(organization or rest.organization(settings, server), {"name": name})])


@command("ORGANIZATION/NAME", words=(1, 1))
def delete(options: Options) -> int:
    rest.client(config.load()).delete_cluster(options.words[0])
    if not options.quiet and not options.json:
        output.line(f"Deleted cluster {options.words[0]}")
    return 0


def _print(options: Options, clusters: list[dict[str, Any]]) -> int:
    if options.json:
        output.json(clusters)
    elif options.quiet:
        for cluster in clusters:
            output.line(cluster["id"])
    else:
        keys = ("id", "fullName", "capacity", "preemptible", "status")
        output.table(HEADING, [[cluster.get(key) for key in keys] for cluster in clusters])
    return 0
