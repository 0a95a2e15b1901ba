"""Overlays and underlays of either IP version, and of both: real daemons, real devices and real packets."""

import errno
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from overlaynet.testing.capture import Capture, Packet
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import NETWORK, NETWORK6, SWITCH_ADDRESS6, Container, Host, Lab, wait_until
from overlaynet.testing.packets import IPv4


@attrs.frozen
class Plan:
    """Which IP versions the overlay and the underlay have, and which engine carries one over the other."""

    inner: tuple[int, ...]
    outer: tuple[int, ...]
    engine: str

    def __str__(self) -> str:
        names = {(4,): "4", (6,): "6", (4, 6): "dual"}
        return f"{names[self.inner]}-over-{names[self.outer]}-{self.engine}"

    @property
    def mtu(self) -> int:
        return 1500 - (48 if 6 in self.outer else 28)

    def lab(self) -> Lab:
        return Lab(
            "dualstack",
            overlay=NETWORK if 4 in self.inner else None,
            overlay6=NETWORK6 if 6 in self.inner else None,
            underlay=self.outer,
            default_route=True,
        )


COMBINATIONS = [((4,), (6,)), ((6,), (4,)), ((6,), (6,)), ((4, 6), (4,)), ((4, 6), (4, 6))]


@pytest.fixture(
    scope="module",
    params=[Plan(*versions, engine) for versions in COMBINATIONS for engine in ("python", "native")],
    ids=str,
)
def plan(request: pytest.FixtureRequest) -> Plan:
    made: Plan = request.param
    return made


@pytest.fixture(scope="module")
def lab(plan: Plan) -> Iterator[Lab]:
    """Two hosts, up."""
    with plan.lab() as lab:
        start(lab, plan)
        yield lab


def start(lab: Lab, plan: Plan) -> None:
    for host in lab.hosts:
        host.start_overlaynet(lab.file_store, ["--udp-engine", plan.engine])
        host.connect_containers()
    lab.wait_until_acquainted()


def address(container: Container, version: int) -> str:
    return str(container.ip if version == 4 else container.ip6)


def ping(source: Host | Container, destination: str, *arguments: str) -> tuple[int, str]:
    """Exit status and output of one ping."""
    result = source.namespace.execute(
        ["ping", "-n", "-c", "1", "-W", "3", *arguments, destination], check=False, timeout=20
    )
    return result.returncode, result.stdout + result.stderr


def test_containers_reach_each_other_over_the_version_that_the_hosts_share(lab: Lab, plan: Plan) -> None:
    """Over IPv4 where both hosts have it."""
    one, other = lab.containers
    with Capture({host.label: (host.namespace, "eth0") for host in lab.hosts}) as capture:
        for version in plan.inner:
            for source, target in ((one, other), (other, one)):
                status, output = ping(source, address(target, version))
                assert status == 0, output
                # One hop is the host of each container; the engines leave the hop limit alone.
                assert "ttl=62" in output
    carried = [packet.ip for packet in capture.packets if packet.ip is not None and packet.ip.inner is not None]
    assert {isinstance(each.header, IPv4) for each in carried} == {4 in plan.outer}
    found = {isinstance(each.inner.header, IPv4) for each in carried if each.inner is not None}
    assert found == {version == 4 for version in plan.inner}
    for each in carried:
        assert each.inner is not None
        assert each.payload == each.inner.data


def test_hosts_reach_containers_and_each_other(lab: Lab, plan: Plan) -> None:
    host_a, host_b = lab.hosts
    for version in plan.inner:
        for source, target in (
            (host_a, address(lab.containers[1], version)),
            (lab.containers[0], "10.244.2.0" if version == 4 else "fd00:10:244:2::"),
            (host_b, "10.244.1.0" if version == 4 else "fd00:10:244:1::"),
        ):
            status, output = ping(source, target)
            assert status == 0, output


def test_the_device_is_as_documented(lab: Lab, plan: Plan) -> None:
    for number, host in enumerate(lab.hosts, 1):
        (device,) = host.namespace.ip_json("address", "show", "dev", "overlay0")
        assert device["mtu"] == plan.mtu
        expected = [("10.244.%d.0", 32)] if 4 in plan.inner else []
        expected += [("fd00:10:244:%d::", 128)] if 6 in plan.inner else []
        found = [(entry["local"], entry["prefixlen"]) for entry in device["addr_info"]]
        assert found == [(text % number, length) for text, length in expected]


