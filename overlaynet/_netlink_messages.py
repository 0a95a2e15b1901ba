"""Links, addresses, routes and neighbours as values, and their translation from and to pyroute2's messages (rtnetlink(7)).

For :mod:`overlaynet.netlink`, which is where they are imported from.
"""

from __future__ import annotations

import ipaddress
import socket
from ipaddress import IPv4Interface, IPv6Interface
from typing import Any, TypeAlias

import attrs

from overlaynet.model import IPAddress, IPNetwork

IPInterface: TypeAlias = IPv4Interface | IPv6Interface
"""An address together with the length of its prefix: ``10.244.1.0/32``."""

MAIN_TABLE = 254
SCOPE_GLOBAL, SCOPE_LINK, SCOPE_HOST = 0, 253, 254
DEFAULT_METRIC = {4: 0, 6: 1024}
"""The metric that a route gets if none is asked for, by IP version."""

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_KINDS = {
    1: "unicast",
    2: "local",
    3: "broadcast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
    9: "throw",
}
_KIND_NUMBERS = {name: number for number, name in _KINDS.items()}
_INTERFACE_UP = 0x1
_ON_LINK = 0x4
_ADDRESS_TEMPORARY = 0x01
ADDRESS_NODAD = 0x02
"""No duplicate address detection."""
_ADDRESS_DUPLICATE = 0x08
_ADDRESS_DEPRECATED = 0x20
_ADDRESS_TENTATIVE = 0x40
_ADDRESS_PERMANENT = 0x80

BRIDGE_FAMILY = 7
"""AF_BRIDGE: neighbours of this family are entries of a forwarding database."""
NEIGHBOUR_PERMANENT = 0x80
NEIGHBOUR_SELF = 0x02
"""The entry is in the device's own forwarding database, not in that of the bridge that it is a port of."""


@attrs.frozen
class Vxlan:
    """What a VXLAN device is made with, and cannot be changed to later."""

    identifier: int
    """VNI: which of the overlays that share a port a packet belongs to."""
    port: int
    """UDP port, both where it listens and where it sends to."""
    local: IPAddress | None = None
    """The outer source address; it decides the outer IP version."""
    interface: str | None = None
    """The interface that the outer packets leave by."""
    learning: bool = False
    """Senders of packets that come in are entered into the forwarding database."""
    group_policy: bool = False
    """Outer packets carry a group policy identifier (GBP)."""


@attrs.frozen
class Link:
    """A network interface."""

    index: int
    name: str
    kind: str
    """``tun``, ``bridge``, ``veth``, …; empty for a physical one and for the loopback."""
    mtu: int
    up: bool
    """Switched on by the administrator; says nothing about the cable."""
    alias: str = ""
    hardware_address: str = ""
    """``52:54:00:12:34:56``; empty if the link has none."""
    vxlan: Vxlan | None = None
    """Set if and only if :attr:`kind` is ``vxlan``."""


@attrs.frozen
class Neighbour:
    """The hardware address that an interface sends packets for an address to."""

    address: IPAddress
    hardware_address: str
    """Empty while it is looked for."""
    permanent: bool = True
    """Made by hand; the kernel neither confirms nor forgets it."""


@attrs.frozen
class ForwardingEntry:
    """The host that a VXLAN device sends frames for a hardware address to: an entry of its forwarding database (FDB).

    The address 00:00:00:00:00:00 stands for all that have none; it can have several entries.
    """

    hardware_address: str
    destination: IPAddress
    port: int | None = None
    """``None`` for the device's own; so with the next ones."""
    identifier: int | None = None
    interface_index: int | None = None
    permanent: bool = True
    """Made by hand; false for one that the device has learnt, which it forgets again."""


@attrs.frozen
class Address:
    """An address of an interface."""

    index: int
    interface: str
    address: IPInterface
    peer: IPAddress | None = None
    """The other end's address, on a point-to-point link that names it."""
    scope: int = SCOPE_GLOBAL
    permanent: bool = True
    """Set by hand; false for one with a lifetime, such as from DHCP or a router advertisement."""
    temporary: bool = False
    """A privacy address (RFC 8981); also set for the second and later IPv4 addresses of one prefix."""
    deprecated: bool = False
    """Still valid, but not for anything new: it will be gone before long."""
    tentative: bool = False
    """Not usable yet: duplicate address detection runs."""
    duplicate: bool = False
    """Not usable: duplicate address detection has found another host that has it."""


