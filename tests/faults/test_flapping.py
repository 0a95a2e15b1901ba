"""The underlay's interface goes down and up again and again, faster than a node looks: it neither chases that nor is lost."""

import contextlib
import http.client
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from overlaynet.testing import namespaces
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import NETWORK6, SWITCH_ADDRESS, SWITCH_ADDRESS6, Lab, wait_until
from tests.faults.picture import picture
from tests.faults.processor import cpu_seconds

PATIENCE = 30.0
FLAPS = 10
LINES_PER_SECOND = 4
"""There is a look a second, at most; of each, a line for each trouble, and for what has become of routes."""


@pytest.fixture
def lab(backend: str, dual: bool) -> Iterator[Lab]:
    overlay6, underlay = (NETWORK6, (4, 6)) if dual else (None, (4,))
    with Lab("flapping", overlay6=overlay6, underlay=underlay, backend=backend, default_route=True) as lab:
        yield lab


@pytest.fixture
def etcd(lab: Lab) -> Iterator[EtcdServer]:
    with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name) as server:
        yield server


def requests(etcd: EtcdServer) -> int:
    """How many requests the etcd has been sent since it was started."""

    def read() -> str:
        with contextlib.closing(http.client.HTTPConnection(etcd.address, etcd.port, timeout=10)) as connection:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()

    assert etcd.network_namespace is not None
    found = re.findall(
        r"^grpc_server_started_total{.*} (\d+)", namespaces.run_inside(etcd.network_namespace, read), re.MULTILINE
    )
    assert found
    return sum(map(int, found))


def writes(etcd: EtcdServer) -> int:
    """How many writes: the store's revision."""
    answer: Any = etcd.post("/v3/kv/range", {"key": "AA=="})
    return int(answer["header"]["revision"])


@pytest.mark.parametrize(
    ("backend", "dual"),
    [("host-gw", False), ("udp", True), ("vxlan", True)],
    ids=["host-gw", "udp-dual", "vxlan-dual"],
)
def test_ten_quick_flaps_leave_all_as_it_was_and_the_node_idle(lab: Lab, etcd: EtcdServer, dual: bool) -> None:
    a, b = lab.hosts
    if dual:
        # Each time the interface is up, the address is checked for duplicates again.
        a.namespace.set_sysctl("net.ipv6.conf.eth0.keep_addr_on_down", 1)
        a.namespace.ip(
            f"address delete {a.address6} dev eth0",
            f"address add {a.address6} dev eth0",
            f"route replace default via {SWITCH_ADDRESS6.ip}",
        )
        wait_until(lambda: "'tentative': True" not in str(a.namespace.ip_json("address")), PATIENCE, "the check")
    for host in (a, b):
        host.start_overlaynet(["--store", "etcd", "--etcd-endpoints", etcd.endpoint])
        host.connect_containers()
    lab.wait_until_acquainted()
    near, far = lab.containers
    wait_until(lambda: near.reaches(far), PATIENCE, "a ping to arrive")
    time.sleep(2)  # what the start has set off
    begun = time.monotonic()
    before, written, asked = picture(a), writes(etcd), requests(etcd)
    lines, lines_of_peer = len(a.daemon.records), len(b.daemon.records)
    with near.namespace.popen(["ping", "-n", "-q", "-i", "0.002", str(far.ip)], stdout=-3) as load:
        for _ in range(FLAPS):
            a.namespace.ip("link set eth0 down")
            time.sleep(0.1)
            a.namespace.ip(
                "link set eth0 up",
                f"route replace default via {SWITCH_ADDRESS.ip}",
                *([f"route replace default via {SWITCH_ADDRESS6.ip}"] if dual else []),
            )
            time.sleep(0.1)
        wait_until(lambda: picture(a) == before, PATIENCE, "all to be as it was")
        wait_until(lambda: near.reaches(far), PATIENCE, "a ping to arrive")
        load.kill()
    time.sleep(2)
    told = [record["message"] for record in a.daemon.records[lines:]]
    assert len(told) <= LINES_PER_SECOND * (time.monotonic() - begun), told
    assert set(told) <= {"degraded", "still degraded", "recovered", "peer not reachable", "routes changed"}
    assert writes(etcd) == written, "nothing has changed for anybody"
    assert requests(etcd) - asked < 20
    assert b.daemon.records[lines_of_peer:] == []
    # And nothing goes on.
    lines, asked, used, began = len(a.daemon.records), requests(etcd), cpu_seconds(a.daemon), time.monotonic()
    time.sleep(2)
    assert cpu_seconds(a.daemon) - used < (time.monotonic() - began) / 2, "a busy loop takes a whole core"
    assert requests(etcd) - asked < 5
    assert len(a.daemon.records) == lines
    assert picture(a) == before
    assert near.reaches(far)
