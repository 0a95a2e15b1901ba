"""The file store: a directory that the processes of one host share.

One file a record, readable and editable by hand (see :mod:`overlaynet.stores._file_format`). Writers may be killed at
any instant: a record is whole, old or new, and no lock outlives its holder.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any, TypeVar

import attrs
import inotify_simple
from inotify_simple import flags

from overlaynet._threads import call_in_thread
from overlaynet.errors import StoreUnavailable
from overlaynet.leases import TableStore
from overlaynet.options import option
from overlaynet.stores._file_directory import Directory
from overlaynet.table import Record, Table

T = TypeVar("T")

_SHORTEST_REST = 0.02
_LONGEST_SLEEP = 60.0


class FileStore(TableStore):
    """A store in a directory of this host. A missing directory is made."""

    @attrs.frozen
    class Options:
        path: str = option(
            "/var/lib/overlaynet/store",
            "Directory of the store, the same for every node of the host",
            check=lambda path: None if path else "must not be empty",
        )

    options: Options

    def __str__(self) -> str:
        return f"files in {self.options.path}"

    def make_table(self) -> Table:
        return FileTable(Directory(self.options.path))


class FileTable(Table):
    """A table in a directory.

    A call that is cancelled while it waits for the directory's lock writes nothing; one that is cancelled later is
    carried out to its end in its thread.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._watches: set[asyncio.Event] = set()
        self._closed = False

    async def get(self, key: str) -> Record | None:
        return await _call(self._directory.get, key)

    async def list(self, prefix: str) -> Mapping[str, Record]:
        return (await _call(self._directory.listing, prefix)).records

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await _call(self._directory.create, key, value, ttl)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        return await _call(self._directory.replace, record, value, ttl)

    async def delete(self, record: Record) -> bool:
        return await _call(self._directory.delete, record)

    async def watch(self, prefix: str) -> AsyncGenerator[Mapping[str, Record], None]:
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        self._watches.add(changed)
        previous: dict[str, str] | None = None
        try:
            await call_in_thread(_load_inotify)
            with contextlib.closing(_Notices(changed)) as notices:
                rested = 0.0
                while not self._closed:
                    await asyncio.sleep(rested - loop.time())
                    changed.clear()
                    began = loop.time()
                    listing = await _call(self._directory.listing, prefix)
                    # While changes come fast, many watches would keep the lock from those who make them.
                    rested = loop.time() + max(_SHORTEST_REST, loop.time() - began)
                    if notices.cover(listing.directories):
                        continue  # something may have changed in a directory before its changes were noticed
                    records = listing.records.values()
                    # The event loop's clock stands still while the host sleeps, but lifetimes do not: look now and then.
                    look = loop.time() + min(
                        [_LONGEST_SLEEP, *(record.ttl for record in records if record.ttl is not None)]
                    )
                    versions = {record.key: record.version for record in records}
                    if versions != previous:
                        previous = versions
                        yield listing.records
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(look):
                            await changed.wait()
        finally:
            self._watches.discard(changed)

    async def aclose(self) -> None:
        self._closed = True
        for changed in self._watches:
            changed.set()


async def _call(function: Callable[..., T], *arguments: Any) -> T:
    abandoned = threading.Event()
    try:
        return await call_in_thread(function, abandoned, *arguments)
    finally:
        abandoned.set()


class _Notices:
    """Sets an event when something changes in a set of directories (inotify(7))."""

    _CHANGES = (
        flags.CREATE | flags.CLOSE_WRITE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO
        | flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR
    )  # fmt: skip

    def __init__(self, changed: asyncio.Event) -> None:
        self._changed = changed
        self._covered: set[int] = set()
        self._inotify = _open_inotify()
        asyncio.get_running_loop().add_reader(self._inotify.fileno(), self._read)

    def cover(self, directories: Iterable[str]) -> bool:
        """Notice changes in these directories from now on; true if any of them had not been covered before."""
        covered = set()
        for directory in directories:
            try:
                covered.add(self._inotify.add_watch(directory, self._CHANGES))
            except (FileNotFoundError, NotADirectoryError):
                return True
            except OSError as error:
                raise _refused(error, "fs.inotify.max_user_watches") from error
        # What is not among them any more was deleted, and with it its watch in the kernel.
        before, self._covered = self._covered, covered
        return not covered <= before

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._inotify.fileno())
        self._inotify.close()

    def _read(self) -> None:
        for event in self._inotify.read(timeout=0):
            if not event.name.startswith("."):  # neither the lock nor a record that is not yet whole
                self._changed.set()


def _load_inotify() -> None:
    """Use inotify for the first time: its library runs programs then, to find the C library."""
    _open_inotify().close()


def _open_inotify() -> inotify_simple.INotify:
    try:
        return inotify_simple.INotify(nonblocking=True)
    except OSError as error:
        raise _refused(error, "fs.inotify.max_user_instances") from error


def _refused(error: OSError, limit: str) -> StoreUnavailable:
    return StoreUnavailable(f"changes of the file store cannot be noticed: {error.strerror}; raise the limit {limit}")