@attrs.frozen
class KernelRoute:
    """A route as the kernel has it."""

    destination: IPNetwork
    kind: str = "unicast"
    """``unicast``, ``unreachable``, ``blackhole``, …; a type without a name is its number."""
    device: str | None = None
    """The output interface, of the first next hop if there are several; ``None`` for kinds that lead nowhere."""
    gateway: IPAddress | None = None
    onlink: bool = False
    metric: int = 0
    protocol: int = 4
    """Who made it: 2 the kernel, 3 boot, 4 static, … (``/etc/iproute2/rt_protos``)."""
    scope: int = SCOPE_GLOBAL
    preferred_source: IPAddress | None = None
    multipath: bool = False
    """There are more next hops than the one that is shown."""

    def __str__(self) -> str:
        """As ``ip route`` takes it."""
        words = [] if self.kind == "unicast" else [self.kind]
        words.append(str(self.destination))
        words += [f"via {self.gateway}"] if self.gateway is not None else []
        words += [f"dev {self.device}"] if self.device is not None else []
        words.append(f"proto {self.protocol}")
        words += [f"metric {self.metric}"] if self.metric != DEFAULT_METRIC[self.destination.version] else []
        return " ".join(words)


class InterfaceNames:
    """The names of interfaces by index, each looked up once."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def __getitem__(self, index: int) -> str:
        if index not in self._known:
            try:
                self._known[index] = socket.if_indextoname(index)
            except OSError:  # deleted since the dump
                self._known[index] = f"#{index}"
        return self._known[index]


def read_link(message: Any) -> Link:
    information = message.get_attr("IFLA_LINKINFO")
    kind = (information.get_attr("IFLA_INFO_KIND") or "") if information is not None else ""
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=kind,
        mtu=message.get_attr("IFLA_MTU") or 0,
        up=bool(message["flags"] & _INTERFACE_UP),
        alias=message.get_attr("IFLA_IFALIAS") or "",
        hardware_address=message.get_attr("IFLA_ADDRESS") or "",
        vxlan=_read_vxlan(information.get_attr("IFLA_INFO_DATA")) if kind == "vxlan" else None,
    )


def _read_vxlan(data: Any) -> Vxlan:
    local = data.get_attr("IFLA_VXLAN_LOCAL") or data.get_attr("IFLA_VXLAN_LOCAL6")
    interface = data.get_attr("IFLA_VXLAN_LINK")
    return Vxlan(
        identifier=data.get_attr("IFLA_VXLAN_ID") or 0,
        port=data.get_attr("IFLA_VXLAN_PORT") or 0,
        local=ipaddress.ip_address(local) if local is not None else None,
        interface=InterfaceNames()[interface] if interface else None,
        learning=bool(data.get_attr("IFLA_VXLAN_LEARNING")),
        group_policy=bool(data.get_attr("IFLA_VXLAN_GBP")),
    )


def vxlan_arguments(vxlan: Vxlan, interface_index: int | None) -> dict[str, Any]:
    """The device as pyroute2 takes it."""
    arguments: dict[str, Any] = {
        "kind": "vxlan",
        "vxlan_id": vxlan.identifier,
        "vxlan_port": vxlan.port,
        "vxlan_learning": int(vxlan.learning),
    }
    if vxlan.local is not None:
        arguments["vxlan_local" if vxlan.local.version == 4 else "vxlan_local6"] = str(vxlan.local)
    if interface_index is not None:
        arguments["vxlan_link"] = interface_index
    if vxlan.group_policy:  # a flag: whatever the value, to name it is to set it
        arguments["vxlan_gbp"] = True
    return arguments


def read_neighbour(message: Any) -> Neighbour:
    return Neighbour(
        address=ipaddress.ip_address(message.get_attr("NDA_DST")),
        hardware_address=message.get_attr("NDA_LLADDR") or "",
        permanent=bool(message["state"] & NEIGHBOUR_PERMANENT),
    )


def read_forwarding_entry(message: Any) -> ForwardingEntry | None:
    """``None`` for an entry that does not lead to a host."""
    destination = message.get_attr("NDA_DST")
    if destination is None:
        return None
    return ForwardingEntry(
        hardware_address=message.get_attr("NDA_LLADDR") or "",
        destination=ipaddress.ip_address(destination),
        port=message.get_attr("NDA_PORT"),
        identifier=message.get_attr("NDA_VNI"),
        interface_index=message.get_attr("NDA_IFINDEX"),
        permanent=bool(message["state"] & NEIGHBOUR_PERMANENT),
    )


def forwarding_arguments(entry: ForwardingEntry, device_index: int) -> dict[str, Any]:
    """The entry as pyroute2 takes it."""
    arguments: dict[str, Any] = {
        "family": BRIDGE_FAMILY,
        "ifindex": device_index,
        "lladdr": entry.hardware_address,
        "dst": str(entry.destination),
        "flags": NEIGHBOUR_SELF,
    }
    # ifindex is the device's, so that of the entry goes by the kernel's name.
    given = {"port": entry.port, "vni": entry.identifier, "NDA_IFINDEX": entry.interface_index}
    return arguments | {name: value for name, value in given.items() if value is not None}


def read_address(message: Any, names: InterfaceNames) -> Address:
    far = message.get_attr("IFA_ADDRESS")
    own = message.get_attr("IFA_LOCAL") or far
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    return Address(
        index=message["index"],
        interface=names[message["index"]],
        address=ipaddress.ip_interface(f"{own}/{message['prefixlen']}"),
        peer=ipaddress.ip_address(far) if far != own else None,
        scope=message["scope"],
        permanent=bool(flags & _ADDRESS_PERMANENT),
        temporary=bool(flags & _ADDRESS_TEMPORARY),
        deprecated=bool(flags & _ADDRESS_DEPRECATED),
        tentative=bool(flags & _ADDRESS_TENTATIVE) and not flags & _ADDRESS_DUPLICATE,
        duplicate=bool(flags & _ADDRESS_DUPLICATE),
    )


def address_arguments(address: IPInterface, peer: IPAddress | None) -> dict[str, Any]:
    own = str(address.ip)
    return {
        "family": FAMILIES[address.version],
        "local": own,
        "address": own if peer is None else str(peer),
        "prefixlen": address.network.prefixlen,
    }


def read_route(message: Any, names: InterfaceNames) -> KernelRoute:
    version = 4 if message["family"] == socket.AF_INET else 6
    everything = "0.0.0.0" if version == 4 else "::"
    hops = message.get_attr("RTA_MULTIPATH") or []
    hop = hops[0] if hops else message
    device = hop["oif"] if hops else message.get_attr("RTA_OIF")
    via = hop.get_attr("RTA_VIA")
    gateway = via["addr"] if via is not None else hop.get_attr("RTA_GATEWAY")
    source = message.get_attr("RTA_PREFSRC")
    kind = _KINDS.get(message["type"], str(message["type"]))
    return KernelRoute(
        destination=ipaddress.ip_network(f"{message.get_attr('RTA_DST') or everything}/{message['dst_len']}"),
        kind=kind,
        # IPv6 shows the loopback as the device of routes that lead nowhere.
        device=names[device] if device and kind not in ("unreachable", "blackhole", "prohibit", "throw") else None,
        gateway=ipaddress.ip_address(gateway) if gateway is not None else None,
        onlink=bool(hop["flags"] & _ON_LINK),
        metric=message.get_attr("RTA_PRIORITY") or 0,
        protocol=message["proto"],
        scope=message["scope"],
        preferred_source=ipaddress.ip_address(source) if source is not None else None,
        multipath=len(hops) > 1,
    )


def route_arguments(route: KernelRoute, device_index: int | None) -> dict[str, Any]:
    """The route as pyroute2 takes it."""
    arguments: dict[str, Any] = {
        "family": FAMILIES[route.destination.version],
        "dst": str(route.destination),
        "table": MAIN_TABLE,
        "type": _KIND_NUMBERS.get(route.kind) or int(route.kind),
        "proto": route.protocol,
        "scope": route.scope,
        "priority": route.metric,
    }
    if device_index is not None:
        arguments["oif"] = device_index
    if route.gateway is not None:
        arguments["gateway"] = str(route.gateway)
    if route.onlink:
        arguments["flags"] = _ON_LINK
    if route.preferred_source is not None:
        arguments["prefsrc"] = str(route.preferred_source)
    return arguments
