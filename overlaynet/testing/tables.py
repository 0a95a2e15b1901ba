"""What every compare-and-swap table has to do, as a suite of tests to derive from::

    class TestMyTable(TableConformance):
        @pytest.fixture
        def make_table(self, tmp_path):
            return lambda: MyTable(tmp_path / "records")

The store that is made of the table has :class:`overlaynet.testing.stores.StoreConformance` beside it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import ClassVar, TypeAlias

from overlaynet.table import Record, Table
from overlaynet.testing._requirements import pytest
from overlaynet.testing.conformance import PATIENCE, Conformance

MakeTable: TypeAlias = Callable[[], Table]
Listing = Mapping[str, Record]

ODD_KEYS = (
    "subnets/10.244.1.0-24",
    "subnets/10.244.1.0-24&fd00::-64",
    "subnets/0.0.0.0-0&fd00:10:244:3::-64",
    "config",
    "a/b/c/d",
    "..",
    "a/../b",
    ".hidden/.lock",
    "100%2Fsure",
    "with space*and?[star]",
    "UPPER",
    "upper",
)


async def wait(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until the condition holds, asking again and again."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


async def until(listings: AsyncGenerator[Listing, None], condition: Callable[[Listing], bool]) -> Listing:
    """Read from a watch until the condition holds for what it yields."""
    async with asyncio.timeout(PATIENCE):
        async for listing in listings:
            if condition(listing):
                return listing
    raise AssertionError("the watch ended")


class TableConformance(Conformance):
    """The laws of tables. A subclass overrides :meth:`make_table`, and what else it can."""

    capabilities: ClassVar[Mapping[str, str]] = {
        "another handle": "several handles can be made on the same records",
        "lifetimes": "records expire; the fixture `lifetime` says how soon they can",
        "binary values": "a value may be any bytes, not only text",
    }

    @pytest.fixture
    def make_table(self) -> MakeTable:
        """Makes a handle on the same records each time it is called, as another node has it. No records are there at first.

        To be overridden.
        """
        raise NotImplementedError("override the fixture 'make_table'")

    @pytest.fixture
    def lifetime(self) -> float:
        """How long a record lives in these tests, in seconds: as short as the table can, yet longer than a few writes take."""
        self.needs("lifetimes")
        return 1.0

    @pytest.fixture
    async def table(self, make_table: MakeTable) -> AsyncIterator[Table]:
        """A handle, closed after the test."""
        table = make_table()
        yield table
        await table.aclose()

    @pytest.fixture
    async def another_table(self, table: Table, make_table: MakeTable) -> AsyncIterator[Table]:
        """A second handle on the records of ``table``."""
        self.needs("another handle")
        another = make_table()
        yield another
        await another.aclose()

    # Reading and writing

    async def test_a_missing_record_is_none(self, table: Table) -> None:
        assert await table.get("subnets/10.244.1.0-24") is None
        assert await table.list("") == {}

    async def test_what_is_created_is_read_back(self, table: Table) -> None:
        created = await table.create("config", b"one")
        assert created is not None
        assert (created.key, created.value) == ("config", b"one")
        found = await table.get("config")
        assert found == created
        assert found.version == created.version
        assert await table.list("") == {"config": created}

    async def test_a_record_is_created_only_once(self, table: Table) -> None:
        created = await table.create("config", b"one")
        assert created is not None
        assert await table.create("config", b"two") is None
        found = await table.get("config")
        assert found is not None
        assert (found.value, found.version) == (b"one", created.version)

    async def test_replace_needs_exactly_the_version(self, table: Table) -> None:
        first = await table.create("config", b"one")
        assert first is not None
        second = await table.replace(first, b"two")
        assert second is not None
        assert (second.key, second.value) == ("config", b"two")
        assert await table.replace(first, b"three") is None
        found = await table.get("config")
        assert found is not None
        assert (found.value, found.version) == (b"two", second.version)

    async def test_replace_never_creates(self, table: Table) -> None:
        record = await table.create("config", b"one")
        assert record is not None
        assert await table.delete(record)
        assert await table.replace(record, b"two") is None
        assert await table.replace(Record("other", b"", record.version), b"two") is None
        assert await table.list("") == {}

    async def test_delete_needs_exactly_the_version(self, table: Table) -> None:
        first = await table.create("config", b"one")
        assert first is not None
        second = await table.replace(first, b"two")
        assert second is not None
        assert not await table.delete(first)
        assert await table.get("config") == second
        assert await table.delete(second)
        assert await table.get("config") is None
        assert not await table.delete(second)

    async def test_a_version_is_never_used_again(self, table: Table) -> None:
        versions = set()
        record = None
        for _ in range(3):
            record = await table.create("config", b"same")
            for _ in range(3):
                assert record is not None
                assert record.version not in versions
                versions.add(record.version)
                record = await table.replace(record, b"same")
            assert record is not None
            assert await table.delete(record)

    async def test_a_former_holder_cannot_write_over_its_successor(self, table: Table) -> None:
        former = await table.create("config", b"same")
        assert former is not None
        assert await table.delete(former)
        successor = await table.create("config", b"same")
        assert successor is not None
        assert await table.replace(former, b"mine") is None
        assert not await table.delete(former)
        found = await table.get("config")
        assert found is not None
        assert found.version == successor.version

    async def test_a_list_has_exactly_the_keys_with_the_prefix(self, table: Table) -> None:
        keys = ["config", "subnetsX/10.0.0.0-24", "subnets2", "t"]
        leases = ["subnets/10.244.1.0-24", "subnets/10.244.10.0-24", "subnets/10.244.1.0-24&fd00::-64"]
        for key in keys + leases:
            assert await table.create(key, key.encode()) is not None
        assert set(await table.list("subnets/")) == set(leases)
        assert set(await table.list("subnets/10.244.1.")) == {leases[0], leases[2]}
        assert set(await table.list("subnets")) == {*leases, "subnetsX/10.0.0.0-24", "subnets2"}
        assert set(await table.list("")) == {*keys, *leases}
        assert await table.list("nothing/") == {}
        assert {key: record.value for key, record in (await table.list("c")).items()} == {"config": b"config"}

    async def test_keys_are_kept_apart(self, table: Table) -> None:
        for key in ODD_KEYS:
            assert await table.create(key, key.encode()) is not None, key
        for key in ODD_KEYS:
            found = await table.get(key)
            assert found is not None, key
            assert (found.key, found.value) == (key, key.encode())
            assert (await table.list(key))[key] == found
        assert set(await table.list("")) == set(ODD_KEYS)
        for record in (await table.list("")).values():
            assert await table.delete(record)
        assert await table.list("") == {}

    @pytest.mark.parametrize("value", [b"", b"{}", "größer".encode(), b"\n \r\n", b"x" * 100_000], ids=len)
    async def test_a_value_comes_back_unchanged(self, table: Table, value: bytes) -> None:
        record = await table.create("config", value)
        assert record is not None
        assert (await table.list("config"))["config"].value == value
        replaced = await table.replace(record, value + b"!")
        assert replaced is not None
        found = await table.get("config")
        assert found is not None
        assert found.value == value + b"!"

    async def test_a_value_is_any_bytes(self, table: Table) -> None:
        self.needs("binary values")
        value = bytes(range(256))
        assert await table.create("config", value) is not None
        found = await table.get("config")
        assert found is not None
        assert found.value == value

    # Many at once

    async def test_of_concurrent_creations_one_wins(self, table: Table, another_table: Table) -> None:
        tables = [table, another_table] * 8
        created = await asyncio.gather(*(t.create("config", b"%d" % i) for i, t in enumerate(tables)))
        (winner,) = [record for record in created if record is not None]
        for reader in (table, another_table):
            found = await reader.get("config")
            assert found == winner
            assert found.version == winner.version

    async def test_of_concurrent_replacements_one_wins(self, table: Table, another_table: Table) -> None:
        record = await table.create("config", b"old")
        assert record is not None
        tables = [table, another_table] * 8
        written = await asyncio.gather(*(t.replace(record, b"%d" % i) for i, t in enumerate(tables)))
        (winner,) = [record for record in written if record is not None]
        assert await table.get("config") == winner

    async def test_no_update_is_lost(self, table: Table, another_table: Table) -> None:
        assert await table.create("counter", b"0") is not None

        async def count(table: Table) -> None:
            for _ in range(5):
                written = None
                while written is None:
                    found = await table.get("counter")
                    assert found is not None
                    written = await table.replace(found, b"%d" % (int(found.value) + 1))

        await asyncio.gather(*(count(t) for t in [table, another_table] * 2))
        found = await table.get("counter")
        assert found is not None
        assert found.value == b"20"

    async def test_a_list_is_of_one_moment(self, table: Table, another_table: Table) -> None:
        token: Record | None = await table.create("token/0", b"")

        async def move() -> None:
            held = token
            for step in range(1, 30):
                following = await table.create(f"token/{step % 2}", b"")
                assert held is not None
                assert await table.delete(held)
                held = following

        moving = asyncio.create_task(move())
        while not moving.done():
            assert await another_table.list("token/"), "a record was created before the other was deleted"
            await asyncio.sleep(0)
        await moving

    async def test_a_cancelled_write_happened_whole_or_not_at_all(self, table: Table) -> None:
        for step in range(10):
            writing = asyncio.create_task(table.create(f"subnets/{step}", b"whole"))
            for _ in range(step):
                await asyncio.sleep(0)
            writing.cancel()
            await asyncio.wait([writing])
        for record in (await table.list("subnets/")).values():
            assert record.value == b"whole"
        assert await table.create("config", b"still works") is not None

    # Lifetimes

    async def test_a_record_without_a_lifetime_never_expires(self, table: Table) -> None:
        record = await table.create("config", b"")
        assert record is not None
        assert await table.ttl(record) == math.inf
        replaced = await table.replace(record, b"x")
        assert replaced is not None
        assert await table.ttl(replaced) == math.inf

    async def test_a_record_lives_as_long_as_it_was_given_and_no_longer(self, table: Table, lifetime: float) -> None:
        loop = asyncio.get_running_loop()
        before = loop.time()
        record = await table.create("subnets/a", b"", lifetime)
        kept = await table.create("subnets/b", b"")
        assert record is not None
        assert kept is not None
        await wait(lambda: _is_gone(table, "subnets/a"))
        # Clocks may differ by a grain, not by more.
        assert loop.time() - before > lifetime - 0.01, "the record expired too early"
        assert await table.list("subnets/") == {"subnets/b": kept}
        assert await table.ttl(record) == 0.0

    async def test_the_time_left_is_known(self, table: Table, lifetime: float) -> None:
        record = await table.create("config", b"", 100 * lifetime)
        assert record is not None
        assert 0 < await table.ttl(record) <= 100 * lifetime
        listed = (await table.list(""))["config"]
        assert listed.ttl is None or 0 < listed.ttl <= 100 * lifetime

    async def test_replacing_gives_a_new_lifetime(self, table: Table, lifetime: float) -> None:
        renewed = await table.create("subnets/renewed", b"", lifetime)
        assert renewed is not None
        assert await table.replace(renewed, b"", 100 * lifetime) is not None
        freed = await table.create("subnets/freed", b"", lifetime)
        assert freed is not None
        assert await table.replace(freed, b"") is not None
        assert await table.create("subnets/left", b"", lifetime) is not None
        await wait(lambda: _is_gone(table, "subnets/left"))
        await asyncio.sleep(lifetime / 2)
        assert set(await table.list("subnets/")) == {"subnets/renewed", "subnets/freed"}

    async def test_replacing_can_shorten_a_lifetime(self, table: Table, lifetime: float) -> None:
        record = await table.create("config", b"")
        assert record is not None
        assert await table.replace(record, b"", lifetime) is not None
        await wait(lambda: _is_gone(table, "config"))

    async def test_an_expired_record_is_gone_for_every_purpose(self, table: Table, lifetime: float) -> None:
        record = await table.create("config", b"old", lifetime)
        assert record is not None
        await wait(lambda: _is_gone(table, "config"))
        assert await table.replace(record, b"mine") is None
        assert not await table.delete(record)
        successor = await table.create("config", b"new")
        assert successor is not None
        assert successor.version != record.version
        assert await table.replace(record, b"mine") is None

    # Watching

    async def test_a_watch_yields_at_once(self, table: Table) -> None:
        async with aclosing(table.watch("subnets/")) as listings:
            assert await until(listings, lambda listing: True) == {}
        record = await table.create("subnets/a", b"a")
        assert record is not None
        async with aclosing(table.watch("subnets/")) as listings:
            listing = await until(listings, lambda listing: True)
            assert listing == {"subnets/a": record}
            assert listing["subnets/a"].version == record.version

    async def test_a_watch_yields_after_each_kind_of_change(self, table: Table) -> None:
        async with aclosing(table.watch("subnets/")) as listings:
            await until(listings, lambda listing: not listing)
            created = await table.create("subnets/a", b"one")
            assert created is not None
            await until(listings, lambda listing: listing == {"subnets/a": created})
            replaced = await table.replace(created, b"two")
            assert replaced is not None
            await until(listings, lambda listing: listing == {"subnets/a": replaced})
            renewed = await table.replace(replaced, b"two")
            assert renewed is not None
            await until(listings, lambda listing: listing["subnets/a"].version == renewed.version)
            assert await table.delete(renewed)
            await until(listings, lambda listing: not listing)

    async def test_a_watch_yields_what_others_change(self, table: Table, another_table: Table) -> None:
        async with aclosing(table.watch("subnets/")) as listings:
            await until(listings, lambda listing: not listing)
            created = await another_table.create("subnets/a", b"one")
            assert created is not None
            await until(listings, lambda listing: listing == {"subnets/a": created})
            assert await another_table.delete(created)
            await until(listings, lambda listing: not listing)

    async def test_a_watch_yields_when_a_record_expires(self, table: Table, lifetime: float) -> None:
        async with aclosing(table.watch("subnets/")) as listings:
            kept = await table.create("subnets/kept", b"")
            assert await table.create("subnets/a", b"", lifetime) is not None
            await until(listings, lambda listing: "subnets/a" in listing)
            assert await until(listings, lambda listing: "subnets/a" not in listing) == {"subnets/kept": kept}

    async def test_a_watch_misses_nothing_while_its_reader_is_busy(self, table: Table) -> None:
        async with aclosing(table.watch("")) as listings:
            await until(listings, lambda listing: True)
            for step in range(10):
                assert await table.create(f"subnets/{step}", b"") is not None
            await until(listings, lambda listing: len(listing) == 10)

    async def test_a_watch_sees_only_its_prefix(self, table: Table) -> None:
        assert await table.create("config", b"") is not None
        async with aclosing(table.watch("subnets/")) as listings:
            assert await until(listings, lambda listing: True) == {}
            assert await table.create("subnets2/a", b"") is not None
            assert await table.create("subnets/a", b"") is not None
            assert set(await until(listings, bool)) == {"subnets/a"}

    async def test_watches_do_not_disturb_each_other(self, table: Table) -> None:
        first, second = table.watch(""), table.watch("")
        async with aclosing(first), aclosing(second):
            await until(first, lambda listing: True)
            await until(second, lambda listing: True)
            await first.aclose()
            assert await table.create("config", b"") is not None
            await until(second, lambda listing: "config" in listing)

    async def test_a_watch_that_is_cancelled_ends_at_once(self, table: Table) -> None:
        async def read_for_ever() -> None:
            async with aclosing(table.watch("")) as listings:
                async for _ in listings:
                    yielded.set()

        yielded = asyncio.Event()
        reading = asyncio.create_task(read_for_ever())
        async with asyncio.timeout(PATIENCE):
            await yielded.wait()
            reading.cancel()
            await asyncio.wait([reading])
        assert reading.cancelled()
        assert await table.create("config", b"") is not None

    # The end

    async def test_closing_is_idempotent(self, table: Table) -> None:
        assert await table.create("config", b"") is not None
        await table.aclose()
        await table.aclose()

    async def test_closing_an_unused_table_is_nothing(self, table: Table) -> None:
        await table.aclose()

    async def test_closing_ends_open_watches(self, table: Table) -> None:
        async with aclosing(table.watch("")) as listings:
            await until(listings, lambda listing: True)
            await table.aclose()
            async with asyncio.timeout(PATIENCE):
                async for _ in listings:
                    pass

    async def test_closing_one_handle_leaves_the_other_open(self, make_table: MakeTable, another_table: Table) -> None:
        async with aclosing(make_table()) as table:
            created = await table.create("config", b"")
        assert await another_table.get("config") == created


async def _is_gone(table: Table, key: str) -> bool:
    return await table.get(key) is None