def test_each_network_has_its_route_and_its_backstop(lab: Lab, plan: Plan) -> None:
    for host in lab.hosts:
        found = {}
        for option in ("-4", "-6"):
            for route in host.namespace.ip_json(option, "route", "show", "proto", "82"):
                found[route["dst"], route["type"]] = route.get("dev") if route["type"] == "unicast" else None
        assert found == {
            (str(network), kind): device
            for network in lab.overlay
            for kind, device in (("unicast", "overlay0"), ("unreachable", None))
        }


def test_the_subnet_file_is_flannels(lab: Lab, plan: Plan) -> None:
    for number, host in enumerate(lab.hosts, 1):
        lines = []
        if 4 in plan.inner:
            lines += ["FLANNEL_NETWORK=10.244.0.0/16", f"FLANNEL_SUBNET=10.244.{number}.1/24"]
        if 6 in plan.inner:
            lines += ["FLANNEL_IPV6_NETWORK=fd00:10:244::/48", f"FLANNEL_IPV6_SUBNET=fd00:10:244:{number}::1/64"]
        lines += [f"FLANNEL_MTU={plan.mtu}", "FLANNEL_IPMASQ=false"]
        assert host.subnet_file.read_text().splitlines() == lines


def test_status_and_log_tell_all_addresses(lab: Lab, plan: Plan) -> None:
    for host, other in (lab.hosts, lab.hosts[::-1]):
        status = host.status()
        assert (status["public_ipv4"], status["public_ipv6"]) == (
            # An address is published of the versions that the overlay has, or of the other one where there is no such.
            str(host.address.ip) if 4 in plan.outer else None,
            str(host.address6.ip) if 6 in plan.outer else None,
        )
        packets = status["packets"]
        assert isinstance(packets, dict)
        reached = other.address.ip if 4 in plan.outer else other.address6.ip
        assert [peer["address"] for peer in packets["peers"].values()] == [str(reached)]
        assert not [record for record in host.daemon.records if record["level"] in ("warning", "error")]
        assert packets["engine"] == plan.engine


def test_a_packet_of_the_mtu_passes_and_one_byte_more_does_not(lab: Lab, plan: Plan) -> None:
    one, other = lab.containers
    for version in plan.inner:
        most = plan.mtu - (28 if version == 4 else 48)
        status, output = ping(one, address(other, version), "-M", "do", "-s", str(most))
        assert status == 0, output
        status, output = ping(one, address(other, version), "-M", "do", "-s", str(most + 1))
        assert status != 0
        assert f"mtu={plan.mtu}" in output.lower() or f"mtu: {plan.mtu}" in output.lower(), output
        # In fragments, which the sender makes, all of it passes.
        status, output = ping(one, address(other, version), "-M", "dont", "-s", "6000")
        assert status == 0, output


def test_a_sender_with_a_larger_mtu_is_told_of_this_one(lab: Lab, plan: Plan) -> None:
    host, (one, other) = lab.hosts[0], lab.containers
    host.namespace.ip("link set veth0 mtu 1500", "link set cni0 mtu 1500")
    one.namespace.ip("link set eth0 mtu 1500")
    try:
        for version in plan.inner:
            size = plan.mtu + 1 - (28 if version == 4 else 48)
            status, output = ping(one, address(other, version), "-M", "do", "-s", str(size))
            assert status != 0
            if version == 4:
                assert "From 10.244.1.1" in output
                assert f"Frag needed and DF set (mtu = {plan.mtu})" in output
            else:
                assert "From fd00:10:244:1::1" in output
                assert f"Packet too big: mtu={plan.mtu}" in output
    finally:
        for version in plan.inner:
            one.namespace.execute(["ip", f"-{version}", "route", "flush", "cache"])
        one.namespace.ip(f"link set eth0 mtu {plan.mtu}")
        host.namespace.ip(f"link set veth0 mtu {plan.mtu}", f"link set cni0 mtu {plan.mtu}")


