"""How the file store writes a record down: the file's name, its text, and when it expires.

A record is one small JSON file, named as its key::

    {
      "value": "{\\"PublicIP\\":\\"192.168.64.3\\",\\"PublicIPv6\\":null}",
      "expires": {
        "time": "2026-03-02T12:00:00.000000+00:00",
        "boot": "0b0cd9b7-f5c5-43d9-a1f6-6f6b8d8a4c63",
        "boottime": 86423.5
      },
      "write": "1f0a6c8d2b7e4f60"
    }

``expires`` is ``null`` if the record never expires. A value that is not UTF-8 stands as ``base64`` in place of
``value``. ``write`` is random, so that no two writes of a record are equal.
"""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import json
import math
import secrets
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import attrs

_PLAIN = "&:=+@,~"
_FOR_EVER = 100 * 365 * 86400.0


@attrs.frozen
class Moment:
    """A point in time, on both clocks of the host.

    The boot clock (``CLOCK_BOOTTIME``) is never set and counts on while the host sleeps, but begins anew with each
    boot; so it decides within a boot, and the wall clock decides across boots.
    """

    boot: str
    """The kernel's identity of this boot."""
    boottime: float
    """Seconds since the boot of the host, also for a process whose time namespace begins at another moment."""
    time: float
    """Seconds since 1970, UTC."""

    def after(self, seconds: float) -> Moment:
        """The moment that many seconds later."""
        return attrs.evolve(self, boottime=self.boottime + seconds, time=self.time + seconds)

    def until(self, other: Moment) -> float:
        """Seconds from this moment to the other; negative if it has passed."""
        return other.boottime - self.boottime if self.boot == other.boot else other.time - self.time


def now() -> Moment:
    """This moment."""
    return Moment(_boot(), time.clock_gettime(time.CLOCK_BOOTTIME) - _boottime_offset(), time.time())


@functools.cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@functools.cache
def _boottime_offset() -> float:
    """What this process's time namespace adds to the boot clock (time_namespaces(7)), in seconds."""
    try:
        lines = Path("/proc/self/timens_offsets").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return 0.0  # a kernel without time namespaces
    offsets = {
        clock: float(seconds) + float(nanoseconds) / 1e9 for clock, seconds, nanoseconds in map(str.split, lines)
    }
    return offsets["boottime"]


def file_name(key: str) -> str:
    """The path of a key's file below the store's directory; no part of it begins with a dot, so none leads out of it.

    :raises ValueError: if a part of the key is empty.
    """
    return "/".join(_quoted(part) for part in key.split("/"))


def key_of(name: str) -> str | None:
    """The key whose file is named so, or ``None`` if no key's is."""
    try:
        key = unquote(name, errors="strict")
        return key if file_name(key) == name else None
    except ValueError:
        return None


def _quoted(part: str) -> str:
    if not part:
        raise ValueError("a part of the key is empty")
    quoted = quote(part, safe=_PLAIN)
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def version_of(content: bytes) -> str:
    """The version of a record whose file has this content, whoever wrote it."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def encode(value: bytes, ttl: float, at: Moment) -> bytes:
    """The content of a record's file, written at this moment."""
    content: dict[str, Any] = {}
    try:
        content["value"] = value.decode()
    except UnicodeDecodeError:
        content["base64"] = base64.b64encode(value).decode()
    content["expires"] = None
    if ttl < _FOR_EVER:
        expires = at.after(ttl)
        content["expires"] = {
            "time": datetime.datetime.fromtimestamp(expires.time, datetime.UTC).isoformat(timespec="microseconds"),
            "boot": expires.boot,
            "boottime": expires.boottime,
        }
    content["write"] = secrets.token_hex(8)
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def decode(content: bytes, at: Moment) -> tuple[bytes, float]:
    """A record's value and the seconds it has left at this moment, ``math.inf`` if it never expires.

    Whatever is not of this module's making is taken as the value itself and never expires: a value put there by
    hand is good, and a damaged file shows as a value that cannot be read, and still keeps its key taken.
    """
    try:
        written = json.loads(content)
    except (ValueError, RecursionError):
        return content, math.inf
    if not isinstance(written, dict) or "write" not in written:
        return content, math.inf
    try:
        return _decode_value(written), _decode_ttl(written["expires"], at)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # Still JSON: it must not pass for the value of a lease.
        return f"damaged record file ({error!r}): ".encode() + content, math.inf


def _decode_value(written: dict[str, Any]) -> bytes:
    if "base64" in written:
        return base64.b64decode(written["base64"], validate=True)
    value: bytes = written["value"].encode()
    return value


def _decode_ttl(expires: Any, at: Moment) -> float:
    if expires is None:
        return math.inf
    wall = datetime.datetime.fromisoformat(expires["time"]).timestamp()
    boottime = expires["boottime"]
    if not isinstance(expires["boot"], str) or not isinstance(boottime, float) or not math.isfinite(boottime):
        raise ValueError("expires has no moment")
    return at.until(Moment(expires["boot"], boottime, wall))
