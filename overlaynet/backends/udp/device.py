"""The backend's TUN device: made, marked as ours, kept as it should be, and told from another of the same name."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from ipaddress import ip_interface

from overlaynet.backends.udp.engine import DeviceGone
from overlaynet.backends.udp.tun import DeviceNameTaken, open_tun
from overlaynet.devices import ALIAS, Parameters, ask, name_is_taken
from overlaynet.errors import BackendError
from overlaynet.logs import fields
from overlaynet.model import Subnets
from overlaynet.netlink import Netlink

log = logging.getLogger(__name__)

_ALIAS = ALIAS.format("udp")
_QUEUE_LENGTH = 1000
"""Packets that wait in the device while the engine is busy."""


class TunDevice:
    """A TUN device that exists as long as its descriptor is open, unless somebody deletes it."""

    def __init__(self, name: str, descriptor: int, index: int) -> None:
        self.name = name
        self.descriptor = descriptor
        self._index = index
        """The interface's index: a later device of the same name has another."""
        self._configured: tuple[int, Subnets] | None = None
        """What it was made to be last."""
        self._parameters = Parameters()
        self._closed = False

    @classmethod
    async def make(cls, name: str, *, offload_header: bool) -> TunDevice:
        """Make the device, which stays down. If this is cancelled, there is none.

        :raises BackendError: naming what has the name, or why this process cannot have a TUN device.
        """
        try:
            descriptor = open_tun(name, offload_header=offload_header)
        except DeviceNameTaken as error:
            raise BackendError(await _who_has_the_name(name)) from error
        try:
            index = await ask(lambda kernel: _mark(kernel, name))
        except BaseException:
            os.close(descriptor)
            raise
        return cls(name, descriptor, index)

    async def configure(self, mtu: int, own: Subnets) -> None:
        """Make the device what it should be. Idempotent: what is right already is not touched, and what was not is logged.

        :raises DeviceGone: if somebody has deleted or renamed it.
        :raises BackendError: if the kernel refuses.
        """
        mended = await ask(lambda kernel: self._configure(kernel, mtu, own))
        if mended and self._configured == (mtu, own):
            log.warning("device mended", extra=fields(device=self.name, mended=", ".join(mended)))
        self._configured = (mtu, own)

    def close(self) -> None:
        """Close the descriptor, with which the device goes. Idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self.descriptor)

    # In a thread, with netlink.

    def _configure(self, kernel: Netlink, mtu: int, own: Subnets) -> list[str]:
        name = self.name
        link = kernel.link(name)
        if link is None or link.index != self._index:
            raise DeviceGone(f"the device {name} is gone: somebody deleted or renamed it")
        mended = []
        if link.mtu != mtu:
            kernel.configure_link(name, mtu=mtu)
            mended.append("MTU")
        for version, parameter, wanted in _wanted_parameters(own):
            changed = self._parameters.set(version, name, parameter, wanted)
            if changed and parameter != "addr_gen_mode":  # this one the kernel itself resets, when an MTU passes 1280
                mended.append(parameter)
        if not link.up:
            kernel.configure_link(name, transmit_queue_length=_QUEUE_LENGTH, up=True)
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


def _mark(kernel: Netlink, name: str) -> int:
    """Make the device recognisable as ours; return its index."""
    kernel.configure_link(name, alias=_ALIAS)
    link = kernel.link(name)
    if link is None:
        raise BackendError(f"the device {name} was deleted or renamed as soon as it was made; try again")
    return link.index


async def _who_has_the_name(name: str) -> str:
    link = await ask(lambda kernel: kernel.link(name))
    if link is not None and link.alias == _ALIAS:
        return (
            f"the device {name} belongs to another overlaynet that is running; stop it, "
            f"or choose another Name in the network document's Backend"
        )
    return name_is_taken(name, "" if link is None else link.kind)
