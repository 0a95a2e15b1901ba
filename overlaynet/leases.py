"""Leases on a compare-and-swap table: choosing a subnet, re-claiming, renewing, releasing, watching.

Written once, for every store that can supply a :class:`~overlaynet.table.Table`. Nothing is written but by
compare-and-swap, and a lost race is answered with a fresh list, so two nodes never come to hold overlapping subnets.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import aclosing
from ipaddress import IPv4Network, IPv6Network
from typing import Any, TypeVar

import attrs

from overlaynet import boot_clock, records
from overlaynet.drivers import Store
from overlaynet.errors import (
    IdentityTaken,
    LeaseLost,
    RecordError,
    StoreError,
    StoreUnavailable,
    SubnetsExhausted,
)
from overlaynet.logs import fields
from overlaynet.model import Lease, LeaseRequest, Malformed, Reservation, Reserved, Snapshot, Subnets
from overlaynet.network import Network, SubnetRange
from overlaynet.reservations import Reservations
from overlaynet.table import Record, Table

log = logging.getLogger(__name__)

N = TypeVar("N", IPv4Network, IPv6Network)

_TTL_QUERIES_AT_ONCE = 16


@attrs.frozen
class _Granted:
    """A lease that this process holds: what else it has written for the same node is a remnant."""

    lease: Lease
    until: float
    """Time of the boot clock until which the table has promised the lease."""


class TableStore(Store):
    """A store whose leases live in a compare-and-swap table.

    A driver derives from it, supplies :meth:`make_table` and ``__str__``, and declares its ``Options``. It closes what
    it opened in the table's ``aclose``.
    """

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._opened: Table | None = None
        self._granted: dict[str, _Granted] = {}
        """The lease that each node of this process holds, by its identity."""

    @abc.abstractmethod
    def make_table(self) -> Table:
        """Make the table; called once, when it is first needed, in the event loop."""

    @property
    def table(self) -> Table:
        """The table, made at its first use."""
        if self._opened is None:
            self._opened = self.make_table()
        return self._opened

    @property
    def reserved(self) -> Reservations:
        """The reservations in the table."""
        return Reservations(self.table)

    async def aclose(self) -> None:
        if self._opened is not None:
            await self._opened.aclose()

    async def read_network(self) -> str | None:
        record = await self.table.get(records.NETWORK_KEY)
        if record is None:
            return None
        try:
            return record.value.decode()
        except UnicodeDecodeError as error:
            raise StoreError(f"the network document in {self} is not UTF-8 text: {error}") from error

    async def create_network(self, document: str) -> bool:
        return await self.table.create(records.NETWORK_KEY, document.encode()) is not None

    async def replace_network(self, document: str) -> None:
        while True:
            record = await self.table.get(records.NETWORK_KEY)
            if record is None:
                written = await self.table.create(records.NETWORK_KEY, document.encode())
            else:
                written = await self.table.replace(record, document.encode())
            if written is not None:
                return

    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        wanted = request.previous
        self._granted.pop(request.node, None)
        while True:
            asked_at = boot_clock.now()
            reserved = await self.reserved.list()
            held = await self.table.list(records.LEASE_PREFIX)
            if await self.reserved.tend(reserved, held):
                continue
            own = _own_records(held, request)
            subnets = _reserved_for(network, request, reserved, held, own)
            if subnets is None and own:
                record, subnets = own[0]
                in_order = network.grants(subnets) and record.key == records.lease_key(subnets)
                overlapped = _overlapped(subnets, held, but=record.key)
                if not in_order or overlapped or reserved.in_the_way(subnets, request) is not None:
                    # The network document has changed since: this claim is of no use any more.
                    await self.reserved.vacate(record, subnets)
                    continue
            if subnets is None:
                taken = list(_subnets(held))
                if wanted is None or not network.grants(wanted) or any(wanted.overlaps(other) for other in taken):
                    wanted = _choose(network, taken)
                subnets = wanted
            lease = await self._claim(network, request, subnets, held, reserved)
            if lease is None:
                if records.lease_key(subnets) not in held:
                    wanted = None  # it was as good as ours, and somebody else's: do not run after it
                continue
            for record, other in own:
                # What else stands under this node's name is a remnant, such as of a claim whose answer was lost.
                if other != subnets and records.decode_lease(record.key, record.value).node:
                    await self.reserved.vacate(record, other)
            self._granted[request.node] = _Granted(lease, asked_at + network.lease_ttl)
            return lease

    async def _claim(
        self, network: Network, request: LeaseRequest, subnets: Subnets, held: Mapping[str, Record], reserved: Reserved
    ) -> Lease | None:
        """Write the lease over what was found under its key; ``None`` if somebody else was quicker."""
        lease = Lease(
            subnets,
            request.public_ipv4,
            request.public_ipv6,
            data=request.data,
            node=request.node,
            run=request.run,
            renewal_margin=request.renewal_margin,
            reserved=reserved.of(subnets) is not None,
        )
        key, value = records.lease_key(subnets), records.encode_lease(lease)
        if key in held:
            written = await self.table.replace(held[key], value, network.lease_ttl)
        else:
            written = await self.table.create(key, value, network.lease_ttl)
            if written is not None and not await self._stands(written, lease):
                written = None
        return None if written is None else _granted(lease, written, network)

    async def renew(self, network: Network, lease: Lease) -> Lease:
        key = records.lease_key(lease.subnets)
        lease = attrs.evolve(lease, reserved=await self.reserved.is_reserved(lease.subnets))
        value = records.encode_lease(lease)
        found: Record | None = attrs.evolve(_EMPTY, key=key, version=lease.version)
        known = True
        while True:
            asked_at = boot_clock.now()
            if found is not None:
                written = await self.table.replace(found, value, network.lease_ttl)
            else:
                written = await self.table.create(key, value, network.lease_ttl)
            if written is not None:
                if not known and not await self._stands(written, lease):
                    raise LeaseLost(f"the lease on {lease.subnets} vanished, and an overlapping subnet is now leased")
                renewed = _granted(lease, written, network)
                self._granted[lease.node] = _Granted(renewed, asked_at + network.lease_ttl)
                return renewed
            # Changed by someone else, or by a write of our own whose answer was lost; that may have been a creation,
            # which nobody has checked against the other records yet.
            known = False
            found = await self.table.get(key)
            if found is not None and not self._damaged(lease, found) and not await self._kept_for(lease, found):
                _check_still_own(found, lease)

    async def release(self, lease: Lease) -> None:
        self._granted.pop(lease.node, None)
        record = await self.table.get(records.lease_key(lease.subnets))
        if record is None:
            return
        try:
            _check_still_own(record, lease)
        except LeaseLost:
            return
        await self.reserved.vacate(record, lease.subnets)

    async def remove(self, claim: Lease | Malformed) -> bool:
        key = claim.key if isinstance(claim, Malformed) else records.lease_key(claim.subnets)
        return await self.reserved.vacate(Record(key, b"", claim.version), records.parse_lease_key(key))

    async def reserve(self, reservation: Reservation) -> None:
        await self.reserved.reserve(reservation)

    async def unreserve(self, subnets: Subnets) -> None:
        await self.reserved.unreserve(subnets)

    async def reservations(self) -> Reserved:
        return await self.reserved.list()

    async def leases(self) -> Snapshot:
        listed = await self.table.list(records.LEASE_PREFIX)
        limit = asyncio.Semaphore(_TTL_QUERIES_AT_ONCE)

        async def with_ttl(record: Record) -> Record:
            if record.ttl is not None:
                return record
            async with limit:
                return attrs.evolve(record, ttl=await self.table.ttl(record))

        complete = await asyncio.gather(*map(with_ttl, listed.values()))
        return read_snapshot({record.key: record for record in complete})

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        previous: Snapshot | None = None
        reserved: set[Subnets] = set()
        reader = _Reader()
        async with aclosing(self.table.watch(records.LEASE_PREFIX)) as listings:
            async for listing in listings:
                leases, malformed = reader.read(listing)
                for subnets in [known for known in reserved if records.lease_key(known) not in listing]:
                    await self.reserved.restore(subnets)
                    reserved.discard(subnets)
                # Once reserved, an expiry is looked into, even if flannel has written over the mark.
                reserved |= {lease.subnets for lease in leases if lease.reserved}
                for lease in leases:
                    await self._vacate_if_remnant(lease)
                snapshot = _snapshot(leases, malformed)
                if snapshot != previous:
                    yield snapshot
                previous = snapshot
        raise StoreUnavailable(f"the watch of {self} ended")

    async def _vacate_if_remnant(self, lease: Lease) -> None:
        """End a claim of a node of this process that came into effect after the node had given it up and got another.

        So may do a claim whose answer did not come: the member of etcd that had it hung, and was passed over.
        """
        granted = self._granted.get(lease.node)
        held = None if granted is None else granted.lease
        if held is not None and lease.run == held.run and lease.subnets != held.subnets:
            remnant = Record(records.lease_key(lease.subnets), b"", lease.version)
            if await self.reserved.vacate(remnant, lease.subnets):
                log.warning("late claim given back", extra=fields(subnet=lease.subnets, held=held.subnets))

    def _damaged(self, lease: Lease, record: Record) -> bool:
        """True if the record is this node's own, and nobody can read it any more: it may be written over.

        An unreadable record names no owner. But as long as the table's promise lasted when it was read, nobody else can
        have claimed the key: the protocol lets a claim through only when the record of the one before has ended, by time
        or by its own node. So what stands there came of our record, by a hand or a disk, and it is written over by
        compare-and-swap at exactly this version; were it to end meanwhile, and another node to claim the key, that
        would fail. Beyond the promise it may be what became of another node's claim: then the lease is lost.
        """
        granted = self._granted.get(lease.node)
        if granted is None or (granted.lease.run, granted.lease.subnets) != (lease.run, lease.subnets):
            return False
        try:
            records.decode_lease(record.key, record.value)
        except RecordError as error:
            if boot_clock.now() >= granted.until:
                return False
            log.warning("damaged record of the lease is written over", extra=fields(key=record.key, reason=str(error)))
            return True
        return False

    async def _kept_for(self, lease: Lease, record: Record) -> bool:
        """True if a vanished lease may be written over the record: it is a placeholder, and not for another node.

        :raises LeaseLost: if it is one for another node.
        """
        found = records.readable_lease(record.key, record.value)
        if found is None or not records.is_placeholder(found):
            return False
        reservation = (await self.reserved.list()).of(lease.subnets)
        if reservation is not None and not reservation.is_for(lease):
            raise LeaseLost(f"the lease on {lease.subnets} vanished, and is now reserved for {reservation.holder}")
        return True

    async def _stands(self, written: Record, lease: Lease) -> bool:
        """Check a new record against all others, and take it back if another lease, or a placeholder, overlaps it.

        Equal subnets have equal keys, so the table itself lets only one of two creations through. Subnets of different
        lengths (after a change of the network document) do not: both creators look again after having
        written, so at least the later one sees the other and withdraws.
        """
        held = await self.table.list(records.LEASE_PREFIX)
        if held.get(written.key, _EMPTY).version != written.version:
            return False
        if not _overlapped(lease.subnets, held, but=written.key):
            return True
        await self.reserved.vacate(written, lease.subnets)
        return False


_EMPTY = Record(key="", value=b"", version="")


def read_snapshot(listing: Mapping[str, Record]) -> Snapshot:
    """Read all lease records; those that cannot be read are listed apart, and placeholders of reservations left out."""
    leases, malformed = [], []
    for _, record in sorted(listing.items()):
        found = _parsed(record).found
        if isinstance(found, Malformed):
            malformed.append(found)
        else:
            leases.append(attrs.evolve(found, ttl=record.ttl))
    return _snapshot(leases, malformed)


@attrs.frozen
class _Parsed:
    """What a record says."""

    version: str
    """The record's."""
    found: Lease | Malformed
    decoded: Lease | None = None
    """The lease without its version. While it is held here, no other reader of this process needs to decode the record."""


