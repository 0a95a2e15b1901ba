"""A node's address changes while it runs, and its connections to etcd with it: it keeps its subnet, and peers follow."""

from collections.abc import Callable, Iterator
from ipaddress import IPv4Interface, IPv6Interface

import pytest

from overlaynet.testing.daemons import DaemonProcess
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import (
    NETWORK,
    NETWORK6,
    SWITCH_ADDRESS,
    SWITCH_ADDRESS6,
    UNDERLAY6,
    Container,
    Host,
    Lab,
    wait_until,
)

A_IS_MOVED_TO = IPv4Interface("172.16.130.77/24")
A_IS_MOVED_TO6 = IPv6Interface("fd00:16::77/64")
PATIENCE = 30.0
SECONDS = 9.0
"""Less than a request waits for its answer on a connection that is dead, and a watch for a sign of life."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Three hosts, the third without a daemon, and a switch where etcd is: they reach it over the underlay that changes."""
    with Lab("moving", hosts=3, default_route=True) as lab:
        yield lab


@pytest.fixture
def etcd(lab: Lab) -> Iterator[EtcdServer]:
    with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name) as server:
        yield server


def wait_for_ping(source: Container, destination: Container, version: int = 4) -> None:
    wait_until(lambda: source.reaches(destination, version=version), PATIENCE, "a ping to arrive")


def another_address(host: Host) -> None:
    """What a DHCP client does whose lease ended, and who is given another address."""
    host.namespace.ip(
        f"address delete {host.address} dev eth0",
        f"address add {A_IS_MOVED_TO} dev eth0",
        f"route replace default via {SWITCH_ADDRESS.ip}",
    )


def another_interface(host: Host) -> None:
    """The interface is deleted, and one of its name made with another address: another index, another hardware address."""
    host.namespace.ip("link delete eth0")
    wait_until(lambda: "underlay" in str(host.status()["problems"]), PATIENCE, "the daemon to miss it")
    host.address = A_IS_MOVED_TO
    host.plug_in()


@pytest.mark.parametrize("backend", ["udp", "vxlan", "host-gw"])
@pytest.mark.parametrize("move", [another_address, another_interface], ids=["address", "interface"])
def test_a_node_that_moves_keeps_its_subnet_and_peers_follow(
    lab: Lab, etcd: EtcdServer, backend: str, move: Callable[[Host], None]
) -> None:
    store = ["--store", "etcd", "--etcd-endpoints", etcd.endpoint]
    a, b, c = lab.hosts
    first, second, third = lab.containers
    for host in (a, b):
        host.start_overlaynet(store, ["--backend", backend])
        host.connect_containers()
    wait_for_ping(first, second)
    subnets = a.status()["subnets"]
    move(a)
    assert b.daemon.wait_for("peer changed", SECONDS)["address"] == str(A_IS_MOVED_TO.ip)
    wait_for_ping(first, second)
    wait_for_ping(second, first)
    wait_until(lambda: a.status()["public_ipv4"] == str(A_IS_MOVED_TO.ip), SECONDS, "the answer to what was published")
    assert a.status()["subnets"] == subnets
    c.start_overlaynet(store, ["--backend", backend])
    c.connect_containers()
    wait_until(lambda: a.status()["peers"] == 2, SECONDS, "the node that moved to hear of another one")
    wait_for_ping(first, third)
    for host in lab.hosts:
        wait_until(lambda host=host: host.status()["problems"] == {}, PATIENCE, "the end of all problems")  # type: ignore[misc]
    assert a.daemon.stop() == 0


@pytest.mark.parametrize("end", [DaemonProcess.stop, DaemonProcess.kill])
@pytest.mark.parametrize("moment", ["before the end", "after the end"])
def test_a_node_whose_interface_was_replaced_keeps_its_subnet_over_a_restart(
    lab: Lab, etcd: EtcdServer, end: Callable[[DaemonProcess], object], moment: str
) -> None:
    """Its identity was made from the hardware address of the interface that is gone."""
    store = ["--store", "etcd", "--etcd-endpoints", etcd.endpoint]
    a, b, _ = lab.hosts
    first, second, _ = lab.containers
    for host in (a, b):
        host.start_overlaynet(store, named=False)
        host.connect_containers()
    wait_for_ping(first, second)
    before, other = a.status(), b.status()
    assert before["node"] != other["node"]
    hardware_address = a.namespace.ip_json("link", "show", "dev", "eth0")[0]["address"]
    if moment == "before the end":
        another_interface(a)
        wait_for_ping(first, second)
    end(a.daemon)
    a.subnet_file.unlink()  # the store alone must know whose subnet it is
    if moment == "after the end":
        a.namespace.ip("link delete eth0")
        a.address = A_IS_MOVED_TO
        a.plug_in()
    assert a.namespace.ip_json("link", "show", "dev", "eth0")[0]["address"] != hardware_address
    a.start_overlaynet(store, named=False)
    after = a.status()
    assert (after["subnets"], after["node"]) == (before["subnets"], before["node"])
    wait_until(lambda: b.status()["peers"] == 1, PATIENCE, "one peer of the other node, and not two")
    wait_for_ping(second, first)
    for host in (a, b):
        wait_until(lambda host=host: host.status()["problems"] == {}, PATIENCE, "the end of all problems")  # type: ignore[misc]


