"""Which peers are reached by which tunnels: pure functions of what they publish."""

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as some

from overlaynet.backends.vxlan import VxlanOptions
from overlaynet.backends.vxlan.tunnels import (
    Plan,
    Tunnel,
    derive_hardware_address,
    make_plan,
    publish,
    read_hardware_address,
)
from overlaynet.errors import ConfigError
from overlaynet.model import Lease, LeaseData, Peer, Subnets
from overlaynet.netlink import ForwardingEntry, Neighbour
from overlaynet.options import parse
from overlaynet.records import decode_lease, encode_lease

OWN = {4: "02:00:00:00:00:01", 6: "02:00:00:00:06:01"}
SUBNET, SUBNET6 = IPv4Network("10.244.2.0/24"), IPv6Network("fd00:10:244:2::/64")
HOST, HOST6 = IPv4Address("172.16.130.164"), IPv6Address("fd00:130::164")
MAC, MAC6 = "c6:d2:32:6f:8f:44", "c6:d2:32:6f:8f:66"
PEER = Peer(
    Subnets(SUBNET, SUBNET6),
    HOST,
    HOST6,
    data=LeaseData("vxlan", {"VNI": 1, "VtepMAC": MAC}, {"VNI": 1, "VtepMAC": MAC6}),
)
PEER_IPV4 = Peer(Subnets(SUBNET), HOST, data=LeaseData("vxlan", {"VNI": 1, "VtepMAC": MAC}))


def test_a_peer_has_a_tunnel_for_each_ip_version() -> None:
    plan = make_plan([PEER], 1, OWN)
    assert plan == Plan((Tunnel(SUBNET, MAC, HOST), Tunnel(SUBNET6, MAC6, HOST6)))
    ipv4, ipv6 = plan.tunnels
    assert list(plan.of_version(4)) == [ipv4]
    assert list(plan.of_version(6)) == [ipv6]
    assert ipv4.gateway == IPv4Address("10.244.2.0")
    assert ipv4.neighbour == Neighbour(IPv4Address("10.244.2.0"), MAC)
    assert ipv4.forwarding_entry == ForwardingEntry(MAC, HOST)
    assert ipv6.neighbour == Neighbour(IPv6Address("fd00:10:244:2::"), MAC6)
    assert ipv6.forwarding_entry == ForwardingEntry(MAC6, HOST6)


def test_a_host_on_the_link_needs_no_tunnel() -> None:
    assert make_plan([PEER], 1, OWN, {HOST}) == Plan((Tunnel(SUBNET6, MAC6, HOST6),), {SUBNET: HOST})
    nothing_published = attrs.evolve(PEER, data=LeaseData("vxlan"))
    assert make_plan([nothing_published], 1, OWN, {HOST, HOST6}) == Plan((), {SUBNET: HOST, SUBNET6: HOST6})


def test_what_cannot_be_reached_is_skipped_with_a_reason_and_keeps_no_other_from_it() -> None:
    def skipped(peer: Peer, own: dict[int, str] = OWN) -> dict[str, str]:
        plan = make_plan([peer, attrs.evolve(PEER_IPV4, subnets=Subnets(IPv4Network("10.244.9.0/24")))], 1, own)
        assert IPv4Network("10.244.9.0/24") in {*(tunnel.subnet for tunnel in plan.tunnels), *plan.skipped}
        return {str(subnet): reason for subnet, reason in plan.skipped.items()}

    elsewhere = attrs.evolve(PEER, data=LeaseData("vxlan", {"VNI": 1, "VtepMAC": "02:00:00:00:00:99"}, PEER.data.ipv6))
    assert skipped(attrs.evolve(elsewhere, public_ipv6=None)) == {str(SUBNET6): "it has no public IPv6 address"}
    assert skipped(attrs.evolve(elsewhere, public_ipv4=None)) == {str(SUBNET): "it has no public IPv4 address"}
    assert skipped(elsewhere, {4: OWN[4]}) == {str(SUBNET6): "this node carries no IPv6"}
    another = {"10.244.9.0/24": f"its VtepMAC {MAC} is that of 10.244.2.0/24, too"}
    assert skipped(attrs.evolve(PEER_IPV4, public_ipv4=IPv4Address("172.16.130.9"))) == another
    assert skipped(attrs.evolve(PEER_IPV4, node="another behind the same address")) == another
    of_this_node = attrs.evolve(PEER_IPV4, data=LeaseData("vxlan", {"VNI": 1, "VtepMAC": OWN[4].upper()}))
    assert skipped(of_this_node) == {str(SUBNET): "its VtepMAC 02:00:00:00:00:01 is that of this node, too"}


def test_several_subnets_of_one_node_have_tunnels_to_one_device() -> None:
    """As long as a claim that came too late stands beside the node's lease: whichever is first must not hide the other."""
    for node in ("a", ""):
        remnant = attrs.evolve(PEER, subnets=Subnets(IPv4Network("10.244.1.0/24"), SUBNET6), node=node)
        lease = attrs.evolve(PEER_IPV4, node=node)
        assert make_plan([remnant, lease], 1, OWN) == Plan(
            (
                Tunnel(IPv4Network("10.244.1.0/24"), MAC, HOST),
                Tunnel(SUBNET6, MAC6, HOST6),
                Tunnel(SUBNET, MAC, HOST),
            )
        )


