"""What happens to a running node on the kernel's side: each fault is injected for real, by hand, under a running daemon."""

import os
import signal
import time
from collections.abc import Iterator
from ipaddress import IPv4Interface, IPv6Network
from typing import Any

import pytest

from overlaynet.testing.lab import SWITCH_ADDRESS, Host, Lab, wait_until
from tests.faults.processor import does_not_spin

A_IS_MOVED_TO = IPv4Interface("172.16.130.77/24")
OVERLAY_ROUTES = [("unicast", "10.244.0.0/16", "overlay0"), ("unreachable", "10.244.0.0/16", None)]
PATIENCE = 20.0


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Three hosts; the third one's daemon is not started."""
    with Lab("kernel", hosts=3, default_route=True) as lab:
        for host in lab.hosts[:2]:
            host.start_overlaynet(lab.file_store)
            host.connect_containers()
        wait_for_traffic(lab)
        yield lab


def wait_for_traffic(lab: Lab) -> None:
    wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), PATIENCE, "a ping to arrive")


def routes(host: Host) -> list[tuple[str, str, str | None]]:
    found = host.namespace.ip_json("route", "show", "proto", "82")
    return sorted((route["type"], route["dst"], route.get("dev")) for route in found)


def said(host: Host, message: str) -> list[dict[str, Any]]:
    return [record for record in host.daemon.records if record["message"] == message]


def problems(host: Host) -> dict[str, str]:
    found: Any = host.status()["problems"]
    return dict(found)


def link(host: Host, name: str = "overlay0") -> dict[str, Any]:
    (found,) = host.namespace.ip_json("link", "show", name)
    return found


@pytest.mark.parametrize(
    "commands",
    [["link delete overlay0"], ["link set overlay0 down", "link set overlay0 name elsewhere"]],
    ids=["deleted", "renamed"],
)
def test_a_lost_device_is_made_again_with_its_lease_peers_and_routes(lab: Lab, commands: list[str]) -> None:
    host = lab.hosts[0]
    before = host.status()
    for times in (1, 2):
        host.namespace.ip(*commands)
        wait_until(lambda times=times: len(said(host, "device made again")) == times, PATIENCE, "another device")  # type: ignore[misc]
        wait_until(lambda: routes(host) == OVERLAY_ROUTES, PATIENCE, "the routes")
        wait_for_traffic(lab)
        assert len(said(host, "device lost")) == times
    assert "elsewhere" not in [link["ifname"] for link in host.namespace.ip_json("link", "show")]
    after = host.status()
    assert [after[name] for name in ("subnets", "peers", "mtu")] == [
        before[name] for name in ("subnets", "peers", "mtu")
    ]
    assert problems(host) == {}
    assert does_not_spin(host.daemon)
    assert not said(host, "packet engine failed")


def test_a_device_whose_name_is_taken_meanwhile_is_reported_and_made_when_the_name_is_free(lab: Lab) -> None:
    host = lab.hosts[0]
    os.kill(host.daemon.pid, signal.SIGSTOP)  # or it would have the name again before anyone else
    try:
        host.namespace.ip("link delete overlay0", "link add overlay0 type bridge", "link set overlay0 up")
    finally:
        os.kill(host.daemon.pid, signal.SIGCONT)
    wait_until(lambda: "backend" in problems(host), PATIENCE, "the daemon to say so")
    assert "the device name overlay0 is taken by another interface (bridge)" in problems(host)["backend"]
    assert said(host, "degraded")[0]["part"] == "backend"
    wait_until(lambda: routes(host) == OVERLAY_ROUTES[1:], PATIENCE, "no route to lead to the other's interface")
    assert does_not_spin(host.daemon)
    # Peers that come meanwhile are known afterwards.
    third = lab.hosts[2]
    third.start_overlaynet(lab.file_store)
    third.connect_containers()
    host.namespace.ip("link delete overlay0")
    wait_until(lambda: problems(host) == {}, PATIENCE, "the daemon to recover")
    assert len(said(host, "device lost")) == len(said(host, "device made again")) == 1
    wait_until(lambda: routes(host) == OVERLAY_ROUTES, PATIENCE, "the routes, a moment after the device")
    wait_for_traffic(lab)
    near, far = lab.containers[0], third.containers[0]
    wait_until(lambda: near.reaches(far), PATIENCE, "the third host to answer")


