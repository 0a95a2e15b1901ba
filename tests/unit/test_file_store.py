"""The file store: its files, its lock, its clocks, and what it makes of damage. The laws of tables are in tests/conformance."""

import asyncio
import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import re
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import attrs
import inotify_simple
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlaynet import options
from overlaynet.errors import ConfigError, StoreError, StoreUnavailable
from overlaynet.listings import read_snapshot
from overlaynet.model import Lease, LeaseRequest
from overlaynet.network import parse
from overlaynet.plugins import Plugins
from overlaynet.stores import _file_format as form
from overlaynet.stores import _file_lock, file
from overlaynet.stores._file_directory import Directory
from overlaynet.stores._file_lock import Abandoned
from overlaynet.stores.file import FileStore, FileTable
from overlaynet.table import Record
from overlaynet.testing.tables import until

pytestmark = pytest.mark.anyio

KEY = "subnets/10.244.1.0-24"
LEASE = b'{"PublicIP":"192.0.2.1","PublicIPv6":null}'
NETWORK = parse('{"Network": "10.244.0.0/16", "LeaseTTL": 60}')
PATIENCE = 30.0


@pytest.fixture
def anyio_backend() -> object:
    return "asyncio"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
async def table(root: Path) -> AsyncIterator[FileTable]:
    table = FileTable(Directory(str(root)))
    yield table
    await table.aclose()


async def create(table: FileTable, key: str = KEY, value: bytes = LEASE, ttl: float = math.inf) -> Record:
    record = await table.create(key, value, ttl)
    assert record is not None
    return record


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


# The store


def test_it_is_found_by_its_name() -> None:
    assert Plugins().driver("store", "file") is FileStore


def test_its_directory_is_an_option() -> None:
    assert FileStore.Options().path == "/var/lib/overlaynet/store"
    assert str(FileStore(options.parse(FileStore.Options, {"path": "/srv/net"}, "store file"))) == "files in /srv/net"
    with pytest.raises(ConfigError, match="^store file: option Path must not be empty$"):
        options.parse(FileStore.Options, {"path": ""}, "store file")


async def test_many_nodes_at_once_get_distinct_subnets_and_see_each_other(root: Path) -> None:
    async def node(number: int) -> Lease:
        store = FileStore(FileStore.Options(path=str(root)))
        try:
            async with aclosing(store.watch()) as snapshots:
                await anext(snapshots)
                lease = await store.acquire(NETWORK, LeaseRequest(f"node-{number}", "1"))
                async for snapshot in snapshots:
                    if len(snapshot.leases) == 60:
                        assert lease in snapshot.leases
                        break
            return lease
        finally:
            await store.aclose()

    leases = await asyncio.gather(*map(node, range(60)))
    assert len({lease.subnets for lease in leases}) == 60
    assert not any(a.subnets.overlaps(b.subnets) for a, b in itertools.combinations(leases, 2))


async def test_a_restart_keeps_the_subnet(root: Path) -> None:
    for run, address in (("1", "192.0.2.1"), ("2", "198.51.100.9")):
        store = FileStore(FileStore.Options(path=str(root)))
        lease = await store.acquire(NETWORK, LeaseRequest("a", run, IPv4Address(address)))
        await store.aclose()
        (listed,) = (await store.leases()).leases
        assert listed == lease


# Files


async def test_a_record_is_a_readable_file(table: FileTable, root: Path) -> None:
    await create(table, "config", b'{"Network": "10.244.0.0/16"}')
    await create(table, f"{KEY}&fd00::-64", LEASE, 3600)
    assert files(root) == [".lock", "config", "subnets/10.244.1.0-24&fd00::-64"]
    assert re.fullmatch(
        r"""\{
  "value": "\{\\"Network\\": \\"10\.244\.0\.0/16\\"\}",
  "expires": null,
  "write": "[0-9a-f]{16}"
\}
""",
        (root / "config").read_text(),
    )
    assert re.fullmatch(
        r"""\{
  "value": "\{\\"PublicIP\\":\\"192\.0\.2\.1\\",\\"PublicIPv6\\":null\}",
  "expires": \{
    "time": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00",
    "boot": "[0-9a-f-]{36}",
    "boottime": \d+\.\d+
  \},
  "write": "[0-9a-f]{16}"
\}
""",
        (root / f"{KEY}&fd00::-64").read_text(),
    )


