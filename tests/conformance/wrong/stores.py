"""Stores that are wrong on purpose, each in one way; and one that is right, which they are made of."""

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from ipaddress import IPv4Address, IPv4Network
from typing import Any, ClassVar

import attrs
import pytest

from overlaynet.api import (
    Lease,
    LeaseData,
    LeaseLost,
    LeaseRequest,
    Network,
    Snapshot,
    Store,
    StoreError,
    StoreUnavailable,
    Subnets,
    SubnetsExhausted,
    option,
)
from overlaynet.records import encode_lease, lease_key
from overlaynet.stores.memory import MemoryStore, MemoryTable
from overlaynet.testing import VIRTUAL_CLOCK
from overlaynet.testing.stores import AddForeign, MakeStore, StoreConformance


def _short(value: str) -> str | None:
    return None if len(value) < 100 else "must be shorter than 100 characters"


@attrs.frozen
class Options:
    path: str = option("/model", "where it is", check=_short)
    password: str = option("open sesame", "its password", secret=True)


class World:
    """What all stores of one test share."""

    def __init__(self) -> None:
        self.table = MemoryTable()
        self.down = False
        self.documents: list[str] = []


class Model(Store):
    """A store that is right. It passes everything on to a memory store."""

    Options = Options
    world: ClassVar[World]

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.inner = MemoryStore(table=self.world.table)

    def __str__(self) -> str:
        return f"the model at {self.options.path}"

    def reached(self) -> MemoryStore:
        if self.world.down:
            raise StoreUnavailable(f"{self} is out of reach")
        return self.inner

    async def read_network(self) -> str | None:
        return await self.reached().read_network()

    async def create_network(self, document: str) -> bool:
        return await self.reached().create_network(document)

    async def replace_network(self, document: str) -> None:
        await self.reached().replace_network(document)

    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        return await self.reached().acquire(network, request)

    async def renew(self, network: Network, lease: Lease) -> Lease:
        return await self.reached().renew(network, lease)

    async def release(self, lease: Lease) -> None:
        await self.reached().release(lease)

    async def leases(self) -> Snapshot:
        return await self.reached().leases()

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        async with aclosing(self.reached().watch()) as snapshots:
            while True:
                reading = asyncio.ensure_future(_next(snapshots))
                try:
                    while not reading.done():
                        await asyncio.wait({reading}, timeout=0.1)
                        self.reached()
                finally:
                    reading.cancel()
                    await asyncio.wait({reading})
                yield reading.result()

    async def aclose(self) -> None:
        await self.inner.aclose()

    async def held_by(self, node: str) -> Lease | None:
        """What a node has."""
        return next((lease for lease in (await self.inner.leases()).leases if lease.node == node), None)

    async def force(self, lease: Lease, ttl: float = math.inf) -> Lease:
        """Write a lease whatever is there."""
        key = lease_key(lease.subnets)
        record = await self.inner.table.get(key)
        if record is None:
            written = await self.inner.table.create(key, encode_lease(lease), ttl)
        else:
            written = await self.inner.table.replace(record, encode_lease(lease), ttl)
        assert written is not None
        return attrs.evolve(lease, version=written.version, ttl=ttl)

    async def erase(self, lease: Lease) -> None:
        """Delete a lease, whoever holds it."""
        record = await self.inner.table.get(lease_key(lease.subnets))
        if record is not None:
            await self.inner.table.delete(record)


async def _next(snapshots: AsyncGenerator[Snapshot, None]) -> Snapshot:
    return await anext(snapshots)


def _elsewhere(subnets: Subnets | None) -> Subnets:
    """Other subnets, which no test asks for."""
    first, second = Subnets(IPv4Network("10.244.222.0/24")), Subnets(IPv4Network("10.244.223.0/24"))
    return second if subnets == first else first


class Suite(StoreConformance):
    model: ClassVar[type[Model]]

    @pytest.fixture
    def anyio_backend(self) -> object:
        return VIRTUAL_CLOCK

    @pytest.fixture
    def world(self) -> World:
        return World()

    @pytest.fixture
    def lifetime(self) -> float:
        return 10.0

    @pytest.fixture
    def make_store(self, world: World) -> MakeStore:
        self.model.world = world
        return lambda: self.model(self.model.Options())

    @pytest.fixture
    def damage(self, world: World) -> Callable[[], Awaitable[None]]:
        async def damage() -> None:
            assert await world.table.create("subnets/10.244.99.0-24", b"no lease") is not None

        return damage

    @pytest.fixture
    def add_foreign(self, world: World) -> AddForeign:
        async def add(subnet: IPv4Network, address: IPv4Address) -> None:
            lease = Lease(Subnets(subnet), address)
            assert await world.table.create(lease_key(lease.subnets), encode_lease(lease)) is not None

        return add

    @pytest.fixture
    def outage(self, world: World) -> Callable[[], None]:
        def outage() -> None:
            world.down = True

        return outage


