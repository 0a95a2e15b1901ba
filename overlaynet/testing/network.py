"""A whole overlay in one process: daemons on one store, with fake devices and links, and packets that go step by step::

    async with Network(3) as network:
        a, b, c = network.nodes
        packet = network.send(a, b, b"hello")
        await network.deliver()
        assert packet.delivered

The daemons are real; only what they would do to the kernel and the wire is pretended. Neither root nor a socket is
needed. Run it on the virtual clock (:data:`overlaynet.testing.clock.VIRTUAL_CLOCK`), or a lease's day lasts one.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

from overlaynet import network as documents
from overlaynet.daemon import Daemon
from overlaynet.delivery import Dropped
from overlaynet.drivers import Store
from overlaynet.hookspecs import hookimpl
from overlaynet.model import IPAddress, Lease, Peer, Route, Underlay
from overlaynet.plugins import Plugins
from overlaynet.settings import Settings
from overlaynet.stores.memory import MemoryStore, MemoryTable
from overlaynet.testing.fakes import FakeBackend, FakeDrivers, UnreliableStore, fake_underlay
from overlaynet.testing.flow import Kind, Packet, Step, draw

_FIRST_ADDRESS = IPv4Address("172.16.0.1")
_POLL = 0.1
_EVER = float("inf")


class Node:
    """One host: its daemon, and what that has made of it. It is started by its network."""

    def __init__(self, network: Network, name: str, underlay: Underlay, directory: Path, settings: Settings) -> None:
        self.name = name
        """``a``, ``b`` and so on."""
        self.underlay = underlay
        """How it is attached to the network of the hosts."""
        self.daemon: Daemon | None = None
        """The daemon that runs, or ran last."""
        self._network = network
        self._directory = directory
        self._settings = settings
        self._drivers = FakeDrivers()
        self._store: UnreliableStore | None = None
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Node {self.name}>"

    @property
    def running(self) -> bool:
        """True from its start until it is stopped, crashes or fails."""
        return self._task is not None and not self._task.done()

    @property
    def failure(self) -> BaseException | None:
        """The error that its daemon ended by."""
        if self._task is None or not self._task.done() or self._task.cancelled():
            return None
        return self._task.exception()

    @property
    def backend(self) -> FakeBackend:
        """The backend of the daemon that runs, or ran last. :raises LookupError: before it has one."""
        return _last(self._drivers.backends, f"{self.name} has no backend yet")

    @property
    def lease(self) -> Lease:
        """What it has leased. :raises LookupError: before it has."""
        lease = self._drivers.backends[-1].lease if self._drivers.backends else None
        if lease is None:
            raise LookupError(f"{self.name} has no lease yet")
        return lease

    @property
    def address(self) -> IPAddress:
        """The address of the node's container, the second of its subnet. :raises LookupError: before it has a lease."""
        return next(iter(self.lease.subnets))[2]

    @property
    def peers(self) -> Sequence[Peer]:
        """The peers that its packets can be sent to now."""
        return self._drivers.backends[-1].peers if self._drivers.backends else ()

    @property
    def routes(self) -> Sequence[Route]:
        """The routes that its kernel would have now."""
        return self._drivers.routers[-1].applied if self._drivers.routers else ()

    def start(self) -> None:
        """Start its daemon (again); :meth:`Network.converge` waits until it is there.

        :raises RuntimeError: if it runs.
        """
        if self.running:
            raise RuntimeError(f"{self.name} runs already")
        network = self._network
        plugins = Plugins()
        plugins.register(self._drivers, name="fakes")
        plugins.register(_Reporter(network, self.name), name="reporter")
        for place, observer in enumerate(network.observers):
            plugins.register(observer, name=f"observer {place}")
        self._store = UnreliableStore(network.make_store())
        if self.name in network.cut_off:
            self._store.fail()
        network.note(self.name, "starts")

        async def find_underlay(document: documents.Network) -> tuple[Underlay, str]:
            return self.underlay, self.name

        self.daemon = Daemon(self._settings, self._store, plugins, find_underlay)
        self._task = asyncio.create_task(self.daemon.run(), name=f"node {self.name}")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self.failure is not None:
            self._network.note(self.name, f"has failed: {self.failure}")

    async def stop(self) -> None:
        """Stop its daemon cleanly, and wait for its end. :raises OverlaynetError: what it ended by instead."""
        if self.daemon is not None and self._task is not None:
            self.daemon.stop()
            await self._task
            self._network.note(self.name, "has stopped")

    async def crash(self) -> None:
        """End its daemon without its leave: the kernel takes its device away, and its lease stays until it expires."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._network.note(self.name, "has crashed")

    def reach_store(self, reachable: bool) -> None:
        """Put the store in reach of this node, or out of it."""
        if self._store is not None:
            self._store.recover() if reachable else self._store.fail()


@attrs.define
class _Link:
    """What is wrong with the link from one node to another."""

    to_drop: float = 0
    delay: float = 0.0


class Network:
    """``nodes`` daemons, named ``a``, ``b``, … (``node-1``, … if they are more than 26), on one store; an async context.

    Entering starts them and waits until each knows all others; leaving ends them. An exception on the way gets the
    diagram of all packets as a note.

    :param document: the network document, as a mapping; by default that of 10.0.0.0/8 with a lifetime of a day.
    :param make_store: makes a store on shared data each time it is called; by default, memory stores.
    :param observers: plugins that every daemon loads: objects with hooks.
    :param settings: settings of every daemon, by their names in :class:`overlaynet.settings.Settings`.
    """

    def __init__(
        self,
        nodes: int = 2,
        *,
        document: dict[str, Any] | None = None,
        make_store: Callable[[], Store] | None = None,
        observers: Sequence[object] = (),
        **settings: Any,
    ) -> None:
        self.observers = observers
        self.cut_off: set[str] = set()
        """Names of the nodes that do not reach the store."""
        self.steps: list[Step] = []
        """All that has happened, in its order."""
        self._document = {"Network": "10.0.0.0/8"} if document is None else document
        self._table = MemoryTable()
        self.make_store = make_store if make_store is not None else self._make_memory_store
        self._directory = tempfile.TemporaryDirectory(prefix="overlaynet-network-")
        self.nodes = tuple(self._make_nodes(nodes, settings))
        """All of them, in the order of their names."""
        self._by_address: dict[IPAddress, Node] = {
            address: node for node in self.nodes if (address := node.underlay.public_ipv4) is not None
        }
        self._links: dict[tuple[str, str], _Link] = {}
        self._side: dict[str, int] = {}
        self._in_flight: list[tuple[float, int, Packet, Iterator[tuple[float, Step]]]] = []
        self._turns = itertools.count()
        self._packets = itertools.count(1)

    def _make_memory_store(self) -> Store:
        return MemoryStore(table=self._table)

    def _make_nodes(self, count: int, settings: dict[str, Any]) -> Iterator[Node]:
        for number in range(count):
            name = chr(ord("a") + number) if count <= 26 else f"node-{number + 1}"
            directory = Path(self._directory.name, name)
            given = {"store": "memory", "router": "memory", "subnet_file": str(directory / "subnet.env")} | settings
            yield Node(self, name, fake_underlay(str(_FIRST_ADDRESS + number)), directory, Settings(**given))

    async def __aenter__(self) -> Self:
        try:
            store = self.make_store()
            await store.replace_network(json.dumps(self._document))
            await store.aclose()
            for node in self.nodes:
                node.start()
            await self.converge()
        except BaseException as error:
            await self._end(error)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end(error)

    async def _end(self, error: BaseException | None) -> None:
        if error is not None:
            error.add_note(f"What happened in the network:\n\n{self.diagram()}\n")
        tasks = {node._task for node in self.nodes if node._task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._directory.cleanup()

    # Packets

    def send(
        self, sender: Node, to: Node | IPAddress | str, payload: bytes = b"", *, source: IPAddress | str | None = None
    ) -> Packet:
        """Have a container of ``sender`` send a packet; nothing happens to it before :meth:`step` or :meth:`deliver`.

        :param to: the node whose container it is for, or any address.
        :param source: the address that it pretends to come from; by default, the container's own.
        """
        destination = to.address if isinstance(to, Node) else ip_address(to)
        packet = Packet(
            next(self._packets), sender.address if source is None else ip_address(source), destination, payload
        )
        self._push(0.0, packet, self._life(packet, sender))
        return packet

    async def step(self) -> Step | None:
        """Let one thing happen to one packet, the one whose turn it is, and tell what; ``None`` if none is on its way.

        Time passes only while every packet is delayed; else, no daemon takes a step between two of a packet's.
        """
        if not self._in_flight:
            return None
        due = self._in_flight[0][0]
        if (wait := due - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(wait)
        _, _, packet, life = heapq.heappop(self._in_flight)
        delay, step = next(life)
        packet.steps.append(step)
        self.steps.append(step)
        if step.kind not in (Kind.DELIVERED, Kind.DROPPED):
            self._push(delay, packet, life)
        return step

    async def deliver(self) -> None:
        """Let everything happen to every packet on its way, until each is delivered or dropped."""
        while await self.step() is not None:
            pass

    def _push(self, delay: float, packet: Packet, life: Iterator[tuple[float, Step]]) -> None:
        due = asyncio.get_running_loop().time() + delay
        heapq.heappush(self._in_flight, (due, next(self._turns), packet, life))

    def _life(self, packet: Packet, sender: Node) -> Iterator[tuple[float, Step]]:
        """What happens to a packet: seconds until the next step, and the step."""

        def step(kind: Kind, node: Node, detail: object, to: Node | None = None, delay: float = 0.0) -> Any:
            now = asyncio.get_running_loop().time()
            return delay, Step(now, node.name, str(detail), kind, packet.number, None if to is None else to.name)

        at = sender
        try:
            route = _route(sender, packet.destination)
            yield step(Kind.ROUTED, sender, f"{packet.source} > {packet.destination} by {route.destination}")
            peer = sender.backend.encapsulate(packet.destination, packet.size)
            outer, far = sender.underlay.public_ipv4, peer.public_ipv4
            yield step(Kind.ENCAPSULATED, sender, f"[{outer} > {far} [{packet.source} > {packet.destination}]]")
            receiver = self._by_address.get(far) if far is not None else None
            if receiver is None:
                raise Dropped("no_host", f"no host has the address {far}")
            link = self._links.get((sender.name, receiver.name), _Link())
            if self._side.get(sender.name, 0) != self._side.get(receiver.name, 0):
                yield step(Kind.DROPPED, sender, "partition: they are on two sides", receiver)
                return
            if link.to_drop > 0:
                link.to_drop -= 1
                yield step(Kind.DROPPED, sender, "drop: lost on the link", receiver)
                return
            yield step(Kind.ON_THE_LINK, sender, f"{outer} > {far}", receiver, link.delay)
            at = receiver
            if not receiver.running:
                raise Dropped("no_daemon", f"nobody listens on {receiver.name}")
            assert outer is not None  # every node of this network has an IPv4 address
            receiver.backend.decapsulate(outer, packet.source, packet.destination)
            yield step(Kind.DELIVERED, receiver, f"{packet.destination}, {len(packet.payload)} bytes")
        except Dropped as dropped:
            yield step(Kind.DROPPED, at, dropped)

    # Time

    async def converge(self, seconds: float = 3600.0) -> None:
        """Wait until every node that runs is ready, and knows where each other is that runs.

        Those that do not run are peers until their leases expire, and are not looked at.

        :raises AssertionError: if that has not come about after so many seconds, or a daemon has failed; it says where.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while True:
            for node in self.nodes:
                if node.failure is not None:
                    raise AssertionError(f"the daemon of {node.name} has failed: {node.failure}") from node.failure
            if (why := self._not_converged()) is None:
                return
            assert loop.time() < until, f"after {seconds:g} seconds, {why}"
            await asyncio.sleep(_POLL)

    def _not_converged(self) -> str | None:
        running = [node for node in self.nodes if node.running]
        for node in running:
            if node.daemon is None or not node.daemon.status()["ready"]:
                return f"{node.name} is not ready"
        truth = {node.lease.subnets: node.underlay.public_ipv4 for node in running}
        for node in running:
            # The cheap test first: of many nodes, none has nearly all peers for most of the time.
            known = len(node.peers)
            if known >= len(truth) - 1:
                known = sum(truth.get(peer.subnets) == peer.public_ipv4 for peer in node.peers)
            if known < len(truth) - 1:
                return f"{node.name} knows {known} of {len(truth) - 1} peers"
        return None

    # Faults

    def drop(self, sender: Node, receiver: Node, count: float = _EVER) -> None:
        """Lose the next ``count`` packets on the link from one node to another; by default, all."""
        self._link(sender, receiver).to_drop = count
        number = "all packets" if count == _EVER else f"{count:g} packets"
        self.note(None, f"the link from {sender.name} to {receiver.name} loses {number}")

    def delay(self, sender: Node, receiver: Node, seconds: float) -> None:
        """Have each packet on the link from one node to another take so many seconds."""
        self._link(sender, receiver).delay = seconds
        self.note(None, f"the link from {sender.name} to {receiver.name} takes {seconds:g} seconds")

    def partition(self, *sides: Iterable[Node]) -> None:
        """Lose every packet between two of these groups of nodes. Nodes that are in none are a group by themselves.

        All reach the store as before: see :meth:`store_down`.
        """
        groups = [[node.name for node in side] for side in sides]
        self._side = {name: number for number, group in enumerate(groups, 1) for name in group}
        self.note(None, f"partition: {' / '.join(' '.join(group) for group in groups)}")

    def store_down(self, *nodes: Node) -> None:
        """Put the store out of reach of these nodes; of all, if none is named."""
        chosen = nodes or self.nodes
        for node in chosen:
            self.cut_off.add(node.name)
            node.reach_store(False)
        self.note(None, f"the store is out of reach{f' of {_names(nodes)}' if nodes else ''}")

    def heal(self) -> None:
        """End all faults of links and store. Nodes that crashed stay so until they are started."""
        self._links.clear()
        self._side.clear()
        self.cut_off.clear()
        for node in self.nodes:
            node.reach_store(True)
        self.note(None, "all is healed")

    def _link(self, sender: Node, receiver: Node) -> _Link:
        return self._links.setdefault((sender.name, receiver.name), _Link())

    # What happened

    def note(self, node: str | None, text: str) -> None:
        """Have the diagram say something at this place: of a node, or of all."""
        self.steps.append(Step(asyncio.get_running_loop().time(), node, text))

    def diagram(self) -> str:
        """What has happened, as a sequence diagram in text: nodes are columns, time goes down."""
        return draw(self.steps, [node.name for node in self.nodes])


