"""How the cost of a packet grows with the number of peers, while packets come from and go to all of them.

Two hosts stand for all: each holds as many subnets as its peer is to have peers, and the peer table has an entry for each.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network
from pathlib import Path

from bench import cpu, spray, traffic
from bench.measures import Effort, Measure
from bench.paths import between_containers
from bench.site import Host, Site, build
from overlaynet.errors import OverlaynetError
from overlaynet.testing.namespaces import NetworkNamespace

ENGINES = ("native", "python")
COUNTS = (2, 10, 100, 1_000, 10_000)
MOST = spray.FLOWS
"""Beyond that, there would not be a flow for each subnet."""

# By name: bytes of payload, and how many datagrams of a flow follow each other. In runs, only the table's size makes a
# difference; mixed, the more peers there are, the fewer neighbouring datagrams go to the same one and share a system call.
_SPRAYS = {"udp1400": (1400, spray.BATCH), "udp64": (64, spray.BATCH), "udp64_mixed": (64, 1)}

MEASURES = (
    Measure("tcp1", "1 TCP stream", "1 TCP", "Gbit/s"),
    Measure("udp1400", "UDP, 1400 bytes, in runs", "UDP 1400, runs", "kpps"),
    Measure("udp64", "UDP, 64 bytes, in runs", "UDP 64, runs", "kpps"),
    Measure("udp64_mixed", "UDP, 64 bytes, mixed", "UDP 64, mixed", "kpps"),
    Measure("udp1400_cpu", "CPU, 1400 bytes, in runs", "CPU 1400, runs", "µs", more_is_better=False),
    Measure("udp64_cpu", "CPU, 64 bytes, in runs", "CPU 64, runs", "µs", more_is_better=False),
    Measure("udp64_mixed_cpu", "CPU, 64 bytes, mixed", "CPU 64, mixed", "µs", more_is_better=False),
    Measure("set_peers", "set_peers", "set_peers", "ms", more_is_better=False),
)

_RANGES = (IPv4Network("10.0.0.0/9"), IPv4Network("10.128.0.0/9"))
_ROOT = Path(__file__).parents[1]


def measure(
    mode: str, engine: str, counts: Sequence[int], effort: Effort, add: Callable[[int, Mapping[str, float]], None]
) -> None:
    """One round: every count once, in the order given.

    :param add: is told the figures of each count.
    :raises OverlaynetError: if something fails.
    """
    with running(mode, engine) as (site, set_peers):
        for count in counts:
            took = set_peers(count)
            add(count, {"set_peers": took * 1e3} | _measure(site, count, effort))


@contextlib.contextmanager
def running(mode: str, engine: str) -> Iterator[tuple[Site, Callable[[int], float]]]:
    """Two hosts with a backend each, and what gives both a table of so many peers and returns the seconds it took."""
    first = tuple(IPv4Network((network.network_address, 24)) for network in _RANGES)
    with build(mode, (first[0], first[1])) as site, _carriers(site, engine) as carriers:
        for host, network in ((site.a, _RANGES[0]), (site.b, _RANGES[1])):
            _widen(host, network)
        yield site, lambda count: max([carrier.set_peers(count) for carrier in carriers])


def _widen(host: Host, network: IPv4Network) -> None:
    """Give the container every address of a network, where one entry in the host's table of neighbours serves them all."""
    host.container.ip(f"route add local {network} dev lo", f"route add {host.gateway}/32 dev eth0")
    host.namespace.ip(
        f"route add {network} via {host.container_address} dev cni0 onlink", "route add 10.0.0.0/8 dev overlay0"
    )
    # The kernel looks local and other routes up at once, the longest prefix first: so the gateway is still another host,
    # and the bridge's subnet would hide the new routes.
    for namespace, device in ((host.namespace, "cni0"), (host.container, "eth0")):
        namespace.ip(f"route delete {host.subnet} dev {device}")