def wrong(breaks: str | None, **members: Any) -> Callable[[type[Model]], type[Model]]:
    """Hold the store against the suite, which it passes but for one test."""

    def declare(model: type[Model]) -> type[Model]:
        name = f"Test{model.__name__}"
        globals()[name] = type(name, (Suite,), {"model": model, "breaks": breaks, "__module__": __name__, **members})
        return model

    return declare


wrong(None)(Model)


# How it is loaded and made


@wrong("test_it_is_a_driver_that_overlaynet_loads")
class OfTheFuture(Model):
    api = (1, 99)


@wrong("test_it_keeps_its_options")
class WithoutItsOptions(Model):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.options = attrs.make_class("Copy", ["path", "password"], repr=False)(options.path, options.password)


@attrs.frozen
class _Silent:
    path: str = "/model"


@wrong("test_every_option_is_explained")
class WithSilentOptions(Model):
    Options = _Silent  # type: ignore[assignment]


@attrs.frozen
class _Impossible:
    path: str = option("x" * 100, "where it is", check=_short)


@wrong("test_it_is_a_driver_that_overlaynet_loads")
class WithAnImpossibleDefault(Model):
    Options = _Impossible  # type: ignore[assignment]


def _first_is_a_slash(value: str) -> str | None:
    return None if value[0] == "/" else "must begin with a slash"


@attrs.frozen
class _Careless:
    path: str = option("/model", "where it is", check=_first_is_a_slash)


@wrong("test_a_value_that_an_option_cannot_have_is_a_config_error")
class WithACarelessCheck(Model):
    Options = _Careless  # type: ignore[assignment]


@wrong("test_making_one_takes_nothing")
class TakingAtOnce(Model):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.ends = list(os.pipe())

    async def aclose(self) -> None:
        await super().aclose()
        while self.ends:
            os.close(self.ends.pop())


@wrong("test_one_that_was_only_made_can_be_closed_twice")
class UnclosableUnlessUsed(Model):
    closed = False

    async def aclose(self) -> None:
        used = self.inner._opened is not None
        if self.closed and not used:
            raise RuntimeError("closed twice")
        self.closed = True
        await super().aclose()


# What it says of itself, and the network document


@wrong("test_it_says_where_it_is_without_secrets")
class Indiscreet(Model):
    def __str__(self) -> str:
        return f"the model at {self.options.path}, with the password {self.options.password}"


@wrong("test_there_is_no_network_document_at_first")
class WithADocumentFromTheBeginning(Model):
    async def read_network(self) -> str | None:
        return await super().read_network() or ""


@wrong("test_the_network_document_is_read_as_it_was_written")
class ReformattingTheDocument(Model):
    async def read_network(self) -> str | None:
        document = await super().read_network()
        return document if document is None else document.strip()


@wrong("test_the_network_document_is_created_only_once")
class ClaimingToHaveCreated(Model):
    async def create_network(self, document: str) -> bool:
        return await super().create_network(document) or document == "third"


@wrong("test_of_many_who_create_the_network_document_one_does")
class LookingBeforeItWrites(Model):
    async def create_network(self, document: str) -> bool:
        if await self.read_network() is not None:
            return False
        await self.replace_network(document)
        return True


@wrong("test_the_network_document_is_no_lease")
class ListingTheDocument(Model):
    async def leases(self) -> Snapshot:
        snapshot = await super().leases()
        if await self.read_network() is not None:
            snapshot = attrs.evolve(snapshot, leases=(*snapshot.leases, Lease(Subnets(IPv4Network("10.0.0.0/8")))))
        return snapshot


# Claiming


@wrong("test_a_lease_says_what_was_asked_for")
class LosingData(Model):
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        return await super().acquire(network, attrs.evolve(request, data=LeaseData(request.data.backend_type)))


@wrong("test_claims_at_once_never_overlap")
class LookingForEqualSubnetsOnly(Model):
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        if network.ipv4 is not None and network.ipv4.prefix_length == 23 and request.node == "node-0":
            await asyncio.sleep(0.1)
            taken = (await self.leases()).leases[-1]
            assert taken.subnets.ipv4 is not None
            wide = Subnets(taken.subnets.ipv4.supernet())
            return await self.force(Lease(wide, request.public_ipv4, node=request.node, run=request.run))
        return await super().acquire(network, request)


