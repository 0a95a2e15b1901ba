"""The backend's TUN device: made, marked as ours, kept as it should be, and told from another of the same name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from ipaddress import ip_interface
from pathlib import Path
from typing import TypeVar

from overlaynet.backends.udp.engine import DeviceGone
from overlaynet.backends.udp.tun import DeviceNameTaken, open_queues
from overlaynet.errors import BackendError
from overlaynet.logs import fields
from overlaynet.model import Subnets
from overlaynet.netlink import Netlink, NetlinkError, netlink

T = TypeVar("T")
log = logging.getLogger(__name__)

ALIAS = "overlaynet udp"
"""What the device's alias says, so that anyone can tell whose it is."""

_QUEUE_LENGTH = 1000
"""Packets that wait in the device while the engine is busy."""


class TunDevice:
    """A TUN device that exists as long as a descriptor of it is open, unless somebody deletes it."""

    def __init__(self, name: str, descriptors: list[int], index: int) -> None:
        self.name = name
        self.descriptors = descriptors
        """One for each of its queues."""
        self._index = index
        """The interface's index: a later device of the same name has another."""
        self._configured: tuple[int, Subnets] | None = None
        """What it was made to be last."""
        self._unwritable: set[Path] = set()

    @classmethod
    async def make(cls, name: str, queues: int, *, offload_header: bool) -> TunDevice:
        """Make the device, which stays down. If this is cancelled, there is none.

        :param queues: how many it has, if the kernel gives as many.
        :raises BackendError: naming what has the name, or why this process cannot have a TUN device.
        """
        try:
            descriptors = open_queues(name, queues, offload_header=offload_header)
        except DeviceNameTaken as error:
            raise BackendError(await _who_has_the_name(name)) from error
        try:
            index = await ask(lambda kernel: _mark(kernel, name))
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return cls(name, descriptors, index)

    async def configure(self, mtu: int, own: Subnets) -> None:
        """Make the device what it should be. Idempotent: what is right already is not touched, and what was not is logged.

        :raises DeviceGone: if somebody has deleted or renamed it.
        :raises BackendError: if the kernel refuses.
        """
        mended = await ask(lambda kernel: self._configure(kernel, mtu, own))
        if mended and self._configured == (mtu, own):
            log.warning("device mended", extra=fields(device=self.name, mended=", ".join(mended)))
        self._configured = (mtu, own)

    def keep_queues(self, count: int) -> None:
        """Give up all queues but the first ``count``; what waits in the others is lost. Not while they are read."""
        while len(self.descriptors) > count:
            os.close(self.descriptors.pop())

    def close(self) -> None:
        """Close the descriptors, with which the device goes. Idempotent."""
        self.keep_queues(0)

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
        for version, parameter, wanted in self._parameters(own):
            changed = self._set_parameter(Path("/proc/sys/net", f"ipv{version}", "conf", name, parameter), wanted)
            if changed and parameter != "addr_gen_mode":  # this one the kernel itself resets, when an MTU passes 1280
                mended.append(parameter)
        if not link.up:
            kernel.configure_link(name, transmit_queue_length=_QUEUE_LENGTH, up=True)
            mended.append("it was down")
        if kernel.set_addresses(name, [ip_interface((subnet.network_address, subnet.max_prefixlen)) for subnet in own]):
            mended.append("addresses")
        return mended

    def _parameters(self, own: Subnets) -> Iterator[tuple[int, str, str]]:
        """The device's kernel parameters, by IP version and name, and what they are to be."""
        if own.ipv4 is not None:
            # The source of our ICMP errors is the device's own address, which the kernel takes for forged without this.
            yield 4, "accept_local", "1"
        # A kernel, or an MTU, without IPv6 has no such parameter.
        if Path("/proc/sys/net/ipv6/conf", self.name).exists():
            # No link-local address, and so no router solicitations into the tunnel.
            yield 6, "addr_gen_mode", "1"
        if own.ipv6 is not None:
            yield 6, "disable_ipv6", "0"  # container runtimes switch IPv6 off for all new devices

    def _set_parameter(self, path: Path, value: str) -> bool:
        """Set a kernel parameter; True if it had another value. One that cannot be set is reported once."""
        try:
            if path.read_text().strip() == value:
                return False
            path.write_text(value)
        except OSError as error:
            if path not in self._unwritable:
                self._unwritable.add(path)
                log.warning(
                    "kernel parameter not set", extra=fields(parameter=path, wanted=value, reason=error.strerror)
                )
            return False
        return True


def _mark(kernel: Netlink, name: str) -> int:
    """Make the device recognisable as ours; return its index."""
    kernel.configure_link(name, alias=ALIAS)
    link = kernel.link(name)
    if link is None:
        raise BackendError(f"the device {name} was deleted or renamed as soon as it was made; try again")
    return link.index


async def _who_has_the_name(name: str) -> str:
    link = await ask(lambda kernel: kernel.link(name))
    if link is not None and link.alias == ALIAS:
        return (
            f"the device {name} belongs to another overlaynet that is running; stop it, "
            f"or choose another Name in the network document's Backend"
        )
    kind = f" ({link.kind})" if link is not None and link.kind else ""
    return (
        f"the device name {name} is taken by another interface{kind}; delete that with `ip link delete {name}`, "
        f"or choose another Name in the network document's Backend"
    )


async def ask(function: Callable[[Netlink], T]) -> T:
    """Call ``function`` in a thread, with netlink. :raises BackendError: if the kernel refuses."""
    try:
        return await netlink(function)
    except NetlinkError as error:
        raise BackendError(str(error)) from error
