"""Whole daemons with the backends that leave packets to others: commands that an operator wrote down, or nobody of ours."""

import shlex
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from overlaynet.testing.lab import Container, Host, Lab, wait_until

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

# flannel's recipe for VXLAN by commands, each with a shell, and with the commands that flannel has not.
VXLAN = {
    "PreStartupCommand": (
        "ip link delete tunnel0 2>/dev/null; "
        "ip link add tunnel0 type vxlan id 1 dstport 8472 local $PUBLIC_IP dev $INTERFACE nolearning && "
        "cat /sys/class/net/tunnel0/address"
    ),
    "PostStartupCommand": ("ip link set tunnel0 mtu 1450 up && ip address replace ${SUBNET%/*}/32 dev tunnel0"),
    "SubnetAddCommand": (
        "read mac; gateway=${SUBNET%/*}; "
        "ip neighbour replace $gateway lladdr $mac dev tunnel0 nud permanent && "
        "bridge fdb replace $mac dev tunnel0 self dst $PUBLIC_IP permanent && "
        "ip route replace $SUBNET via $gateway dev tunnel0 onlink"
    ),
    "SubnetRemoveCommand": (
        "read mac; gateway=${SUBNET%/*}; ip route delete $SUBNET; "
        "ip neighbour delete $gateway dev tunnel0; bridge fdb delete $mac dev tunnel0 self; true"
    ),
    "UnderlayChangeCommand": (
        "mac=$(cat /sys/class/net/tunnel0/address); ip link delete tunnel0; "
        "ip link add tunnel0 address $mac type vxlan id 1 dstport 8472 local $PUBLIC_IP dev $INTERFACE nolearning && "
        "ip link set tunnel0 mtu 1450 up && ip address replace ${SUBNET%/*}/32 dev tunnel0"
    ),
    "ShutdownCommand": "ip link delete tunnel0",
}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("commands", hosts=3) as lab:
        yield lab


def configure(lab: Lab, backend: str, options: dict[str, str]) -> None:
    arguments = [word for name, value in options.items() for word in ("--backend-option", f"{name}={value}")]
    command = [sys.executable, "-P", "-m", "overlaynet", "network", "set", "--network", "10.244.0.0/16"]
    lab.switch.execute([*command, "--backend", backend, *arguments, *lab.file_store])


def start(host: Host, backend: str, *extra: str) -> None:
    host.start_overlaynet(host.lab.file_store, ["--backend", backend, *extra])
    host.connect_containers()


def start_all(lab: Lab, backend: str) -> None:
    for host in lab.hosts:
        start(host, backend)
    lab.wait_until_acquainted()


def extension(lab: Lab) -> None:
    commands = {event: f"sh -c {shlex.quote(script)}" for event, script in VXLAN.items()}
    configure(lab, "extension", commands | {"Device": "tunnel0", "MTU": "1450"})
    start_all(lab, "extension")
    wait_for_all(lab.containers)


def wait_for_all(containers: list[Container]) -> None:
    for source in containers:
        for destination in containers:
            wait_until(lambda s=source, d=destination: s.reaches(d), 30, "a ping to arrive")  # type: ignore[misc]


def transfer(source: Container, destination: Container) -> None:
    receiver = destination.namespace.popen(["python3", "-c", RECEIVER], stdout=-1)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == b"listening\n"
    source.namespace.execute(["python3", "-c", SENDER, str(destination.ip)], timeout=60)
    assert receiver.stdout.read() == b"5000000\n"


def device(host: Host) -> Any:
    return next((link for link in host.namespace.ip_json("link", "show") if link["ifname"] == "tunnel0"), None)


def subnets_routed(host: Host) -> set[str]:
    """The peers' subnets that the host has routes to."""
    found = host.namespace.ip_json("route", "show", "dev", "tunnel0")
    return {route["dst"] for route in found if route["dst"].startswith("10.244.")}


def test_flannels_recipe_for_vxlan_carries_packets_and_a_node_that_leaves_is_removed(lab: Lab) -> None:
    extension(lab)
    a, _, c = lab.hosts
    first, second, _ = lab.containers
    assert "FLANNEL_MTU=1450\n" in a.subnet_file.read_text()
    assert first.reaches(second, "-M", "do", "-s", str(1450 - 28)), "a packet of the MTU passes"
    transfer(first, second)
    assert subnets_routed(a) == {"10.244.2.0/24", "10.244.3.0/24"}
    assert c.daemon.stop() == 0
    assert device(c) is None, "ShutdownCommand was run"
    start(c, "extension", "--release-on-stop")
    assert c.daemon.stop() == 0
    wait_until(lambda: subnets_routed(a) == {"10.244.2.0/24"}, 30, "the node that left to be removed")
    entries = a.namespace.execute(["bridge", "fdb", "show", "dev", "tunnel0"]).stdout
    assert "172.16.130.164" in entries
    assert str(c.address.ip) not in entries
    assert first.reaches(second)
    assert not [record for record in a.daemon.records if record["level"] in ("warning", "error")]


def test_after_a_crash_the_first_command_clears_away_what_was_left(lab: Lab) -> None:
    extension(lab)
    a, _, _ = lab.hosts
    first, second, _ = lab.containers
    before = device(a)
    a.daemon.kill()
    assert first.reaches(second), "the kernel goes on"
    start(a, "extension")
    after = device(a)
    assert before["ifindex"] != after["ifindex"]
    wait_until(lambda: first.reaches(second), 30, "a ping to arrive")
    wait_until(lambda: second.reaches(first), 30, "a ping to arrive, as the peers have the new hardware address")


def test_another_address_of_the_underlay_is_followed_by_the_commands(lab: Lab) -> None:
    extension(lab)
    a, b, _ = lab.hosts
    first, second, _ = lab.containers
    a.namespace.ip("address flush dev eth0", "address add 172.16.130.77/24 dev eth0")
    wait_until(lambda: a.status()["public_ipv4"] == "172.16.130.77", 30, "the new address to be published")
    wait_until(lambda: first.reaches(second), 30, "a ping to arrive")
    wait_until(lambda: second.reaches(first), 30, "a ping to arrive")
    assert "172.16.130.77" in b.namespace.execute(["bridge", "fdb", "show", "dev", "tunnel0"]).stdout
    transfer(first, second)


def test_alloc_leases_subnets_and_others_carry_the_packets(lab: Lab) -> None:
    configure(lab, "alloc", {})
    start_all(lab, "alloc")
    a, _, _ = lab.hosts
    first, second, _ = lab.containers
    assert "FLANNEL_MTU=1500\n" in a.subnet_file.read_text()
    assert not first.reaches(second)
    for host in lab.hosts:
        assert host.namespace.ip_json("route", "show", "proto", "82") == [], "not even a backstop"
        for other in lab.hosts:
            if other is not host:
                host.namespace.ip(f"route add 10.244.{other.number}.0/24 via {other.address.ip}")
    wait_for_all(lab.containers)
    assert first.reaches(second, "-M", "do", "-s", str(1500 - 28)), "a packet of the underlay's MTU passes"
    transfer(first, second)
    a.namespace.ip("link add any0 type bridge")  # some change that the daemon follows
    assert a.daemon.stop() == 0
    assert first.reaches(second), "what others made is left alone"
    assert not [record for record in a.daemon.records if record["level"] in ("warning", "error")]
