"""How a fleet of nodes converges: time, store requests and memory, and how they grow with the number of nodes.

``python -m bench.convergence`` measures and prints a table. The daemons are whole, and live in this process; only
devices are left out. On the memory store time is virtual, so what is told is real time spent (all nodes on one core). On
etcd, it is killed and started again, too; and half of the nodes are cut off from it. Meanwhile a twentieth of all moves to
other addresses.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import math
import resource
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import attrs

from overlaynet.daemon import Daemon
from overlaynet.drivers import NoOptions
from overlaynet.errors import StoreUnavailable
from overlaynet.leases import TableStore
from overlaynet.model import Subnets, Underlay
from overlaynet.network import Network
from overlaynet.plugins import Plugins
from overlaynet.settings import Settings
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.stores.memory import MemoryTable
from overlaynet.table import Record, Table
from overlaynet.testing.clock import VirtualClockLoop
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.fakes import FakeDrivers, fake_underlay
from overlaynet.testing.relay import Relay

_FIRST = IPv4Address("172.16.0.1")
_MOVED = 1 << 16
"""How far from its former address a node is that has moved once."""
_PARTED = 5.0
"""Seconds that nodes are cut off."""
_DOCUMENT = json.dumps({"Network": "10.0.0.0/8", "LeaseTTL": 60})

MakeTable = Callable[[int], Table]
"""Makes the table of the node of this number."""
Fault = Callable[["Fleet"], Awaitable[None]]
"""Does something to all, and undoes it."""


class CountingTable(Table):
    """Counts the requests that pass through it to another table."""

    def __init__(self, table: Table, requests: Counter[str]) -> None:
        self._table = table
        self._requests = requests

    async def get(self, key: str) -> Record | None:
        self._requests["get"] += 1
        return await self._table.get(key)

    async def list(self, prefix: str) -> Mapping[str, Record]:
        self._requests["list"] += 1
        return await self._table.list(prefix)

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        self._requests["create"] += 1
        return await self._table.create(key, value, ttl)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        self._requests["replace"] += 1
        return await self._table.replace(record, value, ttl)

    async def delete(self, record: Record) -> bool:
        self._requests["delete"] += 1
        return await self._table.delete(record)

    def watch(self, prefix: str) -> AsyncGenerator[Mapping[str, Record], None]:
        self._requests["watch"] += 1
        return self._table.watch(prefix)

    async def ttl(self, record: Record) -> float:
        self._requests["ttl"] += 1
        return await self._table.ttl(record)

    async def aclose(self) -> None:
        await self._table.aclose()


class _Store(TableStore):
    def __init__(self, table: Table) -> None:
        super().__init__(NoOptions())
        self._given = table

    def __str__(self) -> str:
        return "the fleet's store"

    def make_table(self) -> Table:
        return self._given


class Member:
    """One node of a fleet."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.name = f"node-{number}"
        self.number = number
        self.underlay = fake_underlay(str(_FIRST + number))
        self.drivers = FakeDrivers()
        self._fleet = fleet
        self._task: asyncio.Task[None] | None = None
        self._moves = 0

    @property
    def running(self) -> bool:
        """True from its start until it is killed or fails."""
        return self._task is not None and not self._task.done()

    @property
    def subnets(self) -> Subnets | None:
        """What it has leased, once it has."""
        lease = self.drivers.backends[-1].lease if self.drivers.backends else None
        return None if lease is None else lease.subnets

    @property
    def peers(self) -> Mapping[Subnets, IPv4Address | None]:
        """Its peer table: where each subnet is reached."""
        return {peer.subnets: peer.public_ipv4 for peer in self.drivers.backends[-1].peers}

    def start(self) -> None:
        """Start its daemon."""
        plugins = Plugins()
        plugins.register(self.drivers, name="fakes")

        async def find_underlay(network: Network) -> tuple[Underlay, str]:
            return self.underlay, self.name

        path = Path(self._fleet.directory, f"{self.name}.env")
        settings = Settings(router="memory", subnet_file=str(path))
        store = _Store(CountingTable(self._fleet.make_table(self.number), self._fleet.requests))
        self._task = asyncio.create_task(Daemon(settings, store, plugins, find_underlay).run(), name=self.name)

    async def kill(self) -> None:
        """End its daemon at whatever it does; its lease stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def move(self) -> None:
        """Have another address, from the next start on."""
        self._moves += 1
        self.underlay = fake_underlay(str(_FIRST + _MOVED * self._moves + self.number))

    def check(self) -> None:
        """:raises OverlaynetError: what its daemon ended by."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()


