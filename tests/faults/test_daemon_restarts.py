"""Daemons that are stopped, killed and restarted, and an etcd that comes and goes, under real traffic."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlaynet.testing.capture import Capture
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import SWITCH_ADDRESS, Host, Lab, wait_until

ON_B = "10.244.2.194"


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("restarts", default_route=True) as lab:
        yield lab


def start_all(lab: Lab, store: list[str | Path]) -> None:
    for host in lab.hosts:
        host.start_overlaynet(store)
        host.connect_containers()


def wait_for_traffic(lab: Lab) -> None:
    wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), 20, "a ping to arrive")


def our_routes(host: Host) -> list[tuple[str, str, str | None]]:
    routes = host.namespace.ip_json("route", "show", "proto", "82")
    return sorted((route["type"], route["dst"], route.get("dev")) for route in routes)


RUNNING = [("unicast", "10.244.0.0/16", "overlay0"), ("unreachable", "10.244.0.0/16", None)]
STOPPED = RUNNING[1:]


def lease_of(host: Host) -> str:
    subnet = host.daemon.wait_for("lease acquired")["subnet"]
    assert isinstance(subnet, str)
    return subnet


@pytest.mark.parametrize("crash", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_a_restart_keeps_the_subnet_and_traffic_resumes(lab: Lab, crash: bool) -> None:
    start_all(lab, lab.file_store)
    wait_for_traffic(lab)
    host = lab.hosts[0]
    daemon = host.daemon
    before = lease_of(host)
    for _ in range(3):
        if crash:
            daemon.kill()
        else:
            assert daemon.stop() == 0
            assert daemon.records[-1]["message"] == "stopped"
        assert our_routes(host) == STOPPED, "the backstop stays, nothing else"
        assert [link["ifname"] for link in host.namespace.ip_json("link", "show")].count("overlay0") == 0
        host.subnet_file.unlink()  # the store alone must know whose subnet it is
        daemon = host.start_overlaynet(lab.file_store)
        assert lease_of(host) == before
        assert our_routes(host) == RUNNING
        wait_for_traffic(lab)


@pytest.mark.parametrize("sender", ["host", "container"])
def test_while_the_daemon_is_down_packets_never_leave_by_the_default_route(lab: Lab, sender: str) -> None:
    start_all(lab, lab.file_store)
    wait_for_traffic(lab)
    host = lab.hosts[0]
    host.daemon.kill()
    source = host.namespace if sender == "host" else lab.containers[0].namespace
    with Capture({"eth0": (host.namespace, "eth0")}) as capture:
        result = source.execute(["ping", "-n", "-c", "2", "-W", "1", ON_B], check=False, timeout=20)
    assert result.returncode != 0
    text = result.stdout + result.stderr
    assert "Destination Host Unreachable" in text or "No route to host" in text
    leaked = [p for p in capture.packets if p.ip is not None and str(p.ip.header.destination) == ON_B]
    assert not leaked


def test_cleanup_removes_the_backstop_but_not_under_a_running_daemon(lab: Lab) -> None:
    start_all(lab, lab.file_store)
    host = lab.hosts[0]
    host.namespace.ip("route add unreachable 10.244.0.0/16 metric 77")
    command = [sys.executable, "-m", "overlaynet", "cleanup"]
    refused = host.namespace.execute(command, check=False)
    assert refused.returncode == 1
    assert refused.stderr == "overlaynet: the device overlay0 exists, so its daemon seems to run; stop it first\n"
    host.daemon.stop()
    assert host.namespace.execute(command).returncode == 0
    assert our_routes(host) == []
    assert host.namespace.execute(command).returncode == 0
    (foreign,) = [r for r in host.namespace.ip_json("route", "show") if r.get("metric") == 77]
    assert foreign["type"] == "unreachable", "somebody else's route is never touched"


def test_a_route_deleted_by_hand_is_repaired(lab: Lab) -> None:
    start_all(lab, lab.file_store)
    wait_for_traffic(lab)
    host = lab.hosts[0]
    host.namespace.ip("route delete 10.244.0.0/16 dev overlay0")
    wait_until(lambda: our_routes(host) == RUNNING, 10, "the route to be repaired")
    host.namespace.ip("route flush proto 82")
    wait_until(lambda: our_routes(host) == RUNNING, 10, "both routes to be repaired")
    wait_for_traffic(lab)


def test_an_etcd_that_stops_and_starts_changes_nothing_for_traffic_also_over_a_compaction(lab: Lab) -> None:
    with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name) as etcd:
        store: list[str | Path] = ["--store", "etcd", "--etcd-endpoints", etcd.endpoint]
        start_all(lab, store)
        wait_for_traffic(lab)
        host_a, host_b = lab.hosts
        etcd.kill()
        host_a.daemon.wait_for("degraded")
        for _ in range(3):
            assert lab.containers[0].reaches(lab.containers[1])
        assert our_routes(host_a) == RUNNING
        # While nobody of ours looks: B's lease moves on, and the history in between is compacted away.
        host_b.daemon.stop()
        etcd.start()
        revision = int(etcd.post("/v3/kv/range", {"key": "Lw=="})["header"]["revision"])
        etcd.post("/v3/kv/compaction", {"revision": str(revision), "physical": True})
        host_b.start_overlaynet(store)
        host_a.daemon.wait_for("recovered")
        wait_for_traffic(lab)
        assert host_a.daemon.running
        # And a change made now still arrives: the watch lives.
        host_b.daemon.stop()
        host_b.start_overlaynet([*store, "--release-on-stop"])
        assert host_b.daemon.stop() == 0
        host_a.daemon.wait_for("peer removed")


def test_a_daemon_stops_at_once_while_etcd_hangs(lab: Lab) -> None:
    with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name) as etcd:
        start_all(lab, ["--store", "etcd", "--etcd-endpoints", etcd.endpoint])
        etcd.pause()
        for host in lab.hosts:
            assert host.daemon.stop(seconds=10) == 0
        etcd.resume()


def test_traffic_survives_the_underlay_going_away_for_a_while(lab: Lab) -> None:
    start_all(lab, lab.file_store)
    wait_for_traffic(lab)
    host = lab.hosts[0]
    host.disconnect()
    assert not lab.containers[0].reaches(lab.containers[1])
    host.reconnect()
    wait_for_traffic(lab)
    assert host.daemon.running
