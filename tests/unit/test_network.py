"""The network document: flannel's rules, one by one, and what the operator is told when one is broken."""

import itertools
import json
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlaynet import network
from overlaynet.errors import ConfigError
from overlaynet.model import Subnets
from overlaynet.network import Network, SubnetRange


def parse(**members: Any) -> Network:
    return network.parse(json.dumps(members))


def parse_ipv6(**members: Any) -> SubnetRange[IPv6Network]:
    parsed = parse(EnableIPv4=False, EnableIPv6=True, **members)
    assert parsed.ipv4 is None
    assert parsed.ipv6 is not None
    return parsed.ipv6


def parse_ipv4(**members: Any) -> SubnetRange[IPv4Network]:
    parsed = parse(**members)
    assert parsed.ipv6 is None
    assert parsed.ipv4 is not None
    return parsed.ipv4


def test_defaults_are_flannels() -> None:
    parsed = parse(Network="10.244.0.0/16")
    assert parsed == Network(
        ipv4=SubnetRange(
            IPv4Network("10.244.0.0/16"), 24, IPv4Network("10.244.1.0/24"), IPv4Network("10.244.255.0/24")
        ),
        ipv6=None,
        backend_type="udp",
        backend_options={},
        lease_ttl=86400.0,
    )


def test_all_members() -> None:
    parsed = parse(
        Network="10.0.0.0/8",
        SubnetLen=20,
        SubnetMin="10.10.0.0",
        SubnetMax="10.99.0.0",
        EnableIPv6=True,
        IPv6Network="fc00::/48",
        IPv6SubnetLen=64,
        IPv6SubnetMin="fc00:0:0:10::",
        IPv6SubnetMax="fc00:0:0:20::",
        EnableNFTables=True,
        LeaseTTL=3600,
        Backend={"Type": "VXLAN", "VNI": 7, "DirectRouting": True},
    )
    assert parsed == Network(
        ipv4=SubnetRange(IPv4Network("10.0.0.0/8"), 20, IPv4Network("10.10.0.0/20"), IPv4Network("10.99.0.0/20")),
        ipv6=SubnetRange(
            IPv6Network("fc00::/48"), 64, IPv6Network("fc00:0:0:10::/64"), IPv6Network("fc00:0:0:20::/64")
        ),
        backend_type="vxlan",
        backend_options={"VNI": 7, "DirectRouting": True},
        lease_ttl=3600.0,
    )
    assert str(parsed) == "10.0.0.0/8 and fc00::/48"
    assert list(parsed) == [IPv4Network("10.0.0.0/8"), IPv6Network("fc00::/48")]


@pytest.mark.parametrize("spell", [str.lower, str.upper, str.swapcase])
def test_names_are_matched_without_regard_to_case(spell: Any) -> None:
    members = {"EnableIPv6": True, "Network": "10.0.0.0/8", "IPv6Network": "fc00::/48", "SubnetLen": 25}
    plain = parse(**members, Backend={"Type": "udp"})
    assert parse(**{spell(name): value for name, value in members.items()}, bACKEND={spell("Type"): "udp"}) == plain


def test_the_last_spelling_of_a_name_wins() -> None:
    assert str(network.parse('{"Network": "10.1.0.0/16", "network": "10.2.0.0/16"}')) == "10.2.0.0/16"


def test_unknown_members_are_ignored() -> None:
    assert parse(Network="10.244.0.0/16", Later={"a": [1]}) == parse(Network="10.244.0.0/16")


def test_host_bits_are_masked_off() -> None:
    assert parse_ipv4(Network="10.244.7.9/16").network == IPv4Network("10.244.0.0/16")


@pytest.mark.parametrize(
    ("length", "subnet_length"), [(8, 24), (16, 24), (21, 24), (22, 24), (23, 25), (24, 26), (27, 29), (28, 30)]
)
def test_the_usual_ipv4_subnet(length: int, subnet_length: int) -> None:
    family = parse_ipv4(Network=f"10.0.0.0/{length}")
    assert family.prefix_length == subnet_length
    # The very first subnet is left out.
    assert family.first == list(itertools.islice(family.network.subnets(new_prefix=subnet_length), 2))[1]
    assert family.last.broadcast_address == family.network.broadcast_address
    assert family.size == len(family) == 2 ** (subnet_length - length) - 1


@pytest.mark.parametrize(
    ("length", "subnet_length"), [(7, 64), (48, 64), (61, 64), (62, 64), (63, 65), (64, 66), (124, 126)]
)
def test_the_usual_ipv6_subnet(length: int, subnet_length: int) -> None:
    family = parse_ipv6(IPv6Network=f"fc00::/{length}")
    assert family.prefix_length == subnet_length
    assert family.first == list(itertools.islice(family.network.subnets(new_prefix=subnet_length), 2))[1]
    assert family.last.broadcast_address == family.network.broadcast_address
    assert family.size == 2 ** (subnet_length - length) - 1