TOLD = """
import errno, socket, sys
destination = sys.argv[1]
family, level, option = (
    (socket.AF_INET6, socket.IPPROTO_IPV6, 25) if ":" in destination else (socket.AF_INET, socket.IPPROTO_IP, 11)
)
with socket.socket(family, socket.SOCK_DGRAM) as sender:
    sender.settimeout(5)
    try:
        sender.connect((destination, 9))
        sender.setsockopt(level, option, 1)  # IP_RECVERR, IPV6_RECVERR: also for what comes later than the send
        sender.send(b"x")
        sender.recv(1)
    except OSError as error:
        print(errno.errorcode.get(error.errno, error))
"""


def told(source: Host | Container, destination: str) -> str:
    """What a sender of UDP learns about a destination."""
    return source.namespace.execute(["python3", "-c", TOLD, destination], timeout=20).stdout.strip()


def nobodys(version: int) -> str:
    """An address of the overlay that no node has leased."""
    return "10.244.77.7" if version == 4 else "fd00:10:244:77::7"


def test_a_destination_that_nobody_leases_is_answered(lab: Lab, plan: Plan) -> None:
    for version in plan.inner:
        for source in (lab.hosts[0], lab.containers[0]):
            assert told(source, nobodys(version)) == errno.errorcode[errno.ENETUNREACH]


SERVER = """
import hashlib, socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
listener = socket.create_server((sys.argv[1], 5001), family=family)
print("listening", flush=True)
connection, _ = listener.accept()
digest = hashlib.sha256()
while data := connection.recv(65536):
    digest.update(data)
connection.sendall(digest.hexdigest().encode())
"""
CLIENT = """
import hashlib, random, socket, sys
data = random.Random(7).randbytes(3_000_001)
connection = socket.create_connection((sys.argv[1], 5001), timeout=20)
connection.sendall(data)
connection.shutdown(socket.SHUT_WR)
assert connection.recv(100).decode() == hashlib.sha256(data).hexdigest()
print("whole")
"""


def test_tcp_is_carried_whole_both_ways(lab: Lab, plan: Plan) -> None:
    one, other = lab.containers
    for version in plan.inner:
        for source, target in ((one, other), (other, one)):
            server = target.namespace.popen(["python3", "-c", SERVER, address(target, version)], stdout=-1)
            assert server.stdout is not None
            assert server.stdout.readline() == b"listening\n"
            client = ["python3", "-c", CLIENT, address(target, version)]
            assert source.namespace.execute(client, timeout=60).stdout == "whole\n"
            assert server.wait(20) == 0
            server.stdout.close()


def goes_to_the_overlay(packet: Packet, lab: Lab) -> bool:
    if packet.ip is None:
        return False
    destination = packet.ip.header.destination
    return any(destination in overlay for overlay in lab.overlay if overlay.version == destination.version)


def test_while_the_daemon_is_down_nothing_of_either_version_leaves_by_the_default_route() -> None:
    plan = Plan((4, 6), (4, 6), "native")
    with plan.lab() as lab:
        start(lab, plan)
        host, target = lab.hosts[0], lab.containers[1]
        with Capture({"underlay": (host.namespace, "eth0")}) as capture:
            host.daemon.kill()
            wait_until(lambda: "overlay0" not in host.namespace.execute(["ip", "link"]).stdout, 10, "the device to go")
            for version in plan.inner:
                for source in (host, lab.containers[0]):
                    for destination in (address(target, version), nobodys(version)):
                        # A host's own lookup says so in other words than an ICMP error does.
                        assert told(source, destination) in ("ENETUNREACH", "EHOSTUNREACH")
            # Something that does leave, so that the capture is known to work.
            for elsewhere in ("198.51.100.7", "2001:db8::7"):
                ping(host, elsewhere, "-W", "0.1")
                capture.wait_for(lambda packet, to=elsewhere: packet.ip and str(packet.ip.header.destination) == to)  # type: ignore[misc]
        assert not [packet for packet in capture.packets if goes_to_the_overlay(packet, lab)]
        host.start_overlaynet(lab.file_store, ["--udp-engine", plan.engine])
        lab.wait_until_acquainted()
        for version in plan.inner:
            status, output = ping(lab.containers[0], address(target, version))
            assert status == 0, output


