"""What order packets must keep, whatever becomes of them on their way."""

from collections.abc import Iterable
from typing import TypeAlias

from overlaynet.delivery import addresses

Stretch: TypeAlias = dict[bytes, list[bytes]] | bytes


def in_order(packets: Iterable[bytes]) -> dict[bytes, list[Stretch]]:
    """Packets by their addresses; and of each pair of addresses in stretches: the packets of each flow in their order, or one
    packet whose ports cannot be read. The latter, a fragment or one with extension headers, may be of any of these flows, so
    what came before it must stay before it, and what came after it behind it."""
    pairs: dict[bytes, list[Stretch]] = {}
    for packet in packets:
        stretches = pairs.setdefault(addresses(packet), [])
        flow = _flow(packet)
        if flow is None:
            stretches.append(packet)
            continue
        if not stretches or isinstance(stretches[-1], bytes):
            stretches.append({})
        last = stretches[-1]
        assert isinstance(last, dict)
        last.setdefault(flow, []).append(packet)
    return pairs


def _flow(packet: bytes) -> bytes | None:
    """Protocol and ports, if they can be read."""
    four = packet[0] >> 4 == 4
    header = (packet[0] & 15) * 4 if four else 40
    protocol = packet[9 if four else 6]
    fragment = four and int.from_bytes(packet[6:8], "big") & 0x3FFF
    if protocol not in (6, 17) or fragment or len(packet) < header + 8:
        return None
    return bytes([protocol]) + packet[header : header + 4]