class _Reporter:
    """Has the diagram show what becomes of one node."""

    def __init__(self, network: Network, name: str) -> None:
        self._network = network
        self._name = name

    @hookimpl
    def overlaynet_ready(self, lease: Lease) -> None:
        self._network.note(self._name, f"is ready: {lease.subnets}")

    @hookimpl
    def overlaynet_lease_lost(self, reason: str) -> None:
        self._network.note(self._name, f"has lost its lease: {reason}")

    @hookimpl
    def overlaynet_degraded(self, reason: str) -> None:
        self._network.note(self._name, f"is degraded: {reason}")

    @hookimpl
    def overlaynet_recovered(self) -> None:
        self._network.note(self._name, "has recovered")


def _route(node: Node, destination: IPAddress) -> Route:
    """The route that the node's kernel would choose. :raises Dropped: if it does not lead into the overlay."""
    matching = [
        route
        for route in node.routes
        if destination.version == route.destination.version and destination in route.destination
    ]
    if not matching:
        raise Dropped("leaked", f"{node.name} has no route for {destination}: it would follow the default route")
    # Of two for the same network, the backstop has the higher metric.
    route = max(matching, key=lambda route: (route.destination.prefixlen, route.kind == "unicast"))
    if route.kind == "unreachable":
        raise Dropped("unreachable", f"{node.name} answers for {destination} with an ICMP error")
    return route


def _last(made: list[FakeBackend], otherwise: str) -> FakeBackend:
    if not made:
        raise LookupError(otherwise)
    return made[-1]


def _names(nodes: Iterable[Node]) -> str:
    return " ".join(node.name for node in nodes)