@wrong("test_the_last_subnets_are_found_in_a_rush")
class RaisingSomethingElseWhenExhausted(Model):
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        try:
            return await super().acquire(network, request)
        except SubnetsExhausted as error:
            raise StoreError(str(error)) from error


@wrong("test_a_restart_keeps_the_subnets")
class TellingNodesApartByAddress(Model):
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        own = await self.held_by(request.node)
        if own is not None and own.public_ipv4 != request.public_ipv4:
            await self.erase(own)
            request = attrs.evolve(request, previous=_elsewhere(own.subnets))
        return await super().acquire(network, request)


@wrong("test_nodes_behind_one_address_are_two")
class OneNodePerAddress(Model):
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        for lease in (await self.leases()).leases:
            if lease.node and lease.node != request.node and lease.public_ipv4 == request.public_ipv4:
                return await self.force(attrs.evolve(lease, node=request.node, run=request.run))
        return await super().acquire(network, request)


@wrong("test_what_a_node_had_before_is_preferred_if_it_is_free")
class WithoutAMemory(Model):
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        if request.previous == Subnets(IPv4Network("10.244.77.0/24")) and request.node == "a" and request.run == "1":
            request = attrs.evolve(request, previous=Subnets(IPv4Network("10.244.66.0/24")))
        return await super().acquire(network, request)


@wrong("test_what_a_node_has_comes_before_what_it_had")
class PreferringThePast(Model):
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        own = await self.held_by(request.node)
        if own is not None and request.previous is not None and network.grants(request.previous):
            await self.erase(own)
        return await super().acquire(network, request)


@wrong("test_what_the_network_no_longer_grants_is_not_claimed")
class KeepingWhatTheNetworkNoLongerGrants(Model):
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        own = await self.held_by(request.node)
        if own is not None and not network.grants(own.subnets):
            return await self.force(attrs.evolve(own, run=request.run))
        return await super().acquire(network, request)


@wrong("test_a_lease_of_nobody_is_ours_if_it_has_our_address")
class IgnoringFlannel(Model):
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        foreign = [lease for lease in (await self.leases()).leases if not lease.node]
        for lease in foreign:
            await self.force(attrs.evolve(lease, node="flannel"))
        return await super().acquire(network, request)


# Renewing


@wrong("test_a_lease_can_be_renewed_again_and_again")
class ForgettingTheAddressOfOldLeases(Model):
    renewals = 0
    last: Lease | None = None

    async def renew(self, network: Network, lease: Lease) -> Lease:
        self.renewals = self.renewals + 1 if lease is self.last else 1
        self.last = None
        self.last = await super().renew(network, lease)
        forgets = self.renewals == 3 and network.lease_ttl > 100
        return attrs.evolve(self.last, public_ipv4=None) if forgets else self.last


@wrong("test_renewing_publishes_what_has_changed")
class RenewingTheTimeOnly(Model):
    async def renew(self, network: Network, lease: Lease) -> Lease:
        own = await self.held_by(lease.node)
        if own is not None and own.public_ipv4 != lease.public_ipv4 and own.data != lease.data:
            await super().renew(network, attrs.evolve(own, version=lease.version))
            return lease
        return await super().renew(network, lease)


@wrong("test_a_lease_that_has_vanished_is_made_again")
class GivingUpWhatHasVanished(Model):
    async def renew(self, network: Network, lease: Lease) -> Lease:
        if not (await self.leases()).leases and lease.ttl == 86400.0:
            raise LeaseLost(f"the lease on {lease.subnets} has vanished")
        return await super().renew(network, lease)


@wrong("test_a_lease_that_another_node_has_is_lost")
class RenewingUnconditionally(Model):
    async def renew(self, network: Network, lease: Lease) -> Lease:
        try:
            return await super().renew(network, lease)
        except LeaseLost as error:
            if "taken by node b" not in str(error):
                raise
            return await self.force(lease)


@wrong("test_a_lease_that_another_process_of_the_node_has_is_lost")
class TrustingTheName(Model):
    async def renew(self, network: Network, lease: Lease) -> Lease:
        try:
            return await super().renew(network, lease)
        except LeaseLost as error:
            if "another process" not in str(error):
                raise
            return await self.force(lease)


