"""Hosts as the suites of backends call them: addresses and subnets, by number and IP version; and one that is far away."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from overlaynet import network as documents
from overlaynet.drivers import Backend
from overlaynet.model import IPAddress, IPNetwork, Peer, Subnets, Underlay
from overlaynet.network import Network


def overlay(version: int) -> Network:
    """The overlay of the tests, of one IP version."""
    if version == 4:
        return documents.parse('{"Network": "10.244.0.0/16"}')
    return documents.parse('{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:244::/48"}')


def subnet_of(number: int, version: int) -> IPNetwork:
    """The subnet of the host with a number between 1 and 254."""
    return IPv4Network(f"10.244.{number}.0/24") if version == 4 else IPv6Network(f"fd00:244:0:{number:x}::/64")


def subnets_of(number: int, version: int) -> Subnets:
    """The same, as a lease has it."""
    subnet = subnet_of(number, version)
    return Subnets(ipv4=subnet) if isinstance(subnet, IPv4Network) else Subnets(ipv6=subnet)


def host_at(number: int, version: int) -> IPAddress:
    """The address of the host with a number, on an underlay that no test sends anything on."""
    return IPv4Address(f"192.0.2.{number}") if version == 4 else IPv6Address(f"2001:db8::{number:x}")


def underlay_at(address: IPAddress, interface: str = "lo", mtu: int = 1500) -> Underlay:
    """How the host that has this address is attached."""
    if isinstance(address, IPv4Address):
        return Underlay(interface, mtu, ipv4=address, public_ipv4=address)
    return Underlay(interface, mtu, ipv6=address, public_ipv6=address)


def peer_at(subnets: Subnets, underlay: Underlay, node: str) -> Peer:
    """How others are told of a node, but for the data that its backend publishes."""
    return Peer(subnets, underlay.public_ipv4, underlay.public_ipv6, node)


def numbered_peer(number: int, version: int) -> Peer:
    """The peer with a number, which nobody is."""
    return peer_at(subnets_of(number, version), underlay_at(host_at(number, version)), node=f"peer-{number}")


class FarHost(abc.ABC):
    """Another host, which runs the same backend, with a container on either: what the laws on delivery need."""

    @abc.abstractmethod
    async def join(self, network: Network, near: Peer) -> Peer:
        """Bring the backend up on the far host, with ``near`` as its only peer; return how it is to be told of."""

    @abc.abstractmethod
    async def meet(self, near: Peer) -> None:
        """Have ``near`` be the far host's only peer from now on: it has another address, or other subnets."""

    @abc.abstractmethod
    async def use(self, backend: Backend, peers: Sequence[Peer]) -> None:
        """Do what the near host's router would: apply ``backend.routes(peers)``."""

    @abc.abstractmethod
    async def send(self, payload: bytes) -> None:
        """Send a UDP datagram from the near container to the far one. That it cannot be sent is no error."""

    @abc.abstractmethod
    async def receive(self) -> bytes:
        """The payload of the next datagram that has come, or comes, to the far container."""

    @abc.abstractmethod
    def move(self) -> Underlay:
        """Give the near host another address in the place of its own; its backend is not yet told."""

    async def inject(self, packet: bytes) -> None:
        """Have the far host send a whole IP packet to the near one: its addresses may be anybody's, as those of a liar.

        It goes the way that packets for the near container go. That it cannot be sent is no error.
        """
        raise NotImplementedError(
            "override inject() and delivered(), or name the capability 'sender checks' in `lacks`"
        )

    async def delivered(self) -> bytes:
        """The payload of the next UDP datagram that the near host's backend has handed its kernel, or hands it."""
        raise NotImplementedError(
            "override inject() and delivered(), or name the capability 'sender checks' in `lacks`"
        )
