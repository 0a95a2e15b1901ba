"""The native engine's peer table, with the standard library's networks as the judge."""

import random
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlaynet.backends.udp._native import Engine, find
from overlaynet.backends.udp.engine import EnginePeer
from overlaynet.backends.udp.native_engine import packed_own, packed_peer
from overlaynet.model import IPAddress, IPNetwork, Subnets

NOBODY, THIS_NODE = -1, -2
OUTER: tuple[IPAddress, ...] = tuple(map(ip_address, ("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2")))


def networks4() -> st.SearchStrategy[IPv4Network]:
    """Nested ones: of few addresses, cut at any length."""
    few = st.sampled_from([0, 2**32 - 1, int(IPv4Address("10.244.1.96")), int(IPv4Address("10.244.1.97"))])
    return st.builds(lambda number, length: IPv4Network((number, length), strict=False), few, st.integers(0, 32))


def networks6() -> st.SearchStrategy[IPv6Network]:
    few = st.sampled_from(
        [0, 2**128 - 1, int(IPv6Address("fd00:1::1:0:0:96")), int(IPv6Address("fd00:1::8001:0:0:97"))]
    )
    lengths = st.one_of(st.integers(0, 128), st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65, 127, 128]))
    return st.builds(lambda number, length: IPv6Network((number, length), strict=False), few, lengths)


def some_subnets() -> st.SearchStrategy[Subnets]:
    both = st.builds(Subnets, networks4(), networks6())
    return st.one_of(both, st.builds(Subnets, networks4()), networks6().map(lambda network: Subnets(None, network)))


def edges(network: IPNetwork) -> list[IPAddress]:
    """The first and last address of a network, and those beside them, as far as there are any."""
    first, last = int(network.network_address), int(network.broadcast_address)
    make = IPv4Address if network.version == 4 else IPv6Address
    return [make(each) for each in (first - 1, first, last, last + 1) if 0 <= each < 2**network.max_prefixlen]


def expected(own: Subnets, peers: Sequence[EnginePeer], outer: IPAddress | None, address: IPAddress) -> int:
    """Of all prefixes that hold the address, the longest; of equal ones, this node's own and then the first."""
    carried = {subnet.version for subnet in own}
    entries: list[tuple[IPNetwork, int]] = [] if outer is not None else [(subnet, THIS_NODE) for subnet in own]
    for number, peer in enumerate(peers):
        if outer is None or peer.address == outer:
            entries += [(subnet, number) for subnet in peer.subnets if subnet.version in carried]
    holder, longest = NOBODY, -1
    for subnet, number in entries:
        if subnet.version == address.version and address in subnet and subnet.prefixlen > longest:
            holder, longest = number, subnet.prefixlen
    return holder


def found(
    own: Subnets, peers: Sequence[EnginePeer], queries: Sequence[tuple[IPAddress | None, IPAddress]]
) -> list[int]:
    packed = b"".join(packed_peer(peer, 0) for peer in peers)
    return find(packed_own(own), packed, [(outer.packed if outer else b"", inner.packed) for outer, inner in queries])


@settings(deadline=None, max_examples=300)
@given(
    own=some_subnets(),
    peers=st.lists(st.builds(EnginePeer, some_subnets(), st.sampled_from(OUTER), st.just(8285)), max_size=40),
    more=st.lists(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), max_size=5),
)
def test_the_longest_prefix_has_an_address(own: Subnets, peers: list[EnginePeer], more: list[IPAddress]) -> None:
    addresses = {*more}
    for subnets in (own, *(peer.subnets for peer in peers)):
        for subnet in subnets:
            addresses.update(edges(subnet))
    queries = [(outer, address) for outer in (None, *OUTER) for address in sorted(addresses, key=str)]
    assert found(own, peers, queries) == [expected(own, peers, *query) for query in queries]


def test_ten_thousand_subnets() -> None:
    chance = random.Random(77)
    own = Subnets(IPv4Network("10.0.0.0/24"), IPv6Network("fd00::/64"))
    peers = [
        EnginePeer(
            Subnets(
                IPv4Network((int(IPv4Address("10.0.0.0")) + number * 256, chance.choice((24, 24, 26))), strict=False),
                IPv6Network((int(IPv6Address("fd00::")) + (number << 64), chance.choice((64, 64, 72))), strict=False),
            ),
            IPv4Address(int(IPv4Address("172.16.0.0")) + number // 2),
            8285,
        )
        for number in range(1, 10001)
    ]
    queries: list[tuple[IPAddress | None, IPAddress]] = []
    answers: list[int] = []
    for number, peer in enumerate(peers):
        asked = [
            (outer, edges(subnet)[at]) for outer in (None, peer.address) for subnet in peer.subnets for at in (1, 3)
        ]
        # All that can be right lies close by.
        first = max(0, number - 1)
        near = [expected(own, peers[first : number + 3], *query) for query in asked]
        queries += asked
        answers += [answer if answer < 0 else first + answer for answer in near]
    assert found(own, peers, queries) == answers


@pytest.mark.parametrize("lengths", [(33, 64), (24, 129), (254, 255), (255, 254)])
def test_a_length_that_cannot_be_is_refused_also_without_peers(lengths: tuple[int, int]) -> None:
    own = bytes(lengths) + bytes(20)
    with pytest.raises(ValueError, match="cannot be"):
        find(own, b"", [])
    engine = Engine(queues=((0, ()),), mtu=1472, offload=False, device_header=0)
    with pytest.raises(ValueError, match="cannot be"):
        engine.set_table(own, b"", b"")
    engine.close()
