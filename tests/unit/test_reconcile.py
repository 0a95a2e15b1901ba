"""The desired state, as pure functions."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlaynet import network
from overlaynet.model import IPNetwork, Lease, LeaseData, Malformed, Peer, Route, Snapshot, Subnets
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
        ("10.244.2.0/24", "172.16.130.141", "its public address 172.16.130.141 is this node's own"),
        ("10.244.2.0/24", "127.0.0.2", "its public address 127.0.0.2 is not one that a host can be reached at"),
        ("10.244.2.0/24", "0.0.0.7", "its public address 0.0.0.7 is not one that a host can be reached at"),
        (
            "10.244.128.0/17",
            "172.16.130.7",
            "it claims 10.244.128.0/17, too much of the network 10.244.0.0/16 for one node",
        ),
        ("10.244.2.0/24", "10.244.9.9", "its public address 10.244.9.9 lies inside the overlay itself"),
    ],
)
def test_absurd_leases_are_rejected_with_a_reason(subnet: str, address: str | None, reason: str) -> None:
    bad = lease(subnet, address, "b")
    good = lease("10.244.200.0/24", "172.16.130.200", "good")
    desired = desired_peers(NETWORK, OWN, Snapshot((OWN, bad, good)), "udp", local=[IPv4Address("172.16.130.141")])
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


@pytest.mark.parametrize("address", ["ff02::1", "::1", "::", "fe80::1", "::ffff:127.0.0.1", "::ffff:192.0.2.1"])
def test_absurd_ipv6_addresses_are_rejected(address: str) -> None:
    bad = attrs.evolve(lease("10.244.2.0/24", "172.16.130.164", "b"), public_ipv6=IPv6Address(address))
    desired = desired_peers(NETWORK, OWN, Snapshot((OWN, bad)), "udp")
    assert desired.peers == ()
    (rejected,) = desired.rejected
    assert rejected.reason == f"its public address {IPv6Address(address)} is not one that a host can be reached at"


def test_of_overlapping_leases_the_one_that_the_network_grants_is_a_peer() -> None:
    wide = lease("10.244.0.0/18", "172.16.130.1", "wide")
    granted = lease("10.244.9.0/24", "172.16.130.2", "granted")
    narrow = lease("10.244.9.128/25", "172.16.130.3", "narrow")
    own = lease("10.244.200.0/24", "172.16.130.140", "a")
    desired = desired_peers(NETWORK, own, Snapshot((wide, granted, narrow, own)), "udp")
    assert [peer.node for peer in desired.peers] == ["granted"]
    assert [(problem.key, problem.reason) for problem in desired.rejected] == [
        ("subnets/10.244.0.0-18", "it claims 10.244.0.0/18, which overlaps 10.244.9.0/24 of another lease"),
        ("subnets/10.244.9.128-25", "it claims 10.244.9.128/25, which overlaps 10.244.9.0/24 of another lease"),
    ]


def test_of_overlapping_leases_that_the_network_does_not_grant_the_first_is_a_peer() -> None:
    older = network.parse('{"Network": "10.244.0.0/16", "SubnetLen": 28}')
    leases = [lease("10.244.8.0/22", "172.16.130.1", "wide"), lease("10.244.9.0/24", "172.16.130.2", "narrow")]
    desired = desired_peers(older, OWN, Snapshot((OWN, *leases)), "udp")
    assert [peer.node for peer in desired.peers] == ["wide"]


@pytest.mark.parametrize("first", ["10.244.9.0/24", "10.244.9.255/32", "10.244.9.0/32"])
@pytest.mark.parametrize("second", ["10.244.9.0/24", "10.244.9.255/32", "10.244.9.0/32"])
def test_overlaps_at_the_edges_are_found(first: str, second: str) -> None:
    leases = [lease(first, "172.16.130.1", "first"), lease(second, "172.16.130.2", "second")]
    older = network.parse('{"Network": "10.244.0.0/16", "SubnetLen": 28}')
    desired = desired_peers(older, OWN, Snapshot((OWN, *leases)), "udp")
    overlap = IPv4Network(first).overlaps(IPv4Network(second))
    assert [peer.node for peer in desired.peers] == (["first"] if overlap else ["first", "second"])


def test_of_two_records_of_the_same_subnet_one_is_a_peer() -> None:
    twice = [lease("10.244.9.0/24", "172.16.130.1", "one"), lease("10.244.9.0/24", "172.16.130.2", "other")]
    desired = desired_peers(NETWORK, OWN, Snapshot((OWN, *twice)), "udp")
    assert [peer.node for peer in desired.peers] == ["one"]
    assert len(desired.rejected) == 1


def test_nodes_behind_one_address_are_peers_of_all_others() -> None:
    nodes = [lease(f"10.244.{n}.0/24", "172.16.130.9", f"node-{n}") for n in range(2, 10)]
    desired = desired_peers(NETWORK, OWN, Snapshot((OWN, *nodes)), "udp")
    assert [peer.node for peer in desired.peers] == [node.node for node in nodes]


BOTH = network.parse('{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}')
OWN_BOTH = Lease(
    Subnets(IPv4Network("10.244.1.0/24"), IPv6Network("fd00:10:244:1::/64")),
    IPv4Address("172.16.130.140"),
    IPv6Address("2001:db8::140"),
    node="a",
)
LOCAL = (IPv4Address("192.168.7.7"), IPv6Address("2001:db8:7::7"))


def _few_ipv4() -> st.SearchStrategy[IPv4Network]:
    """Subnets that often overlap, and often are none that a node could have."""
    return st.one_of(
        st.builds(
            lambda third, length: IPv4Network((f"10.244.{third}.0", length), strict=False),
            st.integers(0, 12),
            st.integers(8, 31),
        ),
        st.builds(lambda third: IPv4Network(f"10.244.{third}.0/24"), st.integers(0, 12)),
        st.builds(
            lambda n, length: IPv4Network((n, length), strict=False), st.integers(0, 2**32 - 1), st.integers(1, 32)
        ),
        st.sampled_from([IPv4Network(text) for text in ("127.0.0.0/8", "224.0.0.0/4", "128.0.0.0/1", "255.0.0.0/8")]),
    )


def _few_ipv6() -> st.SearchStrategy[IPv6Network]:
    return st.one_of(
        st.builds(
            lambda part, length: IPv6Network((f"fd00:10:244:{part:x}::", length), strict=False),
            st.integers(0, 12),
            st.integers(16, 127),
        ),
        st.builds(lambda part: IPv6Network(f"fd00:10:244:{part:x}::/64"), st.integers(0, 12)),
        st.sampled_from([IPv6Network(text) for text in ("ff00::/8", "::1/128", "8000::/1", "fe80::/10")]),
    )


_ABSURD = ["0.0.0.0", "0.1.2.3", "127.0.0.1", "127.9.9.9", "224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1"]
_ABSURD += ["10.244.3.3", "172.16.130.140", "192.168.7.7"]
_ABSURD6 = ["::", "::1", "ff02::1", "fe80::7", "::ffff:10.0.0.1", "fd00:10:244:3::3", "2001:db8::140", "2001:db8:7::7"]

some_subnets = st.one_of(
    st.builds(Subnets, _few_ipv4()),
    st.builds(lambda ipv6: Subnets(ipv6=ipv6), _few_ipv6()),
    st.builds(Subnets, _few_ipv4(), _few_ipv6()),
)
_any_lease = st.builds(
    Lease,
    some_subnets,
    st.none() | st.sampled_from(list(map(IPv4Address, [*_ABSURD, "172.16.130.1", "172.16.130.2"]))),
    st.none() | st.none() | st.sampled_from(list(map(IPv6Address, [*_ABSURD6, "2001:db8::1"]))),
    node=st.sampled_from(["", "a", "b", "c"]),
    data=st.builds(LeaseData, st.sampled_from(["", "", "udp", "vxlan"])),
)
# Nothing is wrong with it by itself; but it may overlap another.
_likely_lease = st.builds(
    lambda third, length: Lease(
        Subnets(IPv4Network((f"10.244.{third}.0", length), strict=False)), IPv4Address("172.16.130.1"), node="b"
    ),
    st.integers(2, 7),
    st.integers(22, 26),
)
some_leases = st.lists(st.one_of(_any_lease, _likely_lease), max_size=30)


@settings(deadline=None, max_examples=400)
@given(some_leases)
def test_whatever_is_in_the_store_no_traffic_goes_astray(leases: list[Lease]) -> None:
    snapshot = Snapshot((OWN_BOTH, *leases))
    desired = desired_peers(BOTH, OWN_BOTH, snapshot, "udp", LOCAL)
    covered: list[IPNetwork] = list(OWN_BOTH.subnets)
    for peer in desired.peers:
        assert peer.node != "a"
        for subnet in peer.subnets:
            overlay = ip_network("10.244.0.0/16" if subnet.version == 4 else "fd00:10:244::/48")
            assert subnet.version == overlay.version
            assert subnet.network_address in overlay
            assert subnet.broadcast_address in overlay
            assert subnet.prefixlen >= overlay.prefixlen + 2
            same_family = [other for other in covered if other.version == subnet.version]
            assert not any(subnet.overlaps(other) for other in same_family)
        covered += peer.subnets
        addresses = {str(address) for address in (peer.public_ipv4, peer.public_ipv6) if address is not None}
        assert addresses
        assert addresses <= {"172.16.130.1", "172.16.130.2", "2001:db8::1"}
    others = [lease for lease in leases if lease.node != "a" and lease.subnets != OWN_BOTH.subnets]
    assert len(desired.peers) + len(desired.rejected) == len(others), "each is a peer, or is reported"
    assert desired_peers(BOTH, OWN_BOTH, snapshot, "udp", LOCAL) == desired


@settings(deadline=None)
@given(some_leases, st.integers(2, 12))
def test_whatever_is_in_the_store_a_proper_lease_stays_a_peer(leases: list[Lease], number: int) -> None:
    proper = Lease(
        Subnets(IPv4Network(f"10.244.{number}.0/24"), IPv6Network(f"fd00:10:244:{number:x}::/64")),
        IPv4Address("172.16.130.9"),
        node="proper",
    )
    others = [lease for lease in leases if not (BOTH.grants(lease.subnets) and lease.subnets.overlaps(proper.subnets))]
    desired = desired_peers(BOTH, OWN_BOTH, Snapshot((*others, OWN_BOTH, proper)), "udp", LOCAL)
    assert "proper" in [peer.node for peer in desired.peers]


def test_of_ten_thousand_leases_each_is_compared_with_few_others() -> None:
    wide = network.parse('{"Network": "10.0.0.0/8"}')
    subnets = list(IPv4Network("10.0.0.0/8").subnets(new_prefix=24))
    own = lease(str(subnets[1]), "172.16.130.140", "a")
    leases = [lease(str(subnet), "172.16.130.1", f"node-{subnet}") for subnet in subnets[2:10_002]]
    comparisons = 0
    real = Subnets.overlaps

    def counted(one: Subnets, other: Subnets) -> bool:
        nonlocal comparisons
        comparisons += 1
        return real(one, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subnets, "overlaps", counted)
        assert len(desired_peers(wide, own, Snapshot((own, *leases)), "udp").peers) == 10_000
    assert comparisons <= 10_000
