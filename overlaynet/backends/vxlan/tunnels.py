"""Which peers are reached by which tunnels: worked out from what they publish, without I/O.

A node publishes, for each IP version, flannel's value ``{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}``: the number of the
overlay, and the hardware address of its VXLAN device (its VTEP, the tunnel's end point).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import attrs

from overlaynet.model import JSON, IPAddress, IPNetwork, Peer
from overlaynet.netlink import ForwardingEntry, Neighbour

_HARDWARE_ADDRESS = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


@attrs.frozen
class Tunnel:
    """How packets for a subnet get to the host that leases it.

    They are routed to the subnet's first address, which no container has, as their next hop; that has the hardware
    address of the peer's device; and frames for that go to the peer's host.
    """

    subnet: IPNetwork
    hardware_address: str
    host: IPAddress

    @property
    def gateway(self) -> IPAddress:
        """The next hop: the subnet's first address."""
        return self.subnet.network_address

    @property
    def neighbour(self) -> Neighbour:
        """The entry that says what hardware address the next hop has."""
        return Neighbour(self.gateway, self.hardware_address)

    @property
    def forwarding_entry(self) -> ForwardingEntry:
        """The entry that says which host has that hardware address."""
        return ForwardingEntry(self.hardware_address, self.host)


@attrs.frozen
class Plan:
    """What becomes of each subnet of the peers: a tunnel, a route without one, or nothing, and why."""

    tunnels: tuple[Tunnel, ...] = ()
    direct: Mapping[IPNetwork, IPAddress] = attrs.field(factory=dict)
    """Subnets whose packets need no tunnel, and the hosts that they are routed to."""
    skipped: Mapping[IPNetwork, str] = attrs.field(factory=dict)
    """Subnets that cannot be reached, and why."""

    def of_version(self, version: int) -> Iterator[Tunnel]:
        """The tunnels that carry one IP version."""
        return (tunnel for tunnel in self.tunnels if tunnel.subnet.version == version)

    def without(self, refused: Mapping[IPNetwork, str]) -> Plan:
        """The plan that is left when these tunnels cannot be made, for the reasons given."""
        tunnels = tuple(tunnel for tunnel in self.tunnels if tunnel.subnet not in refused)
        reasons = {tunnel.subnet: refused[tunnel.subnet] for tunnel in self.tunnels if tunnel.subnet in refused}
        return Plan(tunnels, self.direct, {**self.skipped, **reasons})


def make_plan(
    peers: Sequence[Peer], identifier: int, own_addresses: Mapping[int, str], on_link: Collection[IPAddress] = ()
) -> Plan:
    """Plan how each subnet of the peers is reached.

    :param identifier: this overlay's VNI.
    :param own_addresses: the hardware addresses of this node's own devices, by the IP version that they carry.
    :param on_link: the hosts that can be reached directly, so that no tunnel is needed.
    """
    tunnels: list[Tunnel] = []
    direct: dict[IPNetwork, IPAddress] = {}
    skipped: dict[IPNetwork, str] = {}
    taken: dict[tuple[int, str], Peer | None] = dict.fromkeys(own_addresses.items())  # None: this node
    for peer in peers:
        for subnet in peer.subnets:
            version = subnet.version
            host = peer.public_ipv4 if version == 4 else peer.public_ipv6
            value = peer.data.ipv4 if version == 4 else peer.data.ipv6
            if version not in own_addresses:
                skipped[subnet] = f"this node carries no IPv{version}"
            elif host is None:
                skipped[subnet] = f"it has no public IPv{version} address"
            elif host in on_link:
                direct[subnet] = host
            else:
                try:
                    address = read_hardware_address(value, identifier)
                except ValueError as error:
                    skipped[subnet] = str(error)
                    continue
                holder = taken.setdefault((version, address), peer)
                if holder is not None and _same_end(holder, peer, version):
                    tunnels.append(Tunnel(subnet, address, host))
                else:
                    shown = (
                        "this node" if holder is None else holder.subnets.ipv4 if version == 4 else holder.subnets.ipv6
                    )
                    skipped[subnet] = f"its VtepMAC {address} is that of {shown}, too"
    return Plan(tuple(tunnels), direct, skipped)


def _same_end(one: Peer, other: Peer, version: int) -> bool:
    """True if both are reached by one device: they are leases of one node, as while a late claim stands beside its lease."""
    hosts = (one.public_ipv4, other.public_ipv4) if version == 4 else (one.public_ipv6, other.public_ipv6)
    return one.node == other.node and hosts[0] == hosts[1]


def publish(identifier: int, hardware_address: str) -> JSON:
    """What a node publishes for one IP version."""
    return {"VNI": identifier, "VtepMAC": hardware_address}


def read_hardware_address(value: JSON, identifier: int) -> str:
    """The hardware address that a peer publishes. :raises ValueError: with the reason, if its tunnel cannot be used."""
    if value is None:
        raise ValueError("its lease says nothing of a VXLAN device; does its node run another backend?")
    if not isinstance(value, Mapping):
        raise ValueError("what its lease says of its VXLAN device is not a JSON object")
    members = {name.lower(): member for name, member in value.items()}
    other = members.get("vni", identifier)  # older versions of flannel do not say
    if type(other) is not int or other != identifier:
        raise ValueError(f"its VNI is {_shown(other)}, and this node's is {identifier}")
    address = members.get("vtepmac")
    folded = address.lower() if isinstance(address, str) else ""
    if not _HARDWARE_ADDRESS.fullmatch(folded) or int(folded[:2], 16) & 1 or not folded.strip("0:"):
        raise ValueError(f"its VtepMAC is {_shown(address)}, not a hardware address such as c6:d2:32:6f:8f:44")
    return folded


def derive_hardware_address(identity: str, identifier: int, version: int) -> str:
    """The hardware address of a node's device: the same for the same node, whatever becomes of the device.

    It is locally administered and unicast (IEEE 802), and differs from node to node.
    """
    digest = hashlib.sha256(f"overlaynet vxlan {identifier} IPv{version} of {identity}".encode()).digest()
    octets = bytes([digest[0] & 0xFC | 0x02, *digest[1:6]])
    return octets.hex(":")


def _shown(value: JSON) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
