"""Reserved subnets on a compare-and-swap table: each kept for one node, whether or not it holds them now.

What is reserved, and for whom, is said by records of their own (see :mod:`overlaynet.records`). While nobody holds
reserved subnets, a placeholder has the key of their lease, so that flannel gives them to nobody either. It is put
there by :meth:`Reservations.reserve`, by whoever gives the lease back, and by all who see the lease expire.

A claim and a reservation of the same subnets at the same moment meet at that key: whoever writes it first wins. Where
subnets overlap under different keys, both authors look again after they have written, so at least the later one sees
the other, and gives way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from overlaynet import records
from overlaynet.errors import RecordError, ReservationError
from overlaynet.model import Malformed, Reservation, Reserved, Subnets
from overlaynet.table import Record, Table


class Reservations:
    """The reservations of one table."""

    def __init__(self, table: Table) -> None:
        self._table = table

    async def list(self) -> Reserved:
        """All of them, now."""
        return _read(await self._table.list(records.RESERVATION_PREFIX))

    async def reserve(self, reservation: Reservation) -> None:
        """Reserve subnets; nothing happens if exactly this is reserved already.

        :raises ReservationError: if another node holds them, or they are reserved for another, also if that comes about
            at the same moment; then nothing is reserved.
        """
        key = records.reservation_key(reservation.subnets)
        while True:
            self._check_unreserved(reservation, await self.list())
            await self._check_not_held(reservation)
            written = await self._table.create(key, records.encode_reservation(reservation))
            if written is None:
                found = (await self.list()).of(reservation.subnets)
                if found is None:
                    continue  # there was one, and it has just been removed
                if found != reservation:
                    raise _reserved_already(found)
            try:
                await self._keep_free(reservation)
                self._check_unreserved(reservation, await self.list())
                await self._check_not_held(reservation)
            except ReservationError:
                if written is not None and await self._table.delete(written):
                    await self._let_go(reservation.subnets)
                raise
            return

    async def unreserve(self, subnets: Subnets) -> None:
        """Remove a reservation. Whoever holds the subnets keeps them, as an ordinary lease.

        :raises ReservationError: if there is none of exactly these subnets.
        """
        while True:
            record = await self._table.get(records.reservation_key(subnets))
            if record is None:
                raise ReservationError(f"{subnets} is not reserved; `overlaynet leases` lists what is")
            if await self._table.delete(record):
                await self._let_go(subnets)
                return

    async def is_reserved(self, subnets: Subnets) -> bool:
        """True if exactly these subnets are reserved, for whomever."""
        return await self._table.get(records.reservation_key(subnets)) is not None

    async def vacate(self, record: Record, subnets: Subnets) -> bool:
        """End a lease whose record is still exactly this version, and keep its subnets free if they are reserved.

        :return: ``False`` if the record has changed or gone, with nothing written.
        """
        reservation = await self._get(subnets)
        if reservation is None:
            return await self._table.delete(record)
        return await self._table.replace(record, records.placeholder(reservation)) is not None

    async def restore(self, subnets: Subnets) -> None:
        """Keep subnets free whose lease has just vanished, if they are reserved."""
        reservation = await self._get(subnets)
        if reservation is not None:
            await self._keep_free(reservation)

    async def tend(self, reserved: Reserved, held: Mapping[str, Record]) -> bool:
        """Put missing placeholders in place, and remove those whose reservation is gone. True if anything was written.

        Both can be left over by a process that was killed between two writes.
        """
        written = False
        for reservation in reserved.reservations:
            if records.lease_key(reservation.subnets) not in held:
                written |= await self._keep_free(reservation)
        for key, record in held.items():
            lease = records.readable_lease(key, record.value)
            if lease is not None and records.is_placeholder(lease) and reserved.of(lease.subnets) is None:
                # Reserved since they were listed? Then it is in its place.
                written |= await self._get(lease.subnets) is None and await self._table.delete(record)
        return written

    async def _get(self, subnets: Subnets) -> Reservation | None:
        record = await self._table.get(records.reservation_key(subnets))
        return None if record is None else _read({record.key: record}).of(subnets)

    async def _keep_free(self, reservation: Reservation) -> bool:
        """Put the placeholder in place, unless the key is taken. True if it was written."""
        created = await self._table.create(records.lease_key(reservation.subnets), records.placeholder(reservation))
        if created is None:
            return False
        if not await self.is_reserved(reservation.subnets):
            await self._table.delete(created)  # the reservation was removed at the same moment
        return True

    async def _let_go(self, subnets: Subnets) -> None:
        """Remove the placeholder of a reservation that is gone, if there is one."""
        while (record := await self._table.get(records.lease_key(subnets))) is not None:
            lease = records.readable_lease(record.key, record.value)
            if lease is None or not records.is_placeholder(lease) or await self._table.delete(record):
                return

    def _check_unreserved(self, reservation: Reservation, reserved: Reserved) -> None:
        for other in reserved.reservations:
            if other != reservation and other.subnets.overlaps(reservation.subnets):
                raise _reserved_already(other)

    async def _check_not_held(self, reservation: Reservation) -> None:
        """:raises ReservationError: if anybody but the one whom the reservation is for holds some of its subnets."""
        for key, record in sorted((await self._table.list(records.LEASE_PREFIX)).items()):
            try:
                subnets = records.parse_lease_key(key)
            except RecordError:
                continue  # it claims no subnet
            if not subnets.overlaps(reservation.subnets):
                continue
            lease = records.readable_lease(key, record.value)
            if lease is None:
                raise ReservationError(
                    f"{subnets} is taken by a record that cannot be read; `overlaynet leases` says why, and "
                    f"`overlaynet release` removes it"
                )
            if not records.is_placeholder(lease) and not reservation.is_for(lease):
                address = lease.public_ipv4 if lease.public_ipv4 is not None else lease.public_ipv6
                raise ReservationError(
                    f"{subnets} is held by {f'node {lease.node}' if lease.node else 'a node'} at {address}, not by "
                    f"{reservation.holder}; reserve another subnet, or stop that node and `overlaynet release {subnets}`"
                )


def _reserved_already(found: Reservation) -> ReservationError:
    return ReservationError(
        f"{found.subnets} is reserved for {found.holder} already; `overlaynet unreserve` it first, or reserve another"
    )


def _read(listing: Mapping[str, Record]) -> Reserved:
    reservations, malformed = [], []
    for key, record in sorted(listing.items()):
        try:
            reservations.append(records.decode_reservation(key, record.value))
        except RecordError as error:
            malformed.append(Malformed(key, str(error), record.version))
            reservations += _for_nobody(key)
    return Reserved(tuple(reservations), tuple(malformed))


def _for_nobody(key: str) -> Iterable[Reservation]:
    """What a record reserves whose value cannot be read."""
    try:
        return [Reservation(records.parse_reservation_key(key))]
    except RecordError:
        return []
