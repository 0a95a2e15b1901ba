"""The alloc backend: leases subnets, and leaves the packets to somebody else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs

from overlaynet.devices import check_name, check_no_device
from overlaynet.drivers import Backend
from overlaynet.errors import BackendError
from overlaynet.model import Device, Lease, LeaseData, Peer, Route, Underlay
from overlaynet.network import Network
from overlaynet.options import option


@attrs.frozen
class AllocOptions:
    """The members of ``Backend`` in the network document. flannel's alloc has none."""

    name: str = option(
        "alloc",
        "What tells this overlay from another on the same host; no device has this name",
        check=check_name,
    )


class AllocBackend(Backend):
    """Leases a subnet and does no more: the hosts' network, or another program, carries the packets.

    There is no device of its own: the subnet file tells the underlay's MTU, for packets leave by the underlay as they are.
    There are no routes either, and no ``unreachable`` route for the overlay: packets for other nodes follow whatever routes
    this host has, the default route included, as where a cloud's router knows the subnets.
    """

    Options: ClassVar[type[AllocOptions]] = AllocOptions
    options: AllocOptions
    backstop: ClassVar[bool] = False

    def __init__(self, options: AllocOptions) -> None:
        super().__init__(options)
        self._underlay: Underlay | None = None

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        """Like flannel's alloc, nothing is published."""
        await check_no_device(self.options.name)
        self._underlay = underlay
        return LeaseData()

    async def start(self, lease: Lease) -> Device:
        """The device is the underlay's interface, which is left alone."""
        if self._underlay is None:
            raise BackendError("the alloc backend is not open; this is a defect of its caller")
        return self._device(self._underlay)

    async def set_underlay(self, underlay: Underlay) -> Device:
        """The device is this interface from now on."""
        self._underlay = underlay
        return self._device(underlay)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        """Nothing is to be done for a peer."""

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        """None."""
        return []

    def _device(self, underlay: Underlay) -> Device:
        return Device(underlay.interface, underlay.mtu, instance=self.options.name)