@attrs.frozen
class Claim:
    """One record in the store: which node has which subnet, and where it is reached."""

    subnet: IPv4Network
    address: IPv4Address
    node: str


class Fleet:
    """Many nodes on one store."""

    def __init__(self, size: int, make_table: MakeTable, directory: Path) -> None:
        self.requests: Counter[str] = Counter()
        self.make_table = make_table
        self.directory = directory
        self.members = [Member(self, number) for number in range(size)]

    async def write_document(self) -> None:
        """Write the network document."""
        store = _Store(self.make_table(0))
        await store.replace_network(_DOCUMENT)
        await store.aclose()

    @staticmethod
    def start(members: Sequence[Member]) -> None:
        """Start some, at once."""
        for member in members:
            member.start()

    @staticmethod
    async def kill(members: Sequence[Member]) -> None:
        """Kill some, at once."""
        await asyncio.gather(*(member.kill() for member in members))

    async def move(self, members: Sequence[Member]) -> None:
        """Kill some, and start them at other addresses."""
        await self.kill(members)
        for member in members:
            member.move()
        self.start(members)

    async def converge(self, seconds: float) -> None:
        """Wait until the peer table of every node that runs is the truth: exactly all others that run.

        What the truth is, the bare records in the store say; no daemon is asked.

        :raises AssertionError: if that has not come about after so many seconds.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (why := await self._differs()) is not None:
            assert loop.time() < until, f"after {seconds:g} s {why}"
            await asyncio.sleep(0.2)

    async def _differs(self) -> str | None:
        for member in self.members:
            member.check()
        running = {member.name: member for member in self.members if member.running}
        for name, member in running.items():  # the cheap tests first
            if member.subnets is None:
                return f"{name} has no subnet"
            known = len(member.drivers.backends[-1].peers)
            if known != len(running) - 1:
                return f"{name} knows {known} peers of {len(running) - 1}"
        try:
            claims = await self._claims()
        except StoreUnavailable as error:
            return f"the store cannot be read: {error}"
        if sorted(claim.node for claim in claims) != sorted(running):
            return "the store has other leases than one of each node that runs"
        in_order = sorted(claims, key=lambda claim: claim.subnet)
        for before, after in itertools.pairwise(in_order):
            assert not before.subnet.overlaps(after.subnet), f"{before} and {after} overlap"
        truth = {Subnets(claim.subnet): claim.address for claim in claims}
        for claim in claims:
            member = running[claim.node]
            if member.subnets != Subnets(claim.subnet) or member.underlay.public_ipv4 != claim.address:
                return f"the store has {claim}, and that is not what {claim.node} has"
            if member.peers != {subnets: truth[subnets] for subnets in truth if subnets != member.subnets}:
                return f"{claim.node} knows other peers than there are"
        return None

    async def _claims(self) -> list[Claim]:
        """What the store has. It is read without the daemons' own code, whose faults would then go unseen."""
        table = self.make_table(0)
        try:
            listed = await table.list("subnets/")
        finally:
            await table.aclose()
        claims = []
        for key, record in listed.items():
            value = json.loads(record.value)
            subnet = IPv4Network(key.removeprefix("subnets/").replace("-", "/"))
            claims.append(Claim(subnet, IPv4Address(value["PublicIP"]), value["Overlaynet"]["Node"]))
        return claims


