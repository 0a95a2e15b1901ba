"""The host-gw backend: no tunnel; packets are routed to the peers' hosts, which have to be on the same link."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs

from overlaynet.devices import Claim, ask, check_name, claim_name, find_on_link
from overlaynet.drivers import Backend
from overlaynet.errors import BackendError
from overlaynet.logs import fields
from overlaynet.model import JSON, Device, IPAddress, IPNetwork, Lease, LeaseData, Peer, Route, Underlay
from overlaynet.network import Network
from overlaynet.options import option

log = logging.getLogger(__name__)


@attrs.frozen
class HostGwOptions:
    """The members of ``Backend`` in the network document. flannel's host-gw has none."""

    name: str = option(
        "host-gw",
        "What tells this overlay from another on the same host; it marks the overlay's routes, and is no device's name",
        check=check_name,
    )


@attrs.frozen
class _Opened:
    network: Network
    underlay: Underlay
    claim: Claim


class HostGwBackend(Backend):
    """Routes packets for a peer to its host, unchanged: the fastest way there is, for hosts that are on one link.

    It makes no device. Nodes that run flannel's host-gw are peers like others.
    """

    Options: ClassVar[type[HostGwOptions]] = HostGwOptions
    options: HostGwOptions

    def __init__(self, options: HostGwOptions) -> None:
        super().__init__(options)
        self._opened: _Opened | None = None
        self._peers: tuple[Peer, ...] = ()
        self._on_link: frozenset[IPAddress] = frozenset()
        self._skipped: Mapping[IPNetwork, str] = {}

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        """Check that the peers can route packets to this host; nothing is made."""
        _check(network, underlay)
        claim = await claim_name(self.options.name)
        self._opened = _Opened(network, underlay, claim)
        return LeaseData("host-gw")

    async def start(self, lease: Lease) -> Device:
        """Nothing has to be made: the device is the underlay's."""
        return self._device(self._check_open().underlay)

    async def set_underlay(self, underlay: Underlay) -> Device:
        """Route by this interface from now on."""
        opened = self._check_open()
        _check(opened.network, underlay)
        self._opened = attrs.evolve(opened, underlay=underlay)
        return self._device(underlay)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        """Find out which peers are on the same link; those that are not are reported and have no route."""
        opened = self._check_open()
        self._on_link = await ask(lambda kernel: find_on_link(kernel, peers, opened.underlay.interface))
        before = self._skipped
        self._peers = tuple(peers)
        self._skipped = self._sort(peers)[1]
        for subnet, reason in self._skipped.items():
            if before.get(subnet) != reason:
                log.warning("peer not reachable", extra=fields(subnet=subnet, reason=reason))

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        """A route to each peer's host, for those on the same link."""
        interface = self._check_open().underlay.interface
        return [Route(subnet, device=interface, gateway=host) for subnet, host in self._sort(peers)[0].items()]

    def status(self) -> Mapping[str, JSON]:
        """Interface and MTU; which host each peer's packets are routed to; which peers cannot be reached, and why."""
        underlay = self._opened.underlay if self._opened is not None else None
        hosts = self._sort(self._peers)[0] if underlay is not None else {}
        return {
            "device": underlay.interface if underlay is not None else None,
            "mtu": underlay.mtu if underlay is not None else None,
            "peers": {str(subnet): {"address": str(host)} for subnet, host in hosts.items()},
            "skipped": {str(subnet): reason for subnet, reason in self._skipped.items()},
        }

    async def aclose(self) -> None:
        """Give the name up; the routes are the router's to remove."""
        if self._opened is not None:
            self._opened.claim.close()
            self._opened = None

    def _device(self, underlay: Underlay) -> Device:
        return Device(underlay.interface, underlay.mtu, self.options.name)

    def _sort(self, peers: Sequence[Peer]) -> tuple[dict[IPNetwork, IPAddress], dict[IPNetwork, str]]:
        """The host to route each subnet's packets to; and why there is none, for the others."""
        opened = self._check_open()
        carried = {network.version for network in opened.network}
        hosts: dict[IPNetwork, IPAddress] = {}
        skipped: dict[IPNetwork, str] = {}
        for peer in peers:
            for subnet in peer.subnets:
                host = peer.public_address(subnet.version)
                if subnet.version not in carried:
                    skipped[subnet] = f"this node carries no IPv{subnet.version}"
                elif peer.data.backend_type != "host-gw":
                    skipped[subnet] = "its lease does not say that its node runs host-gw"
                elif host is None:
                    skipped[subnet] = f"it has no public IPv{subnet.version} address"
                elif host not in self._on_link:
                    skipped[subnet] = f"its host {host} is not on the same link as {opened.underlay.interface}"
                else:
                    hosts[subnet] = host
        return hosts, skipped

    def _check_open(self) -> _Opened:
        if self._opened is None:
            raise BackendError("the host-gw backend is not open; this is a defect of its caller")
        return self._opened


def _check(network: Network, underlay: Underlay) -> None:
    """:raises BackendError: unless the peers can route packets straight to this host."""
    for wanted, own, public, version in (
        (network.ipv4, underlay.ipv4, underlay.public_ipv4, 4),
        (network.ipv6, underlay.ipv6, underlay.public_ipv6, 6),
    ):
        if wanted is not None and own is None:
            raise BackendError(
                f"the interface {underlay.interface} has no IPv{version} address, which the host-gw backend needs "
                f"for {wanted.network}; give it one, or choose another with --iface"
            )
        if wanted is not None and own != public:
            raise BackendError(
                f"the public address {public} is not that of {underlay.interface}, which is {own}: the host-gw "
                f"backend's peers route packets straight to it; leave --public-ip out, or choose another backend"
            )
