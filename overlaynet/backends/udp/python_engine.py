"""The engine in plain Python: one thread, one system call for each packet each way."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network
from typing import TypeAlias, TypeVar

import attrs

from overlaynet.backends.udp.engine import Counters, DeviceGone, Drop, Engine, PeerCounters, PeerTable
from overlaynet.backends.udp.packets import Refused, addresses, unreachable
from overlaynet.model import Subnets

T = TypeVar("T")

_BURST = 64
"""Packets taken from one direction before the other, and control, have their turn."""
_LARGEST = 65535
"""Bytes in the largest IP packet, so that no read cuts one short."""
_UNREACHABLES_PER_SECOND = 1000
_UNREACHABLES_AT_ONCE = 100

_SEND_ERRORS = {
    errno.EMSGSIZE: Drop.TOO_BIG,
    errno.EAGAIN: Drop.SEND_CONGESTED,
    errno.ENOBUFS: Drop.SEND_CONGESTED,
    errno.ENOMEM: Drop.SEND_CONGESTED,
    errno.EPERM: Drop.SEND_REFUSED,
    errno.EACCES: Drop.SEND_REFUSED,
    errno.ENETUNREACH: Drop.SEND_UNREACHABLE,
    errno.EHOSTUNREACH: Drop.SEND_UNREACHABLE,
    errno.ENETDOWN: Drop.SEND_UNREACHABLE,
    errno.ECONNREFUSED: Drop.SEND_UNREACHABLE,
}


@attrs.frozen(eq=False)
class _Peer:
    """Where packets for a subnet go; this node itself stands in the tables too, without a place to send to."""

    counters: PeerCounters
    send: Callable[[bytes, tuple[str, int]], int] | None = None
    endpoint: tuple[str, int] = ("", 0)


Prefixes: TypeAlias = tuple[tuple[int, Mapping[int, T]], ...]
"""For each prefix length, longest first: how far to shift an address to the right, and who has the prefix that is left."""


@attrs.frozen
class _Table:
    """A peer table in the form that packets are looked up in."""

    own: Prefixes[_Peer]
    """What may come in."""
    destinations: Prefixes[_Peer]
    """Where what goes out is sent."""
    sources: Mapping[str, Prefixes[_Peer]]
    """For each peer address: what may come from it."""
    counters: Mapping[Subnets, PeerCounters]
    peer_table: PeerTable


class PythonEngine(Engine):
    """Carries IPv4 packets over an IPv4 or IPv6 underlay."""

    name = "python"

    def __init__(self, tun: int, sockets: Sequence[int], mtu: int, table: PeerTable) -> None:
        self._tun = tun
        self._mtu = mtu
        self._sockets = [socket.socket(fileno=descriptor) for descriptor in sockets]
        for each in self._sockets:
            each.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._closed = False
        self._buffer = bytearray(_LARGEST)
        self._drops = [0] * len(Drop)
        self._unreachables_sent = 0
        self._unreachables_allowed = TokenBucket(_UNREACHABLES_PER_SECOND, _UNREACHABLES_AT_ONCE)
        self._table = self._compile(table, {})

    def run(self) -> None:
        """See :meth:`Engine.run`."""
        poller = select.poll()
        sockets = {each.fileno(): each for each in self._sockets}
        for descriptor in (self._tun, self._wake, *sockets):
            poller.register(descriptor, select.POLLIN)
        while True:
            for descriptor, events in poller.poll():
                if descriptor == self._wake:
                    return
                if descriptor == self._tun:
                    if events & ~select.POLLIN:
                        raise DeviceGone("it is no longer there to be polled")
                    self._send_burst()
                else:
                    self._receive_burst(sockets[descriptor])

    def stop(self) -> None:
        """See :meth:`Engine.stop`."""
        with self._wake_lock:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def set_table(self, table: PeerTable) -> None:
        """See :meth:`Engine.set_table`."""
        self._table = self._compile(table, self._table.counters)

    def counters(self) -> Counters:
        """See :meth:`Engine.counters`."""
        return Counters(
            peers={subnets: attrs.evolve(counters) for subnets, counters in self._table.counters.items()},
            drops=dict(zip(Drop, self._drops, strict=True)),
            unreachables_sent=self._unreachables_sent,
        )

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake)
        for each in self._sockets:
            each.detach()

    # The packet path. Names that every packet needs are made local first: a look-up less is a tenth of a microsecond.

    def _send_burst(self) -> None:
        """Take packets out of the device and send them, until there is none or the burst is full."""
        table, tun, mtu, drops = self._table, self._tun, self._mtu, self._drops
        destinations, read = table.destinations, os.read
        for _ in range(_BURST):
            try:
                packet = read(tun, _LARGEST)
            except BlockingIOError:
                return
            except OSError as error:
                raise DeviceGone(str(error)) from error
            size = len(packet)
            try:
                _, destination = addresses(packet, size)
            except Refused as refused:
                drops[refused.reason] += 1
                continue
            if size > mtu:
                drops[Drop.TOO_BIG] += 1
                continue
            peer = longest_match(destinations, destination)
            if peer is None or peer.send is None:
                drops[Drop.NO_ROUTE] += 1
                self._answer(packet, table)
                continue
            try:
                peer.send(packet, peer.endpoint)
            except OSError as error:
                drops[_SEND_ERRORS.get(error.errno or 0, Drop.SEND_FAILED)] += 1
                continue
            counters = peer.counters
            counters.sent_packets += 1
            counters.sent_bytes += size

    def _receive_burst(self, wire: socket.socket) -> None:
        """Take datagrams off the wire and write what may be delivered to the device, until there is none or as above."""
        table, tun, buffer, drops = self._table, self._tun, self._buffer, self._drops
        own, sources, receive, write, view = table.own, table.sources, wire.recvfrom_into, os.write, memoryview(buffer)
        for _ in range(_BURST):
            try:
                size, sender = receive(buffer)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EBADF, errno.ENOTSOCK):
                    raise
                # An ICMP error about what was sent earlier, say; to report it has cleared it.
                drops[Drop.RECEIVE_FAILED] += 1
                continue
            prefixes = sources.get(sender[0])
            if prefixes is None:
                drops[Drop.UNKNOWN_PEER] += 1
                continue
            try:
                source, destination = addresses(buffer, size)
            except Refused as refused:
                drops[refused.reason] += 1
                continue
            peer = longest_match(prefixes, source)
            if peer is None:
                drops[Drop.SPOOFED_SOURCE] += 1
                continue
            if longest_match(own, destination) is None:
                drops[Drop.FOREIGN_DESTINATION] += 1
                continue
            try:
                write(tun, view[:size])
            except OSError:
                drops[Drop.DEVICE_FAILED] += 1
                continue
            counters = peer.counters
            counters.received_packets += 1
            counters.received_bytes += size

    def _answer(self, packet: bytes, table: _Table) -> None:
        """Tell the sender that there is no way to the destination, if it may be told."""
        own = table.peer_table.own.ipv4
        if own is None:
            return
        answer = unreachable(packet, own.network_address)
        if answer is None or not self._unreachables_allowed.take():
            return
        try:
            os.write(self._tun, answer)
        except OSError:
            self._drops[Drop.DEVICE_FAILED] += 1
        else:
            self._unreachables_sent += 1

    def _compile(self, table: PeerTable, counters: Mapping[Subnets, PeerCounters]) -> _Table:
        senders = {4 if each.family == socket.AF_INET else 6: each.sendto for each in self._sockets}
        node = _Peer(PeerCounters())
        own = [(table.own.ipv4, node)] if table.own.ipv4 is not None else []
        destinations: list[tuple[IPv4Network, _Peer]] = list(own)
        sources: dict[str, list[tuple[IPv4Network, _Peer]]] = {}
        kept: dict[Subnets, PeerCounters] = {}
        for each in table.peers:
            count = kept.setdefault(each.subnets, counters.get(each.subnets, PeerCounters()))
            send = senders.get(each.address.version)
            if each.subnets.ipv4 is None or send is None:
                continue
            peer = _Peer(count, send, (str(each.address), each.port))
            destinations.append((each.subnets.ipv4, peer))
            sources.setdefault(str(each.address), []).append((each.subnets.ipv4, peer))
        return _Table(
            own=prefixes_of(own),
            destinations=prefixes_of(destinations),
            sources={address: prefixes_of(subnets) for address, subnets in sources.items()},
            counters=kept,
            peer_table=table,
        )


def prefixes_of(subnets: Iterable[tuple[IPv4Network, T]]) -> Prefixes[T]:
    """Tables for :func:`longest_match`. Of two entries for the same subnet the first counts."""
    lengths: dict[int, dict[int, T]] = {}
    for subnet, holder in subnets:
        shift = subnet.max_prefixlen - subnet.prefixlen
        lengths.setdefault(shift, {}).setdefault(int(subnet.network_address) >> shift, holder)
    return tuple(sorted(lengths.items()))


def longest_match(prefixes: Prefixes[T], address: int) -> T | None:
    """Who has the longest prefix of ``address``; ``None`` if nobody has one."""
    for shift, holders in prefixes:
        holder = holders.get(address >> shift)
        if holder is not None:
            return holder
    return None


class TokenBucket:
    """Allows ``rate`` events a second on average and ``burst`` at once."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._filled = clock()

    def take(self) -> bool:
        """True if an event is allowed now; it is then counted."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
