"""Real daemons with a real etcd that hangs or is full: they keep their leases, and packets go on."""

import base64
import contextlib
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from overlaynet.errors import OverlaynetError
from overlaynet.testing.etcd import EtcdCluster, EtcdServer
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


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def fill(etcd: EtcdServer) -> None:
    def put(number: int) -> object:
        return etcd.post("/v3/kv/put", {"key": encoded(f"filler/{number}"), "value": encoded("x" * 10_000)})

    with pytest.raises(OverlaynetError, match="database space exceeded"):
        all(map(put, itertools.count()))


def make_room(etcd: EtcdServer) -> None:
    """What an operator does."""
    header = etcd.post("/v3/kv/deleterange", {"key": encoded("filler/"), "range_end": encoded("filler0")})["header"]
    etcd.post("/v3/kv/compaction", {"revision": header["revision"], "physical": True})
    etcd.post("/v3/maintenance/defragment", {})
    for alarm in etcd.post("/v3/maintenance/alarm", {"action": "GET"})["alarms"]:
        etcd.post("/v3/maintenance/alarm", {"action": "DEACTIVATE", **alarm})


def written_last(etcd: EtcdServer) -> dict[str, int]:
    """The revision of each lease."""
    prefix = "/coreos.com/network/subnets"
    found = etcd.post("/v3/kv/range", {"key": encoded(f"{prefix}/"), "range_end": encoded(f"{prefix}0")})
    return {base64.b64decode(kv["key"]).decode(): int(kv["mod_revision"]) for kv in found["kvs"]}


def test_packets_go_on_while_etcd_is_full_and_all_heals_once_it_has_room(lab: Lab) -> None:
    quota = ["--quota-backend-bytes", "200000"]
    with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name, arguments=quota) as etcd:
        *nodes, newcomer = lab.hosts
        start(lab, nodes, [etcd.endpoint])
        with every_packet_arrives(*lab.containers[:2]):
            fill(etcd)
            renewed(nodes[0], 1)  # what was under way is over
            renewed(nodes[1], 1)
            before = written_last(etcd)
            for host in nodes:
                renewed(host, 4)  # each a third of its lifetime after the one before
            assert written_last(etcd) == before, "nothing can be written"
            what_to_do = (
                f"etcd at {etcd.endpoint} is out of space (NOSPACE alarm): compact and defragment it, then run etcdctl "
                f"alarm disarm"
            )
            for host in nodes:
                assert said(host, "lease kept alive unchanged")[-1]["reason"] == what_to_do
            waiting = newcomer.start_overlaynet(["--store", "etcd", "--etcd-endpoints", etcd.endpoint], wait=False)
            waiting.wait_for("degraded")
            assert newcomer.status()["problems"] == {"store": what_to_do}

            make_room(etcd)
            waiting.wait_until_ready()
            lab.wait_until_acquainted()
            for host in nodes:
                renewed(host, 2)
            after = written_last(etcd)
            assert len(after) == 3
            assert all(after[key] > revision for key, revision in before.items())
        for host in nodes:
            assert not said(host, "degraded")
            assert not said(host, "peer removed")
        assert newcomer.status()["problems"] == {}