def test_a_route_of_somebody_else_in_the_place_of_ours_is_reported_until_it_is_gone(lab: Lab) -> None:
    host = lab.hosts[0]
    host.namespace.ip("route replace 10.244.0.0/16 dev eth0")
    wait_until(lambda: "routes" in problems(host), PATIENCE, "the daemon to say so")
    assert "because there is 10.244.0.0/16 dev eth0" in problems(host)["routes"]
    assert "remove it with `ip route del" in problems(host)["routes"]
    assert does_not_spin(host.daemon)
    host.namespace.ip("route delete 10.244.0.0/16 dev eth0")
    wait_until(lambda: problems(host) == {}, PATIENCE, "the daemon to recover")
    assert routes(host) == OVERLAY_ROUTES
    wait_for_traffic(lab)


def test_forwarding_switched_off_is_said_and_said_when_it_is_on_again(lab: Lab) -> None:
    host = lab.hosts[0]
    host.namespace.set_sysctl("net.ipv4.ip_forward", 0)
    record = host.daemon.wait_for("this host does not forward containers' packets", PATIENCE)
    assert record["hint"] == "sysctl net.ipv4.ip_forward=1"
    host.namespace.set_sysctl("net.ipv4.ip_forward", 1)
    host.daemon.wait_for("this host forwards containers' packets again", PATIENCE)
    wait_for_traffic(lab)


def test_a_parameter_that_no_event_tells_of_is_found_by_the_audit(lab: Lab) -> None:
    host = lab.hosts[0]
    host.namespace.set_sysctl("net.ipv4.conf.overlay0.accept_local", 0)
    host.daemon.wait_for("device mended", 60)
    assert [record["mended"] for record in said(host, "device mended")] == ["accept_local"]
    assert host.namespace.execute(["sysctl", "-n", "net.ipv4.conf.overlay0.accept_local"]).stdout.strip() == "1"


def test_ipv6_switched_off_on_the_device_is_switched_on_again() -> None:
    with Lab("kernel", overlay6=IPv6Network("fd00:10:244::/48")) as lab:
        for host in lab.hosts:
            host.start_overlaynet(lab.file_store)
            host.connect_containers()
        host = lab.hosts[0]
        host.namespace.set_sysctl("net.ipv6.conf.overlay0.disable_ipv6", 1)
        host.daemon.wait_for("device mended", PATIENCE)
        near, far = lab.containers
        wait_until(lambda: near.reaches(far, version=6), PATIENCE, "a ping by IPv6 to arrive")
        wait_until(lambda: problems(host) == {}, PATIENCE, "the daemon to recover")
        assert [record["mended"] for record in said(host, "device mended")] == ["disable_ipv6, addresses"]


def test_an_underlay_that_is_switched_off_and_on_is_survived_under_load(lab: Lab) -> None:
    host = lab.hosts[0]
    target = str(lab.containers[1].ip)
    with lab.containers[0].namespace.popen(["ping", "-n", "-q", "-i", "0.002", target]) as load:
        host.namespace.ip("link set eth0 down")
        wait_until(lambda: "underlay" in problems(host), PATIENCE, "the daemon to say so")
        assert "the interface eth0 is down; bring it up" in problems(host)["underlay"]
        wait_until(lambda: drops(host)["send_unreachable"] > 100, PATIENCE, "packets to be counted")
        assert does_not_spin(host.daemon)
        assert routes(host) == OVERLAY_ROUTES
        host.namespace.ip("link set eth0 up")
        wait_until(lambda: problems(host) == {}, PATIENCE, "the daemon to recover")
        load.kill()
    wait_for_traffic(lab)
    assert not said(host, "underlay changed")


def drops(host: Host) -> dict[str, int]:
    packets: Any = host.status()["packets"]
    found: dict[str, int] = packets["drops"]
    return found


