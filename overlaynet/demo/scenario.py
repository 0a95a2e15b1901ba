"""The documented scenario: real namespaces, real daemons, real packets. Shows nothing; :mod:`.rendering` does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from overlaynet.demo import measure
from overlaynet.demo.walk import DEVICE, ECHO_REPLY, ECHO_REQUEST, Station, Walk, carried, follow, is_echo
from overlaynet.errors import OverlaynetError
from overlaynet.testing.capture import Capture, Packet
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import ENCAPSULATION, NETWORK, SWITCH_ADDRESS, UNDERLAY, Container, Host, Lab
from overlaynet.testing.namespaces import NetworkNamespace
from overlaynet.testing.packets import ICMP, IPPacket

BRIDGE = "cni0"


@attrs.frozen
class HostFacts:
    """How a host looks once its daemon is ready."""

    label: str
    address: str
    subnet: str
    lease_seconds_left: int
    engine: str
    """Which packet engine carries its packets: ``native`` or ``python``."""
    container: str
    underlay_mtu: int
    link: Mapping[str, Any]
    """What ``ip -details -json link show`` tells of the overlay's device."""
    routes: tuple[str, ...]
    """The lines of ``ip route``."""
    expected_routes: tuple[tuple[str, str], ...]
    """Destination and device of the routes of the documented design."""
    problems: tuple[str, ...]

    @property
    def mtu(self) -> int | None:
        """MTU of the overlay's device, in bytes."""
        return self.link.get("mtu")

    @property
    def kind(self) -> str | None:
        """What kind of device that is: ``tun``."""
        info = self.link.get("linkinfo", {})
        kind: str | None = info.get("info_data", {}).get("type") or info.get("info_kind")
        return kind

    @property
    def flags(self) -> tuple[str, ...]:
        """The device's flags, such as ``POINTOPOINT``."""
        return tuple(self.link.get("flags", ()))


@attrs.frozen
class Walks:
    """A ping packet's way there, and its answer's way back."""

    request: Walk
    reply: Walk
    missed: int
    """Packets that the capture could not keep."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with either."""
        missed = (f"the capture missed {self.missed} packets",) if self.missed else ()
        return (*self.request.problems, *self.reply.problems, *missed)


@attrs.frozen
class Step:
    """One step of the set-up."""

    text: str
    action: Callable[[], None]