@asynccontextmanager
async def fleet(size: int, make_table: MakeTable) -> AsyncIterator[Fleet]:
    """A fleet whose network document is written; all that runs at the end is killed."""
    with tempfile.TemporaryDirectory(prefix="overlaynet-fleet-") as directory:
        made = Fleet(size, make_table, Path(directory))
        try:
            await made.write_document()
            yield made
        finally:
            await made.kill(made.members)


@attrs.frozen
class Figures:
    """What one phase cost."""

    phase: str
    nodes: int
    seconds: float
    """Of real time."""
    requests: float
    """Of the store, by each node that runs."""


async def measure(
    size: int, make_table: MakeTable, *, patience: float, faults: Mapping[str, Fault] | None = None
) -> tuple[list[Figures], float]:
    """Have a fleet join, lose a third, take it back, and bear faults; the figures, and the bytes of memory for each node."""
    figures = []
    memory = _resident()
    async with fleet(size, make_table) as nodes:

        async def phase(name: str) -> None:
            requests, began = nodes.requests.total(), time.perf_counter()
            await nodes.converge(patience)
            running = sum(member.running for member in nodes.members)
            spent = time.perf_counter() - began
            figures.append(Figures(name, size, spent, (nodes.requests.total() - requests) / running))

        nodes.start(nodes.members)
        await phase("all join")
        used = (_resident() - memory) / size
        third = nodes.members[: size // 3]
        await nodes.kill(third)
        await phase("a third killed")
        nodes.start(third)
        await phase("it comes back")
        for name, fault in (faults or {}).items():
            await fault(nodes)
            await phase(name)
    return figures, used


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return float(pages * resource.getpagesize())


def measure_memory_store(size: int) -> tuple[list[Figures], float]:
    """On the memory store, in virtual time."""
    table = MemoryTable()
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(measure(size, lambda _: table.another(), patience=3600.0))


def measure_etcd(size: int) -> tuple[list[Figures], float]:
    """On an etcd of its own, in real time. Every other node reaches it by a way that can be cut."""

    async def run(server: EtcdServer) -> tuple[list[Figures], float]:
        async with Relay("127.0.0.1", int(server.endpoint.rpartition(":")[2])) as relay:
            ways = (server.endpoint, f"http://{relay.address}:{relay.port}")

            def make_table(number: int) -> Table:
                return EtcdStore(EtcdOptions(endpoints=(ways[number % 2],))).make_table()

            async def restart(nodes: Fleet) -> None:
                server.kill()
                await nodes.move(nodes.members[::20])
                await asyncio.to_thread(server.start)

            async def part(nodes: Fleet) -> None:
                await relay.refuse()
                await nodes.move(nodes.members[::20])  # even numbers: they reach etcd all the time
                await asyncio.sleep(_PARTED)
                await relay.accept()

            return await measure(
                size, make_table, patience=600.0, faults={"etcd restarted": restart, "partition healed": part}
            )

    with EtcdServer() as server, asyncio.Runner() as runner:
        return runner.run(run(server))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.convergence", description=__doc__)
    parser.add_argument("--store", choices=["memory", "etcd"], required=True)
    parser.add_argument("sizes", nargs="+", type=int, metavar="NODES")
    given: Any = parser.parse_args(arguments)
    logging.getLogger("overlaynet").addHandler(logging.NullHandler())  # the daemons' log would hide the figures
    print(f"{'store':8}{'nodes':>6}  {'phase':16}{'seconds':>9}{'requests/node':>15}{'KiB/node':>10}")
    for size in given.sizes:
        figures, used = (measure_memory_store if given.store == "memory" else measure_etcd)(size)
        for found in figures:
            print(
                f"{given.store:8}{size:6}  {found.phase:16}{found.seconds:9.2f}{found.requests:15.1f}{used / 1024:10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