def test_an_underlay_interface_that_is_deleted_and_made_again_is_survived(lab: Lab) -> None:
    host = lab.hosts[0]
    host.namespace.ip("link delete eth0")
    # A look that began before the deletion may find another reason first.
    missing = "there is no interface eth0"
    wait_until(lambda: missing in problems(host).get("underlay", ""), PATIENCE, "the daemon to say so")
    assert does_not_spin(host.daemon)
    host.plug_in()
    wait_until(lambda: problems(host) == {}, PATIENCE, "the daemon to recover")
    wait_for_traffic(lab)
    assert len(said(host, "degraded")) == len(said(host, "recovered")) == 1


def test_the_mtu_of_the_underlay_is_followed_down_and_up(lab: Lab) -> None:
    host = lab.hosts[0]
    for mtu in (1300, 1500):
        host.namespace.ip(f"link set eth0 mtu {mtu}")
        wait_until(lambda mtu=mtu: link(host)["mtu"] == mtu - 28, PATIENCE, "the device to follow")  # type: ignore[misc]
        text = f"FLANNEL_MTU={mtu - 28}\n"
        wait_until(lambda text=text: text in host.subnet_file.read_text(), PATIENCE, "the subnet file to follow")  # type: ignore[misc]
        assert host.status()["mtu"] == mtu - 28
        wait_for_traffic(lab)
    assert routes(host) == OVERLAY_ROUTES
    assert not said(host, "device mended"), "it was its own change"


@pytest.mark.parametrize("add_first", [False, True], ids=["removed, then added", "added, then removed"])
def test_another_address_is_published_and_peers_follow(lab: Lab, add_first: bool) -> None:
    a, b, _ = lab.hosts
    subnets = a.status()["subnets"]
    add, remove = f"address add {A_IS_MOVED_TO} dev eth0", f"address delete {a.address} dev eth0"
    # With the address, the kernel takes routes that depend on it; a DHCP client sets them again.
    a.namespace.set_sysctl("net.ipv4.conf.eth0.promote_secondaries", 1)
    a.namespace.ip(*((add, remove) if add_first else (remove, add)))
    a.namespace.ip(f"route replace default via {SWITCH_ADDRESS.ip}")
    wait_until(lambda: a.status()["public_ipv4"] == str(A_IS_MOVED_TO.ip), PATIENCE, "the new address to be published")
    record = b.daemon.wait_for("peer changed", PATIENCE)
    assert record["address"] == str(A_IS_MOVED_TO.ip)
    wait_for_traffic(lab)
    assert a.status()["subnets"] == subnets
    assert problems(a) == problems(b) == {}
    assert a.daemon.stop() == 0


def test_an_address_that_is_added_is_no_reason_to_move() -> None:
    with Lab("kernel", overlay6=IPv6Network("fd00:10:244::/48"), underlay=(4, 6)) as lab:
        for host in lab.hosts:
            host.start_overlaynet(lab.file_store)
            host.connect_containers()
        host = lab.hosts[0]
        before = host.status()
        # The kernel puts new IPv6 addresses before the old ones.
        host.namespace.ip(f"address add {A_IS_MOVED_TO} dev eth0", "address add fd00:16::77/64 dev eth0 nodad")
        time.sleep(3)
        after = host.status()
        for name in ("public_ipv4", "public_ipv6"):
            assert after[name] == before[name] is not None
        assert not said(host, "underlay changed")
        wait_for_traffic(lab)


def test_a_public_address_given_by_hand_stays_as_given(lab: Lab) -> None:
    host = lab.hosts[0]
    host.daemon.stop()
    host.start_overlaynet(lab.file_store, ["--public-ip", "192.0.2.1"])
    host.namespace.ip(f"address add {A_IS_MOVED_TO} dev eth0", f"address delete {host.address} dev eth0")
    host.namespace.ip(f"address replace {A_IS_MOVED_TO} dev eth0")
    host.daemon.wait_for("underlay changed", PATIENCE)
    listening = host.namespace.execute(["ss", "-Hlun", "sport = :8285"]).stdout
    assert f"{A_IS_MOVED_TO.ip}:8285" in listening
    assert host.status()["public_ipv4"] == "192.0.2.1"
    assert not said(host, "address published")
