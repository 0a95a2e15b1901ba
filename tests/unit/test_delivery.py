"""Which peer a packet goes to, and which packets may come from one."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlaynet.delivery import Delivery, Dropped
from overlaynet.model import Peer, Subnets
from overlaynet.testing.pretended import datagram

NAT = IPv4Address("192.0.2.9")
OWN = Subnets(IPv4Network("10.244.1.0/24"), IPv6Network("fd00:10:244:1::/64"))
BOTH = Peer(
    Subnets(IPv4Network("10.244.2.0/24"), IPv6Network("fd00:10:244:2::/64")),
    IPv4Address("192.0.2.2"),
    IPv6Address("2001:db8::2"),
)
THIRD = Peer(Subnets(IPv4Network("10.244.3.0/24")), NAT)
FOURTH = Peer(Subnets(IPv4Network("10.244.4.0/24")), NAT)
DELIVERY = Delivery(OWN, [BOTH, THIRD, FOURTH])


@pytest.mark.parametrize(
    ("destination", "peer"),
    [("10.244.2.7", BOTH), ("fd00:10:244:2::7", BOTH), ("10.244.3.255", THIRD), ("10.244.4.0", FOURTH)],
)
def test_a_packet_goes_to_the_peer_in_whose_subnet_its_destination_lies(destination: str, peer: Peer) -> None:
    source = "10.244.1.1" if "." in destination else "fd00:10:244:1::1"
    assert DELIVERY.receiver(datagram(source, destination, b"content")) == peer


@pytest.mark.parametrize(
    ("host", "source", "destination", "peer"),
    [
        ("192.0.2.2", "10.244.2.7", "10.244.1.1", BOTH),
        ("2001:db8::2", "10.244.2.7", "10.244.1.1", BOTH),
        ("192.0.2.2", "fd00:10:244:2::7", "fd00:10:244:1::1", BOTH),
        ("192.0.2.9", "10.244.3.1", "10.244.1.255", THIRD),
        ("192.0.2.9", "10.244.4.1", "10.244.1.255", FOURTH),
    ],
)
def test_what_a_peer_sends_from_its_own_subnet_may_come_in(
    host: str, source: str, destination: str, peer: Peer
) -> None:
    assert DELIVERY.sender(datagram(source, destination), ip_address(host)) == peer


@pytest.mark.parametrize(
    ("host", "source", "destination", "message"),
    [
        ("192.0.2.3", "10.244.2.7", "10.244.1.1", "unknown_peer: no peer is at 192.0.2.3"),
        ("192.0.2.2", "10.244.3.7", "10.244.1.1", "spoofed_source: 10.244.3.7 is not in the subnet of the peer at 192.0.2.2"),
        ("192.0.2.9", "10.244.2.7", "10.244.1.1", "spoofed_source: 10.244.2.7 is not in the subnet of the peer at 192.0.2.9"),
        ("192.0.2.2", "10.244.1.7", "10.244.1.1", "spoofed_source: 10.244.1.7 is not in the subnet of the peer at 192.0.2.2"),
        ("192.0.2.2", "10.244.2.7", "10.244.3.1", "foreign_destination: 10.244.3.1 is not in this node's subnet"),
        ("192.0.2.2", "fd00:10:244:2::7", "fd00:10:244:2::8", "foreign_destination: fd00:10:244:2::8 is not in this"),
    ],
)  # fmt: skip
def test_whatever_else_comes_is_dropped_with_its_reason(host: str, source: str, destination: str, message: str) -> None:
    with pytest.raises(Dropped) as caught:
        DELIVERY.sender(datagram(source, destination), ip_address(host))
    assert str(caught.value).startswith(message)


def test_a_packet_for_nobody_is_dropped() -> None:
    with pytest.raises(Dropped, match=r"^no_route: no peer has 10\.244\.5\.1$"):
        DELIVERY.receiver(datagram("10.244.1.1", "10.244.5.1"))


@pytest.mark.parametrize("cut", [0, 1, 19, 20, 27])
def test_what_is_not_one_whole_packet_is_malformed(cut: int) -> None:
    for packet in (datagram("10.244.2.1", "10.244.1.1")[:cut], datagram("10.244.2.1", "10.244.1.1") + b"more"):
        for look in (DELIVERY.receiver, lambda packet: DELIVERY.sender(packet, NAT)):
            with pytest.raises(Dropped) as caught:
                look(packet)
            assert caught.value.reason == "malformed"


@given(st.binary(max_size=100), st.sampled_from([*DELIVERY.hosts, IPv4Address("192.0.2.77")]))
def test_nothing_that_comes_does_worse_than_be_dropped(packet: bytes, host: IPv4Address | IPv6Address) -> None:
    try:
        sender = DELIVERY.sender(packet, host)
    except Dropped:
        return
    assert host in (sender.public_ipv4, sender.public_ipv6)
