"""Those who act in a :class:`~lease_world.World`: nodes that hold leases, and operators.

A node claims, keeps and gives back its lease with the daemon's own code; only devices and peers are left out.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from ipaddress import IPv4Address

import attrs

from overlaynet import joining, lease_keeping
from overlaynet.drivers import NoOptions
from overlaynet.errors import (
    IdentityTaken,
    LeaseLost,
    OverlaynetError,
    StoreError,
    StoreUnavailable,
    SubnetsExhausted,
)
from overlaynet.health import Health
from overlaynet.lease_keeping import LeaseKeeper, renewal_margin
from overlaynet.leases import TableStore
from overlaynet.model import Lease, LeaseRequest, Subnets
from overlaynet.network import Network
from overlaynet.plugins import Plugins
from overlaynet.retry import Backoff
from overlaynet.table import Table
from tests.conformance.lease_world import World

MakeStore = Callable[[Table], TableStore]


class StoreOn(TableStore):
    """The leases of all table stores, on a table that is given."""

    def __init__(self, table: Table) -> None:
        super().__init__(NoOptions())
        self._given = table

    def __str__(self) -> str:
        return "the store"

    def make_table(self) -> Table:
        return self._given


@attrs.frozen
class Failure:
    """A node could not keep its lease, or get one."""

    error: BaseException
    lease: Lease | None
    promised: float
    """How many seconds of the lease were left."""


class Node:
    """One host; it lives and dies as it is told."""

    def __init__(self, world: World, name: str, address: str, make_store: MakeStore, plugins: Plugins) -> None:
        self.name = name
        self.address = IPv4Address(address)
        self.subnet_file: Subnets | None = None
        """What is kept on the host's disk from life to life."""
        self.granted: Callable[[Lease], None] = lambda lease: None
        """Called when the node has claimed a lease."""
        self.failures: list[Failure] = []
        """What its lives, or its leases, ended by."""
        self._world = world
        self._store = make_store(world.table(name))
        self._plugins = plugins
        self._keeper: LeaseKeeper | None = None
        self._task: asyncio.Task[None] | None = None
        self._runs = itertools.count(1)
        self._ending = False

    def __repr__(self) -> str:
        return f"{self.name} ({'dead' if not self.alive else f'holds {self.held.subnets}' if self.held else 'joins'})"

    @property
    def alive(self) -> bool:
        """True from its start until it is stopped, crashes or fails; also while it gives its lease back."""
        return self._task is not None and not self._task.done()

    @property
    def held(self) -> Lease | None:
        """The lease that the store has promised it, by its own clock, until later than now."""
        if not self.alive or self._keeper is None or self._world.now >= self._keeper.deadline:
            return None
        return self._keeper.lease

    def start(self, network: Network, *, reacquire: bool = False) -> None:
        """Begin a life. It is dead yet.

        :param reacquire: as with ``--on-lease-lost reacquire``, a lease that is lost is followed by another one.
        """
        self._begin(self._live(network, reacquire=reacquire))

    def crash(self) -> None:
        """End its life at whatever it waits for."""
        self._end()

    def stop(self, *, release: bool) -> None:
        """Have it stop cleanly: it carries no packets any more, and gives its lease back if that is wanted."""
        lease = None if self._keeper is None else self._keeper.lease
        self._end()
        if release and lease is not None:
            held = self._world.loop.create_future()
            held.set_result(lease)
            self._begin(lease_keeping.release(self._store, held))

    def _begin(self, life: Awaitable[None]) -> None:
        async def until_the_end() -> None:
            try:
                await life
            except* Exception as errors:
                self._lose(_plain(errors))
            finally:
                self._keeper = None

        self._ending = False
        self._task = self._world.loop.create_task(until_the_end())
        self._world.settle()

    def _end(self) -> None:
        if self._task is not None:
            self._ending = True
            self._task.cancel()
            self._world.settle()
            assert self._task.done(), "it clings to life"

    def _lose(self, error: BaseException) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            self.failures.append(Failure(error, None, 0.0))
        else:
            self.failures.append(Failure(error, keeper.lease, keeper.deadline - self._world.now))

    async def _live(self, network: Network, *, reacquire: bool) -> None:
        """As the daemon lives, with what it does after the loss of a lease."""
        backoff = Backoff(first=0.1)
        while True:
            try:
                await self._hold_lease(network)
            except BaseExceptionGroup as errors:
                error = _plain(errors)
                other_node = isinstance(error, LeaseLost) and not isinstance(error, IdentityTaken)
                if not (reacquire and other_node) or self._ending:
                    raise
                task = asyncio.current_task()
                while task is not None and task.cancelling():
                    task.uncancel()  # see the daemon
                self._lose(error)
            await asyncio.sleep(backoff.next())

    async def _hold_lease(self, network: Network) -> None:
        request = LeaseRequest(self.name, f"{next(self._runs)}", self.address, previous=self.subnet_file)
        health = Health(self._plugins)
        promised = await joining.acquire(self._store, network, request, health)
        lease = promised.lease
        self.subnet_file = lease.subnets
        self._keeper = keeper = LeaseKeeper(
            self._store,
            network,
            lease,
            deadline=promised.until,
            margin=renewal_margin(network.lease_ttl, 60),
            health=health,
            plugins=self._plugins,
            changed=lambda: None,
        )
        self.granted(lease)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keeper.run())
            tasks.create_task(self._follow(keeper))

    async def _follow(self, keeper: LeaseKeeper) -> None:
        """As the daemon follows the store."""
        backoff = Backoff()
        while True:
            try:
                async with aclosing(self._store.watch()) as snapshots:
                    async for snapshot in snapshots:
                        keeper.look(snapshot)
            except (StoreUnavailable, StoreError):
                await asyncio.sleep(backoff.next())


class Operator:
    """Somebody at a command line, who does one thing at a time."""

    def __init__(self, world: World, make_store: MakeStore) -> None:
        self.name = "operator"
        self._world = world
        self._store = make_store(world.table(self.name))
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """True while a command runs."""
        return self._task is not None and not self._task.done()

    def run(self, command: Callable[[TableStore], Awaitable[None]]) -> None:
        """Begin a command; what refuses it, and a store out of reach, end it."""

        async def run() -> None:
            try:
                await joining.in_time(command(self._store))
            except OverlaynetError:
                return

        self._task = self._world.loop.create_task(run())
        self._world.settle()

    def crash(self) -> None:
        """Kill the command."""
        if self._task is not None:
            self._task.cancel()
            self._world.settle()


def expected(failure: Failure) -> bool:
    """True if this is what may become of a node, as far as the store has kept what was written."""
    late = isinstance(failure.error, LeaseLost) and failure.promised <= 0
    return late or isinstance(failure.error, SubnetsExhausted)


def _plain(error: BaseException) -> BaseException:
    """The first error in groups of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