def renumbered_at_once(host: Host) -> None:
    """The new address can be used only when it has been checked for duplicates, after a second or two."""
    host.namespace.ip(
        f"address delete {host.address6} dev eth0",
        f"address add {A_IS_MOVED_TO6} dev eth0",
        f"route replace default via {SWITCH_ADDRESS6.ip}",
    )


def renumbered_in_time(host: Host) -> None:
    """As routers do it (RFC 4192): both are valid for a while, and the old one is deprecated; with a privacy address."""
    host.namespace.set_sysctl("net.ipv6.conf.eth0.use_tempaddr", 2)
    host.namespace.ip(
        f"route add {UNDERLAY6} dev eth0 metric 100",  # that of the kernel may end with the lifetime of an address
        f"address add {A_IS_MOVED_TO6} dev eth0 valid_lft 90000 preferred_lft 90000 mngtmpaddr",
        f"address change {host.address6} dev eth0 valid_lft 90000 preferred_lft 0",
    )
    assert "temporary" in host.namespace.execute(["ip", "address", "show", "eth0"]).stdout


@pytest.mark.parametrize(
    ("underlay", "backend", "renumber"),
    [
        ((6,), "udp", renumbered_at_once),
        ((6,), "host-gw", renumbered_at_once),
        ((4, 6), "vxlan", renumbered_at_once),
        ((6,), "vxlan", renumbered_in_time),
        ((4, 6), "udp", renumbered_in_time),
    ],
)
def test_another_address_of_ipv6_is_published_when_it_can_be_used_and_peers_follow(
    underlay: tuple[int, ...], backend: str, renumber: Callable[[Host], None]
) -> None:
    overlay = NETWORK if 4 in underlay else None
    with (
        Lab(
            "moving", overlay=overlay, overlay6=NETWORK6, underlay=underlay, backend=backend, default_route=True
        ) as lab,
        EtcdServer(str(SWITCH_ADDRESS6.ip), network_namespace=lab.switch.name) as etcd,
    ):
        a, b = lab.hosts
        first, second = lab.containers
        if backend == "udp" and 4 in underlay:
            b.namespace.ip(f"address delete {b.address} dev eth0")  # or IPv4 would carry everything
        for host in (a, b):
            host.start_overlaynet(["--store", "etcd", "--etcd-endpoints", etcd.endpoint])
            host.connect_containers()
        lab.wait_until_acquainted()
        wait_for_ping(first, second, 6)
        before = a.status()
        renumber(a)
        wait_until(lambda: a.status()["public_ipv6"] == str(A_IS_MOVED_TO6.ip), PATIENCE, "it to be published")
        changed = b.daemon.wait_for("peer changed", SECONDS)
        assert changed["address"].split(", ")[-1] == str(A_IS_MOVED_TO6.ip)
        for version in (6, 4) if 4 in underlay else (6,):
            wait_for_ping(first, second, version)
            wait_for_ping(second, first, version)
        for host in (a, b):
            wait_until(lambda host=host: host.status()["problems"] == {}, PATIENCE, "the end of all problems")  # type: ignore[misc]
        after = a.status()
        assert [after[name] for name in ("subnets", "public_ipv4", "mtu")] == [
            before[name] for name in ("subnets", "public_ipv4", "mtu")
        ]
        for host, message in ((a, "underlay changed"), (a, "address published"), (b, "peer changed")):
            assert [record["message"] for record in host.daemon.records].count(message) == 1, message
        assert a.daemon.stop() == 0


def test_an_address_of_ipv6_that_another_host_has_is_not_published() -> None:
    """What duplicate address detection finds is said; the node goes on with the address that it has of IPv4."""
    with Lab("moving", overlay6=NETWORK6, underlay=(4, 6)) as lab:
        a, b = lab.hosts
        for host in (a, b):
            host.start_overlaynet(lab.file_store)
            host.connect_containers()
        lab.wait_until_acquainted()
        a.namespace.ip(f"address delete {a.address6} dev eth0", f"address add {b.address6.ip}/64 dev eth0")
        wait_until(lambda: a.status()["public_ipv6"] is None, PATIENCE, "the address to be given up")
        assert a.status()["public_ipv4"] == str(a.address.ip)
        wait_until(lambda: a.status()["problems"] == {}, PATIENCE, "the end of all problems")
        wait_for_ping(lab.containers[0], lab.containers[1])
        a.namespace.ip(f"address delete {b.address6.ip}/64 dev eth0", f"address add {A_IS_MOVED_TO6} dev eth0")
        wait_until(lambda: a.status()["public_ipv6"] == str(A_IS_MOVED_TO6.ip), PATIENCE, "another to be published")
        assert str(b.address6.ip) not in str([r for r in a.daemon.records if r["message"] == "address published"])
