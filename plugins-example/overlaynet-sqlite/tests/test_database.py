"""What the sqlite store makes of its file: whose it is, what a hand has written into it, who has it locked."""

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path

import pytest

from overlaynet.api import Record, StoreError, StoreUnavailable
from overlaynet_sqlite import SqliteStore, SqliteTable

pytestmark = pytest.mark.anyio

Execute = Callable[..., None]
MakeTable = Callable[..., SqliteTable]
MakeStore = Callable[..., SqliteStore]


@pytest.fixture
def other(path: Path) -> Iterator[sqlite3.Connection]:
    """Another program that has the database open."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


async def until(listings: AsyncGenerator[Mapping[str, Record], None], key: str) -> Record:
    async with asyncio.timeout(30):
        async for listing in listings:
            if key in listing:
                return listing[key]
    raise AssertionError("the watch ended")


# Whose file it is


async def test_the_file_and_its_directory_are_made(tmp_path: Path, make_store: MakeStore) -> None:
    path = tmp_path / "not" / "there" / "leases.sqlite"
    assert await make_store(path=str(path)).read_network() is None
    assert path.read_bytes().startswith(b"SQLite format 3")


async def test_the_database_of_another_program_is_refused_and_left_alone(
    path: Path, execute: Execute, make_table: MakeTable
) -> None:
    execute("CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        await make_table().create("config", b"{}")
    assert str(caught.value) == (
        f"the database {path} is not one of overlaynet's, and is left alone; give the store another path"
    )
    assert path.read_bytes() == before


async def test_a_layout_of_the_future_is_refused(path: Path, execute: Execute, make_table: MakeTable) -> None:
    assert await make_table().create("config", b"{}") is not None
    execute("PRAGMA user_version = 2")
    with pytest.raises(StoreError) as caught:
        await make_table().get("config")
    assert str(caught.value) == (
        f"the database {path} has layout 2, and this overlaynet-sqlite knows 1; upgrade overlaynet-sqlite"
    )


async def test_what_is_no_database_is_refused(path: Path, make_table: MakeTable) -> None:
    path.write_text("leases, leases, leases " * 100)
    with pytest.raises(StoreError, match="is damaged, or is none: file is not a database; move it away"):
        await make_table().list("")


async def test_a_path_that_cannot_be_is_refused(tmp_path: Path, make_table: MakeTable) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written: unable to open database file; give the store a path to a"):
        await make_table(path=str(tmp_path)).list("")
    with pytest.raises(StoreError, match="/file: File exists; give the store another path"):
        await make_table(path=str(tmp_path / "file" / "leases.sqlite")).list("")


async def test_the_journal_is_one_that_machines_can_share(path: Path, execute: Execute, make_table: MakeTable) -> None:
    execute("PRAGMA journal_mode = WAL")
    assert await make_table().create("config", b"{}") is not None
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert os.listdir(path.parent) == [path.name]


# What a hand has written


async def test_a_watch_shows_what_was_written_by_hand(execute: Execute, make_table: MakeTable) -> None:
    table = make_table()
    created = await table.create("subnets/10.244.1.0-24", b"one")
    assert created is not None
    async with aclosing(table.watch("")) as listings:
        await until(listings, "subnets/10.244.1.0-24")
        execute("UPDATE records SET value = 'two'")
        changed = await until(listings, "subnets/10.244.1.0-24")
        assert changed.value == b"two"
        execute("INSERT INTO records (key, value) VALUES ('subnets/10.244.2.0-24', 'three')")
        added = await until(listings, "subnets/10.244.2.0-24")
        assert added.value == b"three"
    # What was changed by hand has another version: nobody writes over it who has not seen it.
    assert await table.replace(created, b"mine") is None
    assert await table.replace(changed, b"mine") is not None


async def test_rows_that_make_no_sense_are_reported_and_hide_nothing(
    execute: Execute, make_table: MakeTable, make_store: MakeStore
) -> None:
    lease = b'{"PublicIP": "192.0.2.1"}'
    assert await make_table().create("subnets/10.244.1.0-24", lease) is not None
    rows = {
        "'subnets/10.244.2.0-24'": "x'ff', 'w', NULL, NULL, NULL",
        "'subnets/10.244.3.0-24'": "NULL, 'w', NULL, NULL, NULL",
        "'subnets/10.244.4.0-24'": f"'{lease.decode()}', 'w', 'tomorrow', NULL, NULL",
        "'subnets/10.244.5.0-24'": f"'{lease.decode()}', 'w', 9e99, x'00', 'x'",
        "CAST(x'7375626e6574732fff' AS TEXT)": "'{}', 'w', NULL, NULL, NULL",
        "'subnets/no subnet'": "'{}', 'w', NULL, NULL, NULL",
    }
    execute(
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '')",
        "PRAGMA writable_schema = OFF",
    )
    execute(
        "PRAGMA ignore_check_constraints = ON",
        *(f"INSERT INTO records VALUES ({key}, {columns})" for key, columns in rows.items()),
    )
    store = make_store()
    snapshot = await store.leases()
    assert [str(lease.subnets) for lease in snapshot.leases] == ["10.244.1.0/24", "10.244.5.0/24"]
    problems = {problem.key: problem.reason for problem in snapshot.malformed}
    assert set(problems) == {
        "subnets/10.244.2.0-24",
        "subnets/10.244.3.0-24",
        "subnets/10.244.4.0-24",
        "subnets/\\xff",
        "subnets/no subnet",
    }
    async with aclosing(store.watch()) as snapshots:
        assert await anext(snapshots) == snapshot
    # Their keys are taken all the same.
    table = make_table()
    assert await table.create("subnets/10.244.3.0-24", lease) is None


async def test_an_absurd_row_is_refused_where_it_is_written(execute: Execute, make_table: MakeTable) -> None:
    await make_table().list("")
    for values in ("NULL, 'x', 'w', NULL", "x'61', 'x', 'w', NULL", "'a', NULL, 'w', NULL", "'a', 'x', 'w', 'soon'"):
        with pytest.raises(sqlite3.IntegrityError):
            execute(f"INSERT INTO records (key, value, written, expires) VALUES ({values})")


# Locks


async def test_a_locked_database_keeps_nobody_else_waiting(make_table: MakeTable, other: sqlite3.Connection) -> None:
    table = make_table()
    assert await table.create("config", b"{}") is not None
    other.execute("BEGIN EXCLUSIVE")
    reading = asyncio.create_task(table.get("config"))
    writing = asyncio.create_task(table.create("subnets/a", b""))
    for _ in range(10):
        await asyncio.sleep(0.01)  # the event loop goes round, which it could not if one of them held it up
        assert not reading.done()
        assert not writing.done()
    other.execute("ROLLBACK")
    async with asyncio.timeout(30):
        found, written = await asyncio.gather(reading, writing)
    assert found is not None
    assert written is not None


async def test_a_database_that_stays_locked_is_out_of_reach(
    path: Path, make_table: MakeTable, other: sqlite3.Connection
) -> None:
    table = make_table(lock_timeout=0.1)
    assert await table.create("config", b"{}") is not None
    other.execute("BEGIN IMMEDIATE")
    assert await table.get("config") is not None  # who only reads need not wait for who may write
    with pytest.raises(StoreUnavailable) as caught:
        await table.create("subnets/a", b"")
    assert str(caught.value) == (
        f"the database {path} has been locked for 0.1 s; find the process that holds it with: fuser -v {path}"
    )
    other.execute("ROLLBACK")
    assert await table.list("subnets/") == {}


async def test_a_write_that_is_cancelled_while_it_waits_writes_nothing(
    make_table: MakeTable, other: sqlite3.Connection
) -> None:
    table = make_table()
    assert await table.create("config", b"{}") is not None
    other.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(table.create("subnets/a", b""))
    await asyncio.sleep(0.05)
    writing.cancel()
    async with asyncio.timeout(30):
        await asyncio.wait({writing})
        assert writing.cancelled()
        other.execute("ROLLBACK")
        # This waits for its turn, and so until the other is over.
        assert await table.create("subnets/b", b"") is not None
    assert set(await table.list("subnets/")) == {"subnets/b"}


async def test_closing_does_not_wait_for_a_lock(make_table: MakeTable, other: sqlite3.Connection) -> None:
    table = make_table(lock_timeout=300.0)
    assert await table.create("config", b"{}") is not None
    other.execute("BEGIN EXCLUSIVE")
    writing = asyncio.create_task(table.create("subnets/a", b""))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(30):
        await table.aclose()
        with pytest.raises(StoreUnavailable, match="was closed"):
            await writing


# A file that is not the same any more


async def test_a_file_that_was_replaced_is_noticed(path: Path, make_table: MakeTable) -> None:
    first, second = make_table(), make_table()
    old = await first.create("config", b"old")
    assert old is not None
    assert await second.get("config") == old
    async with aclosing(first.watch("")) as listings:
        assert (await until(listings, "config")).value == b"old"
        path.unlink()
        new = await second.create("config", b"new")  # in a new file
        assert new is not None
        # Written to the old one, that nobody else would see, it would be lost, and the subnet be given twice.
        assert await first.create("config", b"mine") is None
        assert await first.replace(old, b"mine") is None
        assert await first.get("config") == new
        while (await until(listings, "config")).value != b"new":
            pass


async def test_an_older_copy_that_was_put_back_is_noticed(path: Path, make_table: MakeTable) -> None:
    table = make_table()
    assert await table.create("config", b"old") is not None
    copy = path.read_bytes()
    found = await table.get("config")
    assert found is not None
    newer = await table.replace(found, b"newer")
    assert newer is not None
    async with aclosing(table.watch("")) as listings:
        assert (await until(listings, "config")).value == b"newer"
        (path.parent / "copy").write_bytes(copy)
        os.replace(path.parent / "copy", path)
        assert (await until(listings, "config")).value == b"old"
    assert await table.replace(newer, b"mine") is None
