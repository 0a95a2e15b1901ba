"""Sends UDP datagrams in many flows as fast as it can, many with one system call: sendmmsg(2).

    python -m bench.spray '{"seconds": 3, "size": 64, "run": 1, "source": "10.0.0.0/9", "destination": …, "subnets": 10}'

Prints how many it sent. There are always as many flows, each from and to addresses of its own, spread over the subnets
evenly and in random order, so that runs with few and with many subnets differ in nothing but that.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import TypeAlias

from bench.sendmmsg import Header, IoVector, Message, send

FLOWS = 10_000
PORT = 20_000
BATCH = 16
"""Datagrams in one system call; it divides the number of flows."""

_FIRST = 256
"""The first address of a subnet that is used: beyond the /24 that the bridge and its container have in the first one."""
_IP_PKTINFO = 8
_ADDRESS_SIZE, _CONTROL_SIZE = 16, 32
_Buffer: TypeAlias = "ctypes.Array[ctypes.c_char]"


def subnets(network: IPv4Network, count: int) -> list[IPv4Network]:
    """The first so many subnets of a network, each with room for its share of the flows; at least a /23."""
    share = -(-FLOWS // count)
    length = min(23, 32 - (_FIRST + share).bit_length())
    start, size = int(network.network_address), 1 << (32 - length)
    return [IPv4Network((start + number * size, length)) for number in range(count)]


def addresses(network: IPv4Network, count: int) -> list[IPv4Address]:
    """One address for each flow, all different, spread evenly over so many subnets, in random order.

    It is the same order for every network and at any time.
    """
    spread = subnets(network, count)
    found = [spread[place % count][_FIRST + place // count] for place in range(FLOWS)]
    random.Random(0).shuffle(found)
    return found


class Sender:
    """A batch of datagrams, laid out once for the kernel, whose addresses are exchanged from one system call to the next.

    :param run: how many datagrams of a flow follow each other, as those of a busy sender do; it divides the batch.
    :param pairs: source and destination of each flow.
    """

    def __init__(self, size: int, run: int, pairs: Sequence[tuple[IPv4Address, IPv4Address]]) -> None:
        addresses, controls = bytearray(), bytearray()
        for source, destination in pairs:
            addresses += _socket_address(destination, PORT)
            controls += _source_address(source)
        self._addresses, self._controls = _buffer(addresses), _buffer(controls)
        self._flows, self._slots = len(pairs), BATCH // run
        self._address_slots, self._control_slots = (
            ctypes.create_string_buffer(self._slots * size) for size in (_ADDRESS_SIZE, _CONTROL_SIZE)
        )
        self._payload = _buffer(os.urandom(size))
        self._vector = IoVector(ctypes.addressof(self._payload), size)
        self._messages = (Message * BATCH)(*(Message(self._header(place // run)) for place in range(BATCH)))

    def run(self, seconds: float) -> int:
        """Send until the time is over; how many were sent. :raises OSError: if the kernel refuses."""
        sent, place = 0, 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                self._exchange(self._address_slots, self._addresses, place, _ADDRESS_SIZE)
                self._exchange(self._control_slots, self._controls, place, _CONTROL_SIZE)
                sent += send(sender.fileno(), self._messages, BATCH)
                place = (place + self._slots) % self._flows
        return sent

    def _header(self, slot: int) -> Header:
        return Header(
            name=ctypes.addressof(self._address_slots) + slot * _ADDRESS_SIZE,
            name_length=_ADDRESS_SIZE,
            vectors=ctypes.addressof(self._vector),
            vectors_length=1,
            control=ctypes.addressof(self._control_slots) + slot * _CONTROL_SIZE,
            control_length=_CONTROL_SIZE,
        )

    def _exchange(self, slots: _Buffer, all_flows: _Buffer, place: int, size: int) -> None:
        ctypes.memmove(slots, ctypes.byref(all_flows, place * size), self._slots * size)


def _buffer(content: bytes | bytearray) -> _Buffer:
    return ctypes.create_string_buffer(bytes(content), len(content))


def _socket_address(address: IPv4Address, port: int) -> bytes:
    """``struct sockaddr_in``."""
    return struct.pack("=H2s4s8x", socket.AF_INET, struct.pack("!H", port), address.packed)


def _source_address(address: IPv4Address) -> bytes:
    """A control message that chooses the source: ``IP_PKTINFO`` with ``struct in_pktinfo`` (ip(7))."""
    return struct.pack("@NiiI4s4x4x", 28, socket.IPPROTO_IP, _IP_PKTINFO, 0, address.packed)


def main(*, seconds: float, size: int, run: int, source: str, destination: str, subnets: int) -> None:
    """Send, and say how much."""
    sources, destinations = (addresses(IPv4Network(network), subnets) for network in (source, destination))
    print(Sender(size, run, list(zip(sources, destinations, strict=True))).run(seconds))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
