"""What every store has to do, as a suite of tests to derive from::

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def make_store(self, tmp_path):
            return lambda: MyStore(MyStore.Options(path=tmp_path / "leases"))

It is for stores that implement :class:`overlaynet.api.Store` themselves as well as for those that supply a table to
:class:`overlaynet.api.TableStore`; the latter have :class:`overlaynet.testing.tables.TableConformance` beside it, which looks
closer at the table.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from ipaddress import IPv4Address, IPv4Network
from typing import ClassVar, TypeAlias

import attrs

from overlaynet import network as documents
from overlaynet.drivers import Driver, Store
from overlaynet.errors import LeaseLost, StoreError, StoreUnavailable, SubnetsExhausted
from overlaynet.model import Lease, LeaseData, LeaseRequest, Snapshot, Subnets
from overlaynet.network import Network
from overlaynet.records import lease_key
from overlaynet.testing._requirements import pytest
from overlaynet.testing.conformance import (
    PATIENCE,
    DriverConformance,
    Resources,
    interrupt,
    interruptions,
    promptly,
)

MakeStore: TypeAlias = Callable[[], Store]
AddForeign: TypeAlias = Callable[[IPv4Network, IPv4Address], Awaitable[None]]


_FREE = (Subnets(IPv4Network("10.244.77.0/24")), Subnets(IPv4Network("10.244.78.0/24")))


class StoreConformance(DriverConformance):
    """The laws of stores. A subclass overrides :meth:`make_store`, and what else it can."""

    axis = "store"
    capabilities: ClassVar[Mapping[str, str]] = {
        "lifetimes": "leases that are not renewed expire; the fixture `lifetime` says how soon they can",
        "malformed records": "somebody can write what is no lease into it; needs the fixture `damage`",
        "foreign leases": "leases that name no node, as flannel's, can be in it; needs the fixture `add_foreign`",
        "outages": "it can be out of reach; needs the fixture `outage`",
    }
    optional_fixtures: ClassVar[Mapping[str, str]] = {
        "damage": "malformed records",
        "add_foreign": "foreign leases",
        "outage": "outages",
    }

    @pytest.fixture
    def make_store(self) -> MakeStore:
        """Makes a store each time it is called, on the same data, as another node would. The data are empty at first.

        To be overridden.
        """
        raise NotImplementedError("override the fixture 'make_store'")

    @pytest.fixture
    def lifetime(self) -> float:
        """How long a lease lives in the tests of lifetimes, in seconds: short, yet longer than a few writes take."""
        return 1.0

    @pytest.fixture
    def damage(self) -> Callable[[], Awaitable[None]]:
        """Writes a record that cannot be read where the leases are, as a careless hand could."""
        self.not_overridden("damage")

    @pytest.fixture
    def add_foreign(self) -> AddForeign:
        """Writes a lease on a subnet for an address, which names no node."""
        self.not_overridden("add_foreign")

    @pytest.fixture
    def outage(self) -> Callable[[], None]:
        """Puts the stores that the test has made out of reach."""
        self.not_overridden("outage")

    @pytest.fixture
    def make_driver(self, make_store: MakeStore) -> Callable[[], Driver]:
        return make_store

    @pytest.fixture
    async def store(self, make: MakeStore) -> Store:
        """A store."""
        return make()

    @pytest.fixture
    async def another(self, make: MakeStore, store: Store) -> Store:
        """A second store on the same data, as another node has it."""
        return make()

    @pytest.fixture
    def network(self) -> Network:
        """The overlay, with more subnets than any test needs."""
        return documents.parse('{"Network": "10.244.0.0/16"}')

    # What it says of itself, and the network document

    async def test_it_says_where_it_is_without_secrets(self, store: Store) -> None:
        assert str(store)
        for field in attrs.fields(store.Options):
            value = getattr(store.options, field.name)
            if field.metadata.get("secret") and value:
                assert str(value) not in str(store)
                assert str(value) not in repr(store.options)

    async def test_there_is_no_network_document_at_first(self, store: Store) -> None:
        assert await store.read_network() is None

    async def test_the_network_document_is_read_as_it_was_written(self, store: Store, another: Store) -> None:
        for document in ('{"Network": "10.244.0.0/16"}', '{\n "Network":"10.0.0.0/8", "Größe": 1}\n'):
            await store.replace_network(document)
            assert await store.read_network() == document
            assert await another.read_network() == document

    async def test_the_network_document_is_created_only_once(self, store: Store, another: Store) -> None:
        assert await store.create_network("first")
        assert not await another.create_network("second")
        assert not await store.create_network("third")
        assert await another.read_network() == "first"

    async def test_of_many_who_create_the_network_document_one_does(self, store: Store, another: Store) -> None:
        documents = [f"document {number}" for number in range(8)]
        stores = itertools.cycle((store, another))
        created = await asyncio.gather(*(s.create_network(d) for d, s in zip(documents, stores, strict=False)))
        (winner,) = [document for document, done in zip(documents, created, strict=True) if done]
        assert await store.read_network() == winner

    async def test_the_network_document_is_no_lease(self, store: Store) -> None:
        await store.replace_network('{"Network": "10.244.0.0/16"}')
        assert await store.leases() == Snapshot()

    # Claiming

    async def test_a_lease_says_what_was_asked_for(self, store: Store, another: Store, network: Network) -> None:
        data = LeaseData("fake", {"key": [1, "two", None, True, 0.5]}, None)
        request = attrs.evolve(_request("a"), data=data)
        lease = await store.acquire(network, request)
        assert network.grants(lease.subnets)
        expected = Lease(lease.subnets, request.public_ipv4, data=data, node="a", run="1")
        assert lease == expected
        assert (await another.leases()).leases == (expected,)

    async def test_claims_at_once_never_overlap(self, make: MakeStore, network: Network) -> None:
        stores = [make() for _ in range(4)]
        shorter = documents.parse('{"Network": "10.244.0.0/16", "SubnetLen": 23}')
        claims = [
            stores[number % 4].acquire(shorter if number % 3 == 0 else network, _request(f"node-{number}"))
            for number in range(24)
        ]
        leases = await promptly(asyncio.gather(*claims))
        _assert_apart(leases)
        assert set((await stores[0].leases()).leases) == set(leases)

    async def test_the_last_subnets_are_found_in_a_rush(self, make: MakeStore) -> None:
        small = documents.parse('{"Network": "10.244.0.0/21"}')
        stores = [make() for _ in range(2)]
        claims = [stores[number % 2].acquire(small, _request(f"node-{number}")) for number in range(10)]
        outcomes = await promptly(asyncio.gather(*claims, return_exceptions=True))
        leases = [outcome for outcome in outcomes if isinstance(outcome, Lease)]
        refused = [outcome for outcome in outcomes if isinstance(outcome, SubnetsExhausted)]
        assert len(leases) == 7
        assert len(refused) == 3, outcomes
        assert "10.244.0.0/21" in str(refused[0])
        _assert_apart(leases)

    async def test_a_restart_keeps_the_subnets(self, store: Store, another: Store, network: Network) -> None:
        first = await store.acquire(network, _request("a", run="1"))
        for number in range(5):
            await store.acquire(network, _request(f"other-{number}"))
        second = await another.acquire(network, _request("a", run="2", address="192.0.2.77"))
        assert second.subnets == first.subnets
        assert second.public_ipv4 == IPv4Address("192.0.2.77")
        mine = [lease for lease in (await store.leases()).leases if lease.node == "a"]
        assert mine == [second]

    async def test_nodes_behind_one_address_are_two(self, store: Store, network: Network) -> None:
        first = await store.acquire(network, _request("a", address="192.0.2.1"))
        second = await store.acquire(network, _request("b", address="192.0.2.1"))
        _assert_apart([first, second])

    async def test_what_a_node_had_before_is_preferred_if_it_is_free(self, store: Store, network: Network) -> None:
        previous = Subnets(IPv4Network("10.244.77.0/24"))
        lease = await store.acquire(network, attrs.evolve(_request("a"), previous=previous))
        assert lease.subnets == previous
        other = await store.acquire(network, attrs.evolve(_request("b"), previous=previous))
        assert not other.subnets.overlaps(previous)

    async def test_what_a_node_has_comes_before_what_it_had(self, store: Store, network: Network) -> None:
        lease = await store.acquire(network, _request("a"))
        free = next(subnet for subnet in _FREE if subnet != lease.subnets)
        again = await store.acquire(network, attrs.evolve(_request("a", run="2"), previous=free))
        assert again.subnets == lease.subnets

    async def test_what_the_network_no_longer_grants_is_not_claimed(self, store: Store, network: Network) -> None:
        held = await store.acquire(network, _request("a"))
        moved = documents.parse('{"Network": "10.245.0.0/16"}')
        lease = await store.acquire(moved, attrs.evolve(_request("a", run="2"), previous=held.subnets))
        assert moved.grants(lease.subnets)
        assert (await store.leases()).leases == (lease,)

    async def test_a_lease_of_nobody_is_ours_if_it_has_our_address(
        self, store: Store, network: Network, add_foreign: AddForeign
    ) -> None:
        await add_foreign(IPv4Network("10.244.5.0/24"), IPv4Address("192.0.2.5"))
        await add_foreign(IPv4Network("10.244.6.0/24"), IPv4Address("192.0.2.6"))
        lease = await store.acquire(network, _request("a", address="192.0.2.5"))
        assert lease.subnets == Subnets(IPv4Network("10.244.5.0/24"))
        other = await store.acquire(network, _request("b", address="192.0.2.7"))
        _assert_apart([lease, other])
        assert not other.subnets.overlaps(Subnets(IPv4Network("10.244.6.0/24")))

    # Renewing

    async def test_a_lease_can_be_renewed_again_and_again(self, store: Store, network: Network) -> None:
        lease = await store.acquire(network, _request("a"))
        for _ in range(3):
            renewed = await store.renew(network, lease)
            assert renewed == lease
            lease = renewed
        assert (await store.leases()).leases == (lease,)

    async def test_renewing_publishes_what_has_changed(self, store: Store, another: Store, network: Network) -> None:
        lease = await store.acquire(network, _request("a"))
        changed = attrs.evolve(lease, public_ipv4=IPv4Address("192.0.2.200"), data=LeaseData("fake", {"new": 1}))
        assert await store.renew(network, changed) == changed
        assert (await another.leases()).leases == (changed,)

    async def test_a_lease_that_has_vanished_is_made_again(
        self, store: Store, another: Store, network: Network
    ) -> None:
        lease = await store.acquire(network, _request("a"))
        await another.release(lease)
        assert (await store.leases()).leases == ()
        renewed = await store.renew(network, lease)
        assert renewed == lease
        assert (await another.leases()).leases == (lease,)
        assert await store.renew(network, renewed) == lease

    async def test_a_lease_that_another_node_has_is_lost(self, store: Store, another: Store, network: Network) -> None:
        lease = await store.acquire(network, _request("a"))
        await store.release(lease)
        taken = await another.acquire(network, attrs.evolve(_request("b"), previous=lease.subnets))
        assert taken.subnets == lease.subnets
        with pytest.raises(LeaseLost):
            await store.renew(network, lease)
        assert (await another.leases()).leases == (taken,)

    async def test_a_lease_that_another_process_of_the_node_has_is_lost(
        self, store: Store, another: Store, network: Network
    ) -> None:
        lease = await store.acquire(network, _request("a", run="1"))
        taken = await another.acquire(network, _request("a", run="2"))
        with pytest.raises(LeaseLost):
            await store.renew(network, lease)
        assert await another.renew(network, taken) == taken

    async def test_a_lease_whose_subnets_overlap_anothers_is_lost(
        self, store: Store, another: Store, network: Network
    ) -> None:
        lease = await store.acquire(network, _request("a"))
        await store.release(lease)
        assert lease.subnets.ipv4 is not None
        wide = lease.subnets.ipv4.supernet()
        bound = str(wide.network_address)
        only_this = {"Network": "10.244.0.0/16", "SubnetLen": 23, "SubnetMin": bound, "SubnetMax": bound}
        taken = await another.acquire(documents.parse(json.dumps(only_this)), _request("b"))
        assert taken.subnets == Subnets(wide)
        with pytest.raises(LeaseLost):
            await store.renew(network, lease)
        assert (await another.leases()).leases == (taken,)

    # Releasing

    async def test_what_is_released_is_gone_and_free(self, store: Store, another: Store, network: Network) -> None:
        lease = await store.acquire(network, _request("a"))
        kept = await store.acquire(network, _request("b"))
        await store.release(lease)
        assert (await another.leases()).leases == (kept,)
        again = await another.acquire(network, attrs.evolve(_request("c"), previous=lease.subnets))
        assert again.subnets == lease.subnets

    async def test_releasing_again_is_nothing(self, store: Store, network: Network) -> None:
        lease = await store.acquire(network, _request("a"))
        await store.release(lease)
        await store.release(lease)

    async def test_a_renewed_lease_can_be_released(self, store: Store, network: Network) -> None:
        lease = await store.acquire(network, _request("a"))
        renewed = await store.renew(network, lease)
        await store.release(renewed)
        assert (await store.leases()).leases == ()

    async def test_what_somebody_else_holds_is_not_released(
        self, store: Store, another: Store, network: Network
    ) -> None:
        lease = await store.acquire(network, _request("a", run="1"))
        restarted = await another.acquire(network, _request("a", run="2"))
        await store.release(lease)
        assert (await store.leases()).leases == (restarted,)
        await another.release(restarted)
        taken = await another.acquire(network, attrs.evolve(_request("b"), previous=lease.subnets))
        await store.release(lease)
        assert (await store.leases()).leases == (taken,)

    # Lifetimes

    async def test_leases_tell_what_is_left_of_their_lifetime(self, store: Store, network: Network) -> None:
        await store.acquire(network, _request("a"))
        (lease,) = (await store.leases()).leases
        assert lease.ttl is not None
        assert 0 < lease.ttl <= network.lease_ttl + 1
        if "lifetimes" not in self.lacks:
            assert lease.ttl > network.lease_ttl / 2

    async def test_a_lease_expires_and_its_subnets_are_free(
        self, store: Store, another: Store, network: Network, lifetime: float
    ) -> None:
        self.needs("lifetimes")
        short = attrs.evolve(network, lease_ttl=lifetime)
        lease = await store.acquire(short, _request("a"))
        kept = await store.acquire(network, _request("b"))
        await _until(another.leases, lambda snapshot: snapshot.leases == (kept,))
        taken = await another.acquire(network, attrs.evolve(_request("c"), previous=lease.subnets))
        assert taken.subnets == lease.subnets
        with pytest.raises(LeaseLost):
            await store.renew(short, lease)

    async def test_a_lease_that_is_renewed_lives_on(self, store: Store, network: Network, lifetime: float) -> None:
        self.needs("lifetimes")
        short = attrs.evolve(network, lease_ttl=lifetime)
        renewed = await store.acquire(short, _request("a"))
        left = await store.acquire(short, _request("b"))
        while left in (snapshot := await store.leases()).leases:
            assert renewed in snapshot.leases
            renewed = await store.renew(short, renewed)
            await asyncio.sleep(lifetime / 20)
        assert renewed in snapshot.leases

    async def test_an_expired_lease_that_nobody_took_can_be_renewed(
        self, store: Store, network: Network, lifetime: float
    ) -> None:
        self.needs("lifetimes")
        lease = await store.acquire(attrs.evolve(network, lease_ttl=lifetime), _request("a"))
        await _until(store.leases, lambda snapshot: not snapshot.leases)
        assert await store.renew(network, lease) == lease

    # Listing and watching

    async def test_leases_are_listed_in_the_order_of_their_keys(self, store: Store, network: Network) -> None:
        for number in range(12):
            await store.acquire(network, _request(f"node-{number}"))
        keys = [lease_key(lease.subnets) for lease in (await store.leases()).leases]
        assert keys == sorted(keys)
        async with aclosing(store.watch()) as snapshots, asyncio.timeout(PATIENCE):
            async for snapshot in snapshots:
                if len(snapshot.leases) == len(keys):
                    break
        assert [lease_key(lease.subnets) for lease in snapshot.leases] == keys

    async def test_a_watch_yields_at_once(self, store: Store, network: Network) -> None:
        async with aclosing(store.watch()) as snapshots:
            assert await _next(snapshots) == Snapshot()
        lease = await store.acquire(network, _request("a"))
        async with aclosing(store.watch()) as snapshots:
            assert await _next(snapshots) == Snapshot((lease,))

    async def test_a_watch_yields_after_each_kind_of_change(
        self, store: Store, another: Store, network: Network
    ) -> None:
        async with aclosing(store.watch()) as snapshots:
            assert await _next(snapshots) == Snapshot()
            lease = await another.acquire(network, _request("a"))
            await _shows(snapshots, Snapshot((lease,)))
            changed = attrs.evolve(lease, public_ipv4=IPv4Address("192.0.2.200"))
            changed = await another.renew(network, changed)
            await _shows(snapshots, Snapshot((changed,)))
            changed = await another.renew(network, attrs.evolve(changed, data=LeaseData("fake", {"new": 1})))
            await _shows(snapshots, Snapshot((changed,)))
            await another.release(changed)
            await _shows(snapshots, Snapshot())

    async def test_a_watch_yields_when_a_lease_expires(self, store: Store, network: Network, lifetime: float) -> None:
        self.needs("lifetimes")
        async with aclosing(store.watch()) as snapshots:
            lease = await store.acquire(attrs.evolve(network, lease_ttl=lifetime), _request("a"))
            await _shows(snapshots, Snapshot((lease,)))
            await _shows(snapshots, Snapshot())

    async def test_a_watch_misses_nothing_while_its_reader_is_busy(self, store: Store, network: Network) -> None:
        async with aclosing(store.watch()) as snapshots:
            await _next(snapshots)
            leases = [await store.acquire(network, _request(f"node-{number}")) for number in range(6)]
            await _shows(snapshots, Snapshot(tuple(sorted(leases, key=lambda lease: lease_key(lease.subnets)))))

    async def test_watches_do_not_disturb_each_other(self, store: Store, network: Network) -> None:
        first, second = store.watch(), store.watch()
        async with aclosing(first), aclosing(second):
            await _next(first)
            await _next(second)
            await first.aclose()
            lease = await store.acquire(network, _request("a"))
            await _shows(second, Snapshot((lease,)))

    async def test_a_record_that_cannot_be_read_is_reported_and_empties_nothing(
        self, store: Store, network: Network, damage: Callable[[], Awaitable[None]]
    ) -> None:
        lease = await store.acquire(network, attrs.evolve(_request("a"), previous=_FREE[0]))
        async with aclosing(store.watch()) as snapshots:
            await _shows(snapshots, Snapshot((lease,)))
            await damage()
            snapshot = await _next(snapshots)
        for seen in (snapshot, await store.leases()):
            assert seen.leases == (lease,)
            assert len(seen.malformed) == 1
            assert seen.malformed[0].key
            assert seen.malformed[0].reason
        another = await store.acquire(network, _request("b"))
        _assert_apart([lease, another])

    async def test_closing_a_watch_frees_what_it_holds(self, store: Store, network: Network) -> None:
        async def watch_once() -> None:
            async with aclosing(store.watch()) as snapshots:
                await _next(snapshots)

        await watch_once()
        before = Resources()
        for _ in range(3):
            await watch_once()
        await before.return_to_this()

    async def test_a_watch_can_be_cancelled(self, store: Store, network: Network) -> None:
        async def watch() -> None:
            async with aclosing(store.watch()) as snapshots:
                async for _ in snapshots:
                    seen.set()

        seen = asyncio.Event()
        watching = asyncio.create_task(watch())
        await promptly(seen.wait())
        watching.cancel()
        await asyncio.wait({watching}, timeout=PATIENCE)
        assert watching.cancelled()
        await promptly(store.acquire(network, _request("a")))

    async def test_a_watch_raises_when_the_store_is_closed(self, store: Store) -> None:
        async with aclosing(store.watch()) as snapshots:
            await _next(snapshots)
            await store.aclose()
            with pytest.raises((StoreUnavailable, StoreError)):
                await promptly(_exhaust(snapshots))

    # Cancellation

    async def test_claiming_can_be_cancelled_anywhere(self, store: Store, another: Store, network: Network) -> None:
        for number, turns in enumerate(interruptions()):
            request = _request(f"node-{number}")
            cancelled = await interrupt(store.acquire(network, request), turns)
            lease = await promptly(store.acquire(network, request))
            # The cancelled claim may take effect late, and then is one more record of the same node, until it expires.
            snapshot = await another.leases()
            assert lease in snapshot.leases
            _assert_apart(snapshot.leases)
            if not cancelled:
                break

    async def test_renewing_can_be_cancelled_anywhere(self, store: Store, network: Network) -> None:
        lease = await store.acquire(network, _request("a"))
        for turns in interruptions():
            cancelled = await interrupt(store.renew(network, lease), turns)
            # What the cancelled one may have written is this process's own, so this is not a loss.
            lease = await promptly(store.renew(network, lease))
            assert (await store.leases()).leases == (lease,)
            if not cancelled:
                break

    async def test_releasing_can_be_cancelled_anywhere(self, store: Store, network: Network) -> None:
        for turns in interruptions():
            lease = await store.acquire(network, _request("a"))
            cancelled = await interrupt(store.release(lease), turns)
            await promptly(store.release(lease))
            assert (await store.leases()).leases == ()
            if not cancelled:
                break

    # Failure and end

    async def test_out_of_reach_it_says_so(self, store: Store, network: Network, outage: Callable[[], None]) -> None:
        lease = await store.acquire(network, _request("a"))
        async with aclosing(store.watch()) as snapshots:
            await _next(snapshots)
            outage()
            with pytest.raises(StoreUnavailable):
                await promptly(_exhaust(snapshots))
        for call in (
            store.read_network,
            lambda: store.create_network("{}"),
            lambda: store.replace_network("{}"),
            lambda: store.acquire(network, _request("b")),
            lambda: store.renew(network, lease),
            lambda: store.release(lease),
            store.leases,
        ):
            with pytest.raises(StoreUnavailable) as caught:
                await promptly(call())
            assert str(caught.value)

    async def test_closing_it_twice_is_closing_it_once(self, store: Store, network: Network) -> None:
        await store.acquire(network, _request("a"))
        await promptly(store.aclose())
        await promptly(store.aclose())

    async def test_closing_it_frees_everything(self, make: MakeStore, network: Network) -> None:
        async def use_once() -> None:
            store = make()
            async with aclosing(store.watch()) as snapshots:
                await _next(snapshots)
                await store.acquire(network, _request("a"))
                await promptly(store.aclose())

        await use_once()
        before = Resources()
        await use_once()
        await before.return_to_this()

    async def test_closing_one_leaves_others_and_the_leases(
        self, make_store: MakeStore, another: Store, network: Network
    ) -> None:
        async with aclosing(make_store()) as store:
            lease = await store.acquire(network, _request("a"))
        assert (await another.leases()).leases == (lease,)
        assert await another.renew(network, lease) == lease


def _request(node: str, *, run: str = "1", address: str | None = None) -> LeaseRequest:
    """What a node asks for; each has an address of its own, unless it is given."""
    own = IPv4Address("198.18.0.0") + zlib.crc32(node.encode()) % 65536
    return LeaseRequest(node, run, own if address is None else IPv4Address(address))


def _assert_apart(leases: Sequence[Lease]) -> None:
    for one, other in itertools.combinations(leases, 2):
        assert not one.subnets.overlaps(other.subnets), f"{one} overlaps {other}"


async def _next(snapshots: AsyncGenerator[Snapshot, None]) -> Snapshot:
    return await promptly(anext(snapshots))


async def _shows(snapshots: AsyncGenerator[Snapshot, None], wanted: Snapshot) -> None:
    """Read from a watch until it yields this."""
    seen = None
    try:
        async with asyncio.timeout(PATIENCE):
            async for seen in snapshots:
                if seen == wanted:
                    return
    except TimeoutError:
        raise AssertionError(f"the watch goes silent at {seen}, and should show {wanted}") from None
    raise AssertionError(f"the watch ended at {seen}, and should show {wanted}")


async def _until(ask: Callable[[], Awaitable[Snapshot]], condition: Callable[[Snapshot], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition(await ask()):  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


async def _exhaust(snapshots: AsyncGenerator[Snapshot, None]) -> None:
    async for _ in snapshots:
        pass