def _measure(site: Site, count: int, effort: Effort) -> dict[str, float]:
    transfer = traffic.tcp(between_containers(site), 1, effort.seconds)
    figures = {"tcp1": transfer.size * 8 / transfer.seconds / 1e9}
    for name, (size, run) in _SPRAYS.items():
        busy = cpu.busy()
        delivered = send_to_all(site, size, run, count, effort.seconds)
        figures[f"{name}_cpu"] = (cpu.busy() - busy) / delivered * 1e6
        figures[name] = delivered / effort.seconds / 1e3
    return figures


def send_to_all(site: Site, size: int, run: int, count: int, seconds: int) -> int:
    """Datagrams that arrived at the server, out of as many as can be sent in this time, to all of so many subnets.

    :param size: bytes of payload.
    :param run: how many of a flow follow each other; see :mod:`bench.spray`.
    :raises OverlaynetError: if sending fails, or nothing arrives.
    """
    arguments: dict[str, object] = {"seconds": seconds, "size": size, "run": run, "subnets": count}
    ranges = dict(zip(("source", "destination"), map(str, _RANGES), strict=True))
    with _sink(site.b.container):
        before = _arrived(site.b.container)
        site.a.container.execute(_python("bench.spray", arguments | ranges), timeout=seconds + 30)
        threading.Event().wait(0.1)  # for what is still in queues
        delivered = _arrived(site.b.container) - before
    if delivered <= 0:
        raise traffic.TrafficError(f"none of the datagrams to {count} subnets arrived")
    return delivered


@contextlib.contextmanager
def _sink(namespace: NetworkNamespace) -> Iterator[None]:
    """A socket that nobody reads: the kernel counts what it drops for lack of room, and no reader's work is measured."""
    with namespace.socket(type=socket.SOCK_DGRAM) as sink:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sink.bind(("0.0.0.0", spray.PORT))
        yield


def _arrived(namespace: NetworkNamespace) -> int:
    """Datagrams for a socket of the namespace, read by it or not."""
    text = namespace.run(Path("/proc/thread-self/net/snmp").read_text)
    names, values = (line.split()[1:] for line in text.splitlines() if line.startswith("Udp:"))
    counters = dict(zip(names, map(int, values), strict=True))
    return counters["InDatagrams"] + counters["RcvbufErrors"]


class _Carrier:
    """The backend on one host."""

    def __init__(self, host: Host, process: subprocess.Popen[bytes]) -> None:
        self._host = host
        self._process = process

    def set_peers(self, count: int) -> float:
        """Give it a table of so many peers; the seconds that took. :raises OverlaynetError: if it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the next line tells
            self._process.stdin.write(b"%d\n" % count)
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait(10)
            raise OverlaynetError(f"the backend on host {self._host.label} ended with exit status {status}")
        return float(answer)

    def stop(self) -> None:
        """End it; idempotent."""
        self._process.communicate(timeout=30)


@contextlib.contextmanager
def _carriers(site: Site, engine: str) -> Iterator[list[_Carrier]]:
    with contextlib.ExitStack() as stack:
        carriers = []
        for (here, there), own, others in zip(site.hosts, _RANGES, reversed(_RANGES), strict=True):
            arguments = {"engine": engine, "underlay": str(here.underlay), "own": str(own)}
            arguments |= {"peer": str(there.underlay), "range": str(others)}
            process = here.namespace.popen(
                _python("bench.carrier", arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            carriers.append(_Carrier(here, process))
            stack.callback(carriers[-1].stop)
            carriers[-1].set_peers(1)  # it is ready when it answers
        yield carriers


def _python(module: str, arguments: Mapping[str, object]) -> list[str]:
    """The command that runs a module of the bench, from wherever."""
    return [
        "env",
        f"PYTHONPATH={_ROOT}",
        sys.executable,
        "-m",
        module,
        json.dumps(arguments),
    ]
