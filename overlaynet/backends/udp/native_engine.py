"""The engine in C: it crosses into the kernel once for up to 64 KiB of packets. What it is made of is in ``_native/``.

Importing this module raises :exc:`ImportError` where the extension module was not built, for want of a compiler.
"""

from __future__ import annotations

import array
import logging
import os
import struct
import threading
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network

from overlaynet._threads import MORE_THREADS
from overlaynet.backends.udp import _native
from overlaynet.backends.udp.engine import (
    Counters,
    Drop,
    Engine,
    EnginePeer,
    HeaderRefused,
    PeerCounters,
    PeerTable,
    Queue,
)
from overlaynet.errors import DeviceGone
from overlaynet.logs import fields
from overlaynet.model import Subnets
from overlaynet.offload import Offload

log = logging.getLogger(__name__)

# The order of the C enumerations.
_OFFLOADS = ("tun_tcp", "tun_udp", "udp_segment", "udp_gro")
_STOPPED, _DEVICE_GONE, _FAILED, _HEADER_REFUSED = range(4)
_ON, _OFF = 0, 1

_OWN = struct.Struct("=BB4s16s").pack
_PEER = struct.Struct("=BBBxHxxI16s4s16s").pack
_NO_SUBNET = 255


class NativeEngine(Engine):
    """Carries IPv4 and IPv6 packets over an IPv4 or IPv6 underlay; of each version, if this node has a subnet of it.

    :param tun: may be a device with ``IFF_VNET_HDR``, and is fast only if it is one.
    :param offload: False for one system call for each packet each way, as in flannel's published design.
    :param more_queues: of a device with several queues (``IFF_MULTI_QUEUE``) the others, each with sockets of its own that
        share addresses and ports with the first ones (``SO_REUSEPORT``). Each queue has a thread.
    :param device_header: whether packets of the device have the header of ``IFF_VNET_HDR``; by default the device is asked.
    """

    name = "native"

    def __init__(
        self,
        tun: int,
        sockets: Sequence[int],
        mtu: int,
        table: PeerTable,
        *,
        more_queues: Sequence[Queue] = (),
        offload: bool = True,
        device_header: bool | None = None,
    ) -> None:
        self._engine = _native.Engine(
            queues=tuple((device, tuple(each)) for device, each in [(tun, sockets), *more_queues]),
            mtu=mtu,
            offload=offload,
            device_header=-1 if device_header is None else device_header,
        )
        self.threads = 1 + len(more_queues)
        # Between set_table and counters; the packet path knows nothing of it.
        self._lock = threading.Lock()
        self._blocks: dict[Subnets, int] = {}
        self._final: Counters | None = None
        self.set_table(table)

    def run(self) -> None:
        """See :meth:`Engine.run`. The GIL is released all the time.

        If the kernel gives fewer threads than there are queues, one of them serves the rest, and that is logged.

        :raises HeaderRefused: if the kernel has granted ``IFF_VNET_HDR``, but takes no packet with the header.
        """
        wanted = self.threads
        self.threads, refusal = self._engine.start()
        if refusal:
            log.warning(
                "fewer threads than asked for",
                extra=fields(threads=self.threads, wanted=wanted, reason=os.strerror(refusal), hint=MORE_THREADS),
            )
        ended, error = self._engine.run()
        if ended == _DEVICE_GONE:
            raise DeviceGone(os.strerror(error))
        if ended == _HEADER_REFUSED:
            raise HeaderRefused(os.strerror(error))
        if ended != _STOPPED:
            raise OSError(error, os.strerror(error))

    def stop(self) -> None:
        """See :meth:`Engine.stop`."""
        self._engine.stop()

    def set_table(self, table: PeerTable) -> None:
        """See :meth:`Engine.set_table`."""
        with self._lock:
            if self._final is not None:
                return
            blocks: dict[Subnets, int] = {}
            kept = array.array("i")
            peers = bytearray()
            for peer in table.peers:
                block = blocks.setdefault(peer.subnets, len(blocks))
                if block == len(kept):
                    kept.append(self._blocks.get(peer.subnets, -1))
                peers += packed_peer(peer, block)
            self._engine.set_table(packed_own(table.own), bytes(peers), kept.tobytes())
            self._blocks = blocks

    def counters(self) -> Counters:
        """See :meth:`Engine.counters`. After :meth:`close`, the counts at the end."""
        with self._lock:
            return self._final if self._final is not None else self._counters()

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        with self._lock:
            if self._final is None:
                self._final = self._counters()
                self._engine.close()

    def _counters(self) -> Counters:
        peers, drops, unreachables, offloads = self._engine.counters()
        return Counters(
            peers={subnets: PeerCounters(*peers[block]) for subnets, block in self._blocks.items()},
            drops=dict(zip(Drop, drops, strict=True)),
            unreachables_sent=unreachables,
            offloads={name: _told(*state) for name, state in zip(_OFFLOADS, offloads, strict=True)},
        )


def packed_own(subnets: Subnets) -> bytes:
    """This node's subnets as the extension module reads them."""
    (length4, network4), (length6, network6) = _packed_network(subnets.ipv4), _packed_network(subnets.ipv6)
    return _OWN(length4, length6, network4, network6)


def packed_peer(peer: EnginePeer, block: int) -> bytes:
    """A peer likewise; ``block`` is the number of its counters."""
    (length4, network4), (length6, network6) = _packed_network(peer.subnets.ipv4), _packed_network(peer.subnets.ipv6)
    return _PEER(peer.address.version, length4, length6, peer.port, block, peer.address.packed, network4, network6)


def _packed_network(network: IPv4Network | IPv6Network | None) -> tuple[int, bytes]:
    return (network.prefixlen, network.network_address.packed) if network is not None else (_NO_SUBNET, b"")


def _told(state: int, reason: int, failures: int) -> str:
    return str(Offload(on=state != _OFF, failing=state not in (_ON, _OFF), reason=reason, failures=failures))