def test_flannels_ipv6_example() -> None:
    family = parse_ipv6(IPv6Network="fc00::/48")
    assert (str(family.first), str(family.last)) == ("fc00:0:0:1::/64", "fc00:0:0:ffff::/64")


def test_the_first_subnet_can_be_asked_for() -> None:
    assert str(parse_ipv4(Network="10.244.0.0/16", SubnetMin="10.244.0.0").first) == "10.244.0.0/24"


def test_one_subnet_is_enough() -> None:
    family = parse_ipv4(Network="10.244.0.0/16", SubnetMin="10.244.9.0", SubnetMax="10.244.9.0")
    assert [family[i] for i in range(len(family))] == [IPv4Network("10.244.9.0/24")]


def test_the_end_of_the_address_space() -> None:
    family = parse_ipv4(Network="255.255.0.0/16")
    assert family[len(family) - 1] == IPv4Network("255.255.255.0/24")


@pytest.mark.parametrize("empty", [None, ""])
def test_empty_members_count_as_absent(empty: object) -> None:
    assert parse(
        Network="10.0.0.0/16", SubnetMin=empty, SubnetMax=empty, SubnetLen=None, LeaseTTL=None, Backend=None
    ) == parse(Network="10.0.0.0/16")


def test_a_range_counts_and_contains_its_subnets() -> None:
    family = parse_ipv4(Network="10.0.0.0/16", SubnetLen=20, SubnetMin="10.0.32.0", SubnetMax="10.0.64.0")
    subnets = [family[i] for i in range(family.size)]
    assert [str(subnet) for subnet in subnets] == ["10.0.32.0/20", "10.0.48.0/20", "10.0.64.0/20"]
    assert all(subnet in family for subnet in subnets)
    for other in ("10.0.16.0/20", "10.0.80.0/20", "10.0.32.0/21", "10.0.32.0/19", "10.1.32.0/20"):
        assert IPv4Network(other) not in family
    assert IPv6Network("fd00::/20") not in family
    assert "10.0.32.0/20" not in family
    for index in (-1, 3):
        with pytest.raises(IndexError):
            family[index]


def test_an_ipv6_network_may_have_more_subnets_than_fit_a_machine_word() -> None:
    family = parse_ipv6(IPv6Network="fd00::/8", IPv6SubnetLen=126)
    assert family.size == 2**118 - 1
    assert family[family.size - 1] == family.last
    assert family.last in family


def test_what_a_network_grants_and_contains() -> None:
    ipv4, ipv6 = IPv4Network("10.0.1.0/24"), IPv6Network("fc00:0:0:1::/64")
    only4 = parse(Network="10.0.0.0/16")
    both = parse(Network="10.0.0.0/16", EnableIPv6=True, IPv6Network="fc00::/48")
    assert only4.grants(Subnets(ipv4))
    assert not only4.grants(Subnets(ipv4, ipv6))
    assert not only4.grants(Subnets(ipv6=ipv6))
    assert both.grants(Subnets(ipv4, ipv6))
    assert not both.grants(Subnets(ipv4))
    assert not both.grants(Subnets(ipv4, IPv6Network("fc00::/64")))  # the first, left out
    assert only4.contains(Subnets(IPv4Network("10.0.0.0/20")))
    assert not only4.contains(Subnets(IPv4Network("10.0.0.0/8")))
    assert not only4.contains(Subnets(ipv4, ipv6))
    assert both.contains(Subnets(ipv4, ipv6))
    assert both.contains(Subnets(ipv4))


