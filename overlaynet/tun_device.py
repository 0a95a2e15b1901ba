"""A backend's TUN device: made, marked as ours, kept as it should be, and told from another of the same name."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Iterator, Sequence
from ipaddress import ip_interface

from overlaynet.devices import ALIAS, Parameters, ask, name_is_taken
from overlaynet.errors import BackendError, DeviceGone
from overlaynet.logs import fields
from overlaynet.model import Subnets
from overlaynet.netlink import Netlink
from overlaynet.offload import Offload
from overlaynet.tun import DeviceNameTaken, are_of, open_queues, start_gro

log = logging.getLogger(__name__)

_QUEUE_LENGTH = 1000
"""Packets that wait in the device while the backend is busy."""
_LARGEST = 65535
"""Bytes in the largest IP packet."""
_GONE = frozenset((errno.EBADFD, errno.ENODEV))


class TunDevice:
    """A TUN device: a network interface whose packets a backend reads and writes. Made by :meth:`make`, not by its class.

    It exists as long as a descriptor of it is open, unless somebody deletes it; however the process ends, the kernel takes it
    away, with its addresses and routes.
    """

    def __init__(self, name: str, descriptors: list[int], index: int, gro: Offload) -> None:
        self.name = name
        self.descriptors = descriptors
        """One for each of its queues; all are non-blocking."""
        self.gro = gro
        """Whether the kernel joins TCP segments that are written (see :func:`.start_gro`), and why not."""
        self._index = index
        """The interface's index: a later device of the same name has another."""
        self._configured: tuple[int, Subnets] | None = None
        """What it was made to be last."""
        self._parameters = Parameters()

    @classmethod
    async def make(
        cls, name: str, *, backend: str, queues: int = 1, offload_header: bool = False, gro: bool = False
    ) -> TunDevice:
        """Make the device, which stays down. If this is cancelled, it ends once the kernel has answered, and there is none.

        :param backend: the name of the backend, which the device's alias tells everybody.
        :param queues: how many it has, if the kernel gives as many, each with a share of the packets. :meth:`read` and
            :meth:`write` use the first.
        :param offload_header: if the kernel can do so, have each packet behind a header (see :func:`.open_tun`); leave that
            to those who do without :meth:`read` and :meth:`write`.
        :param gro: if the kernel can do so, have it join TCP segments that are written one after another, so that they are
            one packet's work to the host; whether it does, :attr:`gro` tells.
        :raises BackendError: naming what has the name, or why this process cannot have a TUN device.
        """
        try:
            descriptors = open_queues(name, queues, offload_header=offload_header, gro=gro)
        except DeviceNameTaken as error:
            raise BackendError(await _who_has_the_name(name)) from error
        completing = asyncio.ensure_future(
            ask(lambda kernel: _complete(kernel, name, descriptors, ALIAS.format(backend), gro))
        )
        try:
            index, offload = await asyncio.shield(completing)
        except BaseException:
            try:
                # While a thread asks the kernel about a queue, the device stays, even when the descriptor is closed.
                await asyncio.wait({completing})
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            raise
        return cls(name, descriptors, index, offload)

    async def configure(self, mtu: int, own: Subnets) -> None:
        """Make the device what it should be, and set it up. Idempotent.

        What is right already is not touched; what somebody has changed since the last call is mended, and logged. Its
        addresses are the first of each subnet.

        :param mtu: bytes in the largest packet that it takes.
        :raises DeviceGone: if somebody has deleted or renamed it.
        :raises BackendError: if the kernel refuses.
        """
        mended = await ask(lambda kernel: self._configure(kernel, mtu, own))
        if mended and self._configured == (mtu, own):
            log.warning("device mended", extra=fields(device=self.name, mended=", ".join(mended)))
        self._configured = (mtu, own)

    def fileno(self) -> int:
        """The descriptor of its first queue, for an event loop's ``add_reader``; it is non-blocking."""
        return self.descriptors[0]

    def read(self) -> bytes:
        """The next packet that this host sends into the device: one whole IP packet.

        :raises BlockingIOError: if there is none now.
        :raises DeviceGone: if somebody has deleted the device.
        """
        try:
            packet = os.read(self.descriptors[0], _LARGEST)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._gone() from error
        if not packet:
            raise self._gone()
        return packet

    def write(self, packet: bytes) -> bool:
        """Hand the kernel a packet, as if it had come in by the device; it goes where this host's routes lead.

        Nothing is checked but that it is an IP packet: who may send it to whom is for the backend to see to, before.

        :return: whether the kernel has taken it. It takes none of a device that is down.
        :raises DeviceGone: if somebody has deleted the device.
        """
        try:
            os.write(self.descriptors[0], packet)
        except OSError as error:
            if error.errno in _GONE:
                raise self._gone() from error
            return False
        return True

    def keep_queues(self, count: int) -> None:
        """Give up all queues but the first ``count``; what waits in the others is lost. Not while they are read."""
        while len(self.descriptors) > count:
            os.close(self.descriptors.pop())

    def close(self) -> None:
        """Close the descriptors, with which the device goes. Idempotent."""
        self.keep_queues(0)

    def _gone(self) -> DeviceGone:
        return DeviceGone(f"the device {self.name} is gone: somebody deleted or renamed it")

    # In a thread, with netlink.

    def _configure(self, kernel: Netlink, mtu: int, own: Subnets) -> list[str]:
        name = self.name
        link = kernel.link(name)
        if link is None or link.index != self._index:
            raise self._gone()
        mended = []
        if link.mtu != mtu:
            kernel.configure_link(name, index=link.index, mtu=mtu)
            mended.append("MTU")
        for version, parameter, wanted in _wanted_parameters(own):
            changed = self._parameters.set(version, name, parameter, wanted)
            if changed and parameter != "addr_gen_mode":  # this one the kernel itself resets, when an MTU passes 1280
                mended.append(parameter)
        if not link.up:
            kernel.configure_link(name, index=link.index, transmit_queue_length=_QUEUE_LENGTH, up=True)
            mended.append("it was down")
        if kernel.set_addresses(name, [ip_interface((subnet.network_address, subnet.max_prefixlen)) for subnet in own]):
            mended.append("addresses")
        return mended


