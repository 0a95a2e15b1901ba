"""The example backend: packets for a peer are routed to its host, which has to be on the same link.

It is no tunnel, and needs no device of its own, so it is small enough to begin from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs

from overlaynet.api import (
    JSON,
    Backend,
    BackendError,
    Claim,
    Device,
    Lease,
    LeaseData,
    Network,
    Peer,
    Route,
    Underlay,
    between,
    check_name,
    claim_name,
    fitting_mtu,
    option,
)


@attrs.frozen
class ExampleOptions:
    """The members of ``Backend`` in the network document, ``{"Type": "example", "MTU": 1400}``."""

    name: str = option(
        "example0", "What tells this overlay from another on the same host; no device has this name", check=check_name
    )
    mtu: int | None = option(
        None,
        "Bytes in the largest packet that containers can send; by default the underlay's MTU",
        name="MTU",
        check=between(576, 65535),
    )


class ExampleBackend(Backend):
    """Routes packets for a peer to its host, unchanged."""

    api: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type[ExampleOptions]] = ExampleOptions
    options: ExampleOptions

    def __init__(self, options: ExampleOptions) -> None:
        super().__init__(options)
        self._claim: Claim | None = None
        self._network: Network | None = None
        self._underlay: Underlay | None = None
        self._device: Device | None = None
        self._peers: tuple[Peer, ...] = ()

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        """Refuse what cannot work before a subnet is leased. What is returned, the peers get with this node's lease."""
        self._network = network
        self._attach(network, underlay)
        self._claim = await claim_name(self.options.name)
        return LeaseData("example")

    async def start(self, lease: Lease) -> Device:
        """Begin to carry packets. A tunnel would bring its device up here; this one uses the underlay's interface."""
        if self._device is None:
            raise BackendError("the example backend is started after it was opened; this is a defect of its caller")
        return self._device

    async def set_underlay(self, underlay: Underlay) -> Device:
        """Follow another interface, MTU or address. A tunnel would bind its sockets again, and mend its device."""
        if self._network is None:
            raise BackendError("the example backend was not opened; this is a defect of its caller")
        return self._attach(self._network, underlay)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        """Make these all the peers there are. A tunnel would tell its device; here, the routes say it all."""
        self._peers = tuple(peers)

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        """A route for each subnet of each peer, by way of the peer's host."""
        if self._underlay is None:
            return []
        return [
            Route(subnet, device=self._underlay.interface, gateway=host)
            for peer in peers
            for subnet in peer.subnets
            if (host := peer.public_address(subnet.version)) is not None
        ]

    def status(self) -> Mapping[str, JSON]:
        """What ``overlaynet status`` shows of it."""
        return {
            "peers": {str(route.destination): {"address": str(route.gateway)} for route in self.routes(self._peers)}
        }

    async def aclose(self) -> None:
        """Free everything, at any point of its life; more than once is no error."""
        if self._claim is not None:
            self._claim.close()

    def _attach(self, network: Network, underlay: Underlay) -> Device:
        """Use this underlay from now on. :raises BackendError: if that cannot work; then all stays as it was."""
        mtu = fitting_mtu(network, underlay, wanted=self.options.mtu)
        for overlay in network:
            if (underlay.ipv4 if overlay.version == 4 else underlay.ipv6) is None:
                raise BackendError(
                    f"{underlay.interface} has no IPv{overlay.version} address, by which the packets of {overlay} "
                    f"would come; give it one, or choose another interface with --iface"
                )
        self._underlay = underlay
        self._device = Device(underlay.interface, mtu, instance=self.options.name)
        return self._device
