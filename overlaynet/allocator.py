"""How the C library hands out memory to a daemon that lives for months (mallopt(3))."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

LARGE = 128 * 1024
"""Bytes from which on a block is mapped by itself: what the GNU C library begins with."""

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def keep_compact(environment: Mapping[str, str] = os.environ) -> None:
    """Let this process hold little more memory than it uses, however much comes and goes. Idempotent.

    Call it before there is another thread. The GNU C library deals arenas out to threads, and once a large block was freed,
    takes blocks of that size out of an arena, too. Both are for speed, and leave gaps: a daemon that asks each question of
    the kernel in a new thread, and makes a packet engine with its buffers whenever its device was deleted, goes on growing
    then, though it uses no more than before. So all threads have one arena (those of Python wait for each other anyway),
    and large blocks are the kernel's to give and to take back.

    :param environment: what ``MALLOC_ARENA_MAX`` and ``MALLOC_MMAP_THRESHOLD_`` say there is left as it is. Another C
        library is, too; that of musl has neither arenas nor such a threshold.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value, variable in (
        (_M_ARENA_MAX, 1, "MALLOC_ARENA_MAX"),
        (_M_MMAP_THRESHOLD, LARGE, "MALLOC_MMAP_THRESHOLD_"),
    ):
        if variable not in environment:
            mallopt(parameter, value)
