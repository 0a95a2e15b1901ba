"""The desired state, as pure functions."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import attrs
import pytest

from overlaynet import network
from overlaynet.model import Lease, LeaseData, Malformed, Peer, Route, Snapshot, Subnets
from overlaynet.reconcile import backstops, desired_peers, difference

NETWORK = network.parse('{"Network": "10.244.0.0/16"}')


def lease(subnet: str, address: str | None, node: str = "", backend_type: str = "") -> Lease:
    return Lease(
        Subnets(IPv4Network(subnet)),
        None if address is None else IPv4Address(address),
        node=node,
        data=LeaseData(backend_type),
    )


OWN = lease("10.244.1.0/24", "172.16.130.140", "a")


def test_every_other_lease_is_a_peer() -> None:
    other = lease("10.244.2.0/24", "172.16.130.164", "b")
    flannels = lease("10.244.3.0/24", "172.16.130.165")
    desired = desired_peers(NETWORK, OWN, Snapshot((OWN, other, flannels)), "udp")
    assert [str(peer) for peer in desired.peers] == [
        "10.244.2.0/24 via 172.16.130.164",
        "10.244.3.0/24 via 172.16.130.165",
    ]
    assert desired.rejected == ()


@pytest.mark.parametrize(
    ("subnet", "address", "reason"),
    [
        ("10.99.0.0/24", "172.16.130.7", "it claims 10.99.0.0/24, outside the network 10.244.0.0/16"),
        ("10.0.0.0/8", "172.16.130.7", "it claims 10.0.0.0/8, outside the network 10.244.0.0/16"),
        ("10.244.0.0/16", "172.16.130.7", "it claims 10.244.0.0/16, which overlaps this node's own 10.244.1.0/24"),
        ("10.244.1.128/25", "172.16.130.7", "it claims 10.244.1.128/25, which overlaps this node's own 10.244.1.0/24"),
        ("10.244.2.0/24", None, "it has no public address"),
        ("10.244.2.0/24", "172.16.130.140", "its public address 172.16.130.140 is this node's own"),
        ("10.244.2.0/24", "224.0.0.5", "its public address 224.0.0.5 is not one that a host can be reached at"),
        (
            "10.244.2.0/24",
            "255.255.255.255",
            "its public address 255.255.255.255 is not one that a host can be reached at",
        ),
        ("10.244.2.0/24", "10.244.9.9", "its public address 10.244.9.9 lies inside the overlay itself"),
    ],
)
def test_absurd_leases_are_rejected_with_a_reason(subnet: str, address: str | None, reason: str) -> None:
    bad = lease(subnet, address, "b")
    good = lease("10.244.200.0/24", "172.16.130.200", "good")
    desired = desired_peers(NETWORK, OWN, Snapshot((OWN, bad, good)), "udp")
    assert [peer.node for peer in desired.peers] == ["good"]
    (rejected,) = desired.rejected
    assert rejected.reason == reason


@pytest.mark.parametrize(
    ("subnet", "address", "reason"),
    [
        ("fd00:99::/64", "fd00:16::7", "it claims fd00:99::/64, outside the network fd00:10:244::/48"),
        (
            "fd00:10:244:1::/66",
            "fd00:16::7",
            "it claims fd00:10:244:1::/66, which overlaps this node's own fd00:10:244:1::/64",
        ),
        ("fd00:10:244:2::/64", "fd00:16::140", "its public address fd00:16::140 is this node's own"),
        ("fd00:10:244:2::/64", "ff02::1", "its public address ff02::1 is not one that a host can be reached at"),
        ("fd00:10:244:2::/64", "fe80::7", "its public address fe80::7 is not one that a host can be reached at"),
        (
            "fd00:10:244:2::/64",
            "::ffff:172.16.130.7",
            "its public address ::ffff:172.16.130.7 is not one that a host can be reached at",
        ),
        (
            "fd00:10:244:2::/64",
            "fd00:10:244:9::9",
            "its public address fd00:10:244:9::9 lies inside the overlay itself",
        ),
        ("10.244.2.0/24", "fd00:16::7", "it claims 10.244.2.0/24, outside the network fd00:10:244::/48"),
    ],
)
def test_absurd_leases_of_ipv6_are_rejected_with_a_reason(subnet: str, address: str, reason: str) -> None:
    network6 = network.parse('{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}')
    own = Lease(Subnets(ipv6=IPv6Network("fd00:10:244:1::/64")), public_ipv6=IPv6Address("fd00:16::140"), node="a")
    claimed = ip_network(subnet)
    subnets = Subnets(claimed) if isinstance(claimed, IPv4Network) else Subnets(ipv6=claimed)
    bad = Lease(subnets, public_ipv6=IPv6Address(address), node="b")
    good = Lease(Subnets(ipv6=IPv6Network("fd00:10:244:200::/64")), IPv4Address("172.16.130.200"), node="good")
    desired = desired_peers(network6, own, Snapshot((own, bad, good)), "udp")
    assert [str(peer) for peer in desired.peers] == ["fd00:10:244:200::/64 via 172.16.130.200"]
    (rejected,) = desired.rejected
    assert rejected.reason.replace("::ffff:ac10:8207", "::ffff:172.16.130.7") == reason


def test_malformed_records_are_passed_on_and_empty_nothing() -> None:
    bad = Malformed("subnets/10.244.7.0-24", "its value is not JSON")
    other = lease("10.244.2.0/24", "172.16.130.164", "b")
    desired = desired_peers(NETWORK, OWN, Snapshot((OWN, other), (bad,)), "udp")
    assert len(desired.peers) == 1
    assert desired.rejected == (bad,)


def test_a_foreign_backend_is_no_peer_but_its_own_name_or_none_is() -> None:
    leases = [
        lease(f"10.244.{n}.0/24", f"172.16.130.{n}", backend_type=name)
        for n, name in ((2, "vxlan"), (3, "udp"), (4, ""))
    ]
    desired = desired_peers(NETWORK, OWN, Snapshot((OWN, *leases)), "udp")
    assert [str(peer.subnets) for peer in desired.peers] == ["10.244.3.0/24", "10.244.4.0/24"]


def test_an_old_lease_of_this_node_is_neither_peer_nor_problem() -> None:
    old = lease("10.244.9.0/24", "172.16.130.140", "a")
    desired = desired_peers(NETWORK, OWN, Snapshot((OWN, old)), "udp")
    assert not desired.peers
    assert not desired.rejected


def test_difference() -> None:
    one = Peer(Subnets(IPv4Network("10.244.2.0/24")), IPv4Address("172.16.130.164"))
    two = Peer(Subnets(IPv4Network("10.244.3.0/24")), IPv4Address("172.16.130.165"))
    moved = attrs.evolve(one, public_ipv4=IPv4Address("172.16.130.166"))
    assert not difference([one, two], [two, one])
    changes = difference([one], [moved, two])
    assert changes.added == (two,)
    assert changes.changed == ((one, moved),)
    assert changes.removed == ()
    assert difference([one, two], []).removed == (one, two)


def test_each_overlay_has_a_backstop() -> None:
    both = network.parse('{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}')
    assert list(backstops(both)) == [Route(overlay, kind="unreachable") for overlay in both]
