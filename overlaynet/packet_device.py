"""A backend's TUN device in an event loop: what leaves this host by it, a function is given; what comes in is written to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable

from overlaynet.delivery import Dropped
from overlaynet.errors import BackendError, DeviceGone
from overlaynet.logs import fields
from overlaynet.model import Device, Subnets
from overlaynet.netlink import NetlinkError
from overlaynet.netlink_events import ChangeSignal
from overlaynet.tun_device import TunDevice

log = logging.getLogger(__name__)

BURST = 64
"""Packets that are taken out of the device before others have a turn."""


class PacketDevice:
    """A TUN device for backends that carry packets in Python. It is made again when somebody deletes it.

    Its life is that of the backend: :meth:`open`, then :meth:`mend` at the start and whenever the core asks to mend, and
    last :meth:`close`, which is allowed at any point.

    :param name: of the device.
    :param backend: the backend's name, which the device's alias tells everybody.
    :param take: is given each packet that this host sends into the device: one whole IP packet, as far as the kernel is
        right. It returns at once, and may raise :exc:`.Dropped`, which is counted.
    """

    def __init__(self, name: str, backend: str, take: Callable[[bytes], None]) -> None:
        self.name = name
        self.drops: Counter[str] = Counter()
        """Packets that were not carried, by reason. The backend may count its own here, too."""
        self._backend = backend
        self._take = take
        self._device: TunDevice | None = None
        self._signal: ChangeSignal | None = None
        self._closed = False

    @property
    def exists(self) -> bool:
        """Whether there was a device when that was last looked at: routes can lead to it."""
        return self._device is not None

    async def open(self) -> None:
        """Make the device, which stays down. If this fails or is cancelled, there is none.

        :raises BackendError: naming what has the name, or why this process cannot have a TUN device.
        """
        try:
            self._signal = ChangeSignal()
        except NetlinkError as error:
            raise BackendError(str(error)) from error
        try:
            await self._make()
        except BaseException:
            self.close()
            raise

    async def mend(self, mtu: int, own: Subnets) -> Device:
        """Set the device up as it should be, and make it again if it is gone. Idempotent; what had to be mended is logged.

        :param mtu: bytes in the largest packet that it takes.
        :param own: this node's subnets; the first address of each is the device's.
        :raises BackendError: if that cannot be done now.
        """
        try:
            await self._existing().configure(mtu, own)
        except DeviceGone as error:
            self._let_go()
            await self._make()
            await self._existing().configure(mtu, own)
            log.warning("device made again", extra=fields(device=self.name, reason=error))
        return Device(self.name, mtu)

    def write(self, packet: bytes) -> None:
        """Hand the kernel a packet, as if it had come in by the device; it goes where this host's routes lead.

        Whether it may come in is for the backend to see to, before: see :class:`.Delivery`.

        :raises Dropped: ``no_device``, or ``refused`` if the kernel does not take it (a damaged header).
        """
        try:
            taken = self._existing().write(packet)
        except DeviceGone as error:
            raise Dropped("no_device", str(error)) from error
        if not taken:
            raise Dropped("refused", "the kernel does not take it")

    async def changed(self) -> None:
        """Return when something about this host's links, addresses or routes has changed, so that :meth:`mend` is due."""
        if self._signal is None:
            raise BackendError(f"the device {self.name} was not opened; this is a defect of its caller")
        await self._signal.wait()

    def close(self) -> None:
        """Take the device away. Idempotent."""
        self._closed = True
        if self._signal is not None:
            self._signal.close()
        self._let_go()

    async def _make(self) -> None:
        device = await TunDevice.make(self.name, backend=self._backend)
        if self._closed:
            device.close()
            raise BackendError(f"the device {self.name} was closed meanwhile")
        self._device = device
        asyncio.get_running_loop().add_reader(device, self._read)

    def _existing(self) -> TunDevice:
        if self._device is None:
            raise DeviceGone(f"there is no device {self.name}")
        return self._device

    def _read(self) -> None:
        device = self._existing()
        with contextlib.suppress(BlockingIOError):
            for _ in range(BURST):
                try:
                    self._take(device.read())
                except Dropped as dropped:
                    self.drops[dropped.reason] += 1
                except DeviceGone:
                    asyncio.get_running_loop().remove_reader(device)  # or it would be called again and again
                    return

    def _let_go(self) -> None:
        device, self._device = self._device, None
        if device is not None:
            asyncio.get_running_loop().remove_reader(device)
            device.close()
