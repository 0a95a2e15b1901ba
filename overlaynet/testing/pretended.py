"""TUN devices that are pretended: what the kernel would do with their packets is in the hands of a test."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self
from unittest import mock

from overlaynet.errors import BackendError
from overlaynet.model import IPAddress, Subnets
from overlaynet.offload import Offload
from overlaynet.testing.packets import checksum
from overlaynet.tun_device import TunDevice

_PORT = 9000


class PretendedTun(TunDevice):
    """A device whose other end, which is the kernel's, is in the hands of a test: :attr:`kernel`."""

    def __init__(self, name: str, index: int, forget: Callable[[PretendedTun], None]) -> None:
        near, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        self.kernel.setblocking(False)
        super().__init__(name, [near.detach()], index, Offload(on=False))
        self.mtu = 0
        self.addresses: tuple[IPAddress, ...] = ()
        self._forget = forget

    async def configure(self, mtu: int, own: Subnets) -> None:
        """See :meth:`overlaynet.tun_device.TunDevice.configure`."""
        await asyncio.sleep(0)
        if self.kernel.fileno() == -1:
            raise self._gone()
        self.mtu = mtu
        self.addresses = tuple(subnet.network_address for subnet in own)

    def delete(self) -> None:
        """Do what ``ip link delete`` does. Idempotent."""
        self._forget(self)
        self.kernel.close()

    def close(self) -> None:
        """See :meth:`overlaynet.tun_device.TunDevice.close`."""
        self.delete()
        super().close()


class _Loopback:
    """The loopback addresses of this network namespace, for one process at a time; a context manager, which may be nested.

    Hosts of two processes that test at once, such as those of pytest-xdist, would take each other's ports: the second waits.
    What tells them is a name in the abstract namespace (unix(7)): it is one network namespace's, and gone with its process.
    """

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._users = 0

    def __enter__(self) -> None:
        if self._users == 0:
            with contextlib.ExitStack() as stack:
                name = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                while not _bound(name, "\0overlaynet-testing-loopback"):
                    time.sleep(0.05)
                self._held = stack.pop_all()
        self._users += 1

    def __exit__(self, *error: object) -> None:
        self._users -= 1
        if self._users == 0:
            self._held.close()


def _bound(to: socket.socket, name: str) -> bool:
    """Whether the socket could be bound to the name, which another one may have."""
    try:
        to.bind(name)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


_loopback = _Loopback()


class PretendedHosts:
    """Hosts whose TUN devices are pretended. Within its ``with`` block, ``TunDevice.make`` makes them.

    They are made on the host ``near``, but in the ``with`` block of :meth:`on`, and by tasks that were begun in it. Their
    sockets are those of this machine: while another process on it has such hosts, the ``with`` block waits.
    """

    def __init__(self) -> None:
        self._devices: dict[tuple[str, str], PretendedTun] = {}
        self._here: ContextVar[str] = ContextVar("host", default="near")
        self._taken: set[tuple[str, str]] = set()
        self._made = 0
        self._patch = mock.patch.object(TunDevice, "make", self._make)

    def __enter__(self) -> Self:
        _loopback.__enter__()
        self._patch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patch.stop()
        _loopback.__exit__()

    @contextlib.contextmanager
    def on(self, host: str) -> Iterator[None]:
        """Make devices on this host meanwhile, and in all tasks that begin meanwhile."""
        before = self._here.set(host)
        try:
            yield
        finally:
            self._here.reset(before)

    def devices(self, host: str = "near") -> Mapping[str, PretendedTun]:
        """The devices of a host, by name."""
        return {name: device for (where, name), device in self._devices.items() if where == host}

    def occupy(self, name: str) -> None:
        """Have the name be that of another device on the host ``near``, whoever's."""
        self._taken.add(("near", name))

    async def _make(self, name: str, *, offload_header: bool = False, **how: object) -> PretendedTun:
        await asyncio.sleep(0)
        if offload_header:
            raise BackendError(
                f"the device {name} is pretended, and offloads nothing; the udp backend needs its Python engine"
            )
        key = (self._here.get(), name)
        if key in self._devices or key in self._taken:
            raise BackendError(f"the device {name} belongs to another overlaynet that is running")
        self._made += 1
        device = self._devices[key] = PretendedTun(name, self._made, self._remove)
        return device

    def _remove(self, device: PretendedTun) -> None:
        self._devices = {key: other for key, other in self._devices.items() if other is not device}


def datagram(
    source: IPAddress | str, destination: IPAddress | str, payload: bytes = b"", *, source_port: int = _PORT
) -> bytes:
    """A whole IP packet, of either version, with a UDP datagram (RFC 768) in it; its UDP checksum is left out."""
    addresses: tuple[Any, Any] = ip_address(source), ip_address(destination)
    packed = b"".join(address.packed for address in addresses)
    content = struct.pack("!HHHH", source_port, _PORT, 8 + len(payload), 0) + payload
    if addresses[0].version == 6:
        return struct.pack("!IHBB", 6 << 28, len(content), 17, 64) + packed + content
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(content), 0, 0, 64, 17, 0) + packed
    return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + content
