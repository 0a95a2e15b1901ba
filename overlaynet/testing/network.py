"""A whole overlay in one process: daemons on one store, with fake devices and links, and packets that go step by step::

    async with Network(3) as network:
        a, b, c = network.nodes
        packet = network.send(a, b, b"hello")
        await network.deliver()
        assert packet.delivered

The daemons are real; only what they would do to the kernel and the wire is pretended. Neither root nor a socket is
needed. Run it on the virtual clock (:data:`overlaynet.testing.clock.VIRTUAL_CLOCK`), or a lease's day lasts one.

With ``backend=`` the backend is real, too, and has real sockets on loopback addresses; only its TUN device is pretended. It
runs on the real clock.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from overlaynet import network as documents
from overlaynet.daemon import Daemon
from overlaynet.drivers import Backend, Store
from overlaynet.hookspecs import hookimpl
from overlaynet.model import IPAddress, Lease, Peer, Route, Underlay
from overlaynet.plugins import Plugins
from overlaynet.settings import Settings
from overlaynet.stores.memory import MemoryStore, MemoryTable
from overlaynet.testing.fakes import FakeBackend
from overlaynet.testing.flow import Kind, Packet, Step, draw
from overlaynet.testing.links import EVER, FakeLinks, Life, Links
from overlaynet.testing.real_links import RealLinks
from overlaynet.testing.runs import Run

_POLL = 0.1


class Node:
    """One host: its daemon, and what that has made of it. It is started by its network."""

    def __init__(self, network: Network, name: str, underlay: Underlay, settings: Mapping[str, Any]) -> None:
        self.network = network
        """What it is part of."""
        self.name = name
        """``a``, ``b`` and so on."""
        self.underlay = underlay
        """How it is attached to the network of the hosts."""
        self.daemon: Daemon | None = None
        """The daemon that runs, or ran last."""
        self._settings = dict(settings)
        self._runs: list[Run] = []
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Node {self.name}>"

    @property
    def running(self) -> bool:
        """True from its start until it is stopped, crashes or fails."""
        return self._task is not None and not self._task.done()

    @property
    def failure(self) -> BaseException | None:
        """The error that its daemon ended by. Whoever expects one waits for it with :meth:`failed`."""
        if self._task is None or not self._task.done() or self._task.cancelled():
            return None
        return self._task.exception()

    @property
    def backend(self) -> Backend:
        """The backend of the daemon that runs, or ran last. :raises LookupError: before it has one."""
        backend = self._runs[-1].backend if self._runs else None
        if backend is None:
            raise LookupError(f"{self.name} has no backend yet")
        return backend

    @property
    def lease(self) -> Lease:
        """What it has leased. :raises LookupError: before it has."""
        lease = self._runs[-1].lease if self._runs else None
        if lease is None:
            raise LookupError(f"{self.name} has no lease yet")
        return lease

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """The addresses of the node's container, the second of each subnet. :raises LookupError: before it has a lease."""
        return tuple(subnet[2] for subnet in self.lease.subnets)

    @property
    def address(self) -> IPAddress:
        """The first of :attr:`addresses`: of IPv4, if the overlay has it."""
        return self.addresses[0]

    @property
    def peers(self) -> Sequence[Peer]:
        """The peers that its packets can be sent to now."""
        return self._runs[-1].peers if self._runs else ()

    @property
    def routes(self) -> Sequence[Route]:
        """The routes that its kernel would have now."""
        return self._runs[-1].routes if self._runs else ()

    def start(self) -> None:
        """Start its daemon (again); :meth:`Network.converge` waits until it is there.

        :raises RuntimeError: if it runs.
        """
        if self.running:
            raise RuntimeError(f"{self.name} runs already")
        network = self.network
        run = Run(network.make_store(), network.backend)
        plugins = Plugins(strict=True)
        plugins.register(run, name="drivers")
        plugins.register(_Reporter(network, self.name), name="reporter")
        for place, observer in enumerate(network.observers):
            plugins.register(observer, name=f"observer {place}")
        self._runs.append(run)
        if self.name in network.cut_off:
            run.store.fail()
        network.note(self.name, "starts")

        async def find_underlay(document: documents.Network) -> tuple[Underlay, str]:
            return self.underlay, self.name

        settings = Settings(**{"subnet_file": str(network.directory / self.name / "subnet.env")} | self._settings)
        daemon = self.daemon = Daemon(settings, run.store, plugins, find_underlay)
        self._task = network.links.start_on(self, lambda: asyncio.create_task(daemon.run(), name=f"node {self.name}"))
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.network.unexpected[task] = (self, error)
            self.network.note(self.name, f"has failed: {error}")

    async def stop(self) -> None:
        """Stop its daemon cleanly, and wait for its end. :raises OverlaynetError: what it ended by instead."""
        if self.daemon is not None and self._task is not None:
            self.daemon.stop()
            await asyncio.wait({self._task})
            self.network.unexpected.pop(self._task, None)  # the caller is told
            await self._task
            self.network.note(self.name, "has stopped")

    async def failed(self) -> BaseException:
        """Wait until its daemon ends by an error, and return that: it was expected, and the network does not raise it.

        :raises RuntimeError: if it ends otherwise, or was never started.
        """
        if self._task is not None:
            await asyncio.wait({self._task})
            self.network.unexpected.pop(self._task, None)
        if self.failure is None:
            raise RuntimeError(f"the daemon of {self.name} has not failed")
        return self.failure

    async def crash(self) -> None:
        """End its daemon as SIGKILL does: nothing of it is closed, nobody is told, and its lease stays until it expires.

        The kernel takes the device away, with the routes that lead to it, and closes the sockets. A real backend is closed
        after that, to end its tasks and threads, which can reach nothing any more.
        """
        if self._task is not None and not self._task.done():
            self._runs[-1].crash()
            self.network.links.crash(self)
            self._task.remove_done_callback(self._ended)
            self._task.cancel()
            await asyncio.wait({self._task})
            self.network.note(self.name, "has crashed")

    def reach_store(self, reachable: bool) -> None:
        """Put the store in reach of this node, or out of it."""
        if self._runs:
            self._runs[-1].store.recover() if reachable else self._runs[-1].store.fail()

    async def _end(self) -> None:
        """End its daemon, and free what crashes have left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for run in self._runs:
            await run.free()


class Network:
    """``nodes`` daemons, named ``a``, ``b``, … (``node-1``, … if they are more than 26), on one store; an async context.

    This is a network to test with; the overlay's own parameters, which backends are given, are an
    :class:`overlaynet.api.Network`. Entering starts the daemons and waits until each knows all others; leaving ends them, and
    raises what one of them has failed by, unless the test expected it (:meth:`Node.failed`). Observers are strict: one that
    raises ends its daemon. An exception on the way gets the diagram of all packets as a note.

    :param document: the network document, as a mapping; by default that of 10.0.0.0/8 with a lifetime of a day.
    :param make_store: makes a store on shared data each time it is called; by default, memory stores.
    :param observers: plugins that every daemon loads: objects with hooks.
    :param underlay: IP versions of the nodes' addresses, ``(4,)``, ``(6,)`` or ``(4, 6)``. With ``backend`` only the first:
        there is no more than one IPv6 address of loopback.
    :param backend: a real backend: the name of one that is installed, or a class. It needs the real clock. It has its device by
        :class:`overlaynet.api.PacketDevice`, or routes packets to the hosts of its peers; and sockets, bound to the node's
        address, in this process.
    :param backend_options: members of ``Backend`` in the network document. For a class, ``Type`` is what it publishes; it may
            be left out if that is ``udp`` or nothing.
    :param patience: seconds after which a packet that has come out of no device of a real backend is lost.
    :param settings: settings of every daemon, by their names in :class:`overlaynet.settings.Settings`.
    """

    def __init__(
        self,
        nodes: int = 2,
        *,
        document: dict[str, Any] | None = None,
        make_store: Callable[[], Store] | None = None,
        observers: Sequence[object] = (),
        underlay: Sequence[int] = (4,),
        backend: str | type[Backend] | None = None,
        backend_options: Mapping[str, Any] | None = None,
        patience: float = 2.0,
        **settings: Any,
    ) -> None:
        self.observers = observers
        self.cut_off: set[str] = set()
        """Names of the nodes that do not reach the store."""
        self.steps: list[Step] = []
        """All that has happened, in its order."""
        self.unexpected: dict[asyncio.Task[None], tuple[Node, BaseException]] = {}
        """What daemons have failed by, as long as nobody has asked for it."""
        self._document = dict({"Network": "10.0.0.0/8"} if document is None else document)
        options = dict(self._document.get("Backend", {})) | dict(backend_options or {})
        if isinstance(backend, str):
            options["Type"] = backend
            backend = Plugins().driver("backend", backend)
        if options:
            self._document["Backend"] = {"Type": "udp"} | options
        self.backend: type[Backend] = FakeBackend if backend is None else backend
        """What every node's backend is made of."""
        self._table = MemoryTable()
        self.make_store = make_store if make_store is not None else self._make_memory_store
        self.directory = Path()
        """Where the nodes have their files, once it was entered."""
        self._stack = ExitStack()
        self.links: Links
        """What is between the nodes."""
        if backend is None:
            self.links = FakeLinks(lambda: self.nodes, underlay)
        elif tuple(underlay) == (4,):
            self.links = RealLinks(lambda: self.nodes, patience)
        else:
            raise ValueError(
                "a real backend's nodes have IPv4 addresses: loopback has only one of IPv6; leave underlay= out"
            )
        self.nodes = tuple(self._make_nodes(nodes, settings))
        """All of them, in the order of their names."""
        self._in_flight: list[tuple[float, int, Packet, Life]] = []
        self._turns = itertools.count()
        self._packets = itertools.count(1)

    def _make_memory_store(self) -> Store:
        return MemoryStore(table=self._table)

    def _make_nodes(self, count: int, settings: dict[str, Any]) -> Iterator[Node]:
        for number in range(count):
            name = chr(ord("a") + number) if count <= 26 else f"node-{number + 1}"
            yield Node(self, name, self.links.underlay(number), {"store": "memory", "router": "memory"} | settings)

    async def __aenter__(self) -> Self:
        try:
            self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="overlaynet-network-")))
            self.links.begin(self._stack)
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
        if error is None:
            self._raise_unexpected()

    async def _end(self, error: BaseException | None) -> None:
        if error is not None:
            error.add_note(f"What happened in the network:\n\n{self.diagram()}\n")
        with self._stack:
            for _, _, _, life in self._in_flight:
                await life.aclose()
            for node in self.nodes:
                await node._end()

    def _raise_unexpected(self) -> None:
        for node, failure in self.unexpected.values():
            error = AssertionError(f"the daemon of {node.name} has failed: {failure}")
            error.add_note(f"What happened in the network:\n\n{self.diagram()}\n")
            raise error from failure

    # Packets

    def send(
        self, sender: Node, to: Node | IPAddress | str, payload: bytes = b"", *, source: IPAddress | str | None = None
    ) -> Packet:
        """Have a container of ``sender`` send a packet; nothing happens to it before :meth:`step` or :meth:`deliver`.

        :param to: the node whose container it is for, or any address.
        :param source: the address that it pretends to come from; by default, the container's own.
        """
        own: dict[int, IPAddress] = {address.version: address for address in sender.addresses}
        if isinstance(to, Node):
            destination = next((address for address in to.addresses if address.version in own), to.address)
        else:
            destination = ip_address(to)
        chosen = own.get(destination.version, sender.address) if source is None else ip_address(source)
        packet = Packet(next(self._packets), chosen, destination, payload)
        self._push(0.0, packet, self.links.life(packet, sender))
        return packet

    async def step(self) -> Step | None:
        """Let one thing happen to one packet, the one whose turn it is, and tell what; ``None`` if none is on its way.

        Time passes only while every packet is delayed; else, no daemon takes a step between two of a packet's.

        With a real backend there are two steps: the packet is routed into the device, and then it is out of one, or dropped.
        The second waits in real time, while daemons and backends go on: until the packet has come out of a device, or for
        ``patience`` seconds; for less if a backend counts a drop. One packet is inside of the backends at a time.
        """
        if not self._in_flight:
            return None
        due = self._in_flight[0][0]
        if (wait := due - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(wait)
        _, _, packet, life = heapq.heappop(self._in_flight)
        delay, step = await anext(life)
        packet.steps.append(step)
        self.steps.append(step)
        if step.kind in (Kind.DELIVERED, Kind.DROPPED):
            await life.aclose()
        else:
            self._push(delay, packet, life)
        return step

    async def deliver(self) -> None:
        """Let everything happen to every packet on its way, until each is delivered or dropped."""
        while await self.step() is not None:
            pass

    def _push(self, delay: float, packet: Packet, life: Life) -> None:
        due = asyncio.get_running_loop().time() + delay
        heapq.heappush(self._in_flight, (due, next(self._turns), packet, life))

    # Time

    async def converge(self, seconds: float | None = None) -> None:
        """Wait until every node that runs is ready, and knows where each other is that runs.

        Those that do not run are peers until their leases expire, and are not looked at.

        :param seconds: by default an hour, or half a minute with a real backend.
        :raises AssertionError: if that has not come about after so many seconds, or a daemon has failed; it says where.
        """
        loop = asyncio.get_running_loop()
        seconds = self.links.patience if seconds is None else seconds
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
        truth = {node.lease.subnets: _public(node.underlay) for node in running}
        for node in running:
            # The cheap test first: of many nodes, none has nearly all peers for most of the time.
            known = len(node.peers)
            if known >= len(truth) - 1:
                known = sum(truth.get(peer.subnets) == _public(peer) for peer in node.peers)
            if known < len(truth) - 1:
                return f"{node.name} knows {known} of {len(truth) - 1} peers"
        return None

    # Faults

    def drop(self, sender: Node, receiver: Node, count: float = EVER) -> None:
        """Lose the next ``count`` packets on the link from one node to another; by default, all.

        With a real backend those are counted before they get into the device. If all are to be lost, the kernel loses whatever
        the one sends the other: connections hang.
        """
        self.links.link(sender, receiver).to_drop = count
        self.links.changed()
        number = "all packets" if count == EVER else f"{count:g} packets"
        self.note(None, f"the link from {sender.name} to {receiver.name} loses {number}")

    def delay(self, sender: Node, receiver: Node, seconds: float) -> None:
        """Have each packet on the link from one node to another take so many seconds.

        With a real backend, before it gets into the device.
        """
        self.links.link(sender, receiver).delay = seconds
        self.note(None, f"the link from {sender.name} to {receiver.name} takes {seconds:g} seconds")

    def partition(self, *sides: Iterable[Node]) -> None:
        """Lose every packet between two of these groups of nodes. Nodes that are in none are a group by themselves.

        With a real backend it is the kernel that loses them, and whatever else the sides send each other, in both directions.
        All reach the store as before: see :meth:`store_down`.
        """
        groups = [[node.name for node in side] for side in sides]
        self.links.divide({name: number for number, group in enumerate(groups, 1) for name in group})
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
        self.links.heal()
        self.cut_off.clear()
        for node in self.nodes:
            node.reach_store(True)
        self.note(None, "all is healed")

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


def _public(host: Underlay | Peer) -> tuple[IPAddress | None, IPAddress | None]:
    """Where others reach it."""
    return host.public_ipv4, host.public_ipv6


def _names(nodes: Iterable[Node]) -> str:
    return " ".join(node.name for node in nodes)
