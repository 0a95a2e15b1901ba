"""What the kernel drops at the sockets that face the other hosts."""

import socket
import struct
from contextlib import ExitStack
from ipaddress import IPv4Address

from overlaynet.backends.udp.wire import Losses, open_sockets

LOCAL = IPv4Address("127.0.0.1")


def overflow(wire: socket.socket, datagrams: int) -> int:
    """Send more than a socket has room for; how many found none."""
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with socket.socket(type=socket.SOCK_DGRAM) as sender:
        for _ in range(datagrams):
            sender.sendto(bytes(500), wire.getsockname())
    arrived = 0
    while True:
        try:
            wire.recv(1000)
        except BlockingIOError:
            return datagrams - arrived
        arrived += 1


def test_what_the_kernel_drops_is_counted_over_sockets_that_come_and_go() -> None:
    losses, total = Losses(), 0
    for number in range(2):
        with ExitStack() as stack:
            (wire,) = open_sockets([LOCAL], 0, 1)[LOCAL]
            stack.enter_context(wire)
            assert losses.look([wire]) == total
            for _ in range(2):
                lost = overflow(wire, 50 + number)
                assert lost > 0
                total += lost
                assert losses.look([wire]) == total
                assert losses.look([wire]) == total
    assert losses.look([]) == total


def test_the_kernels_count_may_begin_anew() -> None:
    class Busy(socket.socket):
        dropped = 2**32 - 1

        def getsockopt(self, *arguments: int) -> bytes:  # type: ignore[override]
            return struct.pack("=9I", *[7] * 8, self.dropped)

    losses = Losses()
    with Busy(type=socket.SOCK_DGRAM) as wire:
        assert losses.look([wire]) == 2**32 - 1
        wire.dropped = 4
        assert losses.look([wire]) == 2**32 + 4