@wrong("test_a_lease_whose_subnets_overlap_anothers_is_lost")
class LookingAtItsOwnKeyOnly(Model):
    async def renew(self, network: Network, lease: Lease) -> Lease:
        try:
            return await super().renew(network, lease)
        except LeaseLost as error:
            if "overlapping" not in str(error):
                raise
            return await self.force(lease)


# Releasing


@wrong("test_what_is_released_is_gone_and_free")
class KeepingTheSubnetOfTheReleased(Model):
    released: ClassVar[Subnets | None] = None

    async def release(self, lease: Lease) -> None:
        await super().release(lease)
        type(self).released = lease.subnets

    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        if request.node == "c" and request.previous == self.released:
            request = attrs.evolve(request, previous=_elsewhere(request.previous))
        return await super().acquire(network, request)


@wrong("test_releasing_again_is_nothing")
class RaisingWhenNothingIsHeld(Model):
    released: Lease | None = None

    async def release(self, lease: Lease) -> None:
        if self.released == lease and not (await self.leases()).leases and self.once:
            raise LeaseLost(f"there is no lease on {lease.subnets}")
        self.released = lease
        await super().release(lease)

    once = True

    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        self.once = not hasattr(self, "acquired")
        self.acquired = True
        return await super().acquire(network, request)


@wrong("test_a_renewed_lease_can_be_released")
class ReleasingTheFirstVersionOnly(Model):
    renewed = False

    async def renew(self, network: Network, lease: Lease) -> Lease:
        renewed = await super().renew(network, lease)
        self.renewed = True
        return renewed

    async def release(self, lease: Lease) -> None:
        if not self.renewed or lease.data != LeaseData():
            await super().release(lease)


@wrong("test_what_somebody_else_holds_is_not_released")
class ReleasingWhateverIsThere(Model):
    async def release(self, lease: Lease) -> None:
        self.reached()
        await self.erase(lease)


# Lifetimes


@wrong("test_leases_tell_what_is_left_of_their_lifetime")
class TellingNoLifetimes(Model):
    async def leases(self) -> Snapshot:
        snapshot = await super().leases()
        return attrs.evolve(snapshot, leases=tuple(attrs.evolve(lease, ttl=None) for lease in snapshot.leases))


@wrong("test_a_lease_expires_and_its_subnets_are_free")
class KeepingTheSubnetsOfTheExpired(Model):
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        if request.node == "c" and asyncio.get_running_loop().time() > 5:
            request = attrs.evolve(request, previous=_elsewhere(request.previous))
        return await super().acquire(network, request)


@wrong("test_a_lease_that_is_renewed_lives_on")
class RenewingInVain(Model):
    async def renew(self, network: Network, lease: Lease) -> Lease:
        own = await self.held_by(lease.node)
        if (
            network.lease_ttl == 10.0
            and own is not None
            and own.run == lease.run
            and len((await self.leases()).leases) == 2
        ):
            return attrs.evolve(lease, ttl=network.lease_ttl)
        return await super().renew(network, lease)


@wrong("test_an_expired_lease_that_nobody_took_can_be_renewed")
class LosingWhatHasExpired(Model):
    async def renew(self, network: Network, lease: Lease) -> Lease:
        if lease.ttl == 10.0 and not (await self.leases()).leases:
            raise LeaseLost(f"the lease on {lease.subnets} has expired")
        return await super().renew(network, lease)


# Listing and watching


@wrong("test_leases_are_listed_in_the_order_of_their_keys")
class ListingAtRandom(Model):
    async def leases(self) -> Snapshot:
        snapshot = await super().leases()
        return attrs.evolve(snapshot, leases=snapshot.leases[::-1])


@wrong("test_a_watch_yields_at_once")
class BeginningEmpty(Model):
    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        begun = False
        async with aclosing(super().watch()) as snapshots:
            async for snapshot in snapshots:
                if snapshot.leases and not begun:
                    yield Snapshot()
                begun = True
                yield snapshot


@wrong("test_a_watch_yields_after_each_kind_of_change")
class DeafToChangedData(Model):
    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        seen: set[Subnets] | None = None
        async with aclosing(super().watch()) as snapshots:
            async for snapshot in snapshots:
                if {lease.subnets for lease in snapshot.leases} != seen or snapshot.malformed:
                    yield snapshot
                seen = {lease.subnets for lease in snapshot.leases}


