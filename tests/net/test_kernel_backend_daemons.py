"""Whole daemons with the backends that leave packets to the kernel: three hosts, a container on each."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from overlaynet.testing.lab import Host, Lab, wait_until

RECEIVER = """
import socket
listener = socket.create_server(("0.0.0.0", 5001))
print("listening", flush=True)
connection, _ = listener.accept()
count = 0
while data := connection.recv(65536):
    count += len(data)
print(count)
"""
SENDER = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5001), timeout=20)
connection.sendall(bytes(5_000_000))
connection.close()
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("kernel", hosts=3, default_route=True) as lab:
        yield lab


def start(host: Host, backend: str, *extra: str) -> None:
    host.start_overlaynet(host.lab.file_store, ["--backend", backend, *extra])
    host.connect_containers()


def start_all(lab: Lab, backend: str) -> None:
    for host in lab.hosts:
        start(host, backend)
    lab.wait_until_acquainted()
    for source in lab.containers:
        for destination in lab.containers:
            wait_until(lambda s=source, d=destination: s.reaches(d), 20, "a ping to arrive")  # type: ignore[misc]


def link(host: Host, name: str = "overlay0") -> Any:
    return next((one for one in host.namespace.ip_json("link", "show") if one["ifname"] == name), None)


def routes(host: Host) -> dict[str, Any]:
    """The routes that are ours and lead somewhere, by destination."""
    found = host.namespace.ip_json("route", "show", "proto", "82")
    return {route["dst"]: route for route in found if route["type"] == "unicast"}


def lease_of(host: Host) -> Any:
    (record,) = (host.lab.directory / "store").rglob(f"10.244.{host.number}.0-24*")
    return record.read_text()


@pytest.mark.parametrize(("backend", "mtu"), [("vxlan", 1450), ("host-gw", 1500)])
def test_containers_reach_each_other_and_a_node_that_leaves_is_forgotten(lab: Lab, backend: str, mtu: int) -> None:
    start_all(lab, backend)
    a, _, c = lab.hosts
    assert f"FLANNEL_MTU={mtu}\n" in a.subnet_file.read_text()
    first, second, _ = lab.containers
    assert first.reaches(second, "-M", "do", "-s", str(mtu - 28)), "a packet of the MTU passes"
    assert first.reaches(second, "-s", "6000"), "fragments, too"
    receiver = second.namespace.popen(["python3", "-c", RECEIVER], stdout=-1)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == b"listening\n"
    first.namespace.execute(["python3", "-c", SENDER, str(second.ip)], timeout=60)
    assert receiver.stdout.read() == b"5000000\n"
    assert routes(a).keys() == {"10.244.2.0/24", "10.244.3.0/24"}
    assert c.daemon.stop() == 0
    start(c, backend, "--release-on-stop")
    assert c.daemon.stop() == 0
    wait_until(lambda: routes(a).keys() == {"10.244.2.0/24"}, 20, "the node that left to be forgotten")
    assert set(a.status()["packets"]["peers"]) == {"10.244.2.0/24"}  # type: ignore[index, arg-type, call-overload]
    assert not [record for record in a.daemon.records if record["level"] in ("warning", "error")]


def test_the_lease_is_flannels(lab: Lab) -> None:
    start(lab.hosts[0], "vxlan")
    address = link(lab.hosts[0])["address"]
    expected = (
        '"PublicIP":"172.16.130.140","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"%s"}'
    )
    text = lease_of(lab.hosts[0]).replace('\\"', '"')
    assert expected % address in text


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_a_crash_stops_no_traffic_and_a_restart_takes_over(lab: Lab, backend: str) -> None:
    start_all(lab, backend)
    a, b, _ = lab.hosts
    first, second, _ = lab.containers
    before = link(a)
    a.daemon.kill()
    assert first.reaches(second)
    assert second.reaches(first)
    start(a, backend)
    assert link(a) == before, "the same device, with the same hardware address"
    wait_until(lambda: second.reaches(first), 20, "a ping to arrive")
    assert a.daemon.stop() == 0
    assert link(a) is None
    assert routes(a) == {}, "only the backstop stays"
    assert not first.reaches(second)
    start(a, backend)
    assert (before and before["address"]) == (link(a) and link(a)["address"])
    wait_until(lambda: second.reaches(first), 20, "a ping to arrive")
    assert "peer changed" not in b.daemon.log


def test_what_is_deleted_from_the_kernel_comes_back(lab: Lab) -> None:
    start_all(lab, "vxlan")
    a, b, _ = lab.hosts
    first, second, _ = lab.containers
    a.namespace.ip("link delete overlay0")
    wait_until(lambda: first.reaches(second), 20, "a ping to arrive through a new device")
    a.namespace.ip("link set overlay0 down")
    wait_until(lambda: first.reaches(second), 20, "a ping to arrive through the device that was set down")
    address = link(b)["address"]
    a.namespace.execute(["bridge", "fdb", "del", address, "dev", "overlay0", "self"])
    wait_until(lambda: first.reaches(second), 20, "a ping to arrive by a new forwarding entry, before the audit")
    a.namespace.ip("neighbour del 10.244.2.0 dev overlay0")
    wait_until(lambda: first.reaches(second), 20, "a ping to arrive by a new neighbour entry, before the audit")
    a.namespace.ip("route delete 10.244.2.0/24")
    wait_until(lambda: first.reaches(second), 20, "a ping to arrive by a new route")


@pytest.mark.parametrize(("backend", "headers"), [("vxlan", 50), ("host-gw", 0)])
def test_another_address_and_mtu_of_the_underlay_are_followed(lab: Lab, backend: str, headers: int) -> None:
    start_all(lab, backend)
    a, b, _ = lab.hosts
    first, second, _ = lab.containers
    before = link(a)
    a.namespace.ip("address flush dev eth0", "address add 172.16.130.77/24 dev eth0", "link set eth0 mtu 1400")
    wait_until(lambda: a.status()["public_ipv4"] == "172.16.130.77", 20, "the new address to be published")
    wait_until(lambda: f"FLANNEL_MTU={1400 - headers}\n" in a.subnet_file.read_text(), 20, "the subnet file to follow")
    wait_until(lambda: first.reaches(second), 20, "a ping to arrive")
    wait_until(lambda: second.reaches(first), 20, "a ping to arrive")
    wait_until(lambda: a.status()["problems"] == {}, 20, "the daemon to recover")
    assert b.daemon.wait_for("peer changed")["address"] == "172.16.130.77"
    assert (before and before["address"]) == (link(a) and link(a)["address"]), "the peers know the hardware address"


def test_with_direct_routing_packets_on_one_link_need_no_tunnel(lab: Lab) -> None:
    options = ["--network", "10.244.0.0/16", "--backend", "vxlan", "--backend-option", "DirectRouting=true"]
    command = [sys.executable, "-P", "-m", "overlaynet", "network", "set", *options, *lab.file_store]
    lab.switch.execute(command)
    start_all(lab, "vxlan")
    assert routes(lab.hosts[0])["10.244.2.0/24"]["gateway"] == "172.16.130.164"
    assert routes(lab.hosts[0])["10.244.2.0/24"]["dev"] == "eth0"


@pytest.mark.parametrize(("backend", "name"), [("vxlan", "overlay0"), ("host-gw", "host-gw")])
def test_cleanup_removes_what_a_crash_left_but_not_under_a_running_daemon(lab: Lab, backend: str, name: str) -> None:
    start_all(lab, backend)
    a = lab.hosts[0]
    command = [sys.executable, "-P", "-m", "overlaynet", "cleanup", "--device", name]
    refused = a.namespace.execute(command, check=False)
    assert refused.returncode == 1
    assert f"the device {name} exists, so its daemon seems to run; stop it first" in refused.stderr
    a.daemon.kill()
    assert routes(a) != {}
    for _ in range(2):
        a.namespace.execute(command)
        assert link(a) is None
        assert a.namespace.ip_json("route", "show", "proto", "82") == []
    start(a, backend)


def test_a_port_that_is_taken_ends_the_daemon_before_it_claims_a_lease(lab: Lab) -> None:
    a = lab.hosts[0]
    a.namespace.ip("link add flannel.1 type vxlan id 1 dstport 8472 local 172.16.130.140 dev eth0 nolearning")
    daemon = a.start_overlaynet(lab.file_store, ["--backend", "vxlan"], wait=False)
    wait_until(lambda: not daemon.running, 20, "the daemon to end")
    assert daemon.exit_status == 1
    assert "VNI 1 on UDP port 8472 is taken by the VXLAN device flannel.1; stop what made it" in daemon.log
    assert "lease acquired" not in daemon.log
    assert link(a) is None
    assert json.dumps(link(a, "flannel.1"))
