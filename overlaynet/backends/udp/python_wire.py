"""A UDP socket as the Python engine uses it: with congestion marks in outer headers, and runs of packets where it can."""

from __future__ import annotations

import errno
import socket
import struct
import sys

from overlaynet.offload import Offload

MOST_SEGMENTS = 64
"""Packets in one send: UDP_MAX_SEGMENTS of all kernels."""

# Of Linux 4.18 and 5.0 (udp(7)); missing from the socket module.
_UDP_SEGMENT = 103
_UDP_GRO = 104
_REFUSALS = frozenset((errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENOPROTOOPT))
_LARGEST = 65535
# Beside each datagram: the type of service or traffic class of the outer header (a byte or an int), and the size of segments.
_CONTROL_SPACE = 2 * socket.CMSG_SPACE(struct.calcsize("i"))
_LOWEST_BYTE = 0 if sys.byteorder == "little" else -1


class Wire:
    """A bound, non-blocking UDP socket.

    :param descriptor: stays the caller's to close; see :meth:`close`.
    :param offload: whether packets may share system calls, as far as the kernel can do that.
    """

    def __init__(self, descriptor: int, *, offload: bool) -> None:
        self.socket = socket.socket(fileno=descriptor)
        self.socket.setblocking(False)
        if self.socket.family == socket.AF_INET:
            self.version, level, option, receive = 4, socket.IPPROTO_IP, socket.IP_TOS, socket.IP_RECVTOS
        else:
            self.version, level, option, receive = 6, socket.IPPROTO_IPV6, socket.IPV6_TCLASS, socket.IPV6_RECVTCLASS
        self.socket.setsockopt(level, receive, 1)
        self._receive = self.socket.recvmsg
        self._plain = [(level, option, bytes(1 if self.version == 4 else 4))]
        """What comes beside a single datagram without a mark."""
        self._marks = [[(level, option, struct.pack("i", mark))] if mark else [] for mark in range(4)]
        self.segmentation = self._probe(_UDP_SEGMENT, 0, offload)
        self.coalescing = self._probe(_UDP_GRO, 1, offload)
        self.most_segments = MOST_SEGMENTS if self.segmentation.on else 1
        """How many packets of one size (the last may be smaller) :meth:`send` takes at once."""

    def _probe(self, option: int, value: int, wanted: bool) -> Offload:
        offload = Offload(on=wanted)
        if wanted:
            try:
                self.socket.setsockopt(socket.IPPROTO_UDP, option, value)
            except OSError as error:
                offload = Offload(on=False, reason=error.errno or 0)
        return offload

    def send(self, packets: list[bytes], mark: int, endpoint: tuple[str, int]) -> None:
        """Send each packet as a datagram with these ECN bits in its outer header.

        :raises OSError: if none was sent.
        """
        if len(packets) > 1:
            size = (socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("H", len(packets[0])))
            self.socket.sendmsg(packets, [*self._marks[mark], size], 0, endpoint)
            self.segmentation.failing = False
        elif mark:
            self.socket.sendmsg(packets, self._marks[mark], 0, endpoint)
        else:
            self.socket.sendto(packets[0], endpoint)

    def refused(self, error: OSError) -> bool:
        """True if the kernel may have refused several packets because they were several."""
        return error.errno in _REFUSALS

    def receive(self) -> tuple[list[bytes], int, str]:
        """Packets that came in the payloads of datagrams, one in each; the ECN bits of their outer headers; the sender.

        :raises OSError: as the socket does, :exc:`BlockingIOError` if there is none.
        """
        data, control, _, sender = self._receive(_LARGEST, _CONTROL_SPACE)
        if control == self._plain:  # most often by far
            return [data], 0, sender[0]
        mark = segment = 0
        for level, _, content in control:
            if level == socket.IPPROTO_UDP:
                segment = int.from_bytes(content, sys.byteorder)
            else:
                mark = content[_LOWEST_BYTE] & 3
        if 0 < segment < len(data):
            return [data[at : at + segment] for at in range(0, len(data), segment)], mark, sender[0]
        return [data], mark, sender[0]

    def close(self) -> None:
        """Let go of the descriptor, which stays open."""
        self.socket.detach()
