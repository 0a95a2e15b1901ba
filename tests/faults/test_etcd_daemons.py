"""Real daemons with a real etcd that hangs or is full: they keep their leases, and packets go on."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from overlaynet.testing.etcd import EtcdCluster
from overlaynet.testing.lab import NETWORK, SWITCH_ADDRESS, Container, Host, Lab, wait_until

PATIENCE = 30.0
TTL = 5
"""The shortest lifetime of a lease that there is."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Three hosts, of which two have a daemon at first, and a switch where etcd is."""
    with Lab("store", hosts=3) as lab:
        yield lab


def start(lab: Lab, hosts: Sequence[Host], endpoints: Sequence[str]) -> None:
    store = ["--store", "etcd", "--etcd-endpoints", ",".join(endpoints)]
    command = [sys.executable, "-P", "-m", "overlaynet", "network", "set", *store, "--network", str(NETWORK)]
    lab.switch.execute([*command, "--lease-ttl", str(TTL)])
    for host in hosts:
        host.start_overlaynet(store)
        host.connect_containers()
    lab.wait_until_acquainted()


@contextlib.contextmanager
def every_packet_arrives(source: Container, destination: Container) -> Iterator[None]:
    """Ten packets a second while the block lasts, each of which is answered."""
    command = ["ping", "-n", "-q", "-i", "0.1", str(destination.ip)]
    process = source.namespace.popen(command, stdout=subprocess.PIPE)
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        summary, _ = process.communicate(timeout=PATIENCE)
    counted = re.search(rb"(\d+) packets transmitted, (\d+) received", summary)
    assert counted is not None, summary
    sent, received = map(int, counted.groups())
    assert received > 0
    assert sent - received <= 1, "more are missing than the last one, which was on its way still"


def said(host: Host, message: str) -> list[dict[str, object]]:
    assert host.daemon is not None
    return [record for record in host.daemon.records if record["message"] == message]


def renewed(host: Host, times: int) -> None:
    """Wait until the host has renewed its lease so many more times."""
    before = len(said(host, "lease renewed"))
    wait_until(
        lambda: len(said(host, "lease renewed")) >= before + times, times * TTL + PATIENCE, "the lease to be renewed"
    )


@pytest.mark.parametrize("who", ["the leader", "a follower"])
def test_a_member_that_hangs_costs_no_node_its_lease_however_short_that_is(lab: Lab, who: str) -> None:
    """It has the connections of all nodes, and accepts more."""
    usual = ["--heartbeat-interval", "100", "--election-timeout", "1000"]
    with EtcdCluster(3, str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name, arguments=usual) as cluster:
        leader = cluster.leader
        hung, *others = sorted(cluster.members, key=lambda member: (member is leader) == (who == "a follower"))
        nodes = lab.hosts[:2]
        start(lab, nodes, [member.endpoint for member in (hung, *others)])
        with every_packet_arrives(*lab.containers[:2]):
            hung.pause()
            for host in nodes:
                renewed(host, 4)
            hung.resume()
        for host in nodes:
            assert not [record for record in said(host, "degraded") if "expired" in str(record["reason"])]
            assert not said(host, "lease taken back")
            assert not said(host, "peer removed")
