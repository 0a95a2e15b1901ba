"""The compare-and-swap table on etcd: transactions, etcd leases, and flannel's keys."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, TypeVar

import attrs

from overlaynet._threads import call_in_thread
from overlaynet.errors import OverlaynetError, StoreUnavailable
from overlaynet.logs import fields
from overlaynet.stores import _etcd_replies as replies
from overlaynet.stores._etcd_client import EtcdClient
from overlaynet.stores._etcd_errors import NoSpace, OutcomeUnknown, Refused
from overlaynet.stores._etcd_watch import Watcher
from overlaynet.table import Record, Table

log = logging.getLogger(__name__)

T = TypeVar("T")

Conditions = Sequence[Mapping[str, str]]
"""Comparisons of a transaction that must all hold for its key."""

_MISSING: Conditions = ({"target": "CREATE", "create_revision": "0"},)
_VERSION = re.compile(r"([1-9][0-9]{0,18})(?:/([1-9][0-9]{0,18}))?")
_CALLS_AT_ONCE = 16
_NOT_FOUND = 5
_FAILED_PRECONDITION = 9


@attrs.frozen
class EtcdRecord(Record):
    """A record, and the etcd lease that its key is attached to."""

    lease: int = attrs.field(default=0, eq=False)
    """0 for none: the record never expires."""


class NotKept:
    """A record cannot be given a new lifetime without a write."""


class EtcdTable(Table):
    """A table whose records are the keys of etcd under ``root``.

    A record's version is its ``mod_revision`` and, after a slash, the id of its etcd lease. The revision alone would do
    if etcd never lost its data: one that was wiped or restored gives the same revisions out again, and a former holder
    would write over its successor. The ids are random, and each is used for one write only.

    Each record with a lifetime has an etcd lease of its own, granted before the write and revoked when the record is
    written over or deleted, so that no empty lease is left. etcd counts whole seconds: lifetimes are rounded up. Where etcd
    is full, a record that is replaced by itself keeps its version, and its etcd lease is prolonged.
    """

    def __init__(self, client: EtcdClient, root: str) -> None:
        self._client = client
        self._root = root
        self._limit = asyncio.Semaphore(_CALLS_AT_ONCE)
        self._watchers: set[Watcher] = set()

    async def get(self, key: str) -> Record | None:
        return await self._in_thread(self._get, key)

    async def list(self, prefix: str) -> Mapping[str, Record]:
        return await self._in_thread(self._list, prefix)

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await self._in_thread(self._write, key, value, ttl, _MISSING)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        conditions = _unchanged(record)
        if conditions is None:
            return None
        return await self._in_thread(self._replace, record, value, ttl, conditions)

    async def delete(self, record: Record) -> bool:
        conditions = _unchanged(record)
        if conditions is None:
            return False
        return await self._in_thread(self._delete, record.key, conditions)

    async def watch(self, prefix: str) -> AsyncGenerator[Mapping[str, Record], None]:
        watcher = Watcher(self._client, self._key(prefix), self._record)
        self._watchers.add(watcher)
        try:
            watcher.start()
            while (listing := await watcher.next()) is not None:
                yield listing
        finally:
            self._watchers.discard(watcher)
            await watcher.aclose()

    async def ttl(self, record: Record) -> float:
        return await self._in_thread(self._ttl, record)

    async def aclose(self) -> None:
        await asyncio.gather(*[watcher.aclose() for watcher in self._watchers])
        self._client.close()

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        async with self._limit:
            try:
                async with asyncio.timeout(self._client.timeouts.whole):
                    return await call_in_thread(function, *arguments)
            except TimeoutError:
                raise self._client.too_slow() from None

    def _get(self, key: str) -> EtcdRecord | None:
        _, found = self._client.call("kv/range", {"key": replies.encode(self._key(key))}, replies.read_range)
        return self._record(found[0]) if found else None

    def _list(self, prefix: str) -> Mapping[str, Record]:
        _, found = self._client.call("kv/range", replies.prefix_range(self._key(prefix)), replies.read_range)
        return {record.key: record for record in map(self._record, found)}

    def _replace(self, record: Record, value: bytes, ttl: float, conditions: Conditions) -> EtcdRecord | None:
        try:
            return self._write(record.key, value, ttl, conditions)
        except NoSpace as error:
            kept = self._keep_alive(record, value, ttl)
            if isinstance(kept, NotKept):
                raise
            if kept is not None:
                log.warning("lease kept alive unchanged", extra=fields(key=record.key, reason=error))
            return kept

    def _keep_alive(self, record: Record, value: bytes, ttl: float) -> EtcdRecord | NotKept | None:
        """Do without a write what replacing a record by itself would do: let it live for ``ttl`` seconds from now.

        A full etcd refuses the new etcd lease and the write that a renewal takes, but it goes on prolonging the leases
        that it has. That nobody is promised what etcd does not keep, is seen so:

        - The record is at exactly this version, and so attached to its own etcd lease, before and after. That lease was
          made for this write only. So nothing but its end, a deletion or another write of the key ends the record; the
          latter two are what compare-and-swap allows to whoever has seen this version, as ever.
        - The lease was prolonged by the leader, who counts from a time after we asked. Could it have been a leader that
          was deposed already without knowing, the new one would count from its election, which is earlier. But then the
          term would be a later one by the time of the second look, which is answered by a majority only.
        - The whole lifetime was given again, and it is no shorter than what is asked for now.

        :return: ``None`` if the record is no longer at this version, :class:`NotKept` if it cannot be had without a write.
        """
        before = self._get(record.key)
        if before is None or before.version != record.version:
            return None
        if before.value != value or before.lease == 0 or ttl == math.inf:
            return NotKept()
        prolonged, seconds = self._client.call("lease/keepalive", {"ID": str(before.lease)}, replies.read_keep_alive)
        living = self._time_to_live(before.lease)
        now, found = self._client.call("kv/range", {"key": replies.encode(self._key(record.key))}, replies.read_range)
        if not found or self._record(found[0]).version != record.version:
            return None
        attached = self._key(record.key) in living.keys and living.seconds >= 0
        if seconds < ttl or not attached or now.term != prolonged.term or now.cluster != prolonged.cluster:
            return NotKept()
        return EtcdRecord(record.key, value, record.version, ttl, before.lease)

    def _write(self, key: str, value: bytes, ttl: float, conditions: Conditions) -> EtcdRecord | None:
        lease = 0
        if ttl != math.inf:
            self._client.hurry(ttl)
            lease = self._grant(ttl)
        put: dict[str, Any] = {"key": replies.encode(self._key(key)), "value": replies.encode(value), "prev_kv": True}
        if lease:
            put["lease"] = str(lease)
        try:
            written = self._transact(key, conditions, {"request_put": put})
        except OutcomeUnknown:
            raise  # the record may be there, and would vanish with the lease
        except OverlaynetError:
            self._revoke(lease)
            raise
        if not written.succeeded:
            self._revoke(lease)
            return None
        self._revoke_unused(written.previous_lease)
        return EtcdRecord(key, value, _version(written.revision, lease), ttl, lease)

    def _delete(self, key: str, conditions: Conditions) -> bool:
        delete = {"key": replies.encode(self._key(key)), "prev_kv": True}
        deleted = self._transact(key, conditions, {"request_delete_range": delete})
        self._revoke_unused(deleted.previous_lease)
        return deleted.succeeded

    def _transact(self, key: str, conditions: Conditions, operation: Mapping[str, Any]) -> replies.Transacted:
        compare = [{"key": replies.encode(self._key(key)), "result": "EQUAL", **each} for each in conditions]
        body = {"compare": compare, "success": [operation]}
        try:
            return self._client.call("kv/txn", body, replies.read_transaction, repeatable=False)
        except Refused as refusal:
            if refusal.code == _NOT_FOUND:  # "requested lease not found"
                raise StoreUnavailable(
                    f"{self._client} took too long: the lifetime of {key} ended before it began"
                ) from None
            raise

    def _ttl(self, record: Record) -> float:
        current = record if isinstance(record, EtcdRecord) and record.lease != 0 else self._get(record.key)
        while current is not None:
            if current.lease == 0:
                return math.inf
            living = self._time_to_live(current.lease)
            if living.seconds >= 0 and self._key(record.key) in living.keys:
                return float(living.seconds)
            # Gone, or written over and attached to another etcd lease since.
            found = self._get(record.key)
            current = None if found is None or found.lease == current.lease else found
        return 0.0

    def _grant(self, ttl: float) -> int:
        """Grant an etcd lease. The id is ours, so that asking twice does not make two."""
        lease = secrets.randbits(62) + 1
        body = {"ID": str(lease), "TTL": str(max(1, math.ceil(ttl)))}
        try:
            return self._client.call("lease/grant", body, replies.read_lease)
        except Refused as refusal:
            if refusal.code != _FAILED_PRECONDITION:  # "lease already exists": the answer to the first try was lost
                raise
            return lease

    def _time_to_live(self, lease: int) -> replies.TimeToLive:
        body = {"ID": str(lease), "keys": True}
        return self._client.call("lease/timetolive", body, replies.read_time_to_live)

    def _revoke_unused(self, lease: int) -> None:
        """Revoke an etcd lease that our write has freed its key from, unless it still holds others' keys."""
        if lease == 0:
            return
        try:
            living = self._time_to_live(lease)
        except OverlaynetError as error:
            log.debug("etcd lease left to expire", extra=fields(reason=error))
            return
        if living.seconds >= 0 and not living.keys:
            self._revoke(lease)

    def _revoke(self, lease: int) -> None:
        if lease == 0:
            return
        try:
            self._client.call("lease/revoke", {"ID": str(lease)}, replies.read_header)
        except OverlaynetError as error:
            log.debug("etcd lease left to expire", extra=fields(reason=error))

    def _key(self, key: str) -> bytes:
        return (self._root + key).encode()

    def _record(self, found: replies.KeyValue) -> EtcdRecord:
        root = self._root.encode()
        # A key that is no UTF-8 is nobody's lease; it is shown, so that it can be reported.
        key = found.key.removeprefix(root).decode("utf-8", "backslashreplace")
        never = math.inf if found.lease == 0 else None
        return EtcdRecord(key, found.value, _version(found.revision, found.lease), never, found.lease)


def _version(revision: int, lease: int) -> str:
    return f"{revision}/{lease}" if lease else str(revision)


def _unchanged(record: Record) -> Conditions | None:
    """The conditions that a key is still at this version; ``None`` if it can not be.

    Revision 0 is how etcd says that a key does not exist.
    """
    match = _VERSION.fullmatch(record.version)
    if match is None:
        return None
    return {"target": "MOD", "mod_revision": match[1]}, {"target": "LEASE", "lease": match[2] or "0"}