async def test_only_the_owner_can_read_what_we_make(tmp_path: Path) -> None:
    root = tmp_path / "above" / "store"
    await create(FileTable(Directory(str(root))))
    for path in (root.parent, root, root / "subnets"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for name in files(root):
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o600, name


async def test_a_directory_that_exists_keeps_its_mode(root: Path, table: FileTable) -> None:
    root.mkdir(mode=0o755)
    await create(table)
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


async def test_a_value_written_by_hand_is_a_record(table: FileTable, root: Path) -> None:
    await create(table, "other")
    (root / "config").write_text('{"Network": "10.244.0.0/16"}\n')
    found = await table.get("config")
    assert found is not None
    assert (found.value, found.ttl) == (b'{"Network": "10.244.0.0/16"}\n', math.inf)
    assert await table.replace(found, b"{}") is not None


async def test_an_edit_by_hand_makes_a_new_version(table: FileTable, root: Path) -> None:
    record = await create(table)
    path = root / KEY
    path.write_text(path.read_text().replace("192.0.2.1", "192.0.2.2"))
    found = await table.get(KEY)
    assert found is not None
    assert b"192.0.2.2" in found.value
    assert found.version != record.version
    assert await table.replace(record, b"mine") is None
    assert not await table.delete(record)


async def test_names_with_a_dot_are_not_records(table: FileTable, root: Path) -> None:
    await create(table)
    (root / ".config.swp").write_text("x")
    (root / "subnets" / ".hidden").mkdir()
    (root / "subnets" / ".hidden" / "10.244.2.0-24").write_text("x")
    assert list(await table.list("")) == [KEY]


async def test_a_file_that_no_key_names_is_told_once(
    table: FileTable, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await create(table)
    (root / "subnets" / "with space").write_text("x")
    os.close(os.open(os.fsencode(root) + b"/\xff", os.O_CREAT | os.O_WRONLY))
    for _ in range(3):
        assert list(await table.list("")) == [KEY]
    assert [record.getMessage() for record in caplog.records] == ["file ignored: no record is named so"] * 2


async def test_a_record_and_records_below_it_cannot_be(table: FileTable, root: Path) -> None:
    await create(table, "a")
    with pytest.raises(StoreError) as caught:
        await table.create("a/b", b"")
    assert str(caught.value) == f"{root}/a is not a directory; move it away, or give the file store another path"
    assert await table.get("a/b") is None
    await create(table, "b/c")
    with pytest.raises(StoreError) as caught:
        await table.create("b", b"")
    assert str(caught.value) == f"{root}/b is a directory where the file store keeps a record; move it away"
    assert set(await table.list("")) == {"a", "b/c"}


async def test_a_symbolic_link_leads_nowhere(table: FileTable, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "10.244.1.0-24").write_bytes(LEASE)
    root.mkdir()
    (root / "subnets").symlink_to(outside)
    (root / "config").symlink_to(outside / "10.244.1.0-24")
    for call in (table.get(KEY), table.create(KEY, b"")):
        with pytest.raises(StoreError, match="is not a directory"):
            await call
    found = await table.get("config")
    assert found is not None
    assert found.value == b"not readable: Too many levels of symbolic links"
    assert await table.delete(found)
    assert files(outside) == ["10.244.1.0-24"]
    assert not await table.list("subnets/")


async def test_the_stores_own_path_may_be_a_symbolic_link(root: Path, tmp_path: Path) -> None:
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    table = FileTable(Directory(str(tmp_path / "link")))
    await create(table)
    assert list(await table.list("")) == [KEY]
    assert files(root) == [".lock", KEY]


async def test_what_a_killed_writer_left_is_removed(table: FileTable, root: Path) -> None:
    root.mkdir()
    (root / ".new").write_text('{"val')
    assert await table.list("") == {}
    assert (root / ".new").exists()
    await create(table)
    assert files(root) == [".lock", KEY]
    (root / ".new").write_text('{"val')
    assert await table.create(KEY, b"") is None
    assert files(root) == [".lock", KEY]


async def test_a_record_is_on_the_disk_before_it_is_in_place(
    table: FileTable, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(table, "subnets/10.244.2.0-24")
    calls: list[str] = []
    sync, replace, unlink = os.fsync, os.replace, os.unlink

    def synced(opened: int) -> None:
        calls.append("sync " + os.path.relpath(os.readlink(f"/proc/self/fd/{opened}"), root))
        sync(opened)

    def replaced(source: str, target: str) -> None:
        calls.append(f"rename {os.path.relpath(source, root)} {os.path.relpath(target, root)}")
        replace(source, target)

    def unlinked(path: str) -> None:
        calls.append(f"delete {os.path.relpath(path, root)}")
        unlink(path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "unlink", unlinked)
    record = await create(table)
    assert calls == ["delete .new", "sync .new", f"rename .new {KEY}", "sync subnets"]
    calls.clear()
    assert await table.delete(record)
    assert calls == ["delete .new", f"delete {KEY}", "sync subnets"]


@settings(deadline=None)
@given(st.binary(), st.floats(1e-3, 1e12) | st.just(math.inf))
def test_what_is_written_is_read_back(value: bytes, ttl: float) -> None:
    moment = form.now()
    decoded, left = form.decode(form.encode(value, ttl, moment), moment)
    assert decoded == value
    assert left == math.inf if ttl > 100 * 366 * 86400 else left == pytest.approx(ttl, abs=1e-3)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text(min_size=1).filter(lambda part: "/" not in part), min_size=1, max_size=4))
def test_every_key_has_a_file_of_its_own_inside(parts: list[str]) -> None:
    key = "/".join(parts)
    try:
        name = form.file_name(key)
    except UnicodeEncodeError:
        return  # a lone surrogate, which no file is named
    assert form.key_of(name) == key
    assert name.isascii()
    assert not any(part.startswith(".") or not part for part in name.split("/"))
    assert os.path.normpath(name) == name


@settings(deadline=None, max_examples=300)
@given(st.text() | st.from_regex("(%[0-9A-Fa-f]{2}|[a-z.%/])*"))
def test_every_file_has_one_key_or_none(name: str) -> None:
    key = form.key_of(name)
    assert key is None or form.file_name(key) == name


@pytest.mark.parametrize("key", ["", "/config", "subnets//a", "subnets/"])
async def test_a_key_with_an_empty_part_is_refused(table: FileTable, key: str) -> None:
    with pytest.raises(ValueError, match="^a part of the key is empty$"):
        await table.create(key, b"")


# Damage


async def test_a_file_cut_off_anywhere_shows_as_malformed_and_stays_taken(table: FileTable, root: Path) -> None:
    good = await create(table, "subnets/10.244.2.0-24", ttl=3600)
    await create(table, ttl=3600)
    whole = (root / KEY).read_bytes()
    for length in range(len(whole) - 2):  # without the last line break it is still whole
        (root / KEY).write_bytes(whole[:length])
        listing = await table.list("subnets/")
        snapshot = read_snapshot(listing)
        assert [lease.version for lease in snapshot.leases] == [good.version]
        assert [malformed.key for malformed in snapshot.malformed] == [KEY]
        assert listing[KEY].value == whole[:length]
        assert await table.create(KEY, b"") is None


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x00" * 512,
        b"\xff\xfe garbage",
        b"[" * 100_000,
        b"x" * ((1 << 20) + 1),
        b'{"value": 7, "expires": null, "write": "0"}',
        b'{"value": "\\ud800", "expires": null, "write": "0"}',
        b'{"base64": "*", "expires": null, "write": "0"}',
        b'{"expires": null, "write": "0"}',
        b'{"value": "{}", "write": "0"}',
        b'{"value": "{}", "expires": "never", "write": "0"}',
        b'{"value": "{}", "expires": {}, "write": "0"}',
        b'{"value": "{}", "expires": {"time": "soon", "boot": "x", "boottime": 1.0}, "write": "0"}',
        b'{"value": "{}", "expires": {"time": 7, "boot": "x", "boottime": 1.0}, "write": "0"}',
        b'{"value": "{}", "expires": {"time": "2026-01-01T00:00:00+00:00", "boot": 1, "boottime": 1.0}, "write": "0"}',
        b'{"value": "{}", "expires": {"time": "2026-01-01T00:00:00+00:00", "boot": "x", "boottime": NaN}, "write": "0"}',
        b'{"value": "{}", "expires": {"time": "2026-01-01T00:00:00+00:00", "boot": "x"}, "write": "0"}',
    ],
    ids=lambda damage: damage[:24].decode(errors="replace") + str(len(damage)),
)
async def test_a_damaged_file_is_a_malformed_record_that_can_be_replaced(
    table: FileTable, root: Path, damage: bytes
) -> None:
    good = await create(table, "subnets/10.244.2.0-24")
    (root / KEY).write_bytes(damage)
    snapshot = read_snapshot(await table.list("subnets/"))
    assert [lease.version for lease in snapshot.leases] == [good.version]
    assert [malformed.key for malformed in snapshot.malformed] == [KEY]
    assert await table.create(KEY, LEASE) is None
    found = await table.get(KEY)
    assert found is not None
    assert await table.replace(attrs.evolve(found, version=good.version), LEASE) is None
    replaced = await table.replace(found, LEASE)
    assert replaced is not None
    assert await table.get(KEY) == replaced
    (root / KEY).write_bytes(damage)
    found = await table.get(KEY)
    assert found is not None
    assert await table.delete(found)
    assert await table.create(KEY, LEASE) is not None


