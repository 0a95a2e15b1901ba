"""Tables that are wrong on purpose, each in one way; and one that is right, which they are made of."""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, ClassVar

import attrs
import pytest

from overlaynet.api import Record
from overlaynet.stores.memory import MemoryTable
from overlaynet.testing import VIRTUAL_CLOCK
from overlaynet.testing.tables import MakeTable, TableConformance

Listing = Mapping[str, Record]


class Model(MemoryTable):
    """A table that is right: handles on the records of the test's."""

    shared: ClassVar[MemoryTable]

    def __init__(self) -> None:
        super().__init__()
        self._content = self.shared._content

    async def write(self, key: str, value: bytes, ttl: float = math.inf) -> Record:
        """Write whatever is there."""
        found = await MemoryTable.get(self, key)
        written = await (
            MemoryTable.create(self, key, value, ttl) if found is None else MemoryTable.replace(self, found, value, ttl)
        )
        assert written is not None
        return written


class Suite(TableConformance):
    model: ClassVar[type[Model]]

    @pytest.fixture
    def anyio_backend(self) -> object:
        return VIRTUAL_CLOCK

    @pytest.fixture
    def lifetime(self) -> float:
        return 10.0

    @pytest.fixture
    def make_table(self) -> MakeTable:
        self.model.shared = MemoryTable()
        return self.model


def wrong(breaks: str | None, **members: Any) -> Callable[[type[Model]], type[Model]]:
    """Hold the table against the suite, which it passes but for one test."""

    def declare(model: type[Model]) -> type[Model]:
        name = f"Test{model.__name__}"
        globals()[name] = type(name, (Suite,), {"model": model, "breaks": breaks, "__module__": __name__, **members})
        return model

    return declare


wrong(None)(Model)


# Reading and writing


@wrong("test_a_missing_record_is_none")
class NeverEmpty(Model):
    async def list(self, prefix: str) -> Listing:
        listing = await super().list(prefix)
        if not listing and prefix == "" and not self._content.writes:
            return {"": Record("", b"", "0")}
        return listing


@wrong("test_what_is_created_is_read_back")
class ReadingAnotherVersion(Model):
    async def list(self, prefix: str) -> Listing:
        listing = await super().list(prefix)
        if set(listing) == {"config"} and listing["config"].value == b"one":
            return {"config": attrs.evolve(listing["config"], value=b"ONE")}
        return listing


@wrong("test_a_record_is_created_only_once")
class WritingOverTheExisting(Model):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        created = await super().create(key, value, ttl)
        if created is None and value == b"two":
            await self.write(key, value, ttl)
        return created


@wrong("test_replace_needs_exactly_the_version")
class ReplacingWhateverIsThere(Model):
    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        found = await self.get(record.key)
        if found is not None and value == b"three":
            return await self.write(record.key, value, ttl)
        return await super().replace(record, value, ttl)


@wrong("test_replace_never_creates")
class ReplacingTheMissing(Model):
    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        if record.key == "other":
            return await super().create(record.key, value, ttl)
        return await super().replace(record, value, ttl)


@wrong("test_delete_needs_exactly_the_version")
class DeletingTwice(Model):
    async def delete(self, record: Record) -> bool:
        return await super().delete(record) or record.value == b"two"


@wrong("test_a_version_is_never_used_again")
class CountingFromOneAgain(Model):
    """Versions begin anew with each record: fine for comparing values, but a former holder may be taken for the new."""

    created: ClassVar[dict[str, int]] = {}

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        record = await super().create(key, value, ttl)
        if record is None or value != b"same" or self._content.writes < 5:
            return record
        self._content.entries[key] = attrs.evolve(self._content.entries[key], version="1")
        return attrs.evolve(record, version="1")


@wrong("test_a_former_holder_cannot_write_over_its_successor")
class ComparingValues(Model):
    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        found = await self.get(record.key)
        if found is not None and found.value == record.value == b"same" and value == b"mine":
            return await super().replace(found, value, ttl)
        return await super().replace(record, value, ttl)