@pytest.mark.parametrize(
    "value", [{"VNI": 1, "VtepMAC": MAC}, {"VtepMAC": MAC.upper()}, {"vtepmac": MAC, "vni": 1, "x": None}]
)
def test_what_flannel_publishes_is_read(value: Any) -> None:
    """Names without regard to case, as Go reads them; a version of flannel without the VNI is an old one."""
    assert read_hardware_address(value, 1) == MAC


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "its lease says nothing of a VXLAN device; does its node run another backend?"),
        ([], "what its lease says of its VXLAN device is not a JSON object"),
        ({"VNI": 2, "VtepMAC": MAC}, "its VNI is 2, and this node's is 1"),
        ({"VNI": True, "VtepMAC": MAC}, "its VNI is True, and this node's is 1"),
        ({"VNI": "1", "VtepMAC": MAC}, "its VNI is '1', and this node's is 1"),
        *(
            ({"VNI": 1, "VtepMAC": wrong}, f"its VtepMAC is {wrong!r}, not a hardware address such as {MAC}")
            for wrong in (None, 5, "", "x", MAC[:-1], f"{MAC}:00", "00:00:00:00:00:00", "01:00:5e:00:00:01", f"{MAC}\n")
        ),
        ({}, f"its VtepMAC is None, not a hardware address such as {MAC}"),
    ],
)
def test_what_cannot_be_read_is_said(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match="^its|^what") as refused:
        read_hardware_address(value, 1)
    assert str(refused.value) == reason


_MEMBERS = some.sampled_from(["VNI", "VtepMAC", "vtepmac"])
_JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.text() | some.just(MAC),
    lambda inner: some.lists(inner) | some.dictionaries(_MEMBERS, inner),
)


@given(_JSON)
def test_whatever_is_published_is_read_or_refused_briefly(value: Any) -> None:
    plan = make_plan([attrs.evolve(PEER_IPV4, data=LeaseData("vxlan", value))], 1, OWN)
    if plan.tunnels:
        assert plan.tunnels == (Tunnel(SUBNET, MAC, HOST),)
    else:
        assert len(plan.skipped[SUBNET]) < 200


def test_the_record_of_a_lease_is_flannels_to_the_byte() -> None:
    data = LeaseData("vxlan", publish(1, MAC), publish(1, MAC6))
    ipv4 = Lease(Subnets(SUBNET), IPv4Address("192.168.64.3"), data=attrs.evolve(data, ipv6=None))
    assert encode_lease(ipv4) == (
        b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}'
    )
    both = Lease(Subnets(SUBNET, SUBNET6), IPv4Address("192.168.64.3"), IPv6Address("fd00::3"), data)
    assert encode_lease(both) == (
        b'{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::3","BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:66"}}'
    )
    assert decode_lease("subnets/10.244.2.0-24&fd00:10:244:2::-64", encode_lease(both)).data == data
    assert json.dumps(publish(1, MAC)) == '{"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"}'


def test_a_hardware_address_is_a_nodes_own_and_stays_the_same() -> None:
    made = {
        derive_hardware_address(node, identifier, version)
        for node in ("5f0c8a3e1b2d", "5f0c8a3e1b2e")
        for identifier in (1, 2)
        for version in (4, 6)
    }
    assert len(made) == 8
    for address in made:
        first = int(address[:2], 16)
        assert first & 3 == 2, "locally administered, and of one station"
        assert read_hardware_address({"VtepMAC": address}, 1) == address
    # Peers keep what was published: from one version to the next, it must not change.
    assert derive_hardware_address("5f0c8a3e1b2d", 1, 4) == "72:02:1d:83:e1:5b"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"VNI": 0}, "option VNI must be between 1 and 16777215, not 0"),
        ({"VNI": 2**24}, "option VNI must be between 1 and 16777215"),
        ({"Port": 65536}, "option Port must be between 0 and 65535"),
        ({"Port": "8472"}, "option Port must be a whole number, not '8472'"),
        ({"Name": "a-name-too-long"}, "option Name must be an interface name of 1 to 12 bytes, not 'a-name-too-long'"),
        ({"Name": "a b"}, "option Name must be an interface name, such as 'overlay0', not 'a b'"),
        ({"MTU": 575}, "option MTU must be between 576 and 65535"),
        ({"GBP": 1}, "option GBP must be true or false, not 1"),
        ({"DirectRoute": True}, "did you mean 'DirectRouting'?"),
    ],
)
def test_options_that_cannot_be_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(VxlanOptions, given, "backend vxlan")
    assert message in str(refused.value)


def test_flannels_options_are_understood() -> None:
    document = {"VNI": 4096, "Port": 4789, "GBP": True, "Learning": True, "DirectRouting": True, "MTU": 1400}
    assert parse(VxlanOptions, document, "backend vxlan") == VxlanOptions(
        identifier=4096, port=4789, group_policy=True, learning=True, direct_routing=True, mtu=1400
    )
    assert parse(VxlanOptions, {}, "backend vxlan") == VxlanOptions()
