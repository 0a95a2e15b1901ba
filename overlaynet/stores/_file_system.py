"""The few things that the file store asks of a file system, and Python's library does not offer as such."""

from __future__ import annotations

import errno
import os
import stat

LARGEST = 1 << 20
"""Bytes in the largest record file; that of a lease has a few hundred."""

_DAMAGE = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.EIO)


def read(path: str) -> bytes | None:
    """The content of a record's file, or ``None`` if there is none.

    A file that is there but cannot be read has the reason as its content: its key is taken, and it shows as damaged.
    """
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return _unreadable(error)
    try:
        status = os.fstat(opened)
        if stat.S_ISDIR(status.st_mode):
            return None
        if not stat.S_ISREG(status.st_mode):
            return b"not a regular file"
        if status.st_size > LARGEST:
            return b"larger than %d bytes" % LARGEST
        return os.read(opened, status.st_size)
    except OSError as error:
        return _unreadable(error)
    finally:
        os.close(opened)


def _unreadable(error: OSError) -> bytes:
    if error.errno not in _DAMAGE:
        raise error
    return f"not readable: {error.strerror}".encode()


def make_directory(path: str) -> None:
    """Make a directory, and those above it, if they are missing."""
    if os.path.isdir(path):
        return
    above = os.path.dirname(path)
    if above != path:
        make_directory(above)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise not_a_directory(path) from None
    sync(above)


def not_a_directory(path: str) -> NotADirectoryError:
    """The error of a path that leads through something else than a directory."""
    return NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def sync(directory: str) -> None:
    """Let the names in a directory survive a power failure."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write(path: str, content: bytes) -> None:
    """Write a file, which only its owner may read, and wait until it is on the disk."""
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(opened, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(opened)