@wrong("test_a_list_has_exactly_the_keys_with_the_prefix")
class TakingAPrefixForAFolder(Model):
    async def list(self, prefix: str) -> Listing:
        return await super().list("subnets/" if prefix == "subnets" else prefix)


@wrong("test_keys_are_kept_apart")
class ResolvingDots(Model):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await super().create("b" if key == "a/../b" else key, value, ttl)


@wrong("test_a_value_comes_back_unchanged")
class StrippingValues(Model):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await super().create(key, value.rstrip() if value == b"\n \r\n" else value, ttl)


@wrong("test_a_value_is_any_bytes")
class ForTextOnly(Model):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await super().create(key, value.decode(errors="replace").encode(), ttl)


# Many at once


@wrong("test_of_concurrent_creations_one_wins")
class LookingBeforeItCreates(Model):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        if key == "config" and value.isdigit():
            if await self.get(key) is not None:
                return None
            await asyncio.sleep(0)
            return await self.write_blindly(key, value, ttl)
        return await super().create(key, value, ttl)

    async def write_blindly(self, key: str, value: bytes, ttl: float) -> Record:
        loop = asyncio.get_running_loop()
        entry = self._content.write(key, value, loop.time() + ttl)
        return Record(key, value, entry.version, ttl)


@wrong("test_of_concurrent_replacements_one_wins")
class LookingBeforeItReplaces(LookingBeforeItCreates):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await MemoryTable.create(self, key, value, ttl)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        if record.value == b"old":
            if not self._stands(record, asyncio.get_running_loop().time()):
                return None
            await asyncio.sleep(0)
            return await self.write_blindly(record.key, value, ttl)
        return await super().replace(record, value, ttl)


@wrong("test_no_update_is_lost")
class LosingUpdates(LookingBeforeItReplaces):
    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        if record.key == "counter" and self._stands(record, asyncio.get_running_loop().time()):
            await asyncio.sleep(0)
            return await self.write_blindly(record.key, value, ttl)
        return await MemoryTable.replace(self, record, value, ttl)


@wrong("test_a_list_is_of_one_moment")
class ListingOneByOne(Model):
    async def list(self, prefix: str) -> Listing:
        if prefix != "token/":
            return await super().list(prefix)
        listing = {}
        for key in ("token/1", "token/0"):
            if (record := await self.get(key)) is not None:
                listing[key] = record
            await asyncio.sleep(0)
        return listing


@wrong("test_a_cancelled_write_happened_whole_or_not_at_all")
class WritingInTwoSteps(Model):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        if value != b"whole":
            return await super().create(key, value, ttl)
        half = await super().create(key, value[:2], ttl)
        return None if half is None else await super().replace(half, value, ttl)


# Lifetimes


@wrong("test_a_record_without_a_lifetime_never_expires")
class WithALongestLifetime(Model):
    async def ttl(self, record: Record) -> float:
        return min(await super().ttl(record), 1e9)


@wrong("test_a_record_lives_as_long_as_it_was_given_and_no_longer")
class ExpiringEarly(Model):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await super().create(key, value, ttl - 1 if ttl == 10.0 else ttl)


@wrong("test_the_time_left_is_known")
class KnowingNoTimes(Model):
    async def ttl(self, record: Record) -> float:
        left = await super().ttl(record)
        return math.inf if left > 500 else left


@wrong("test_replacing_gives_a_new_lifetime")
class KeepingTheFirstLifetime(Model):
    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        if record.key in ("subnets/renewed", "subnets/freed") and record.ttl is not None:
            ttl = record.ttl
        return await super().replace(record, value, ttl)


@wrong("test_replacing_can_shorten_a_lifetime")
class NeverShortening(Model):
    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        return await super().replace(record, value, max(ttl, record.ttl or 0))


@wrong("test_an_expired_record_is_gone_for_every_purpose")
class ReplacingTheExpired(Model):
    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        if record.value == b"old" and value == b"mine" and await self.get(record.key) is None:
            return await self.create(record.key, value, ttl)
        return await super().replace(record, value, ttl)


# Watching