async def test_what_is_no_file_is_a_malformed_record(table: FileTable, root: Path) -> None:
    await create(table, "subnets/10.244.2.0-24")
    os.mkfifo(root / KEY)
    snapshot = read_snapshot(await table.list("subnets/"))
    assert [malformed.key for malformed in snapshot.malformed] == [KEY]
    assert len(snapshot.leases) == 1
    assert await table.create(KEY, LEASE) is None


async def test_a_file_that_may_not_be_read_is_a_malformed_record(
    table: FileTable, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(table, "subnets/10.244.2.0-24")
    await create(table)
    refuse(monkeypatch, "open", errno.EACCES, lambda path, *_: path == str(root / KEY))
    snapshot = read_snapshot(await table.list("subnets/"))
    assert [malformed.key for malformed in snapshot.malformed] == [KEY]
    assert len(snapshot.leases) == 1
    assert await table.create(KEY, LEASE) is None


@settings(deadline=None, max_examples=300)
@given(
    st.binary()
    | st.fixed_dictionaries(
        {"write": st.text()},
        optional={name: st.none() | st.text() | st.floats() | st.integers() for name in ("value", "base64", "expires")},
    ).map(lambda content: json.dumps(content).encode())
    | st.fixed_dictionaries(
        {"time": st.text() | st.datetimes().map(str), "boot": st.text(), "boottime": st.floats() | st.text()}
    ).map(lambda expires: json.dumps({"write": "", "value": "", "expires": expires}).encode())
)
def test_no_content_is_too_strange_to_be_read(content: bytes) -> None:
    value, left = form.decode(content, form.now())
    assert isinstance(value, bytes)
    assert not math.isnan(left)


# Errors


def refuse(
    monkeypatch: pytest.MonkeyPatch, call: str, number: int, applies: Callable[..., bool] = lambda *_: True
) -> None:
    """Let a system call of the store fail with this error."""
    real = getattr(os, call)

    def refusing(*arguments: Any, **named: Any) -> Any:
        if applies(*arguments):
            path = arguments[0] if isinstance(arguments[0], str) else None
            raise OSError(number, os.strerror(number), path)
        return real(*arguments, **named)

    monkeypatch.setattr(os, call, refusing)


def is_file(opened: Any, *_: Any) -> bool:
    return stat.S_ISREG(os.fstat(opened).st_mode)


async def test_a_path_that_is_no_directory(root: Path, table: FileTable) -> None:
    root.write_text("")
    told = f"{root} is not a directory; move it away, or give the file store another path"
    for call in (table.get(KEY), table.list(""), table.create(KEY, b"")):
        with pytest.raises(StoreError) as caught:
            await call
        assert str(caught.value) == told
    with pytest.raises(StoreError):
        await anext(table.watch(""))
    below = FileTable(Directory(str(root / "below")))
    with pytest.raises(StoreError) as caught:
        await below.create(KEY, b"")
    assert str(caught.value) == told


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("call", ["mkdir", "open", "replace"])
async def test_a_directory_that_may_not_be_used(
    root: Path, table: FileTable, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    refuse(monkeypatch, call, number)
    with pytest.raises(StoreError) as caught:
        await table.create("config", b"")
    refused = {"mkdir": root, "open": root.parent, "replace": root / ".new"}[call]
    assert str(caught.value) == (
        f"the file store may not use {refused}: {os.strerror(number)}; run as the owner of {root}, "
        f"or give the file store another path"
    )
    monkeypatch.undo()
    assert await table.list("") == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
async def test_a_full_disk_leaves_nothing_half_written(
    root: Path, table: FileTable, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    record = await create(table, "config", b"old")
    refuse(monkeypatch, call, number, is_file if call == "fsync" else lambda *_: True)
    for write in (table.replace(record, b"new"), table.create(KEY, b"new")):
        with pytest.raises(StoreUnavailable) as caught:
            await write
        assert str(caught.value) == f"the file store {root} is full: {os.strerror(number)}; free space there"
    monkeypatch.undo()
    assert files(root) == [".lock", "config"]
    assert (await table.list(""))["config"].version == record.version


async def test_a_failing_disk_is_tried_again(root: Path, table: FileTable, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "fsync", errno.EIO, is_file)
    with pytest.raises(StoreUnavailable) as caught:
        await table.create("config", b"")
    assert str(caught.value) == f"the file store {root} does not work: {root}: Input/output error"


async def test_too_many_open_files_damage_no_record(
    root: Path, table: FileTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(table)
    refuse(monkeypatch, "open", errno.EMFILE, lambda path, *_: path == str(root / KEY))
    with pytest.raises(StoreUnavailable, match="Too many open files"):
        await table.list("")


async def test_a_key_too_long_for_a_file(table: FileTable) -> None:
    with pytest.raises(StoreError, match="is too long a name for a file; give the file store a shorter path$"):
        await table.create("k" * 300, b"")


async def test_a_value_too_large_is_refused(root: Path, table: FileTable) -> None:
    with pytest.raises(
        StoreError, match="^a record of 1048[0-9]* bytes is too large for the file store; it takes 1048576$"
    ):
        await table.create("config", b"x" * (1 << 20))
    assert await table.list("") == {}


async def test_the_kernels_limit_of_watches_is_told(table: FileTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(inotify_simple.INotify, "__init__", refuse)
        with pytest.raises(StoreUnavailable) as caught:
            await anext(table.watch(""))
    assert str(caught.value) == (
        "changes of the file store cannot be noticed: Too many open files; raise the limit fs.inotify.max_user_instances"
    )
    monkeypatch.setattr(inotify_simple.INotify, "add_watch", refuse)
    with pytest.raises(StoreUnavailable, match="raise the limit fs.inotify.max_user_watches$"):
        await anext(table.watch(""))


# The lock


@contextlib.contextmanager
def locked(root: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the lock as another process would."""
    root.mkdir(exist_ok=True)
    lock = os.open(root / ".lock", os.O_RDONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, kind)
        yield
    finally:
        os.close(lock)


async def test_who_writes_waits_for_the_lock_and_blocks_nobody(root: Path, table: FileTable) -> None:
    with locked(root):
        writing = asyncio.create_task(table.create(KEY, LEASE))
        listing = asyncio.create_task(table.list(""))
        for _ in range(20):
            await asyncio.sleep(0.01)  # the event loop goes on
        assert not writing.done()
        assert not listing.done()
        assert await table.get(KEY) is None  # a single file is always whole
    assert await writing is not None
    await listing


async def test_lists_share_the_lock_and_writes_do_not(root: Path, table: FileTable) -> None:
    with locked(root, fcntl.LOCK_SH):
        assert await table.list("") == {}
        writing = asyncio.create_task(table.create(KEY, LEASE))
        await asyncio.sleep(0.1)
        assert not writing.done()
    assert await writing is not None


async def test_a_write_cancelled_while_it_waits_writes_nothing(
    root: Path, table: FileTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_file_lock, "TIMEOUT", 1000.0)
    before = threading.active_count()
    with locked(root):
        writing = [asyncio.create_task(table.create(f"subnets/{i}", LEASE)) for i in range(10)]
        await asyncio.sleep(0.05)
        for task in writing:
            task.cancel()
        await asyncio.wait(writing)
        assert all(task.cancelled() for task in writing)
        async with asyncio.timeout(PATIENCE):
            while threading.active_count() > before:  # they notice without ever having had the lock
                await asyncio.sleep(0.01)
    assert await table.list("") == {}


def test_a_call_that_nobody_waits_for_writes_nothing(root: Path) -> None:
    abandoned = threading.Event()
    abandoned.set()
    with pytest.raises(Abandoned):
        Directory(str(root)).create(abandoned, KEY, LEASE, math.inf)
    assert files(root) == [".lock"]
    with locked(root):
        pass


async def test_a_lock_that_is_never_released_is_told(
    root: Path, table: FileTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_file_lock, "TIMEOUT", 0.1)
    with locked(root), pytest.raises(StoreUnavailable) as caught:
        await table.create(KEY, LEASE)
    assert str(caught.value) == (
        f"the file store {root} has been locked for 0.1 s; find the process that holds it with: fuser -v {root}/.lock"
    )
    assert await table.create(KEY, LEASE) is not None


async def test_a_lock_of_a_directory_that_was_removed_is_no_lock(root: Path, table: FileTable) -> None:
    with locked(root):
        writing = asyncio.create_task(table.create(KEY, LEASE))
        await asyncio.sleep(0.05)
        (root / ".lock").unlink()
        root.rmdir()
        assert await writing is not None  # not kept waiting by who holds the lost lock
    assert files(root) == [".lock", KEY]


def test_a_lock_that_is_removed_while_it_is_taken_is_no_lock(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Directory(str(root))
    real = fcntl.flock
    with contextlib.ExitStack() as others:

        def swapped(lock: int, kind: int) -> None:
            monkeypatch.setattr(fcntl, "flock", real)
            (root / ".lock").unlink()
            others.enter_context(locked(root))  # another process makes the lock anew, and takes it
            real(lock, kind)

        monkeypatch.setattr(fcntl, "flock", swapped)
        monkeypatch.setattr(_file_lock, "TIMEOUT", 0.1)
        with pytest.raises(StoreUnavailable, match="has been locked for 0.1 s"):
            directory.create(threading.Event(), KEY, LEASE, math.inf)
    assert directory.create(threading.Event(), KEY, LEASE, math.inf) is not None


async def test_a_killed_process_leaves_no_lock(root: Path, table: FileTable) -> None:
    root.mkdir()
    script = (
        "import fcntl, os, sys, time\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY | os.O_CREAT), fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(1000)\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(root / ".lock"), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    writing = asyncio.create_task(table.create(KEY, LEASE))
    await asyncio.sleep(0.05)
    assert not writing.done()
    process.kill()
    await process.communicate()
    assert await writing is not None


async def test_a_forked_process_keeps_no_lock(root: Path) -> None:
    script = (
        "import os, sys, threading\n"
        "from overlaynet.stores._file_lock import DirectoryLock\n"
        "lock = DirectoryLock(sys.argv[1])\n"
        "with lock.alone(threading.Event()):\n"
        "    if os.fork() == 0:\n"
        "        os.read(0, 1)  # lives on, with all that its parent had open\n"
        "        os._exit(0)\n"
        "with lock.alone(threading.Event()):\n"
        "    print('free', flush=True)\n"
    )
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(root), stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    assert await process.stdout.readline() == b"free\n"
    process.stdin.close()
    await process.communicate()
    assert process.returncode == 0


async def test_a_file_system_without_locks_is_told(
    root: Path, table: FileTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(lock: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreUnavailable) as caught:
        await table.create(KEY, LEASE)
    assert str(caught.value) == f"the file store {root} does not work: {root}: No locks available"
    assert len(os.listdir("/proc/self/fd")) == before


# Lifetimes


@attrs.define
class Host:
    """The clocks of a host that the test sets."""

    moment: form.Moment

    def now(self) -> form.Moment:
        return self.moment

    def pass_by(self, seconds: float) -> None:
        self.moment = self.moment.after(seconds)

    def set_clock(self, seconds: float) -> None:
        self.moment = attrs.evolve(self.moment, time=self.moment.time + seconds)

    def reboot(self, seconds: float) -> None:
        """The host is down for some seconds."""
        self.moment = form.Moment(f"{self.moment.boot}+", 1.0, self.moment.time + seconds)


@pytest.fixture
def host() -> Host:
    return Host(form.Moment("boot-1", 100.0, 1_700_000_000.0))


@pytest.fixture
def clocked(root: Path, host: Host) -> FileTable:
    return FileTable(Directory(str(root), host.now))


async def test_a_record_expires_exactly_when_due(clocked: FileTable, host: Host) -> None:
    await create(clocked, ttl=60)
    host.pass_by(59.999)
    found = await clocked.get(KEY)
    assert found is not None
    assert found.ttl == pytest.approx(0.001)
    host.pass_by(0.001)
    assert await clocked.get(KEY) is None
    assert await clocked.list("") == {}


@pytest.mark.parametrize("step", [86400.0, -86400.0, 1e9, -1e9])
async def test_setting_the_clock_changes_no_lifetime(clocked: FileTable, host: Host, step: float) -> None:
    await create(clocked, ttl=60)
    host.set_clock(step)
    host.pass_by(59)
    found = await clocked.get(KEY)
    assert found is not None
    assert found.ttl == pytest.approx(1)
    host.pass_by(1)
    assert await clocked.get(KEY) is None


async def test_over_a_reboot_the_wall_clock_counts(clocked: FileTable, host: Host) -> None:
    await create(clocked, ttl=60)
    host.pass_by(10)
    host.reboot(20)
    found = await clocked.get(KEY)
    assert found is not None
    assert found.ttl == pytest.approx(30)
    renewed = await clocked.replace(found, LEASE, 60)
    assert renewed is not None
    host.set_clock(1000)
    host.pass_by(59)
    assert await clocked.get(KEY) == renewed
    host.reboot(1)
    assert await clocked.get(KEY) is None


async def test_expired_files_are_removed_by_the_next_writer(clocked: FileTable, host: Host, root: Path) -> None:
    await create(clocked, ttl=60)
    await create(clocked, "config")
    host.pass_by(60)
    assert list(await clocked.list("")) == ["config"]
    assert files(root) == [".lock", "config", KEY]
    assert await clocked.create("config", b"") is None  # has written nothing, yet was about to
    assert files(root) == [".lock", "config"]


async def test_lifetimes_beyond_the_calendar_are_for_ever(clocked: FileTable) -> None:
    await create(clocked, ttl=1e15)
    found = await clocked.get(KEY)
    assert found is not None
    assert found.ttl == math.inf


def test_the_hosts_clocks() -> None:
    first, second = form.now(), form.now()
    assert first.boot == second.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert 0 <= first.until(second) < PATIENCE


# Watching


async def test_changes_by_hand_are_noticed(table: FileTable, root: Path) -> None:
    async with aclosing(table.watch("subnets/")) as listings:
        await until(listings, lambda listing: not listing)
        (root / "subnets").mkdir()
        (root / KEY).write_bytes(LEASE)
        await until(listings, lambda listing: KEY in listing and listing[KEY].value == LEASE)
        (root / KEY).write_bytes(b"{}")
        await until(listings, lambda listing: listing[KEY].value == b"{}")
        (root / KEY).rename(root / "subnets" / "10.244.9.0-24")
        await until(listings, lambda listing: list(listing) == ["subnets/10.244.9.0-24"])
        (root / "subnets").rename(root / "elsewhere")
        await until(listings, lambda listing: not listing)


async def test_a_directory_removed_and_made_anew_is_watched_on(table: FileTable, root: Path) -> None:
    async with aclosing(table.watch("subnets/")) as listings:
        await until(listings, lambda listing: not listing)
        for _ in range(3):
            await create(table)
            await until(listings, lambda listing: KEY in listing)
            root.rename(root.parent / "gone")
            await until(listings, lambda listing: not listing)
            for name in reversed(files(root.parent / "gone")):
                (root.parent / "gone" / name).unlink()
            (root.parent / "gone" / "subnets").rmdir()
            (root.parent / "gone").rmdir()


async def test_deep_directories_are_watched(table: FileTable) -> None:
    async with aclosing(table.watch("a/b")) as listings:
        await until(listings, lambda listing: not listing)
        for step in range(20):
            record = await create(table, f"a/b{step}/c/d/e")
            await until(listings, lambda listing, record=record: record.key in listing)  # type: ignore[misc]


async def test_what_is_no_change_of_a_record_wakes_no_watch(
    table: FileTable, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = 0
    real = table._directory.listing

    def counted(*arguments: Any) -> Any:
        nonlocal listed
        listed += 1
        return real(*arguments)

    monkeypatch.setattr(table._directory, "listing", counted)
    await create(table)
    async with aclosing(table.watch("")) as listings:
        await until(listings, lambda listing: KEY in listing)
        waiting = asyncio.create_task(anext(listings))
        before = listed
        for _ in range(10):
            await asyncio.sleep(0.02)
            await table.list("")
            (root / ".config.swp").write_text("")
        assert listed == before + 10
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_a_change_just_before_changes_are_noticed_is_not_missed(
    table: FileTable, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = table._directory.listing

    def late(*arguments: Any) -> Any:
        monkeypatch.undo()
        listing = real(*arguments)
        Directory(str(root)).create(threading.Event(), KEY, LEASE, math.inf)
        return listing

    monkeypatch.setattr(table._directory, "listing", late)
    async with aclosing(table.watch("")) as listings:
        await until(listings, lambda listing: KEY in listing)


async def test_watches_leave_no_file_open(table: FileTable) -> None:
    async def watch_for_a_while() -> None:
        async with aclosing(table.watch("")) as listings:
            async for _ in listings:
                pass

    await create(table)
    before = len(os.listdir("/proc/self/fd"))
    for step in range(10):
        watching = asyncio.create_task(watch_for_a_while())
        await asyncio.sleep(0.005 * step)
        watching.cancel()
        await asyncio.wait([watching])
    async with aclosing(table.watch("")) as listings:
        await anext(listings)
    async with asyncio.timeout(PATIENCE):
        while len(os.listdir("/proc/self/fd")) > before:  # threads left to themselves still close theirs
            await asyncio.sleep(0.01)


async def test_a_store_that_breaks_ends_its_watches(
    table: FileTable, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aclosing(table.watch("")) as listings:
        await until(listings, lambda listing: True)
        (root / ".lock").unlink()
        root.rmdir()
        root.write_text("")
        with pytest.raises(StoreError, match="is not a directory"):
            async with asyncio.timeout(PATIENCE):
                await anext(listings)


def test_the_longest_sleep_of_a_watch_is_short() -> None:
    """A host that slept finds expired leases when the watch wakes next; its sleep is by a clock that stood still."""
    assert file._LONGEST_SLEEP <= 60
