"""What the daemon may do beyond an ordinary process, and how it lets go of the rest (capabilities(7)).

Everything overlaynet does to the kernel's network (devices, addresses, routes, parameters below ``/proc/sys/net``, large
socket buffers) takes ``CAP_NET_ADMIN``, and a UDP port below 1024 ``CAP_NET_BIND_SERVICE``. What it reads and writes in
the file system it reads and writes as its user.
"""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Iterable
from pathlib import Path

from overlaynet.errors import ConfigError


class Capability(enum.IntEnum):
    """The capabilities that overlaynet has a use for, by their numbers in ``linux/capability.h``."""

    NET_BIND_SERVICE = 10
    NET_ADMIN = 12


_SETPCAP = 8
_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_LOWER = 3

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Words(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def held() -> frozenset[int]:
    """The numbers of the capabilities that the calling thread has in effect."""
    status = Path("/proc/thread-self/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    return frozenset(number for number in range(64) if mask >> number & 1)


def keep_only(wanted: Iterable[Capability] = tuple(Capability)) -> frozenset[int]:
    """Give up every capability but those of ``wanted`` that the thread has, for good; nothing it starts has more.

    Call it before there is another thread: each thread has capabilities of its own, and hands them to those it starts.
    Idempotent.

    :return: what is left.
    :raises ConfigError: if the kernel refuses, which it does only to a process that another one restricts.
    """
    before = held()
    kept = before & frozenset(wanted)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    dropped = [number for number in range(last + 1) if number not in kept]
    if _SETPCAP in before:  # without it, the bounding set stays; no_new_privs makes it meaningless
        for number in dropped:
            _prctl(_PR_CAPBSET_DROP, number)
    for number in dropped:
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER, number)
    _set(kept)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return kept


def _prctl(*arguments: int) -> None:
    padded = [*arguments, 0, 0, 0, 0][:5]
    if _libc.prctl(*(ctypes.c_ulong(argument) for argument in padded)) != 0:
        raise _refused()


def _set(capabilities: frozenset[int]) -> None:
    mask = sum(1 << number for number in capabilities)
    words = (_Words * 2)(*(_Words(half, half, half) for half in (mask & 0xFFFFFFFF, mask >> 32)))
    if _libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), words) != 0:
        raise _refused()


def _refused() -> ConfigError:
    return ConfigError(
        f"privileges cannot be given up: {os.strerror(ctypes.get_errno())}; see what restricts this process "
        f"(a sandbox, seccomp), or run with --privileges keep"
    )
