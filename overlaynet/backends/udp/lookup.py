"""Looking up whose subnet an address is in, in plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias, TypeVar

from overlaynet.model import IPNetwork

T = TypeVar("T")

Prefixes: TypeAlias = Mapping[int, tuple[tuple[int, Mapping[int, T]], ...]]
"""For each size of address (4 or 16 bytes) and prefix length, longest first: how far to shift an address to the right, and
who has the prefix that is left."""


def prefixes_of(subnets: Iterable[tuple[IPNetwork, T]]) -> Prefixes[T]:
    """Tables for :func:`longest_match`. Of two entries for the same subnet the first counts."""
    found: dict[int, dict[int, dict[int, T]]] = {}
    for subnet, holder in subnets:
        shift = subnet.max_prefixlen - subnet.prefixlen
        lengths = found.setdefault(subnet.max_prefixlen // 8, {})
        lengths.setdefault(shift, {}).setdefault(int(subnet.network_address) >> shift, holder)
    return {size: tuple(sorted(lengths.items())) for size, lengths in found.items()}


def longest_match(prefixes: Prefixes[T], address: bytes) -> T | None:
    """Who has the longest prefix of ``address``; ``None`` if nobody has one."""
    number = int.from_bytes(address, "big")
    for shift, holders in prefixes.get(len(address), ()):
        holder = holders.get(number >> shift)
        if holder is not None:
            return holder
    return None