def test_hosts_without_a_version_in_common_say_so_and_the_others_go_on() -> None:
    """A dual-stack host between one with IPv4 alone and one with IPv6 alone."""
    with Lab("dualstack", hosts=3, overlay6=NETWORK6, underlay=(4, 6)) as lab:
        both, four, six = lab.hosts
        four.namespace.ip(f"address delete {four.address6} dev eth0")
        six.namespace.ip(f"address delete {six.address} dev eth0")
        for host in lab.hosts:
            host.start_overlaynet(lab.file_store)
            host.connect_containers()
        lab.wait_until_acquainted()
        for host, other in ((both, four), (both, six), (four, both), (six, both)):
            for version in (4, 6):
                status, output = ping(host.containers[0], address(other.containers[0], version))
                assert status == 0, output
        for version in (4, 6):
            assert told(four.containers[0], address(six.containers[0], version)) == "ENETUNREACH"
        for host, other, lacking in ((four, six, "IPv4"), (six, four, "IPv6")):
            reported = [record for record in host.daemon.records if record["message"] == "peer not reachable"]
            assert [(record["reason"], str(other.containers[0].ip) in str(record)) for record in reported] == [
                (f"it has no {lacking} address", False)
            ]
        assert not [record for record in both.daemon.records if record["level"] in ("warning", "error")]
        # The one with IPv4 alone has room for more.
        mtus = [host.status()["mtu"] for host in lab.hosts]
        assert mtus == [1452, 1472, 1452]


def test_a_public_address_of_ipv6_is_published_and_served_where_the_overlay_is_of_ipv4() -> None:
    with Lab("dualstack", underlay=(4, 6)) as lab:
        one, other = lab.hosts
        other.namespace.ip(f"address delete {other.address} dev eth0")
        one.start_overlaynet(lab.file_store, ["--public-ipv6", str(one.address6.ip)])
        other.start_overlaynet(lab.file_store)
        for host in lab.hosts:
            host.connect_containers()
        lab.wait_until_acquainted()
        assert (one.status()["public_ipv4"], one.status()["public_ipv6"]) == (
            str(one.address.ip),
            str(one.address6.ip),
        )
        status, output = ping(lab.containers[0], str(lab.containers[1].ip))
        assert status == 0, output


def test_where_the_overlay_is_of_ipv4_a_host_with_both_stays_with_ipv4() -> None:
    """As flannel does, so that the device keeps its 1472 bytes."""
    with Lab("dualstack", underlay=(4, 6)) as lab:
        for host in lab.hosts:
            host.start_overlaynet(lab.file_store)
        status = lab.hosts[0].status()
        assert (status["public_ipv4"], status["public_ipv6"], status["mtu"]) == (
            "172.16.130.140",
            None,
            1472,
        )


def test_an_overlay_of_ipv6_alone_on_an_etcd_that_is_reached_by_ipv6() -> None:
    """flannel's nodes, which know each other by their IPv4 addresses alone, take each other's lease here."""
    with (
        Lab("dualstack", overlay=None, overlay6=NETWORK6, underlay=(6,)) as lab,
        EtcdServer(str(SWITCH_ADDRESS6.ip), network_namespace=lab.switch.name) as etcd,
    ):
        store: list[str | Path] = ["--store", "etcd", "--etcd-endpoints", etcd.endpoint]
        for host in lab.hosts:
            host.start_overlaynet(store)
            host.connect_containers()
        lab.wait_until_acquainted()
        status, output = ping(lab.containers[0], str(lab.containers[1].ip6))
        assert status == 0, output
        listed = lab.switch.execute([sys.executable, "-P", "-m", "overlaynet", "leases", "--json", *store[2:]]).stdout
        assert "fd00:10:244:1::/64" in listed
        assert "fd00:10:244:2::/64" in listed
        # A restart finds its lease again.
        host = lab.hosts[0]
        host.daemon.kill()
        host.subnet_file.unlink()
        host.start_overlaynet(store)
        assert host.status()["subnets"] == ["fd00:10:244:1::/64"]