def _wanted_parameters(own: Subnets) -> Iterator[tuple[int, str, str]]:
    """The device's kernel parameters, by IP version and name, and what they are to be."""
    if own.ipv4 is not None:
        # The source of our ICMP errors is the device's own address, which the kernel takes for forged without this.
        yield 4, "accept_local", "1"
    # No link-local address, and so no router solicitations into the tunnel.
    yield 6, "addr_gen_mode", "1"
    if own.ipv6 is not None:
        yield 6, "disable_ipv6", "0"  # container runtimes switch IPv6 off for all new devices


def _complete(kernel: Netlink, name: str, descriptors: Sequence[int], alias: str, gro: bool) -> tuple[int, Offload]:
    """Make the device recognisable as ours, and start its GRO; return its index, and what became of that."""
    link = kernel.link(name)
    # Asked after that: the name may have come to mean another device, which is not ours to touch.
    if link is None or not are_of(name, descriptors):
        raise BackendError(f"the device {name} was deleted or renamed as soon as it was made; try again")
    kernel.configure_link(name, index=link.index, alias=alias)
    offload = Offload(on=gro)
    if gro:
        try:
            start_gro(name, descriptors[0])
        except OSError as error:
            offload = Offload(on=False, reason=error.errno or 0)
    return link.index, offload


async def _who_has_the_name(name: str) -> str:
    link = await ask(lambda kernel: kernel.link(name))
    if link is not None and link.kind == "tun" and link.alias.startswith(ALIAS.format("")):
        return (
            f"the device {name} belongs to another overlaynet that is running; stop it, "
            f"or choose another Name in the network document's Backend"
        )
    return name_is_taken(name, "" if link is None else link.kind)
