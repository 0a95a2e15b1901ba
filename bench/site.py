"""Two hosts on one wire and a container on each, as network namespaces: what every path is measured on.

client ── cni0  host  eth0 ──────── eth0  host  cni0 ── server
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import attrs

from overlaynet.testing.namespaces import NetworkNamespace

MODES = {
    "wire": "wire-like: every frame on the underlay is at most 1500 bytes, as between real network cards",
    "plain": "plain veth: the underlay takes frames of up to 64 KiB whole, as nothing but one machine's memory does",
}

OVERLAY = IPv4Network("10.244.0.0/16")
CONTAINER_MTU = 1440
"""Bytes. What fits into every tunnel measured here on an underlay of 1500, so that all of them carry equal packets."""

_UNDERLAY = (IPv4Address("172.16.130.1"), IPv4Address("172.16.130.2"))
_SUBNETS = (IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24"))
# The sender must not hand over what a network card would cut; GRO at the receiver is what network cards' drivers do.
_WIRE_LIKE = "tso off gso off tx-udp-segmentation off tx-udp_tnl-segmentation off gro on"


@attrs.frozen
class Host:
    """One of the two hosts, and its container."""

    label: str
    """``a`` or ``b``."""
    namespace: NetworkNamespace
    container: NetworkNamespace
    underlay: IPv4Address
    """Of ``eth0``."""
    subnet: IPv4Network
    """Of the container."""

    @property
    def gateway(self) -> IPv4Address:
        """Of ``cni0``, and the container's way out."""
        return self.subnet[1]

    @property
    def container_address(self) -> IPv4Address:
        """Where the container is in the overlay."""
        return self.subnet[96]


@attrs.frozen
class Site:
    """Traffic goes from the container of ``a`` to that of ``b``."""

    a: Host
    b: Host

    @property
    def hosts(self) -> tuple[tuple[Host, Host], tuple[Host, Host]]:
        """Each host, and the other one."""
        return (self.a, self.b), (self.b, self.a)


@contextlib.contextmanager
def build(mode: str, subnets: tuple[IPv4Network, IPv4Network] = _SUBNETS) -> Iterator[Site]:
    """Make the hosts, and take them down in the end with all that runs in them.

    :param mode: one of :data:`MODES`.
    :param subnets: of the two hosts' bridges.
    :raises NamespaceError: if the machine cannot do it.
    """
    with contextlib.ExitStack() as stack:

        def made(label: str) -> NetworkNamespace:
            return stack.enter_context(NetworkNamespace(label=f"bench-{label}"))

        a, b = (
            Host(label, made(f"host-{label}"), made(f"container-{label}"), underlay, subnet)
            for label, underlay, subnet in zip("ab", _UNDERLAY, subnets, strict=True)
        )
        a.namespace.ip(f"link add eth0 type veth peer name eth0 netns {b.namespace.name}")
        for host in (a, b):
            _configure(host)
            if mode == "wire":
                host.namespace.execute(["ethtool", "-K", "eth0", *_WIRE_LIKE.split()])
        yield Site(a, b)


def _configure(host: Host) -> None:
    host.namespace.set_sysctl("net.ipv4.ip_forward", 1)
    host.namespace.ip(
        "link set lo up",
        f"address add {host.underlay}/24 dev eth0",
        "link set eth0 up",
        "link add cni0 type bridge mcast_snooping 0",
        f"address add {host.gateway}/{host.subnet.prefixlen} dev cni0",
        "link set cni0 up",
        f"link add veth0 mtu {CONTAINER_MTU} type veth peer name eth0 mtu {CONTAINER_MTU} netns {host.container.name}",
        "link set veth0 master cni0 up",
    )
    host.container.ip(
        "link set lo up",
        f"address add {host.container_address}/{host.subnet.prefixlen} dev eth0",
        "link set eth0 up",
        f"route add default via {host.gateway}",
    )