class Watching(Model):
    """What its watches yield can be changed."""

    async def watch(self, prefix: str) -> AsyncGenerator[Listing, None]:
        async with aclosing(super().watch(prefix)) as listings:
            async for listing in listings:
                for changed in self.instead_of(listing):
                    yield changed

    def instead_of(self, listing: Listing) -> list[Listing]:
        """What is yielded in place of one listing."""
        return [listing]


@wrong("test_a_watch_yields_at_once")
class BeginningEmpty(Watching):
    async def watch(self, prefix: str) -> AsyncGenerator[Listing, None]:
        if self._content.entries and prefix == "subnets/":
            yield {}
        async with aclosing(super().watch(prefix)) as listings:
            async for listing in listings:
                yield listing


@wrong("test_a_watch_yields_after_each_kind_of_change")
class DeafToChangedValues(Watching):
    seen: str | None = None

    def instead_of(self, listing: Listing) -> list[Listing]:
        record = listing.get("subnets/a")
        return [] if record is not None and record.value == b"two" else [listing]


@wrong("test_a_watch_yields_what_others_change")
class DeafToOthers(Watching):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        self._content.watchers, others = self._watchers, self._content.watchers
        try:
            return await super().create(key, value, ttl)
        finally:
            self._content.watchers = others


@wrong("test_a_watch_yields_when_a_record_expires")
class DeafToExpiry(Watching):
    expiring = False

    def instead_of(self, listing: Listing) -> list[Listing]:
        wanted = not (self.expiring and set(listing) == {"subnets/kept"})
        self.expiring = "subnets/kept" in listing
        return [listing] if wanted else []


@wrong("test_a_watch_misses_nothing_while_its_reader_is_busy")
class WithAShortQueue(Watching):
    def instead_of(self, listing: Listing) -> list[Listing]:
        return [dict(list(listing.items())[:9])]


@wrong("test_a_watch_sees_only_its_prefix")
class WatchingTooMuch(Watching):
    def instead_of(self, listing: Listing) -> list[Listing]:
        stranger = self._content.entries.get("subnets2/a")
        return [listing if stranger is None else {**listing, "subnets2/a": Record("subnets2/a", b"", "1")}]


@wrong("test_watches_do_not_disturb_each_other")
class WithOneWatch(Model):
    async def watch(self, prefix: str) -> AsyncGenerator[Listing, None]:
        try:
            async with aclosing(super().watch(prefix)) as listings:
                async for listing in listings:
                    yield listing
        finally:
            if len(self._watchers) == 1 and not self._closed and not self._content.entries:
                self._content.watchers.clear()


@wrong("test_a_watch_that_is_cancelled_ends_at_once")
class UncancellableWatch(Model):
    async def watch(self, prefix: str) -> AsyncGenerator[Listing, None]:
        async with aclosing(super().watch(prefix)) as listings:
            while True:
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                    yield await anext(listings)
                    continue
                return


# The end


@wrong("test_closing_is_idempotent")
class RaisingWhenClosedAgain(Model):
    closed = 0

    async def aclose(self) -> None:
        await super().aclose()
        self.closed += "config" in self._content.entries
        if self.closed == 2:
            raise RuntimeError("it is closed already")


@wrong("test_closing_an_unused_table_is_nothing")
class UnclosableUnlessUsed(Model):
    used = False

    async def aclose(self) -> None:
        if not self._content.writes and not self._content.watchers and not self.used:
            raise RuntimeError("there is nothing to close")
        await super().aclose()

    async def get(self, key: str) -> Record | None:
        self.used = True
        return await super().get(key)

    async def watch(self, prefix: str) -> AsyncGenerator[Listing, None]:
        self.used = True
        async with aclosing(super().watch(prefix)) as listings:
            async for listing in listings:
                yield listing


@wrong("test_closing_ends_open_watches")
class WatchingOnWhenClosed(Model):
    async def aclose(self) -> None:
        self._closed = True


@wrong("test_closing_one_handle_leaves_the_other_open")
class ClearingWhenClosed(Model):
    async def aclose(self) -> None:
        self._content.entries.clear()
        await super().aclose()
