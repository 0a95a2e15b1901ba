"""The underlay's interface goes down and up again and again, faster than a node looks: it neither chases that nor is lost."""

import contextlib
import http.client
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from overlaynet.testing import namespaces
from overlaynet.testing.daemons import DaemonProcess
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import NETWORK6, SWITCH_ADDRESS, SWITCH_ADDRESS6, Host, Lab, wait_until
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


def daemon_of(host: Host) -> DaemonProcess:
    assert host.daemon is not None
    return host.daemon


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


def picture(host: Host) -> dict[str, Any]:
    """What is to be again as it was."""
    status = host.status()
    packets: Any = status["packets"]
    return {
        **{name: status[name] for name in ("subnets", "public_ipv4", "public_ipv6", "mtu", "problems", "ready")},
        "peers": {subnet: peer["address"] for subnet, peer in packets["peers"].items()},
        "routes": sorted(
            (route["type"], route["dst"], route.get("dev"), route.get("gateway"), route.get("metric"))
            for version in ("-4", "-6")
            for route in host.namespace.ip_json(version, "route", "show")
        ),
        "addresses": sorted(
            (link["ifname"], link["mtu"], "UP" in link["flags"], entry["local"], entry.get("tentative", False))
            for link in host.namespace.ip_json("address", "show")
            for entry in link["addr_info"]
        ),
    }


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
    command = ["ping", "-n", "-c", "1", "-W", "1", str(lab.containers[1].ip)]
    container = lab.containers[0].namespace

    def reaches() -> bool:
        return container.execute(command, check=False).returncode == 0

    wait_until(reaches, PATIENCE, "a ping to arrive")
    time.sleep(2)  # what the start has set off
    begun = time.monotonic()
    before, written, asked = picture(a), writes(etcd), requests(etcd)
    lines, lines_of_peer = len(daemon_of(a).records), len(daemon_of(b).records)
    with container.popen(["ping", "-n", "-q", "-i", "0.002", str(lab.containers[1].ip)], stdout=-3) as load:
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
        wait_until(reaches, PATIENCE, "a ping to arrive")
        load.kill()
    time.sleep(2)
    told = [record["message"] for record in daemon_of(a).records[lines:]]
    assert len(told) <= LINES_PER_SECOND * (time.monotonic() - begun), told
    assert set(told) <= {"degraded", "still degraded", "recovered", "peer not reachable", "routes changed"}
    assert writes(etcd) == written, "nothing has changed for anybody"
    assert requests(etcd) - asked < 20
    assert daemon_of(b).records[lines_of_peer:] == []
    # And nothing goes on.
    lines, asked, used, began = len(daemon_of(a).records), requests(etcd), cpu_seconds(daemon_of(a)), time.monotonic()
    time.sleep(2)
    assert cpu_seconds(daemon_of(a)) - used < (time.monotonic() - began) / 2, "a busy loop takes a whole core"
    assert requests(etcd) - asked < 5
    assert len(daemon_of(a).records) == lines
    assert picture(a) == before
    assert reaches()
