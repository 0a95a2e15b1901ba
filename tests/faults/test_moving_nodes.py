"""A node's address changes while it runs, and its connections to etcd with it: it keeps its subnet, and peers follow."""

from collections.abc import Callable, Iterator
from ipaddress import IPv4Interface

import pytest

from overlaynet.testing.daemons import DaemonProcess
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import SWITCH_ADDRESS, Container, Host, Lab, wait_until

A_IS_MOVED_TO = IPv4Interface("172.16.130.77/24")
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


def wait_for_ping(source: Container, destination: Container) -> None:
    command = ["ping", "-n", "-c", "1", "-W", "1", str(destination.ip)]
    wait_until(lambda: source.namespace.execute(command, check=False).returncode == 0, PATIENCE, "a ping to arrive")


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
    assert b.daemon is not None
    assert b.daemon.wait_for("peer changed", SECONDS)["address"] == str(A_IS_MOVED_TO.ip)
    wait_for_ping(first, second)
    wait_for_ping(second, first)
    after = a.status()
    assert after["subnets"] == subnets
    assert after["public_ipv4"] == str(A_IS_MOVED_TO.ip)
    c.start_overlaynet(store, ["--backend", backend])
    c.connect_containers()
    wait_until(lambda: a.status()["peers"] == 2, SECONDS, "the node that moved to hear of another one")
    wait_for_ping(first, third)
    for host in lab.hosts:
        wait_until(lambda host=host: host.status()["problems"] == {}, PATIENCE, "the end of all problems")  # type: ignore[misc]
    assert a.daemon is not None
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
    assert a.daemon is not None
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
