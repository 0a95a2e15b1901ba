"""The underlay and the node's identity, found on hosts that are namespaces of the test's own."""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from overlaynet.errors import UnderlayError
from overlaynet.identity import default_identity
from overlaynet.model import Underlay
from overlaynet.testing.namespaces import NetworkNamespace
from overlaynet.underlay import find_underlay


@pytest.fixture
def host() -> Iterator[NetworkNamespace]:
    """A host with two interfaces; the default route leads to the first."""
    with NetworkNamespace(label="underlay") as made:
        made.ip(
            "link set lo up",
            "link add eth0 type veth peer name far0",
            "link add eth1 mtu 1400 type veth peer name far1",
            *[f"link set {name} up" for name in ("eth0", "far0", "eth1", "far1")],
            "address add 172.16.130.140/24 dev eth0",
            "address add fd00:16::140/64 dev eth0 nodad",
            "address add 10.0.0.7/8 dev eth1",
            "route add default via 172.16.130.1",
            "route add default via fd00:16::1",
            "route add 192.0.2.0/24 via 10.0.0.1 src 10.0.0.7",
        )
        yield made


ETH0 = Underlay("eth0", 1500, ipv4=IPv4Address("172.16.130.140"), public_ipv4=IPv4Address("172.16.130.140"))
ETH1 = Underlay("eth1", 1400, ipv4=IPv4Address("10.0.0.7"), public_ipv4=IPv4Address("10.0.0.7"))


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({}, ETH0),
        ({"interfaces": ["eth1"]}, ETH1),
        ({"interfaces": ["10.0.0.7"]}, ETH1),
        ({"interface_patterns": [r"^10\."]}, ETH1),
        ({"can_reach": ip_address("192.0.2.9")}, ETH1),
        ({"can_reach": ip_address("198.51.100.9")}, ETH0),
        ({"can_reach": ip_address("fd00:77::9")}, ETH0),
        ({"public_ip": IPv4Address("10.0.0.7")}, ETH1),
    ],
    ids=str,
)
def test_the_underlay_is_found(host: NetworkNamespace, wishes: dict[str, Any], expected: Underlay) -> None:
    assert host.run_async(find_underlay, **wishes) == expected


def test_both_families_are_found(host: NetworkNamespace) -> None:
    found = host.run_async(find_underlay, ipv6=True)
    assert (found.ipv4, found.ipv6) == (ETH0.ipv4, IPv6Address("fd00:16::140"))
    found = host.run_async(find_underlay, ipv4=False, ipv6=True)
    assert (found.ipv4, found.public_ipv6) == (None, IPv6Address("fd00:16::140"))


def test_one_family_is_enough(host: NetworkNamespace) -> None:
    found = host.run_async(find_underlay, interfaces=["eth1"], ipv6=True)
    assert (found.ipv4, found.ipv6) == (ETH1.ipv4, None)
    host.ip("address delete 172.16.130.140/24 dev eth0")
    found = host.run_async(find_underlay, interfaces=["eth0"])
    assert (found.ipv4, found.ipv6, found.public_ipv6) == (None, *[IPv6Address("fd00:16::140")] * 2)


@pytest.mark.parametrize(
    ("commands", "wishes", "message"),
    [
        ([], {"interfaces": ["eth7"]}, "there is no interface eth7; this host has eth0 (172.16.130.140, fd00:16::140"),
        (["link set eth1 down"], {"interfaces": ["eth1"]}, "the interface eth1 is down"),
        (["address flush dev eth1"], {"interfaces": ["eth1"]}, "the interface eth1 has no usable IPv4 address"),
        (
            ["route delete default", "route delete default via fd00:16::1"],
            {},
            "there is no IPv4 default route; name the interface with --iface",
        ),
        (
            ["route delete default"],
            {"can_reach": ip_address("198.51.100.9")},
            "no route leads to 198.51.100.9; name an address",
        ),
    ],
)
def test_what_is_missing_is_said(
    host: NetworkNamespace, commands: list[str], wishes: dict[str, Any], message: str
) -> None:
    host.ip(*commands)
    with pytest.raises(UnderlayError) as raised:
        host.run_async(find_underlay, **wishes)
    assert str(raised.value).startswith(message)


def test_the_identity_is_the_interfaces_and_outlasts_its_address(host: NetworkNamespace, tmp_path: Path) -> None:
    machine = tmp_path / "machine-id"
    machine.write_text("0123456789abcdef0123456789abcdef\n")
    of_eth0 = host.run_async(default_identity, ETH0, machine)
    of_eth1 = host.run_async(default_identity, ETH1, machine)
    assert of_eth0 != of_eth1
    host.ip("address flush dev eth0", "address add 172.16.130.99/24 dev eth0")
    assert host.run_async(default_identity, ETH0, machine) == of_eth0
    machine.write_text("fedcba9876543210fedcba9876543210\n")
    assert host.run_async(default_identity, ETH0, machine) != of_eth0


def test_the_identity_can_do_without_a_machine_identity(host: NetworkNamespace, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    of_eth0 = host.run_async(default_identity, ETH0, missing)
    assert of_eth0 != host.run_async(default_identity, ETH1, missing)
    host.ip("link delete eth0")
    by_name = host.run_async(default_identity, ETH0, missing)
    assert by_name not in (of_eth0, "")
