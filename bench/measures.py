"""The columns of the bench: what is measured on every path, in one order."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from bench import cpu, traffic
from bench.paths import Way


@attrs.frozen
class Measure:
    """A column."""

    name: str
    title: str
    short: str
    """Title where there is little room."""
    unit: str
    more_is_better: bool = True


MEASURES = (
    Measure("tcp1", "1 TCP stream", "1 TCP", "Gbit/s"),
    Measure("tcp4", "4 TCP streams", "4 TCP", "Gbit/s"),
    Measure("udp1400", "UDP, 1400 bytes", "UDP 1400", "kpps"),
    Measure("udp64", "UDP, 64 bytes", "UDP 64", "kpps"),
    Measure("rtt", "round trip at rest", "ping", "ms", more_is_better=False),
    Measure("rtt_load", "round trip under load", "ping, loaded", "ms", more_is_better=False),
    Measure("cpu", "CPU, whole machine", "CPU, all", "s/GB", more_is_better=False),
    Measure("cpu_daemons", "CPU, daemons alone", "CPU, daemons", "s/GB", more_is_better=False),
)


@attrs.frozen
class Effort:
    """How long to look."""

    rounds: int
    """Times that everything is measured."""
    seconds: int
    """That each kind of traffic lasts."""
    pings: int
    """For the round trip at rest."""

    @property
    def path_seconds(self) -> float:
        """About how long all measures of one path take, its setting up included."""
        return 5 * (self.seconds + 0.5) + 2.5 + self.pings * traffic.PING_INTERVAL


def measure(way: Way, effort: Effort) -> Mapping[str, float]:
    """Every measure that the path has, by name. :raises TrafficError: if traffic fails."""
    # At rest first: what a busy path leaves behind (timers, clock rates) would flatter it.
    figures = {"rtt": traffic.round_trip(way, effort.pings)}
    busy, worked = cpu.busy(), cpu.processes(way.daemons)
    transfers = [traffic.tcp(way, streams, effort.seconds) for streams in (1, 4)]
    busy, worked = cpu.busy() - busy, cpu.processes(way.daemons) - worked
    for name, transfer in zip(("tcp1", "tcp4"), transfers, strict=True):
        figures[name] = transfer.size * 8 / transfer.seconds / 1e9
    gigabytes = sum(transfer.size for transfer in transfers) / 1e9
    if not gigabytes:
        raise traffic.TrafficError("not a byte arrived over TCP")
    figures["cpu"] = busy / gigabytes
    if way.daemons:
        figures["cpu_daemons"] = worked / gigabytes
    for size in (1400, 64):
        figures[f"udp{size}"] = traffic.udp(way, size, effort.seconds) / 1000
    figures["rtt_load"] = traffic.round_trip_under_load(way, effort.seconds)
    return figures
