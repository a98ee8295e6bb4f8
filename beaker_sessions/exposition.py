"""The text in which Prometheus reads metrics, made by its own client library. What is not known has no line.

Owns what server and executor have in common: gauges with labels. Format:
https://prometheus.io/docs/instrumenting/exposition_formats/ (0.0.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as TYPE
from prometheus_client.registry import Collector

__all__ = ["TYPE", "Gauge", "registry", "text"]

# name, what it is, and values by their labels, of which each has the same names; None is not known
Gauge = tuple[str, str, Iterable[tuple[Mapping[str, str], float | None]]]


def registry(gauges: Callable[[], Iterable[Gauge]]) -> CollectorRegistry:
    """What the library serves: it asks for the gauges each time that somebody reads them."""
    made = CollectorRegistry(auto_describe=False)
    made.register(_Gauges(gauges))
    return made


def text(gauges: Iterable[Gauge]) -> str:
    return generate_latest(registry(lambda: gauges)).decode()


class _Gauges(Collector):
    def __init__(self, gauges: Callable[[], Iterable[Gauge]]) -> None:
        self.gauges = gauges

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()  # or the library would read all values once, to learn their names

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, help, values in self.gauges():
            known = [(labels, value) for labels, value in values if value is not None]
            if known:
                family = GaugeMetricFamily(name, help, labels=list(known[0][0]))
                for labels, value in known:
                    family.add_metric([_plain(text) for text in labels.values()], value)
                yield family


def _plain(value: str) -> str:
    return value.encode("utf-8", "replace").decode()  # lone surrogates have no place in UTF-8
