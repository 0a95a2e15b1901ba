"""The engine in plain Python, in one thread.

It makes one system call for each packet at the device, and leaves it to a device with GRO (:func:`overlaynet.tun.start_gro`)
to join what is written. At the wire, packets of one size to one peer share a send, and what arrives together is received
together, where the kernel can do that (``UDP_SEGMENT`` and ``UDP_GRO``, udp(7)).
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import attrs

from overlaynet.backends.udp.engine import Counters, Drop, Engine, PeerCounters, PeerTable
from overlaynet.backends.udp.packets import congestion_mark, decapsulate, unreachable
from overlaynet.backends.udp.python_wire import Wire
from overlaynet.delivery import Prefixes, addresses, longest_match, prefixes_of
from overlaynet.errors import DeviceGone
from overlaynet.model import IPNetwork, Subnets

_BURST = 64
"""Packets taken from one direction before the other, and control, have their turn."""
_LARGEST = 65535
"""Bytes in the largest IP packet, so that no read cuts one short."""
_LARGEST_PAYLOAD = 65507
"""Bytes in the payload of the largest datagram over IPv4, which holds for all packets of a send together."""
_MOST_FLOWS = 4096
"""Pairs of addresses whose peer is remembered, for each direction; past that, all are looked up again."""
_RETRY = 1.0
"""Seconds for which nothing shares a send to a peer after such a send has failed."""
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


@attrs.define(eq=False)
class _Peer:
    """Where packets for a subnet go; this node itself stands in the tables too, without a place to send to."""

    counters: PeerCounters
    wire: Wire | None = None
    endpoint: tuple[str, int] = ("", 0)
    singly_until: float = 0.0
    """A moment of the monotonic clock, before which no two packets share a send: the way to this peer did not allow it."""


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
    sent: dict[bytes, _Peer] = attrs.field(factory=dict)
    """By source and destination: to whom packets went that went to anyone."""
    received: dict[tuple[str, bytes], _Peer] = attrs.field(factory=dict)
    """By peer address, source and destination: whose packets were delivered."""


class PythonEngine(Engine):
    """Carries IPv4 and IPv6 packets over an IPv4 or IPv6 underlay; of each version, if this node has a subnet of it.

    :param offload: False for one system call for each packet each way, also at the wire.
    """

    name = "python"

    def __init__(self, tun: int, sockets: Sequence[int], mtu: int, table: PeerTable, *, offload: bool = True) -> None:
        self._tun = tun
        self._mtu = mtu
        self._wires = [Wire(descriptor, offload=offload) for descriptor in sockets]
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._closed = False
        self._drops = [0] * len(Drop)
        self._unreachables_sent = 0
        self._unreachables_allowed = TokenBucket(_UNREACHABLES_PER_SECOND, _UNREACHABLES_AT_ONCE)
        self._table = self._compile(table, {})

    def run(self) -> None:
        """See :meth:`Engine.run`."""
        poller = select.poll()
        wires = {wire.socket.fileno(): wire for wire in self._wires}
        for descriptor in (self._tun, self._wake, *wires):
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
                    self._receive_burst(wires[descriptor])

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
            offloads=self._offloads(),
        )

    def _offloads(self) -> dict[str, str]:
        offloads: dict[str, str] = {}
        for wire in self._wires:
            for name, offload in (("udp_segment", wire.segmentation), ("udp_gro", wire.coalescing)):
                # With a socket of each version, the one that fails is told.
                if name not in offloads or str(offload) != "on":
                    offloads[name] = str(offload)
        return offloads

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake)
        for wire in self._wires:
            wire.close()

    # The packet path. Names that every packet needs are made local first, and what was found out about a pair of addresses
    # is remembered as long as the table is: to look it up anew would take a third of the time that Python needs here.

    def _send_burst(self) -> None:
        """Take packets out of the device and send them, until there is none or the burst is full."""
        table, tun, mtu, read = self._table, self._tun, self._mtu, os.read
        known = table.sent
        # What waits to be sent: packets of one size to one peer with one mark; the last one may be smaller.
        run: list[bytes] = []
        run_peer: _Peer | None = None
        run_mark = run_size = room = most = 0
        try:
            for _ in range(_BURST):
                try:
                    packet = read(tun, _LARGEST)
                except BlockingIOError:
                    return
                except OSError as error:
                    raise DeviceGone(str(error)) from error
                pair = addresses(packet)
                peer = known.get(pair) or self._find_peer(table, packet, pair)
                if peer is None:
                    continue
                size = len(packet)
                if size > mtu:
                    self._drops[Drop.TOO_BIG] += 1
                    continue
                mark = congestion_mark(packet)
                if peer is run_peer and mark == run_mark and size <= run_size and size <= room and len(run) < most:
                    run.append(packet)
                    room = room - size if size == run_size else 0
                    continue
                if run_peer is not None:
                    self._send(run_peer, run, run_mark)
                run, run_peer, run_mark, run_size, room = [packet], peer, mark, size, _LARGEST_PAYLOAD - size
                most = peer.wire.most_segments if peer.wire is not None else 1
                if peer.singly_until and time.monotonic() < peer.singly_until:
                    most = 1
        finally:
            if run_peer is not None:
                self._send(run_peer, run, run_mark)

    def _send(self, peer: _Peer, packets: list[bytes], mark: int) -> None:
        """Send packets of one size, of which only the last may be smaller; singly, if that is what it takes."""
        wire, count = peer.wire, len(packets)
        if wire is None:
            return
        try:
            wire.send(packets, mark, peer.endpoint)
        except OSError as error:
            if count > 1 and wire.refused(error):
                before = peer.counters.sent_packets
                for packet in packets:
                    self._send(peer, [packet], mark)
                if peer.counters.sent_packets > before:
                    # It is the way to this peer that lacks it: its device, or its MTU.
                    wire.segmentation.failed(error.errno or 0)
                    peer.singly_until = time.monotonic() + _RETRY
            else:
                self._drops[_SEND_ERRORS.get(error.errno or 0, Drop.SEND_FAILED)] += count
            return
        counters = peer.counters
        counters.sent_packets += count
        counters.sent_bytes += len(packets[0]) * (count - 1) + len(packets[-1])

    def _find_peer(self, table: _Table, packet: bytes, pair: bytes) -> _Peer | None:
        """To whom a packet out of the device goes; if to nobody, that is counted, and answered if it may be."""
        destination = pair[len(pair) // 2 :]
        if not pair:
            reason = Drop.MALFORMED
        elif len(destination) not in table.own:
            reason = Drop.UNSUPPORTED
        elif len(packet) > self._mtu:
            reason = Drop.TOO_BIG
        else:
            peer = longest_match(table.destinations, destination)
            if peer is not None and peer.wire is not None:
                if len(table.sent) >= _MOST_FLOWS:
                    table.sent.clear()
                table.sent[pair] = peer
                return peer
            reason = Drop.NO_ROUTE
        self._drops[reason] += 1
        if reason is Drop.NO_ROUTE:
            self._answer(packet, table)
        return None

    def _receive_burst(self, wire: Wire) -> None:
        """Take datagrams off the wire and write what may be delivered to the device, until there is none or as above."""
        table, tun, drops, receive, write = self._table, self._tun, self._drops, wire.receive, os.write
        known = table.received
        taken = 0
        while taken < _BURST:
            try:
                packets, mark, sender = receive()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EBADF, errno.ENOTSOCK):
                    raise
                # An ICMP error about what was sent earlier, say; to report it has cleared it.
                drops[Drop.RECEIVE_FAILED] += 1
                taken += 1
                continue
            taken += len(packets)
            for packet in packets:
                pair = addresses(packet)
                peer = known.get((sender, pair)) or self._admit(table, sender, pair)
                if peer is None:
                    continue
                delivered = decapsulate(packet, mark) if mark else packet
                if delivered is None:
                    drops[Drop.CONGESTION] += 1
                    continue
                try:
                    write(tun, delivered)
                except OSError:
                    drops[Drop.DEVICE_FAILED] += 1
                    continue
                counters = peer.counters
                counters.received_packets += 1
                counters.received_bytes += len(packet)

    def _admit(self, table: _Table, sender: str, pair: bytes) -> _Peer | None:
        """Whose packet it is that came off the wire; ``None`` if it may not be delivered, which is then counted."""
        half = len(pair) // 2
        prefixes = table.sources.get(sender)
        peer = None
        if prefixes is None:
            reason = Drop.UNKNOWN_PEER
        elif not pair:
            reason = Drop.MALFORMED
        elif half not in table.own:
            reason = Drop.UNSUPPORTED
        elif (peer := longest_match(prefixes, pair[:half])) is None:
            reason = Drop.SPOOFED_SOURCE
        elif longest_match(table.own, pair[half:]) is None:
            reason = Drop.FOREIGN_DESTINATION
        else:
            if len(table.received) >= _MOST_FLOWS:
                table.received.clear()
            table.received[sender, pair] = peer
            return peer
        self._drops[reason] += 1
        return None

    def _answer(self, packet: bytes, table: _Table) -> None:
        """Tell the sender that there is no way to the destination, if it may be told."""
        own = table.peer_table.own.ipv4 if packet[0] >> 4 == 4 else table.peer_table.own.ipv6
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
        wires = {wire.version: wire for wire in self._wires}
        node = _Peer(PeerCounters())
        own = [(subnet, node) for subnet in table.own]
        carried = {subnet.version for subnet in table.own}
        destinations = list(own)
        sources: dict[str, list[tuple[IPNetwork, _Peer]]] = {}
        kept: dict[Subnets, PeerCounters] = {}
        for each in table.peers:
            count = kept.setdefault(each.subnets, counters.get(each.subnets, PeerCounters()))
            wire = wires.get(each.address.version)
            subnets = [subnet for subnet in each.subnets if subnet.version in carried]
            if not subnets or wire is None:
                continue
            peer = _Peer(count, wire, (str(each.address), each.port))
            for subnet in subnets:
                destinations.append((subnet, peer))
                sources.setdefault(str(each.address), []).append((subnet, peer))
        return _Table(
            own=prefixes_of(own),
            destinations=prefixes_of(destinations),
            sources={address: prefixes_of(subnets) for address, subnets in sources.items()},
            counters=kept,
            peer_table=table,
        )


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
