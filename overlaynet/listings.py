"""What a listing of lease records says: to a watch, and to who claims subnets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import attrs

from overlaynet import records
from overlaynet.errors import RecordError
from overlaynet.model import Lease, Malformed, Snapshot, Subnets
from overlaynet.table import Record


def read_snapshot(listing: Mapping[str, Record]) -> Snapshot:
    """Read all lease records; those that cannot be read are listed apart, and placeholders of reservations left out."""
    leases, malformed = [], []
    for _, record in sorted(listing.items()):
        found = _parsed(record).found
        if isinstance(found, Malformed):
            malformed.append(found)
        else:
            leases.append(attrs.evolve(found, ttl=record.ttl))
    return snapshot_of(leases, malformed)


@attrs.frozen
class _Parsed:
    """What a record says."""

    version: str
    """The record's."""
    found: Lease | Malformed
    decoded: Lease | None = None
    """The lease without its version. While it is held here, no other reader of this process needs to decode the record."""


class Reader:
    """Reads listings of lease records, one after the other; what has not changed since the last stays the same object.

    What it reads does not tell how long a lease has left, which changes all the time, unless it never ends.
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
                if isinstance(parsed.found, Lease) and record.ttl == math.inf:
                    parsed = attrs.evolve(parsed, found=attrs.evolve(parsed.found, ttl=math.inf))
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


def snapshot_of(leases: Iterable[Lease], malformed: Iterable[Malformed]) -> Snapshot:
    """A snapshot of what was read; placeholders of reservations are left out."""
    return Snapshot(tuple(lease for lease in leases if not records.is_placeholder(lease)), tuple(malformed))


def claimed_subnets(held: Iterable[str]) -> Iterator[Subnets]:
    """What every record claims, whether or not its value can be read."""
    for key in held:
        try:
            yield records.parse_lease_key(key)
        except RecordError:
            continue  # no key of a lease claims no subnet; the watch reports it


def overlapped(subnets: Subnets, held: Mapping[str, Record], *, but: str) -> bool:
    """True if a record, but for the one of that key, claims addresses of these subnets."""
    return any(subnets.overlaps(other) for other in claimed_subnets(key for key in held if key != but))