class Scenario:
    """Some hosts with a container each, all in namespaces of their own. Call the steps in order, and :meth:`close` always.

    :param hosts: how many, at least 2.
    :param store: ``file`` or ``etcd``; the latter is a private server, started here.
    """

    def __init__(self, hosts: int = 2, store: str = "file") -> None:
        self.lab = Lab("demo", hosts=hosts)
        self.store = store
        self.endpoint: str | None = None
        """URL of the private etcd, once it runs."""
        self.count = hosts
        self._resources = contextlib.ExitStack()

    @property
    def pair(self) -> tuple[Container, Container]:
        """The containers whose packets are looked at closely."""
        first, second = self.lab.containers[:2]
        return first, second

    @property
    def store_arguments(self) -> Sequence[str | Path]:
        """The arguments that make ``overlaynet`` use the scenario's store."""
        if self.endpoint is not None:
            return ["--store", "etcd", "--etcd-endpoints", self.endpoint]
        return self.lab.file_store

    def steps(self) -> list[Step]:
        """The set-up, step by step. Each may raise :exc:`OverlaynetError` or :exc:`TimeoutError`."""
        steps = [Step(f"{self.count} hosts and {self.count} containers, each a network namespace", self.lab.open)]
        if self.store == "etcd":
            steps.append(Step(f"a private etcd at {SWITCH_ADDRESS.ip}", self._start_etcd))
        return [
            *steps,
            Step("overlaynet run on each host", self._start_daemons),
            Step(f"each container plugged into its host's {BRIDGE}", self._connect_containers),
        ]

    def facts(self) -> list[HostFacts]:
        """How the hosts look now."""
        return [_facts(host) for host in self.lab.hosts]

    def walk(self) -> Walks:
        """Send one ping, capture it at every hop there and back, and check what was captured."""
        first, second = self.pair
        stations = _stations(first, second)
        # Neighbours are asked for their hardware addresses now, so that nothing waits while it is looked at.
        measure.ping(first, second, 1)
        taps = {str(station): (self._namespace(station.place), station.interface) for station in stations}
        encapsulated = {str(station): station.encapsulated for station in stations}

        def content(packet: Packet) -> IPPacket | None:
            return carried(packet, encapsulated=encapsulated[packet.tap])

        def keep(packet: Packet) -> bool:
            return is_echo(content(packet), ECHO_REQUEST) or is_echo(content(packet), ECHO_REPLY)

        with Capture(taps, keep) as capture:
            # What is missing is told hop by hop, not here.
            answered = measure.ping(first, second, 1).milliseconds
            with contextlib.suppress(TimeoutError):
                start = str(stations[0])
                capture.wait_for(
                    lambda packet: packet.tap == start and is_echo(content(packet), ECHO_REPLY), 2 if answered else 0
                )
        return _check(capture, stations, first, second)

    def ping(self, count: int = 10) -> measure.RoundTrips:
        """Ping the second container from the first."""
        return measure.ping(*self.pair, count)

    def transfer(self) -> measure.Transfer:
        """Send bytes over TCP from the first container to the second. :raises OverlaynetError: if it breaks off."""
        return measure.transfer(*self.pair)

    def reach(self) -> Mapping[tuple[str, str], bool]:
        """Whether each container reaches each other one, by label."""
        return measure.reach(self.lab.containers)

    def last_log_lines(self, lines: int = 5) -> dict[str, list[str]]:
        """The end of each daemon's log, by host."""
        return {host.label: host.daemon.log_lines()[-lines:] for host in self.lab.hosts if host.daemons}

    def commands(self, program: str) -> list[tuple[str, str]]:
        """What to try while it stays up: what it shows, and the command; ``program`` is how to call overlaynet."""
        first, second = self.pair
        host = first.host
        store = " ".join(map(str, self.store_arguments))
        # A private etcd listens in the switch's namespace, and nowhere else.
        inside = "" if self.endpoint is None else f"ip netns exec {self.lab.switch.name} "
        return [
            ("from container to container", f"ip netns exec {first.namespace.name} ping {second.ip}"),
            (f"{host.label}'s routes", f"ip netns exec {host.namespace.name} ip route"),
            ("the datagrams between the hosts", f"ip netns exec {host.namespace.name} tcpdump -ni eth0 udp port 8285"),
            ("who holds which subnet", f"{inside}{program} leases {store}"),
            (f"{host.label}'s daemon", f"{program} status --status-socket {host.status_socket}"),
            ("what it says", f"tail -f {host.daemon.log_file}" if host.daemons else ""),
        ]

    def close(self) -> None:
        """Take everything down. Idempotent."""
        try:
            self.lab.close()
        finally:
            self._resources.close()

    def leave_up(self) -> None:
        """Let everything outlive this process; :func:`overlaynet.testing.lab.take_down` removes it."""
        self._resources.pop_all()

    def _start_etcd(self) -> None:
        server = EtcdServer(
            str(SWITCH_ADDRESS.ip), network_namespace=self.lab.switch.name, directory=self.lab.directory
        )
        self._resources.enter_context(server)
        self.endpoint = server.endpoint

    def _start_daemons(self) -> None:
        daemons = [host.start_overlaynet(self.store_arguments, wait=False) for host in self.lab.hosts]
        for daemon in daemons:
            daemon.wait_until_ready(60)
        self.lab.wait_until_acquainted()

    def _connect_containers(self) -> None:
        for host in self.lab.hosts:
            host.connect_containers()

    def _namespace(self, place: str) -> NetworkNamespace:
        by_label = {host.label: host.namespace for host in self.lab.hosts}
        by_label |= {container.label: container.namespace for container in self.lab.containers}
        return by_label[place]


