"""Real daemons on a real etcd: who is cut off, or held up, beyond its lease is silent before its subnet is another's."""

import base64
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest

from overlaynet.testing.capture import Capture, Packet
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import NETWORK, SWITCH_ADDRESS, Container, Host, Lab, wait_until
from overlaynet.testing.packets import OVERLAY_PORT, UDP

PATIENCE = 30.0
TTL = 5
SUBNET_OF_A = IPv4Network("10.244.1.0/24")


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Three hosts, of which two have a daemon, and a switch where etcd is."""
    with Lab("fencing", hosts=3, default_route=True) as lab:
        yield lab


@pytest.fixture
def etcd(lab: Lab) -> Iterator[EtcdServer]:
    with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name) as server:
        yield server


def store(etcd: EtcdServer) -> list[str]:
    return ["--store", "etcd", "--etcd-endpoints", etcd.endpoint]


def overlaynet(lab: Lab, etcd: EtcdServer, *arguments: str) -> str:
    """Run a command at the switch; what it wrote, and an exit status other than 0."""
    command = [sys.executable, "-P", "-m", "overlaynet", *arguments, *store(etcd)]
    result = lab.switch.execute(command, check=False, timeout=PATIENCE)
    return result.stdout + result.stderr + (f"exit status {result.returncode}" if result.returncode else "")


def write_network(lab: Lab, etcd: EtcdServer, *arguments: str) -> None:
    text = overlaynet(lab, etcd, "network", "set", "--network", str(NETWORK), "--lease-ttl", str(TTL), *arguments)
    assert "exit status" not in text, text


def cut_off_from_etcd(host: Host) -> None:
    """What the host sends to etcd reaches nobody, and nothing says so; the other hosts are reached as before."""
    host.namespace.ip(f"neighbour replace {SWITCH_ADDRESS.ip} lladdr 02:00:00:00:00:99 dev eth0 nud permanent")


def reach_etcd_again(host: Host) -> None:
    host.namespace.ip(f"neighbour delete {SWITCH_ADDRESS.ip} dev eth0")


def is_leased(etcd: EtcdServer, subnet: IPv4Network) -> bool:
    key = f"/coreos.com/network/subnets/{subnet.network_address}-{subnet.prefixlen}"
    return "kvs" in etcd.post("/v3/kv/range", {"key": base64.b64encode(key.encode()).decode()})


@contextlib.contextmanager
def pinging(source: Container, destination: Container) -> Iterator[None]:
    """Packets all the time, answered or not."""
    command = ["ping", "-n", "-q", "-i", "0.02", str(destination.ip)]
    process = source.namespace.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def of_the_overlay(packet: Packet) -> bool:
    """True for what a host puts on the wire for the overlay, encapsulated or not."""
    if packet.outgoing or packet.ip is None:
        return False
    transport = packet.ip.transport
    encapsulated = isinstance(transport, UDP) and transport.destination_port == OVERLAY_PORT
    return encapsulated or packet.ip.header.source in NETWORK


def from_host(lab: Lab, host: Host) -> Capture:
    """What a host sends for the overlay, captured at its port of the switch."""
    return Capture({host.label: (lab.switch, host.label)}, of_the_overlay)


def wait_for_tries(host: Host) -> None:
    """Wait until containers have tried to send fifty more packets."""
    with Capture({"cni0": (host.namespace, "cni0")}, lambda packet: not packet.outgoing) as tried:
        wait_until(lambda: len(tried.packets) >= 50, PATIENCE, "fifty packets of containers")


@pytest.mark.parametrize("backend", ["udp", "host-gw"])
@pytest.mark.parametrize("held_up", [False, True], ids=["cut off", "stopped"])
def test_a_node_whose_lease_has_ended_is_silent_before_its_subnet_is_another_nodes(
    lab: Lab, etcd: EtcdServer, backend: str, held_up: bool
) -> None:
    """One that was stopped is as soon as it goes on: while it is, the kernel carries on by itself."""
    a, b, c = lab.hosts
    in_a, in_b, in_c = lab.containers
    # Two subnets in all: who comes third gets what is given up.
    limits = ["--subnet-min", "10.244.1.0", "--subnet-max", "10.244.2.0"]
    write_network(lab, etcd, *limits, "--backend", backend)
    for host in (a, b):
        host.start_overlaynet(store(etcd), ["--backend", backend])
        host.connect_containers()
    old_owner = a.daemon
    assert old_owner is not None
    wait_until(lambda: in_a.reaches(in_b), PATIENCE, "a ping to arrive")
    with pinging(in_a, in_b), contextlib.ExitStack() as captures:
        cut_off_from_etcd(a)
        with from_host(lab, a) as before:
            before.wait_for(lambda packet: True, what="packet of the old owner")
        if held_up:
            os.kill(old_owner.pid, signal.SIGSTOP)
        wait_until(lambda: not is_leased(etcd, SUBNET_OF_A), PATIENCE, "the lease to end")
        if not held_up:
            of_a = captures.enter_context(from_host(lab, a))
        of_c = captures.enter_context(from_host(lab, c))
        c.start_overlaynet(store(etcd), ["--backend", backend])
        assert c.status()["subnets"] == [str(SUBNET_OF_A)]
        c.connect_containers()
        if held_up:
            os.kill(old_owner.pid, signal.SIGCONT)
            wait_until(lambda: "expired" in str(a.status()["problems"]), PATIENCE, "the daemon to know")
            wait_until(lambda: not a.status()["peers"], PATIENCE, "the daemon to act on it")
            ways = a.namespace.ip_json  # with `host-gw`, peers are gone from the status before their routes are
            wait_until(
                lambda: str(b.address.ip) not in {way.get("gateway") for way in ways("route", "show")},
                PATIENCE,
                "the route to be gone",
            )
            of_a = captures.enter_context(from_host(lab, a))
        wait_until(lambda: in_c.reaches(in_b), PATIENCE, "the new owner to be answered")
        of_c.wait_for(lambda packet: True, what="packet of the new owner")
        wait_for_tries(a)
        assert old_owner.running
        reach_etcd_again(a)
        wait_until(lambda: not old_owner.running, PATIENCE, "the old owner to end")
        wait_for_tries(a)
        assert of_a.missed == of_c.missed == 0
        assert of_a.packets == []
    assert old_owner.exit_status == 1
    assert old_owner.log.splitlines()[-1] == (
        f"overlaynet: the lease on {SUBNET_OF_A} was taken by node {c.label} at {c.address.ip}"
    )


@pytest.mark.parametrize("claimed", [True, False], ids=["claimed", "not claimed yet"])
def test_a_node_whose_lease_has_ended_gives_way_to_the_one_that_its_subnet_is_reserved_for(
    lab: Lab, etcd: EtcdServer, claimed: bool
) -> None:
    a, b, c = lab.hosts
    in_a, in_b, in_c = lab.containers
    write_network(lab, etcd)
    for host in (a, b):
        host.start_overlaynet(store(etcd))
        host.connect_containers()
    old_owner = a.daemon
    assert old_owner is not None
    wait_until(lambda: in_a.reaches(in_b), PATIENCE, "a ping to arrive")
    reserve = ("reserve", str(SUBNET_OF_A), "--node", c.label)
    assert f"{SUBNET_OF_A} is held by node {a.label}" in overlaynet(lab, etcd, *reserve), "as long as its lease lasts"
    with pinging(in_a, in_b), contextlib.ExitStack() as captures:
        cut_off_from_etcd(a)
        with from_host(lab, a) as before:
            before.wait_for(lambda packet: True, what="packet of the old owner")
        wait_until(lambda: not is_leased(etcd, SUBNET_OF_A), PATIENCE, "the lease to end")
        of_a = captures.enter_context(from_host(lab, a))
        assert "exit status" not in overlaynet(lab, etcd, *reserve)
        if claimed:
            c.start_overlaynet(store(etcd))
            assert c.status()["subnets"] == [str(SUBNET_OF_A)]
            c.connect_containers()
            wait_until(lambda: in_c.reaches(in_b), PATIENCE, "the new owner to be answered")
        wait_for_tries(a)
        assert old_owner.running
        reach_etcd_again(a)
        wait_until(lambda: not old_owner.running, PATIENCE, "the old owner to end")
        wait_for_tries(a)
        assert of_a.missed == 0
        assert of_a.packets == []
    assert old_owner.exit_status == 1
    what = (
        f"was taken by node {c.label} at {c.address.ip}"
        if claimed
        else f"vanished, and is now reserved for node {c.label}"
    )
    assert old_owner.log.splitlines()[-1] == f"overlaynet: the lease on {SUBNET_OF_A} {what}"
    if not claimed:
        c.start_overlaynet(store(etcd))
        assert c.status()["subnets"] == [str(SUBNET_OF_A)]
