"""Watching etcd: a list, then its changes from the next revision on, in a thread of its own.

etcd3gw's watch falls silent for ever when etcd restarts, compacts or loses its leader, so this one speaks to the gateway
itself: one connection to one endpoint, first ``kv/range``, then the endless answer to ``watch``. What breaks is resumed
after the last event seen, at the next endpoint, if etcd still has that event: else it was compacted, wiped or restored
from a copy meanwhile, and a fresh list is made. Its revision or its cluster's id would not tell: a wiped etcd has the same
id, and may have overtaken the revision.

A member that hangs keeps its connections, and nothing on a watch tells it from a quiet network. So it is asked for one key
over another connection whenever the watch is silent for some seconds. If it does not answer as fast as any request has to
be, and another member does, the watch goes on there; if none does, it stays where it is, and so costs nothing once etcd
answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from overlaynet._threads import start_thread
from overlaynet.errors import NoThread
from overlaynet.logs import fields
from overlaynet.stores import _etcd_errors as errors
from overlaynet.stores import _etcd_replies as replies
from overlaynet.stores._etcd_client import EtcdClient
from overlaynet.stores._etcd_connection import Connection
from overlaynet.stores._etcd_errors import EndpointError, Refused
from overlaynet.stores._etcd_newest import Newest
from overlaynet.stores._etcd_settings import Endpoint
from overlaynet.table import Record

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0
_STEADY = 10.0
"""A watch that lasted this many seconds before it broke is opened again without much delay."""
_CLOSE_SECONDS = 1.0
_OUT_OF_RANGE = 11


class Watcher:
    """Follows all keys with a prefix, and hands the newest listing to the event loop.

    :param prefix: of the keys, as etcd has them.
    :param read_record: makes the record of a key; the listings are by the record's key.
    """

    def __init__(self, client: EtcdClient, prefix: bytes, read_record: Callable[[replies.KeyValue], Record]) -> None:
        self._client = client
        self._range = replies.prefix_range(prefix)
        self._prefix = prefix
        self._read_record = read_record
        self._newest = Newest[Mapping[str, Record]]()
        self._thread = threading.Thread(target=self._run, name="watch etcd", daemon=True)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        # All below is the thread's own.
        self._listing: dict[str, Record] | None = None
        self._next_revision = 0
        self._cluster = 0
        self._last: replies.KeyValue | None = None
        """The last event seen, if there is no mistaking it: a record with an etcd lease, whose id is never used again."""
        self._endpoints = deque(client.rotation())
        self._token: str | None = None
        self._token_refused = False
        self._failures: dict[Endpoint, EndpointError] = {}
        """Of the endpoints tried since the watch last stood."""
        self._broken_since: float | None = None
        self._stood_since: float | None = None
        """When this watch was opened; ``None`` if it did not come to stand."""
        self._heard_at = 0.0
        """When its member gave the last sign of life."""
        self._attempts = 0

    def start(self) -> None:
        """Start the thread. :raises NoThread: if the kernel gives none; it is over then."""
        try:
            start_thread(self._thread)
        except NoThread:
            self._newest.close(None)
            raise

    async def next(self) -> Mapping[str, Record] | None:
        """The newest listing, once there is one that has not been returned yet; ``None`` after :meth:`aclose`.

        :raises StoreUnavailable: when no endpoint serves the watch. :raises StoreError: when none ever will.
        """
        return await self._newest.get()

    async def aclose(self) -> None:
        """End the thread, wherever it waits, and wait a moment for that; idempotent."""
        self._stopping.set()
        with self._lock:
            for connection in self._connections:
                connection.cut()
        with contextlib.suppress(TimeoutError):  # it is making a connection: that has a time limit of its own
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._newest.wait_closed()
                if self._thread.ident is not None:
                    self._thread.join(_CLOSE_SECONDS)  # to be closed is the last thing it does

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._follow()
        except BaseException as caught:
            error = caught
        self._newest.close(None if self._stopping.is_set() else error)

    def _follow(self) -> None:
        """Watch until stopped. :raises OverlaynetError: what :meth:`next` is to raise."""
        while not self._stopping.is_set():
            self._stood_since = None
            try:
                self._watch(self._endpoints[0])
            except _ListAnew as reason:
                log.info("listing anew", extra=fields(endpoint=self._endpoints[0], reason=reason))
                self._last = None
            except Refused as refusal:
                if self._token_refused or not refusal.by_token or not self._client.forget_token(self._token):
                    raise self._client.explained(refusal) from refusal
                self._token_refused = True
            except EndpointError as error:
                self._failed(self._endpoints[0], error)
            self._pause()

    def _watch(self, endpoint: Endpoint) -> None:
        """Watch one endpoint, until that ends by an exception."""
        self._client.check_open()
        self._token = self._client.token(endpoint)
        with self._connected(endpoint) as connection, self._connected(endpoint) as asked:
            if not self._continues(connection):
                self._list(connection)
            create = {**self._range, "start_revision": str(self._next_revision)}

            def silent() -> None:
                self._see_if_alive(endpoint, asked)

            self._heard_at = time.monotonic()
            for document in connection.stream("watch", {"create_request": create}, self._token, silent):
                self._heard_at = time.monotonic()
                self._take(_read(replies.read_watch, document))

    @contextlib.contextmanager
    def _connected(self, endpoint: Endpoint) -> Iterator[Connection]:
        """A connection that :meth:`aclose` cuts."""
        connection = Connection(self._client, endpoint)
        with self._lock:
            self._connections.add(connection)
            if self._stopping.is_set():
                connection.cut()
        try:
            yield connection
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _see_if_alive(self, endpoint: Endpoint, asked: Connection) -> None:
        """Ask the endpoint, whose watch is silent, for a sign of life.

        :raises EndpointError: if it gives none, and another one does; or if it has given none for too long.
        """
        try:
            self._ask(endpoint, asked)
        except EndpointError as error:
            if self._stopping.is_set():
                raise
            answering = next(filter(self._answers, list(self._endpoints)[1:]), None)
            if answering is not None:
                self._endpoints.remove(answering)
                self._endpoints.insert(1, answering)  # it is the next
                self._client.pass_over(endpoint)
                raise
            if time.monotonic() - self._heard_at >= self._client.timeouts.stay:
                raise
            log.debug("watch stays where it is", extra=fields(endpoint=endpoint, reason=error))
        else:
            self._heard_at = time.monotonic()

    def _ask(self, endpoint: Endpoint, connection: Connection) -> None:
        """Ask for one key, with a new token if the one we have is no longer good.

        Not only for what the member knows already: one that falls behind the others has to catch up before it answers.
        """
        one = {"key": replies.encode(self._prefix)}
        try:
            connection.call("kv/range", one, self._token)
        except Refused as refusal:
            if not refusal.by_token or not self._client.forget_token(self._token):
                raise
        except EndpointError as error:
            if not error.hung_up:
                raise
            # As for an old token; or as this connection has rested for too long.
            self._client.forget_token(self._token)
        else:
            return
        self._token = self._client.token(endpoint)
        connection.call("kv/range", one, self._token)

    def _answers(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint would serve us."""
        with self._connected(endpoint) as connection:
            try:
                self._ask(endpoint, connection)
            except (EndpointError, Refused) as error:
                log.debug("endpoint passed over", extra=fields(endpoint=endpoint, reason=error))
                return False
        return True

    def _continues(self, connection: Connection) -> bool:
        """Whether the listing may be carried on: etcd still has the last event seen, and so all that was before it."""
        if self._last is None:
            return False
        then = {"key": replies.encode(self._last.key), "revision": str(self._last.revision)}
        try:
            _, found = _read(replies.read_range, connection.call("kv/range", then, self._token))
        except Refused as refusal:
            if refusal.code != _OUT_OF_RANGE:  # the revision is compacted away, or has not been yet
                raise
            found = ()
        if found != (self._last,):
            log.info("listing anew", extra=fields(endpoint=self._endpoints[0], reason="etcd lost what was seen last"))
            return False
        return True

    def _list(self, connection: Connection) -> None:
        header, found = _read(replies.read_range, connection.call("kv/range", self._range, self._token))
        self._listing = {record.key: record for record in map(self._read_record, found)}
        self._next_revision = header.revision + 1
        self._cluster = header.cluster
        self._last = None
        self._newest.put(dict(self._listing))

    def _take(self, reply: replies.WatchReply) -> None:
        """Take one document of the watch."""
        if reply.compacted:
            raise _ListAnew("what came next is compacted away")
        if reply.cancelled:
            raise errors.from_refusal(*replies.read_cancel_reason(reply.cancel_reason))
        if reply.created:
            if reply.header.cluster != self._cluster or reply.header.revision < self._next_revision - 1:
                raise _ListAnew("etcd lost its data, or is another one")
            self._stands()
        if reply.events and self._listing is not None:
            for found, deleted in reply.events:
                record = self._read_record(found)
                if deleted:
                    self._listing.pop(record.key, None)
                else:
                    self._listing[record.key] = record
                # Never the header's revision: etcd sends old events in batches, each with the newest revision.
                self._next_revision = max(self._next_revision, found.revision + 1)
                self._last = found if found.lease else None  # a deletion has none
            self._newest.put(dict(self._listing))

    def _stands(self) -> None:
        self._stood_since = time.monotonic()
        self._token_refused = False
        self._failures.clear()
        self._broken_since = None

    def _failed(self, endpoint: Endpoint, error: EndpointError) -> None:
        """Note a failure, and go on to the next endpoint. :raises OverlaynetError: when all have failed for too long."""
        log.debug("watch broke", extra=fields(endpoint=endpoint, reason=error))
        now = time.monotonic()
        self._broken_since = now if self._broken_since is None else self._broken_since
        self._failures[endpoint] = error
        self._endpoints.rotate(-1)
        if error.hung_up:
            self._client.forget_token(self._token)
        patience = self._client.timeouts.patience if self._listing is not None else 0.0
        if len(self._failures) == len(self._endpoints) and now - self._broken_since >= patience:
            raise self._client.unserved(self._failures)

    def _pause(self) -> None:
        """Wait before the next attempt: longer each time, and never as long as the other nodes do."""
        if self._stood_since is not None and time.monotonic() - self._stood_since >= _STEADY:
            self._attempts = 0
        delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2**self._attempts)
        self._attempts += 1
        self._stopping.wait(delay * random.uniform(0.5, 1.5))


class _ListAnew(Exception):
    """The events that come next are not to be had; the text says why."""


def _read(read: Callable[[object], T], document: object) -> T:
    try:
        return read(document)
    except replies.OddReply as error:
        raise EndpointError(f"its answer is not one of etcd's: {error}") from error