# Each broken rule, with exactly what the operator is told; a text that ends in ": " goes on with Python's own words.
ERRORS = [
    ("", "the network document is not JSON: "),
    ("{", "the network document is not JSON: "),
    ('{"Network": "10.0.0.0/16",}', "the network document is not JSON: "),
    ("[" * 100_000, "the network document is not JSON: "),
    ("9" * 10_000, "the network document is not JSON: "),
    ("[]", "the network document must be a JSON object, not a list"),
    ("null", "the network document must be a JSON object, not null"),
    ('"10.0.0.0/16"', "the network document must be a JSON object, not a string"),
    ("true", "the network document must be a JSON object, not a boolean"),
    ("7", "the network document must be a JSON object, not a number"),
    ({}, 'the network document has no Network; add one, as in "Network": "10.244.0.0/16"'),
    ({"Network": ""}, 'the network document has no Network; add one, as in "Network": "10.244.0.0/16"'),
    ({"Network": 7}, "Network must be a string, not 7"),
    (
        {"Network": "ten"},
        "Network is 'ten', which is not a network such as 10.244.0.0/16: ",
    ),
    (
        {"Network": "fc00::/48"},
        "Network is 'fc00::/48', which is not a network such as 10.244.0.0/16: ",
    ),
    (
        {"Network": "10.0.0.0/255.255.0.0"},
        "Network is '10.0.0.0/255.255.0.0', which is not a network such as 10.244.0.0/16: "
        "neither a scope nor a netmask can stand there",
    ),
    (
        {"Network": "0.0.0.0/0"},
        "Network is 0.0.0.0/0, the whole address space; name the overlay's own network, such as 10.244.0.0/16",
    ),
    (
        {"Network": "10.0.0.0/29"},
        "Network 10.0.0.0/29 is too small to share out among hosts; it needs a prefix length of at most 28",
    ),
    (
        {"Network": "10.0.0.0"},
        "Network 10.0.0.0/32 is too small to share out among hosts; it needs a prefix length of at most 28",
    ),
    (
        {"Network": "10.0.0.0/16", "SubnetLen": 31},
        "SubnetLen is 31; a subnet needs room for containers: at most 30",
    ),
    (
        {"Network": "10.0.0.0/16", "SubnetLen": 17},
        "Network 10.0.0.0/16 is too small for SubnetLen 17; choose SubnetLen 18 or longer, or a larger network",
    ),
    ({"Network": "10.0.0.0/16", "SubnetLen": "24"}, "SubnetLen must be a whole number, not '24'"),
    ({"Network": "10.0.0.0/16", "SubnetLen": 24.0}, "SubnetLen must be a whole number, not 24.0"),
    ({"Network": "10.0.0.0/16", "SubnetLen": True}, "SubnetLen must be a whole number, not True"),
    ({"Network": "10.0.0.0/16", "SubnetMin": "ten"}, "SubnetMin is 'ten', which is not an address"),
    ({"Network": "10.0.0.0/16", "SubnetMin": "10.0.1.0/24"}, "SubnetMin is '10.0.1.0/24', which is not an address"),
    ({"Network": "10.0.0.0/16", "SubnetMin": 7}, "SubnetMin must be a string, not 7"),
    ({"Network": "10.0.0.0/16", "SubnetMin": "10.1.0.0"}, "SubnetMin 10.1.0.0 lies outside 10.0.0.0/16"),
    ({"Network": "10.0.0.0/16", "SubnetMax": "10.1.0.0"}, "SubnetMax 10.1.0.0 lies outside 10.0.0.0/16"),
    ({"Network": "10.0.0.0/16", "SubnetMin": "fc00::"}, "SubnetMin fc00:: lies outside 10.0.0.0/16"),
    (
        {"Network": "10.0.0.0/16", "SubnetMin": "10.0.1.5"},
        "SubnetMin 10.0.1.5 is not the start of a /24 subnet; the nearest below is 10.0.1.0",
    ),
    (
        {"Network": "10.0.0.0/16", "SubnetMax": "10.0.255.255"},
        "SubnetMax 10.0.255.255 is not the start of a /24 subnet; the nearest below is 10.0.255.0",
    ),
    (
        {"Network": "10.0.0.0/16", "SubnetMin": "10.0.9.0", "SubnetMax": "10.0.8.0"},
        "SubnetMin 10.0.9.0 is above SubnetMax 10.0.8.0; swap them",
    ),
    (
        {"EnableIPv4": False},
        "the network document enables neither IPv4 nor IPv6; set EnableIPv4 or EnableIPv6 to true",
    ),
    ({"Network": "10.0.0.0/16", "EnableIPv4": "yes"}, "EnableIPv4 must be true or false, not 'yes'"),
    ({"Network": "10.0.0.0/16", "EnableIPv6": 1}, "EnableIPv6 must be true or false, not 1"),
    (
        {"Network": "10.0.0.0/16", "EnableIPv6": True},
        'the network document has no IPv6Network; add one, as in "IPv6Network": "fd00:10:244::/48"',
    ),
    (
        {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "10.0.0.0/16"},
        "IPv6Network is '10.0.0.0/16', which is not a network such as fd00:10:244::/48: ",
    ),
    (
        {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fe80::%eth0/48"},
        "IPv6Network is 'fe80::%eth0/48', which is not a network such as fd00:10:244::/48: "
        "neither a scope nor a netmask can stand there",
    ),
    (
        {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "::/0"},
        "IPv6Network is ::/0, the whole address space; name the overlay's own network, such as fd00:10:244::/48",
    ),
    (
        {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fc00::/125"},
        "IPv6Network fc00::/125 is too small to share out among hosts; it needs a prefix length of at most 124",
    ),
    (
        {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fc00::/48", "IPv6SubnetLen": 127},
        "IPv6SubnetLen is 127; a subnet needs room for containers: at most 126",
    ),
    (
        {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fc00::/48", "IPv6SubnetLen": 49},
        "IPv6Network fc00::/48 is too small for IPv6SubnetLen 49; "
        "choose IPv6SubnetLen 50 or longer, or a larger network",
    ),
    (
        {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fc00::/48", "IPv6SubnetMin": "fc00:0:0:1::%1"},
        "IPv6SubnetMin is 'fc00:0:0:1::%1', which is not an address",
    ),
    (
        {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fc00::/48", "IPv6SubnetMax": "fd00::"},
        "IPv6SubnetMax fd00:: lies outside fc00::/48",
    ),
    (
        {"Network": "10.0.0.0/16", "Backend": "udp"},
        'Backend must be an object such as {"Type": "udp"}, not a string',
    ),
    ({"Network": "10.0.0.0/16", "Backend": []}, 'Backend must be an object such as {"Type": "udp"}, not a list'),
    ({"Network": "10.0.0.0/16", "Backend": {}}, 'Backend has no Type; name the backend, as in {"Type": "udp"}'),
    (
        {"Network": "10.0.0.0/16", "Backend": {"Type": ""}},
        'Backend has no Type; name the backend, as in {"Type": "udp"}',
    ),
    (
        {"Network": "10.0.0.0/16", "Backend": {"Type": 7, "Port": 8285}},
        'Backend has no Type; name the backend, as in {"Type": "udp"}',
    ),
    ({"Network": "10.0.0.0/16", "LeaseTTL": 4}, "LeaseTTL is 4; it must be between 5 seconds and ten years"),
    ({"Network": "10.0.0.0/16", "LeaseTTL": 1e9}, "LeaseTTL is 1e+09; it must be between 5 seconds and ten years"),
    ({"Network": "10.0.0.0/16", "LeaseTTL": 10**400}, "LeaseTTL is inf; it must be between 5 seconds and ten years"),
    ('{"Network": "10.0.0.0/16", "LeaseTTL": NaN}', "LeaseTTL is nan; it must be between 5 seconds and ten years"),
    ({"Network": "10.0.0.0/16", "LeaseTTL": "1h"}, "LeaseTTL must be a number, not '1h'"),
]


@pytest.mark.parametrize(("document", "text"), ERRORS)
def test_each_broken_rule_is_told_in_one_sentence(document: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        network.parse(document if isinstance(document, str) else json.dumps(document))
    message = str(caught.value)
    assert message == text or (text.endswith(": ") and message.startswith(text) and message != text)
    assert "\n" not in message


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
networks = st.one_of(
    st.builds("{}/{}".format, st.ip_addresses(), st.integers(0, 130)), st.builds(str, st.ip_addresses()), anything
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "Network": networks,
        "IPv6Network": networks,
        "EnableIPv4": st.booleans() | anything,
        "EnableIPv6": st.booleans() | anything,
        "SubnetLen": st.integers(-1, 33) | anything,
        "IPv6SubnetLen": st.integers(-1, 129) | anything,
        "SubnetMin": networks,
        "SubnetMax": networks,
        "IPv6SubnetMin": networks,
        "IPv6SubnetMax": networks,
        "LeaseTTL": st.floats() | anything,
        "Backend": st.fixed_dictionaries({}, optional={"Type": anything, "Port": anything}) | anything,
    },
)


@settings(deadline=None, max_examples=500)
@given(documents.map(json.dumps) | st.text())
def test_no_document_does_worse_than_a_config_error(document: str) -> None:
    try:
        parsed = network.parse(document)
    except ConfigError:
        return
    families = [family for family in (parsed.ipv4, parsed.ipv6) if family is not None]
    assert families
    for family in families:
        assert family.size >= 1
        assert family[0] == family.first
        assert family[family.size - 1] == family.last
        assert family.last.subnet_of(family.network)  # type: ignore[arg-type]


@st.composite
def subnet_ranges(draw: st.DrawFn) -> SubnetRange[IPv4Network]:
    length = draw(st.integers(8, 28))
    subnet_length = draw(st.integers(length + 2, 30))
    address = draw(st.integers(0, 2**32 - 1))
    count = 2 ** (subnet_length - length)
    first, last = sorted(draw(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))))
    whole = IPv4Network((address, length), strict=False)
    base, step = int(whole.network_address), 2 ** (32 - subnet_length)
    return parse_ipv4(
        Network=str(whole),
        SubnetLen=subnet_length,
        SubnetMin=str(IPv4Network(base + first * step).network_address),
        SubnetMax=str(IPv4Network(base + last * step).network_address),
    )


@settings(deadline=None)
@given(subnet_ranges(), st.data())
def test_every_subnet_of_a_range_is_found_in_it(family: SubnetRange[IPv4Network], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, family.size - 1))
    subnet = family[index]
    assert subnet in family
    assert subnet.prefixlen == family.prefix_length
    assert subnet.subnet_of(family.network)
    if index:
        assert int(subnet.network_address) == int(family[index - 1].broadcast_address) + 1