def _stations(first: Container, second: Container) -> list[Station]:
    there, back = first.host.label, second.host.label
    return [
        Station(first.label, "eth0", "the container sends it"),
        Station(there, BRIDGE, "its host's bridge"),
        Station(there, DEVICE, "routed to the TUN device"),
        Station(there, "eth0", "wrapped by overlaynet", encapsulated=True),
        Station(back, "eth0", "received", encapsulated=True),
        Station(back, DEVICE, "unwrapped by overlaynet"),
        Station(back, BRIDGE, "routed to the bridge"),
        Station(second.label, "eth0", "there it is"),
    ]


def _check(capture: Capture, stations: Sequence[Station], first: Container, second: Container) -> Walks:
    packets = capture.packets
    start = next((packet.ip for packet in packets if packet.tap == str(stations[0]) and packet.outgoing), None)
    identifier, sequence = None, None
    if start is not None and isinstance(start.transport, ICMP):
        identifier, sequence = start.transport.identifier, start.transport.sequence
    there = (first.host.address.ip, second.host.address.ip)
    request = follow(
        packets,
        stations,
        lambda packet: is_echo(packet, ECHO_REQUEST, identifier, sequence),
        "echo request",
        inner=(first.ip, second.ip),
        outer=there,
    )
    reply = follow(
        packets,
        stations[::-1],
        lambda packet: is_echo(packet, ECHO_REPLY, identifier, sequence),
        "echo reply",
        inner=(second.ip, first.ip),
        outer=there[::-1],
    )
    return Walks(request, reply, capture.missed)


def _facts(host: Host) -> HostFacts:
    status = host.status()
    subnet = ", ".join(map(str, _list(status.get("subnets"))))
    links = [link for link in host.namespace.ip_json("link", "show") if link.get("ifname") == DEVICE]
    routes = host.namespace.execute(["ip", "route"]).stdout.splitlines()
    expected = ((f"10.244.{host.number}.0/24", BRIDGE), (str(NETWORK), DEVICE), (str(UNDERLAY), "eth0"))
    facts = HostFacts(
        label=host.label,
        address=str(host.address.ip),
        subnet=subnet,
        lease_seconds_left=int(str(status.get("lease_seconds_left", 0))),
        engine=str(_mapping(status.get("packets")).get("engine")),
        container=", ".join(str(container.address) for container in host.containers),
        underlay_mtu=host.lab.mtu,
        link=links[0] if links else {},
        routes=tuple(line.rstrip() for line in routes),
        expected_routes=expected,
        problems=(),
    )
    return attrs.evolve(facts, problems=tuple(_wrong(facts, host)))


def _wrong(facts: HostFacts, host: Host) -> Iterator[str]:
    label = facts.label
    if facts.subnet != facts.expected_routes[0][0]:
        yield f"{label} leased {facts.subnet or 'nothing'}, not {facts.expected_routes[0][0]}"
    if not facts.link:
        yield f"{label} has no device {DEVICE}"
    elif facts.kind != "tun" or "POINTOPOINT" not in facts.flags:
        yield f"{label}'s {DEVICE} is not a point-to-point TUN device"
    elif facts.mtu != host.lab.mtu - ENCAPSULATION:
        yield f"{label}'s {DEVICE} has an MTU of {facts.mtu}, not {host.lab.mtu - ENCAPSULATION}"
    for destination, device in facts.expected_routes:
        if not any(is_route(line, destination, device) for line in facts.routes):
            yield f"{label} has no route {destination} dev {device}"


def is_route(line: str, destination: str, device: str) -> bool:
    """Whether a line of ``ip route`` is the route to that destination through that device."""
    return f"{line} ".startswith(f"{destination} dev {device} ")


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise OverlaynetError("the daemon's status does not tell of its packets")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise OverlaynetError("the daemon's status does not list its subnets")
    return value