class _Reader:
    """Reads listings of lease records, one after the other; what has not changed since the last stays the same object.

    What it reads does not tell how long a lease has left, which changes all the time.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Parsed] = {}

    def read(self, listing: Mapping[str, Record]) -> tuple[list[Lease], list[Malformed]]:
        """The leases, and the records that cannot be read."""
        before, self._known = self._known, {}
        leases, malformed = [], []
        for key, record in sorted(listing.items()):
            parsed = before.get(key)
            if parsed is None or parsed.version != record.version:
                parsed = _parsed(record)
            self._known[key] = parsed
            if isinstance(parsed.found, Malformed):
                malformed.append(parsed.found)
            else:
                leases.append(parsed.found)
        return leases, malformed


def _parsed(record: Record) -> _Parsed:
    try:
        lease = records.decode_lease(record.key, record.value)
    except RecordError as error:
        return _Parsed(record.version, Malformed(record.key, str(error), record.version))
    return _Parsed(record.version, attrs.evolve(lease, version=record.version), lease)


def _snapshot(leases: Iterable[Lease], malformed: Iterable[Malformed]) -> Snapshot:
    return Snapshot(tuple(lease for lease in leases if not records.is_placeholder(lease)), tuple(malformed))


def _granted(lease: Lease, written: Record, network: Network) -> Lease:
    return attrs.evolve(lease, version=written.version, ttl=network.lease_ttl)


def _own_records(held: Mapping[str, Record], request: LeaseRequest) -> list[tuple[Record, Subnets]]:
    """The records that are this node's by its identity; failing that, those that flannel wrote for its address.

    flannel knows a node by its address only, and so are its leases taken over. But where another node has the same
    address, behind a NAT or on hosts made alike, a lease without a name is this node's only if the node held it before.
    """
    by_node, by_address = [], []
    shared = False
    for key, record in sorted(held.items()):
        lease = records.readable_lease(key, record.value)
        if lease is None or records.is_placeholder(lease):
            continue  # what cannot be read, the watch reports; its subnet counts as taken all the same
        if lease.node and lease.node == request.node:
            by_node.append((record, lease.subnets))
        elif _same_address(lease, request):
            if lease.node:
                shared = True
            else:
                by_address.append((record, lease.subnets))
    if shared:
        by_address = [(record, subnets) for record, subnets in by_address if subnets == request.previous]
    return sorted(by_node or by_address, key=lambda found: found[1] != request.previous)


def _reserved_for(
    network: Network,
    request: LeaseRequest,
    reserved: Reserved,
    held: Mapping[str, Record],
    own: Iterable[tuple[Record, Subnets]],
) -> Subnets | None:
    """Subnets that are reserved for this node and that it can have; those that it holds come first."""
    own_keys = {record.key for record, _ in own}

    def free(subnets: Subnets) -> bool:
        key = records.lease_key(subnets)
        lease = records.readable_lease(key, held[key].value) if key in held else None
        vacant = key not in held or key in own_keys or (lease is not None and records.is_placeholder(lease))
        return vacant and network.grants(subnets) and not _overlapped(subnets, held, but=key)

    candidates = [subnets for subnets in reserved.kept_for(request) if free(subnets)]
    return min(candidates, key=lambda subnets: records.lease_key(subnets) not in own_keys, default=None)


def _same_address(lease: Lease, request: LeaseRequest) -> bool:
    if request.public_ipv4 is not None:
        return lease.public_ipv4 == request.public_ipv4
    return lease.public_ipv4 is None and request.public_ipv6 is not None and lease.public_ipv6 == request.public_ipv6


def _check_still_own(record: Record, lease: Lease) -> None:
    try:
        found = records.decode_lease(record.key, record.value)
    except RecordError as error:
        raise LeaseLost(f"the record of the lease on {lease.subnets} was overwritten: {error}") from error
    if found.node == lease.node and found.run == lease.run:
        return
    address = found.public_ipv4 or found.public_ipv6
    if found.node != lease.node:
        raise LeaseLost(f"the lease on {lease.subnets} was taken by node {found.node or '(unnamed)'} at {address}")
    raise IdentityTaken(
        f"the lease on {lease.subnets} was taken by another process with the same node identity {lease.node!r} at "
        f"{address}; give each node an identity of its own with --node"
    )


def _subnets(held: Iterable[str]) -> Iterator[Subnets]:
    """What every record claims, whether or not its value can be read."""
    for key in held:
        try:
            yield records.parse_lease_key(key)
        except RecordError:
            continue  # no key of a lease claims no subnet; the watch reports it


def _overlapped(subnets: Subnets, held: Mapping[str, Record], *, but: str) -> bool:
    return any(subnets.overlaps(other) for other in _subnets(key for key in held if key != but))


def _choose(network: Network, taken: list[Subnets]) -> Subnets:
    """Free subnets, picked at random among all that are free."""
    return Subnets(
        ipv4=_choose_free(network.ipv4, [t.ipv4 for t in taken if t.ipv4 is not None]),
        ipv6=_choose_free(network.ipv6, [t.ipv6 for t in taken if t.ipv6 is not None]),
    )


def _choose_free(family: SubnetRange[N] | None, taken: list[N]) -> N | None:
    """One of the free subnets, each equally likely: spread out, so that nodes that start together seldom collide, and
    so that a subnet just given back is not the next to be given out."""
    if family is None:
        return None
    free_runs = list(_free_runs(family, taken))
    free = sum(end - start for start, end in free_runs)
    if free == 0:
        raise SubnetsExhausted(
            f"all {family.size} subnets of {family.network} are leased; widen SubnetMin to SubnetMax or Network "
            f"in the network document, or release leases of nodes that are gone"
        )
    pick = random.randrange(free)
    for start, end in free_runs:
        if pick < end - start:
            return family[start + pick]
        pick -= end - start
    raise AssertionError("unreachable: pick is below the number of free subnets")


def _free_runs(family: SubnetRange[N], taken: list[N]) -> Iterator[tuple[int, int]]:
    """The runs of free subnets, as half-open intervals of indices; cost grows with the leases, not with the network."""
    shift = family.network.max_prefixlen - family.prefix_length
    base = int(family.first.network_address)
    position = 0
    for subnet in sorted(taken, key=lambda subnet: int(subnet.network_address)):
        start = (int(subnet.network_address) - base) >> shift
        end = ((int(subnet.broadcast_address) - base) >> shift) + 1
        if end <= 0 or start >= family.size:
            continue
        if start > position:
            yield position, start
        position = max(position, end)
    if position < family.size:
        yield position, family.size