@wrong("test_a_watch_yields_when_a_lease_expires")
class DeafToExpiry(Model):
    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        shortest = math.inf
        async with aclosing(super().watch()) as snapshots:
            async for snapshot in snapshots:
                if snapshot.leases or shortest > 10.0:
                    yield snapshot
                listed = await self.leases()
                shortest = min((lease.ttl or math.inf for lease in listed.leases), default=math.inf)


@wrong("test_a_watch_misses_nothing_while_its_reader_is_busy")
class WithAShortQueue(Model):
    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        async with aclosing(super().watch()) as snapshots:
            async for snapshot in snapshots:
                yield attrs.evolve(snapshot, leases=snapshot.leases[:5]) if len(snapshot.leases) == 6 else snapshot


@wrong("test_watches_do_not_disturb_each_other")
class WithOneWatch(Model):
    open = 0
    most = 0

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        self.open += 1
        self.most = max(self.open, self.most)
        try:
            async with aclosing(super().watch()) as snapshots:
                async for snapshot in snapshots:
                    yield snapshot
                    if self.most > 1 and self.open == 1:
                        return
        finally:
            self.open -= 1


@wrong("test_a_record_that_cannot_be_read_is_reported_and_empties_nothing")
class ForgettingAllForOneBadRecord(Model):
    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        async with aclosing(super().watch()) as snapshots:
            async for snapshot in snapshots:
                yield Snapshot() if snapshot.malformed else snapshot


@wrong("test_closing_a_watch_frees_what_it_holds")
class LeakingFromWatches(Model):
    leaked = 0

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        async with aclosing(super().watch()) as snapshots:
            async for snapshot in snapshots:
                if self.leaked == 2:
                    os.pipe()
                self.leaked += 1
                yield snapshot
                self.leaked = -5 if snapshot.leases else self.leaked


@wrong("test_a_watch_can_be_cancelled")
class UncancellableWatch(Model):
    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        async with aclosing(super().watch()) as snapshots:
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    yield await anext(snapshots)
                    continue
                return


@wrong("test_a_watch_raises_when_the_store_is_closed")
class EndingQuietly(Model):
    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        with contextlib.suppress(StoreUnavailable):
            async with aclosing(super().watch()) as snapshots:
                async for snapshot in snapshots:
                    yield snapshot
        if self.world.down:
            raise StoreUnavailable(f"{self} is out of reach")


# Cancellation


@wrong("test_claiming_can_be_cancelled_anywhere")
class SwallowingTheCancellation(Model):
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        try:
            return await super().acquire(network, request)
        except asyncio.CancelledError:
            return await super().acquire(network, request)


@wrong("test_renewing_can_be_cancelled_anywhere")
class LosingTheCancelled(Model):
    cancelled = False

    async def renew(self, network: Network, lease: Lease) -> Lease:
        if self.cancelled:
            raise LeaseLost("the last renewal was cancelled")
        try:
            return await super().renew(network, lease)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


@wrong("test_releasing_can_be_cancelled_anywhere")
class ReleasingOnlyOnce(Model):
    cancelled: str | None = None

    async def release(self, lease: Lease) -> None:
        if self.cancelled == lease.version:
            return
        try:
            await super().release(lease)
        except asyncio.CancelledError:
            self.cancelled = lease.version
            raise


# Failure and end


@wrong("test_out_of_reach_it_says_so")
class GivingUpOutOfReach(Model):
    async def leases(self) -> Snapshot:
        if self.world.down:
            raise StoreError("the connection was refused")
        return await super().leases()


@wrong("test_closing_it_twice_is_closing_it_once")
class RaisingWhenClosedAgain(Model):
    closed = 0

    async def aclose(self) -> None:
        await super().aclose()
        self.closed += self.inner._opened is not None
        if self.closed == 2 and not self.watched:
            raise RuntimeError("it is closed already")

    watched = False

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        self.watched = True
        async with aclosing(super().watch()) as snapshots:
            async for snapshot in snapshots:
                yield snapshot


@wrong("test_closing_it_frees_everything")
class LeakingADescriptor(Model):
    kept: ClassVar[list[int]] = []

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        async with aclosing(super().watch()) as snapshots:
            async for snapshot in snapshots:
                yield snapshot

    async def aclose(self) -> None:
        if any(watchers for watchers in [self.inner._opened] if watchers is not None and watchers._watchers):  # type: ignore[attr-defined]
            self.kept.extend(os.pipe())
        await super().aclose()


@wrong("test_closing_one_leaves_others_and_the_leases")
class ReleasingWhenClosed(Model):
    async def aclose(self) -> None:
        await super().aclose()
        for lease in (await self.inner.leases()).leases:
            await self.erase(lease)
