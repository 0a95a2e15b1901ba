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
    Device,
    Lease,
    LeaseData,
    Network,
    Peer,
    Route,
    Underlay,
    between,
    option,
)


@attrs.frozen
class ExampleOptions:
    """The members of ``Backend`` in the network document, ``{"Type": "example", "MTU": 1400}``."""

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
        self._underlay: Underlay | None = None
        self._peers: tuple[Peer, ...] = ()

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        """Refuse what cannot work before a subnet is leased. What is returned, the peers get with this node's lease."""
        if network.ipv4 is not None and underlay.ipv4 is None:
            raise BackendError(f"{underlay.interface} has no IPv4 address; choose another interface with --iface")
        if self.options.mtu is not None and self.options.mtu > underlay.mtu:
            raise BackendError(f"MTU {self.options.mtu} does not fit into the {underlay.mtu} of {underlay.interface}")
        self._underlay = underlay
        return LeaseData("example")

    async def start(self, lease: Lease) -> Device:
        """Begin to carry packets. A tunnel would bring its device up here; this one uses the underlay's interface."""
        if self._underlay is None:
            raise BackendError("the example backend is started after it was opened; this is a defect of its caller")
        return Device(self._underlay.interface, self.options.mtu or self._underlay.mtu, instance="example")

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        """Make these all the peers there are. A tunnel would tell its device; here, the routes say it all."""
        self._peers = tuple(peers)

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        """A route for each subnet of each peer, by way of the peer's host."""
        if self._underlay is None:
            return []
        return [
            Route(subnet, device=self._underlay.interface, gateway=gateway)
            for peer in peers
            for subnet in peer.subnets
            if (gateway := peer.public_ipv4 if subnet.version == 4 else peer.public_ipv6) is not None
        ]

    def status(self) -> Mapping[str, JSON]:
        """What ``overlaynet status`` shows of it."""
        return {"peers": {str(peer.subnets): {"address": str(peer.public_ipv4)} for peer in self._peers}}

    async def aclose(self) -> None:
        """Free everything, at any point of its life; more than once is no error."""
        self._peers = ()
