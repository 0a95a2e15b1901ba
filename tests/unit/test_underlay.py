"""The choice of the underlay's interface and addresses: pure functions over what a host has."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface

import attrs
import pytest

from overlaynet.errors import UnderlayError
from overlaynet.model import Underlay
from overlaynet.netlink import Address, Link
from overlaynet.underlay import HostNetwork, Wishes, choose_underlay, read_host_network


def link(name: str, mtu: int = 1500, *, up: bool = True) -> Link:
    return Link(index=0, name=name, kind="", mtu=mtu, up=up)


def address(interface: str, text: str, **flags: bool | int) -> Address:
    return attrs.evolve(Address(index=0, interface=interface, address=ip_interface(text)), **flags)  # type: ignore[arg-type]


HOST = HostNetwork(
    links=[
        link("lo", 65536),
        link("eth0"),
        link("eth1", 9000),
        link("eth2", up=False),
        link("wg0", 1420),
        link("cni0"),
    ],
    addresses=[
        address("lo", "127.0.0.1/8"),
        address("lo", "::1/128"),
        address("eth0", "172.16.130.140/24"),
        address("eth0", "fd00:16::140/64"),
        address("eth0", "fe80::140/64"),
        address("eth1", "10.0.0.7/8"),
        address("eth1", "10.0.0.8/8", temporary=True),
        address("eth1", "fd00:10::7/64"),
        address("eth2", "10.2.0.7/8"),
        address("cni0", "10.244.1.1/24"),
    ],
    default_interfaces={4: "eth0", 6: "eth0"},
)
HAS = (
    "this host has eth0 (172.16.130.140, fd00:16::140), eth1 (10.0.0.7, 10.0.0.8, fd00:10::7), "
    "eth2 (10.2.0.7) and cni0 (10.244.1.1)"
)
BOTH = (4, 6)


def on_eth0(**changes: object) -> Underlay:
    return attrs.evolve(
        Underlay("eth0", 1500, ipv4=IPv4Address("172.16.130.140"), public_ipv4=IPv4Address("172.16.130.140")),
        **changes,  # type: ignore[arg-type]
    )


# -- nothing asked for


def test_the_default_route_tells_the_interface() -> None:
    assert choose_underlay(HOST, Wishes()) == on_eth0()


def test_both_families_come_from_one_interface() -> None:
    v6 = IPv6Address("fd00:16::140")
    assert choose_underlay(HOST, Wishes(versions=BOTH)) == on_eth0(ipv6=v6, public_ipv6=v6)


def test_ipv6_alone() -> None:
    v6 = IPv6Address("fd00:16::140")
    assert choose_underlay(HOST, Wishes(versions=(6,))) == Underlay("eth0", 1500, ipv6=v6, public_ipv6=v6)


def test_the_owner_of_the_public_address_comes_before_the_default_route() -> None:
    found = choose_underlay(HOST, Wishes(public_ip=IPv4Address("10.0.0.8")))
    assert (found.interface, found.mtu) == ("eth1", 9000)
    # The very address that was named, although it is not the interface's first.
    assert found.ipv4 == found.public_ipv4 == IPv4Address("10.0.0.8")


def test_a_public_address_behind_nat_leaves_the_default_route() -> None:
    public = IPv4Address("198.51.100.7")
    assert choose_underlay(HOST, Wishes(public_ip=public)) == on_eth0(public_ipv4=public)


def test_public_addresses_of_both_families() -> None:
    wishes = Wishes(public_ip=IPv4Address("198.51.100.7"), public_ipv6=IPv6Address("fd00:10::7"), versions=BOTH)
    found = choose_underlay(HOST, wishes)
    assert found == Underlay(
        "eth1",
        9000,
        ipv4=IPv4Address("10.0.0.7"),
        ipv6=IPv6Address("fd00:10::7"),
        public_ipv4=IPv4Address("198.51.100.7"),
        public_ipv6=IPv6Address("fd00:10::7"),
    )


# -- an interface asked for


@pytest.mark.parametrize(
    ("interfaces", "interface", "ipv4"),
    [
        (["eth1"], "eth1", "10.0.0.7"),
        (["10.0.0.8"], "eth1", "10.0.0.8"),
        (["fd00:10::7"], "eth1", "10.0.0.7"),
        (["eth9", "10.9.9.9", "eth2", "wg0", "eth1", "eth0"], "eth1", "10.0.0.7"),
        (["cni0", "eth0"], "cni0", "10.244.1.1"),
    ],
)
def test_the_first_interface_that_can_be_used_is_taken(interfaces: list[str], interface: str, ipv4: str) -> None:
    found = choose_underlay(HOST, Wishes(interfaces=interfaces))
    assert (found.interface, str(found.ipv4)) == (interface, ipv4)
    assert found.public_ipv4 == found.ipv4


EARLIER = Underlay("eth1", 9000, ipv4=IPv4Address("10.0.0.8"), public_ipv4=IPv4Address("10.0.0.8"))


def test_what_was_chosen_is_kept_as_long_as_it_is_there() -> None:
    assert choose_underlay(HOST, Wishes(), EARLIER) == EARLIER
    assert choose_underlay(HOST, Wishes(interfaces=["eth0", "eth1"]), EARLIER) == EARLIER
    lower = [attrs.evolve(link, mtu=1400) for link in HOST.links]
    assert choose_underlay(attrs.evolve(HOST, links=lower), Wishes(), EARLIER) == attrs.evolve(EARLIER, mtu=1400)
    translated = IPv4Address("192.0.2.1")
    kept = choose_underlay(HOST, Wishes(interfaces=["eth1"], public_ip=translated), EARLIER)
    assert kept == attrs.evolve(EARLIER, public_ipv4=translated)


def test_what_was_chosen_is_left_when_it_is_gone() -> None:
    without = [a for a in HOST.addresses if a.address.ip != EARLIER.ipv4]
    on_eth1 = attrs.evolve(EARLIER, ipv4=IPv4Address("10.0.0.7"), public_ipv4=IPv4Address("10.0.0.7"))
    assert choose_underlay(attrs.evolve(HOST, addresses=without), Wishes(), EARLIER) == on_eth0()
    assert choose_underlay(attrs.evolve(HOST, addresses=without), Wishes(interfaces=["eth1"]), EARLIER) == on_eth1
    deleted = [link for link in HOST.links if link.name != "eth1"]
    assert choose_underlay(attrs.evolve(HOST, links=deleted), Wishes(), EARLIER) == on_eth0()


def test_what_was_chosen_is_kept_with_one_version_or_both() -> None:
    both = Wishes(versions=(4, 6))
    dual = choose_underlay(HOST, both, EARLIER)
    assert dual == attrs.evolve(EARLIER, ipv6=IPv6Address("fd00:10::7"), public_ipv6=IPv6Address("fd00:10::7"))
    without = attrs.evolve(HOST, addresses=[a for a in HOST.addresses if a.address.ip != dual.ipv6])
    assert choose_underlay(without, both, dual) == EARLIER, "better than to move to eth0, which has both"
    assert choose_underlay(HOST, both, EARLIER) == dual


DUAL = attrs.evolve(EARLIER, ipv6=IPv6Address("fd00:10::7"), public_ipv6=IPv6Address("fd00:10::7"))


def with_ipv6(*addresses: tuple[str, dict[str, bool | int]]) -> HostNetwork:
    """The host, with these addresses in the place of the one that eth1 has of IPv6."""
    others = [a for a in HOST.addresses if a.address.ip != DUAL.ipv6]
    return attrs.evolve(HOST, addresses=[*others, *(address("eth1", text, **flags) for text, flags in addresses)])


@pytest.mark.parametrize("versions", [BOTH, (6,)], ids=["dual", "IPv6"])
@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [
        # Replaced: at once, and beside the address of IPv4 that stays.
        ([("fd00:10::9/64", {})], "fd00:10::9"),
        ([("fe80::9/64", {}), ("fd00:10::9/64", {"permanent": False})], "fd00:10::9"),
        # Deprecated: used on where there is no other, and not where there is one.
        ([("fd00:10::7/64", {"deprecated": True})], "fd00:10::7"),
        ([("fd00:10::9/64", {"deprecated": True}), ("fd00:10::7/64", {"deprecated": True})], "fd00:10::7"),
        ([("fd00:10::7/64", {"deprecated": True}), ("fd00:10::9/64", {"permanent": False})], "fd00:10::9"),
        ([("fd00:10::7/64", {"deprecated": True}), ("fd00:10::9/64", {"temporary": True})], "fd00:10::7"),
        ([("fd00:10::7/64", {"deprecated": True}), ("fd00:10::9/64", {"tentative": True})], "fd00:10::7"),
        ([("fd00:10::7/64", {"deprecated": True}), ("fd00:10::9/64", {"duplicate": True})], "fd00:10::7"),
        # Checked again, as after the interface was down.
        ([("fd00:10::7/64", {"tentative": True})], "fd00:10::7"),
        ([("fd00:10::9/64", {}), ("fd00:10::7/64", {"tentative": True})], "fd00:10::7"),
        # Somebody else's, as it turned out.
        ([("fd00:10::7/64", {"duplicate": True}), ("fd00:10::9/64", {})], "fd00:10::9"),
    ],
)
def test_an_address_of_ipv6_is_replaced_when_it_is_gone_and_not_before(
    addresses: list[tuple[str, dict[str, bool | int]]], chosen: str, versions: tuple[int, ...]
) -> None:
    current = DUAL if 4 in versions else attrs.evolve(DUAL, ipv4=None, public_ipv4=None)
    found = choose_underlay(with_ipv6(*addresses), Wishes(interfaces=["eth1"], versions=versions), current)
    assert found == attrs.evolve(current, ipv6=IPv6Address(chosen), public_ipv6=IPv6Address(chosen))


@pytest.mark.parametrize("versions", [BOTH, (6,)], ids=["dual", "IPv6"])
@pytest.mark.parametrize(
    "other",
    [("fe80::9/64", {}), ("fd00:10::8/64", {"temporary": True, "permanent": False})],
    ids=["local", "temporary"],
)
def test_while_the_address_to_come_is_checked_for_duplicates_it_is_waited_for(
    other: tuple[str, dict[str, bool | int]], versions: tuple[int, ...]
) -> None:
    """And neither is it published that there is none, nor one that is gone tomorrow."""
    current = DUAL if 4 in versions else attrs.evolve(DUAL, ipv4=None, public_ipv4=None)
    wishes = Wishes(interfaces=["eth1"], versions=versions)
    checked = with_ipv6(other, ("fd00:10::9/64", {"tentative": True}))
    with pytest.raises(UnderlayError, match="no longer has the address fd00:10::7, and fd00:10::9 is still being"):
        choose_underlay(checked, wishes, current)


@pytest.mark.parametrize(
    "addresses",
    [
        [],
        [("fe80::9/64", {"tentative": True})],
        [("fd00:10::9/64", {"duplicate": True})],
    ],
)
def test_where_there_is_no_other_address_of_ipv6_ipv4_is_enough(
    addresses: list[tuple[str, dict[str, bool | int]]],
) -> None:
    assert choose_underlay(with_ipv6(*addresses), Wishes(interfaces=["eth1"], versions=BOTH), DUAL) == EARLIER


def test_an_address_of_ipv4_is_replaced_beside_one_of_ipv6_that_stays() -> None:
    without = attrs.evolve(HOST, addresses=[a for a in HOST.addresses if a.address.ip != EARLIER.ipv4])
    other = IPv4Address("10.0.0.7")
    assert choose_underlay(without, Wishes(versions=BOTH), DUAL) == attrs.evolve(DUAL, ipv4=other, public_ipv4=other)


def test_an_interface_that_goes_while_it_is_looked_at_is_what_is_missing() -> None:
    """And not its address, so that one reason is told, and not two."""

    class Kernel:
        gone = False

        def default_route(self, version: int) -> None:
            self.gone = True

        def links(self) -> list[Link]:
            before, self.gone = self.gone, True
            return [] if before else [link("eth0")]

        def addresses(self) -> list[Address]:
            before, self.gone = self.gone, True
            return [] if before else [address("eth0", "10.0.0.7/8")]

    host = read_host_network(Kernel(), None)  # type: ignore[arg-type]
    with pytest.raises(UnderlayError, match="^there is no interface eth0; "):
        choose_underlay(host, Wishes(interfaces=["eth0"]))


def test_what_was_chosen_is_the_first_to_be_named_when_nothing_can_be_used() -> None:
    down = [attrs.evolve(link, up=False) for link in HOST.links]
    with pytest.raises(UnderlayError, match="^the interface eth1 is down; bring it up"):
        choose_underlay(attrs.evolve(HOST, links=down, default_interfaces={}), Wishes(), EARLIER)


def test_an_interface_and_a_public_address() -> None:
    public = IPv4Address("172.16.130.140")  # another interface's, but the interface was named
    found = choose_underlay(HOST, Wishes(interfaces=["eth1"], public_ip=public))
    assert (found.interface, found.ipv4, found.public_ipv4) == ("eth1", IPv4Address("10.0.0.7"), public)


def test_an_address_names_the_interface_for_both_families() -> None:
    found = choose_underlay(HOST, Wishes(interfaces=["10.0.0.8"], versions=BOTH))
    assert (found.ipv4, found.ipv6) == (IPv4Address("10.0.0.8"), IPv6Address("fd00:10::7"))


@pytest.mark.parametrize(
    ("patterns", "interface", "ipv4"),
    [
        (["eth1"], "eth1", "10.0.0.7"),
        ([r"^10\.0\."], "eth1", "10.0.0.7"),
        ([r"\.8$"], "eth1", "10.0.0.8"),  # the address that matches, not the first one
        (["h"], "eth0", "172.16.130.140"),
        (["7"], "eth0", "172.16.130.140"),  # an address of the first interface
        (["eth2|eth1"], "eth1", "10.0.0.7"),  # eth2 is down
        (["nothing", "cni"], "cni0", "10.244.1.1"),
        ([r"^10\.2\.", "eth0"], "eth0", "172.16.130.140"),  # the address matches, but eth2 is down
        (["cni0|172"], "eth0", "172.16.130.140"),  # addresses come before names
    ],
)
def test_patterns_match_addresses_before_names(patterns: list[str], interface: str, ipv4: str) -> None:
    found = choose_underlay(HOST, Wishes(interface_patterns=patterns))
    assert (found.interface, str(found.ipv4)) == (interface, ipv4)


def test_for_both_families_both_addresses_have_to_match() -> None:
    found = choose_underlay(HOST, Wishes(interface_patterns=["7$"], versions=BOTH))
    assert (found.ipv4, found.ipv6) == (IPv4Address("10.0.0.7"), IPv6Address("fd00:10::7"))


def test_the_loopback_addresses_match_no_pattern() -> None:
    with pytest.raises(UnderlayError, match="matches no interface's name or address"):
        choose_underlay(HOST, Wishes(interface_patterns=["^127|^::1"], versions=(4,)))


def test_what_leads_to_an_address_is_taken() -> None:
    host = attrs.evolve(HOST, reached=("eth1", ip_address("10.0.0.8")))
    found = choose_underlay(host, Wishes(can_reach=ip_address("10.9.9.9")))
    assert (found.interface, found.ipv4) == ("eth1", IPv4Address("10.0.0.8"))
    host = attrs.evolve(HOST, reached=("eth1", None))
    assert choose_underlay(host, Wishes(can_reach=ip_address("10.9.9.9"))).ipv4 == IPv4Address("10.0.0.7")


def test_names_come_before_patterns_and_patterns_before_what_is_reached() -> None:
    host = attrs.evolve(HOST, reached=("cni0", None))
    reach = ip_address("10.244.1.9")
    every = Wishes(interfaces=["eth0"], interface_patterns=["eth1"], can_reach=reach)
    assert choose_underlay(host, every).interface == "eth0"
    assert choose_underlay(host, attrs.evolve(every, interfaces=["eth9"])).interface == "eth1"
    assert choose_underlay(host, attrs.evolve(every, interfaces=["eth9"], interface_patterns=["x"])).interface == "cni0"


# -- which address


@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [
        ([("169.254.1.1/16", {}), ("10.0.0.1/24", {})], "10.0.0.1"),
        ([("10.0.0.1/24", {"scope": 253}), ("10.0.0.2/24", {})], "10.0.0.2"),
        ([("10.0.0.1/24", {"permanent": False}), ("10.0.0.2/24", {})], "10.0.0.2"),
        ([("10.0.0.1/24", {"temporary": True}), ("10.0.0.2/24", {})], "10.0.0.2"),
        ([("10.0.0.1/24", {"deprecated": True}), ("10.0.0.2/24", {"permanent": False})], "10.0.0.2"),
        ([("10.0.0.1/24", {"deprecated": True}), ("169.254.1.1/16", {})], "169.254.1.1"),
        ([("2001:db8::1/64", {"deprecated": True}), ("2001:db8::2/64", {"tentative": True})], "2001:db8::1"),
        ([("2001:db8::1/64", {"duplicate": True}), ("2001:db8::2/64", {"temporary": True})], "2001:db8::2"),
        ([("10.0.0.1/24", {"tentative": True}), ("169.254.1.1/16", {})], "169.254.1.1"),
        ([("10.0.0.1/24", {"permanent": False}), ("169.254.1.1/16", {})], "10.0.0.1"),
        ([("10.0.0.3/24", {}), ("10.0.0.1/24", {})], "10.0.0.3"),
        ([("127.0.0.5/8", {}), ("10.0.0.1/32", {})], "10.0.0.1"),
        ([("fe80::1/64", {}), ("2001:db8::1/64", {"permanent": False})], "2001:db8::1"),
        (
            [("2001:db8::a/64", {"permanent": False, "temporary": True}), ("2001:db8::1/64", {"permanent": False})],
            "2001:db8::1",
        ),
    ],
)
def test_global_permanent_and_lasting_addresses_come_first(
    addresses: list[tuple[str, dict[str, bool | int]]], chosen: str
) -> None:
    host = HostNetwork(links=[link("eth0")], addresses=[address("eth0", text, **flags) for text, flags in addresses])
    expected = ip_address(chosen)
    found = choose_underlay(host, Wishes(interfaces=["eth0"], versions=(expected.version,)))
    assert (found.ipv4 or found.ipv6) == expected


# -- nothing to be had


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (Wishes(interfaces=["eth9"]), f"there is no interface eth9; {HAS}"),
        (Wishes(interfaces=["10.9.9.9"]), f"no interface has the address 10.9.9.9; {HAS}"),
        (Wishes(interfaces=["eth2"]), "the interface eth2 is down; bring it up with `ip link set eth2 up`"),
        (
            Wishes(interfaces=["wg0"]),
            "the interface wg0 has no usable IPv4 address; add one, or name another interface with --iface",
        ),
        (
            Wishes(interfaces=["cni0"], public_ipv6=IPv6Address("2001:db8::7")),
            "the interface cni0 has no usable IPv6 address; add one, or name another interface with --iface",
        ),
        (
            Wishes(interfaces=["eth9", "eth2"]),
            f"there is no interface eth9; {HAS}; the interface eth2 is down; bring it up with `ip link set eth2 up`",
        ),
        (Wishes(interface_patterns=["^en"]), f"the pattern '^en' matches no interface's name or address; {HAS}"),
        (
            Wishes(interface_patterns=["eth["]),
            "the interface pattern 'eth[' is not a regular expression: unterminated character set at position 3; "
            "correct --iface-regex",
        ),
        (
            Wishes(interfaces=["eth0"], interface_patterns=["("]),
            "the interface pattern '(' is not a regular expression: missing ), unterminated subpattern at position 0; "
            "correct --iface-regex",
        ),
        (
            Wishes(can_reach=ip_address("203.0.113.1")),
            "no route leads to 203.0.113.1; name an address that this host can reach with --iface-can-reach",
        ),
        (
            Wishes(can_reach=ip_address("10.0.0.7")),
            "10.0.0.7 is an address of this host itself; name one of another host with --iface-can-reach",
        ),
        (
            Wishes(public_ip=IPv4Address("10.0.0.7"), public_ipv6=IPv6Address("fd00:16::140"), versions=BOTH),
            "the public address 10.0.0.7 belongs to eth1 but fd00:16::140 belongs to eth0; name one interface with --iface",
        ),
        (
            Wishes(public_ip=IPv4Address("10.2.0.7")),
            "the interface eth2 is down; bring it up with `ip link set eth2 up`",
        ),
    ],
)
def test_errors_name_the_thing_and_the_way_out(wishes: Wishes, message: str) -> None:
    with pytest.raises(UnderlayError) as raised:
        choose_underlay(HOST, wishes)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("defaults", "versions", "message"),
    [
        ({}, (4,), "there is no IPv4 default route; name the interface with --iface"),
        ({}, BOTH, "there is no IPv4 and no IPv6 default route; name the interface with --iface"),
    ],
)
def test_without_a_default_route_the_interface_has_to_be_named(
    defaults: dict[int, str], versions: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UnderlayError) as raised:
        choose_underlay(attrs.evolve(HOST, default_interfaces=defaults), Wishes(versions=versions))
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("defaults", "versions", "found"),
    [
        ({4: "eth0"}, (6,), ("eth0", "172.16.130.140", None)),
        ({6: "eth0"}, (4,), ("eth0", None, "fd00:16::140")),
        ({4: "eth0"}, BOTH, ("eth0", "172.16.130.140", None)),
        ({6: "eth0"}, BOTH, ("eth0", None, "fd00:16::140")),
        ({4: "eth0", 6: "eth1"}, BOTH, ("eth0", "172.16.130.140", None)),
        ({4: "cni0", 6: "cni0"}, BOTH, ("cni0", "10.244.1.1", None)),
        ({4: "cni0", 6: "cni0"}, (6,), ("cni0", "10.244.1.1", None)),
    ],
)
def test_an_underlay_of_one_version_is_enough(
    defaults: dict[int, str], versions: tuple[int, ...], found: tuple[str, str | None, str | None]
) -> None:
    chosen = choose_underlay(attrs.evolve(HOST, default_interfaces=defaults), Wishes(versions=versions))
    addresses = (chosen.ipv4 and str(chosen.ipv4), chosen.ipv6 and str(chosen.ipv6))
    assert (chosen.interface, *addresses) == found
    assert (chosen.public_ipv4, chosen.public_ipv6) == (chosen.ipv4, chosen.ipv6)


def test_an_interface_with_all_versions_comes_before_one_with_some() -> None:
    assert choose_underlay(HOST, Wishes(interfaces=["cni0", "eth0"], versions=BOTH)).interface == "eth0"
    assert choose_underlay(HOST, Wishes(interface_patterns=["cni0|eth1"], versions=BOTH)).interface == "eth1"


def test_a_public_address_of_a_version_that_the_overlay_has_not_is_used() -> None:
    public = IPv6Address("2001:db8::7")
    found = choose_underlay(HOST, Wishes(public_ipv6=public))
    assert found == on_eth0(ipv6=IPv6Address("fd00:16::140"), public_ipv6=public)
    host = attrs.evolve(HOST, addresses=[a for a in HOST.addresses if a.address.version == 6])
    assert choose_underlay(host, Wishes(public_ipv6=public)).public_ipv4 is None


def test_an_address_of_one_link_is_none_for_peers() -> None:
    addresses = [address("eth0", "fe80::140/64"), address("eth1", "fe80::7/64"), address("eth1", "10.0.0.7/8")]
    host = attrs.evolve(HOST, addresses=addresses, reached=("eth1", ip_address("fe80::7")))
    for wishes in (Wishes(interfaces=["fe80::7"]), Wishes(can_reach=ip_address("fe80::9"))):
        found = choose_underlay(host, attrs.evolve(wishes, versions=BOTH))
        assert (found.interface, found.ipv4, found.ipv6) == ("eth1", IPv4Address("10.0.0.7"), None)
    with pytest.raises(UnderlayError, match="no usable IPv6 address; fe80::140 is valid on one link only"):
        choose_underlay(host, Wishes(interfaces=["eth0"], versions=(6,)))


def test_an_address_still_being_checked_is_said_to_be() -> None:
    host = HostNetwork(links=[link("eth0")], addresses=[address("eth0", "fd00::1/64", tentative=True)])
    with pytest.raises(
        UnderlayError, match="fd00::1 is still being checked for duplicates, so try again in a few seconds"
    ):
        choose_underlay(host, Wishes(interfaces=["eth0"], versions=(6,)))


def test_an_address_that_another_host_has_is_said_to_be() -> None:
    addresses = [address("eth0", "fe80::1/64", tentative=True), address("eth0", "fd00::1/64", duplicate=True)]
    with pytest.raises(UnderlayError, match="another host has fd00::1, too, so remove it and add another"):
        choose_underlay(HostNetwork([link("eth0")], addresses), Wishes(interfaces=["eth0"], versions=(6,)))


def test_no_mtu_is_no_underlay() -> None:
    host = attrs.evolve(HOST, links=[link("eth0", 0)])
    with pytest.raises(UnderlayError, match="the interface eth0 has MTU 0"):
        choose_underlay(host, Wishes())


def test_a_host_with_many_interfaces_is_not_listed_whole() -> None:
    many = HostNetwork(
        links=[link(f"veth{i}") for i in range(300)],
        addresses=[address(f"veth{i}", f"10.0.{i // 250}.{i % 250}/32") for i in range(300)],
    )
    with pytest.raises(UnderlayError, match=r"veth9 \(10.0.0.9\) and 290 more$"):
        choose_underlay(many, Wishes(interfaces=["eth0"]))


@pytest.mark.parametrize(
    ("links", "text"),
    [
        ([], "this host has no interface with an address"),
        ([link("eth1")], "this host has eth1 (10.0.0.7, 10.0.0.8, fd00:10::7)"),
    ],
)
def test_a_host_with_few_interfaces(links: list[Link], text: str) -> None:
    with pytest.raises(UnderlayError, match=re.escape(text) + "$"):
        choose_underlay(attrs.evolve(HOST, links=links), Wishes(interfaces=["eth0"]))
