"""The file store's directory: records as files, written by one process at a time. Every call blocks; none needs asyncio.

Beside the records the directory holds

- ``.lock``: who lists holds a shared ``flock`` on it, who writes an exclusive one; the kernel releases it when its
  holder dies;
- ``.new``: the one file that is being written. It is renamed into place once it is whole and on the disk; what a killed
  writer left of it, the next one removes.

Names that begin with a dot are never records.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping

import attrs

from overlaynet.errors import OverlaynetError, StoreError, StoreUnavailable
from overlaynet.logs import fields
from overlaynet.stores import _file_format as form
from overlaynet.stores._file_lock import DirectoryLock
from overlaynet.stores._file_system import LARGEST, make_directory, not_a_directory, read, sync, write
from overlaynet.table import Record

log = logging.getLogger(__name__)


@attrs.frozen
class Listing:
    """All live records below a prefix at one moment, and all directories that records can appear in."""

    records: Mapping[str, Record]
    directories: tuple[str, ...]


class Directory:
    """The records in one directory.

    ``abandoned`` is set by another thread when nobody waits for the call any more: a call that has not begun to
    write by then ends with :exc:`~overlaynet.stores._file_lock.Abandoned`.
    """

    def __init__(self, path: str, now: Callable[[], form.Moment] = form.now) -> None:
        self.path = os.path.abspath(path)
        self._lock = DirectoryLock(self.path)
        self._new = os.path.join(self.path, ".new")
        self._now = now
        self._keys: dict[str, str | None] = {}
        """What was there last, by its path: a record's key, or ``None`` for a file that no key names, which was told."""

    def get(self, abandoned: threading.Event, key: str) -> Record | None:
        """The record, or ``None`` if there is none or it has expired. Needs no lock: a record's file is always whole."""
        with self._explained():
            make_directory(self.path)
            return self._find(key, self._now())

    def listing(self, abandoned: threading.Event, prefix: str) -> Listing:
        """All live records whose key starts with ``prefix``, in the order of their keys."""
        with self._explained(), self._lock.shared(abandoned):
            now = self._now()
            directories, paths = self._walk()
            found = {key: self._read(key, path, now) for key, path in sorted(paths.items()) if key.startswith(prefix)}
            return Listing({key: record for key, record in found.items() if record is not None}, tuple(directories))

    def create(self, abandoned: threading.Event, key: str, value: bytes, ttl: float) -> Record | None:
        """Write a record that does not exist yet; ``None`` if it does."""
        with self._explained(), self._writing(abandoned) as now:
            return self._write(key, value, ttl, now) if self._find(key, now) is None else None

    def replace(self, abandoned: threading.Event, record: Record, value: bytes, ttl: float) -> Record | None:
        """Write over exactly this version; ``None`` if the record has changed or gone."""
        with self._explained(), self._writing(abandoned) as now:
            return self._write(record.key, value, ttl, now) if self._stands(record, now) else None

    def delete(self, abandoned: threading.Event, record: Record) -> bool:
        """Delete exactly this version; ``False`` if the record has changed or gone."""
        with self._explained(), self._writing(abandoned) as now:
            stands = self._stands(record, now)
            if stands:
                self._remove(self._path(record.key))
            return stands

    @contextlib.contextmanager
    def _writing(self, abandoned: threading.Event) -> Iterator[form.Moment]:
        """Hold the directory alone, cleared of expired records and of what killed writers left; yields the time."""
        with self._lock.alone(abandoned):
            now = self._now()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._new)
            for key, path in self._walk()[1].items():
                content = read(path)
                if content is not None and form.decode(content, now)[1] <= 0:
                    log.debug("expired record removed", extra=fields(key=key))
                    self._remove(path)
            yield now

    def _walk(self) -> tuple[list[str], dict[str, str]]:
        """All directories that records can appear in, and the path of each record's file by its key."""
        directories = [self.path]
        before, keys = self._keys, {}
        for directory in directories:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
                    elif entry.path in before:
                        keys[entry.path] = before[entry.path]
                    else:
                        keys[entry.path] = form.key_of(entry.path[len(self.path) + 1 :])
                        if keys[entry.path] is None:
                            log.warning("file ignored: no record is named so", extra=fields(path=entry.path))
        self._keys = keys
        return directories, {key: path for path, key in keys.items() if key is not None}

    def _path(self, key: str) -> str:
        name = form.file_name(key)
        path = os.path.join(self.path, name)
        inside = os.path.join(os.path.realpath(self.path), os.path.dirname(name))
        if os.path.realpath(os.path.dirname(path)) != os.path.normpath(inside):
            raise not_a_directory(os.path.dirname(path))  # but a symbolic link
        return path

    def _find(self, key: str, now: form.Moment) -> Record | None:
        return self._read(key, self._path(key), now)

    def _stands(self, record: Record, now: form.Moment) -> bool:
        found = self._find(record.key, now)
        return found is not None and found.version == record.version

    def _read(self, key: str, path: str, now: form.Moment) -> Record | None:
        content = read(path)
        if content is None:
            return None
        value, ttl = form.decode(content, now)
        return None if ttl <= 0 else Record(key, value, form.version_of(content), ttl)

    def _write(self, key: str, value: bytes, ttl: float, now: form.Moment) -> Record:
        content = form.encode(value, ttl, now)
        if len(content) > LARGEST:
            raise StoreError(f"a record of {len(content)} bytes is too large for the file store; it takes {LARGEST}")
        path = self._path(key)
        directory = os.path.dirname(path)
        make_directory(directory)
        try:
            write(self._new, content)
            os.replace(self._new, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._new)
            raise
        sync(directory)
        return Record(key, value, form.version_of(content), ttl)

    def _remove(self, path: str) -> None:
        os.unlink(path)
        sync(os.path.dirname(path))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> OverlaynetError:
        """What the operator is told: what will not mend itself ends the daemon, all else it tries again."""
        path = self.path if error.filename is None else os.fsdecode(error.filename2 or error.filename)
        match error.errno:
            case errno.ENOTDIR:
                return StoreError(f"{path} is not a directory; move it away, or give the file store another path")
            case errno.EISDIR:
                return StoreError(f"{path} is a directory where the file store keeps a record; move it away")
            case errno.EACCES | errno.EPERM | errno.EROFS:
                return StoreError(
                    f"the file store may not use {path}: {error.strerror}; run as the owner of {self.path}, "
                    f"or give the file store another path"
                )
            case errno.ENAMETOOLONG:
                return StoreError(f"{path} is too long a name for a file; give the file store a shorter path")
            case errno.ENOSPC | errno.EDQUOT:
                return StoreUnavailable(f"the file store {self.path} is full: {error.strerror}; free space there")
            case _:
                return StoreUnavailable(f"the file store {self.path} does not work: {path}: {error.strerror}")
