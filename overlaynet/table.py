"""The compare-and-swap table: all that a store has to supply for the shared lease logic of :mod:`overlaynet.leases`.

A table maps keys (``config``, ``subnets/10.244.1.0-24``; ASCII, ``/``-separated, no leading ``/``) to values (bytes).
Each write gives the record a new version. Nothing is ever written unconditionally.
"""

from __future__ import annotations

import abc
import math
from collections.abc import AsyncGenerator, Mapping

import attrs


@attrs.frozen
class Record:
    """One record, as read at one moment."""

    key: str
    """Its name in the table."""
    value: bytes
    """What was written."""
    version: str = attrs.field(eq=False)
    """Opaque; changes with every write of the record, and is never used again for the same key."""
    ttl: float | None = attrs.field(default=None, eq=False)
    """Seconds left when it was read; ``math.inf`` if it never expires, ``None`` if not known (see :meth:`Table.ttl`)."""


class Table(abc.ABC):
    """A compare-and-swap table with lifetimes.

    Every method may raise :exc:`~overlaynet.errors.StoreUnavailable` (try again; a write may have taken effect all the
    same) and :exc:`~overlaynet.errors.StoreError` (no use trying again). Every coroutine may be cancelled at any
    time; a cancelled write either happened whole or not at all.
    """

    @abc.abstractmethod
    async def get(self, key: str) -> Record | None:
        """The record, or ``None`` if there is none or it has expired."""

    @abc.abstractmethod
    async def list(self, prefix: str) -> Mapping[str, Record]:
        """All live records whose key starts with ``prefix``, by key, all of one moment."""

    @abc.abstractmethod
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        """Write a record that does not exist yet; ``None`` if it does, with nothing written.

        The record expires ``ttl`` seconds from now, never earlier.
        """

    @abc.abstractmethod
    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        """Write over exactly this version; ``None`` if the record has changed or gone, with nothing written."""

    @abc.abstractmethod
    async def delete(self, record: Record) -> bool:
        """Delete exactly this version; ``False`` if the record has changed or gone."""

    @abc.abstractmethod
    def watch(self, prefix: str) -> AsyncGenerator[Mapping[str, Record], None]:
        """Yield what :meth:`list` returns: at once, and again after each change, expiry included.

        Changes that come in quick succession may be yielded as one. The iterator raises rather than going silent: a
        table that cannot be reached ends it with :exc:`~overlaynet.errors.StoreUnavailable`, and the caller watches anew.
        Closing the iterator (``aclose``) frees all that it holds.
        """

    async def ttl(self, record: Record) -> float:
        """Seconds until the record expires, ``math.inf`` if never; 0.0 if it is gone."""
        found = await self.get(record.key)
        if found is None:
            return 0.0
        return math.inf if found.ttl is None else found.ttl

    async def aclose(self) -> None:  # noqa: B027 - nothing to free is a fair default
        """Free everything; idempotent. Watches that are still open end."""
