"""The documented design, replayed with real daemons, real devices and real packets, once for each store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from overlaynet.status import ask
from overlaynet.testing.capture import Capture, Packet
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import SWITCH_ADDRESS, Container, Host, Lab
from overlaynet.testing.packets import ICMP, UDP

A, B = "172.16.130.140", "172.16.130.164"
ON_A, ON_B = "10.244.1.96", "10.244.2.194"
ECHO_REQUEST, ECHO_REPLY = 8, 0


@pytest.fixture(scope="module", params=["file", "etcd"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The two documented hosts, up, on each store. The etcd is a real one, on the hosts' network."""
    with Lab("scenario", default_route=True) as lab:
        if request.param == "file":
            _start(lab, lab.file_store)
            yield lab
        else:
            with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name) as etcd:
                _start(lab, ["--store", "etcd", "--etcd-endpoints", etcd.endpoint])
                yield lab


def _start(lab: Lab, store: list[str | Path]) -> None:
    for host in lab.hosts:
        host.start_overlaynet(store)
        host.connect_containers()
    for host in lab.hosts:
        host.daemon.wait_for("peer added")


def ping(source: Host | Container, destination: str, *arguments: str) -> tuple[int, str]:
    """Exit status and output of one ping."""
    result = source.namespace.execute(
        ["ping", "-n", "-c", "1", "-W", "3", *arguments, destination], check=False, timeout=20
    )
    return result.returncode, result.stdout + result.stderr


def is_ping(packet: Packet, kind: int) -> bool:
    """True for the echo packet itself, on interfaces where it is not encapsulated."""
    return packet.ip is not None and isinstance(packet.ip.transport, ICMP) and packet.ip.transport.type == kind


def carries_ping(packet: Packet, kind: int) -> bool:
    """True for the datagram that carries the echo packet."""
    inner = None if packet.ip is None else packet.ip.inner
    return inner is not None and isinstance(inner.transport, ICMP) and inner.transport.type == kind


def test_one_ping_is_carried_as_documented(lab: Lab) -> None:
    host_a, host_b = lab.hosts
    container_a, container_b = lab.containers
    taps = {
        "container a": (container_a.namespace, "eth0"),
        "cni0 a": (host_a.namespace, "cni0"),
        "overlay0 a": (host_a.namespace, "overlay0"),
        "eth0 a": (host_a.namespace, "eth0"),
        "eth0 b": (host_b.namespace, "eth0"),
        "overlay0 b": (host_b.namespace, "overlay0"),
        "cni0 b": (host_b.namespace, "cni0"),
        "container b": (container_b.namespace, "eth0"),
    }
    with Capture(taps) as capture:
        status, output = ping(container_a, ON_B, "-s", "100")
        assert status == 0, output
        capture.wait_for(lambda packet: packet.tap == "container a" and is_ping(packet, ECHO_REPLY))
    for kind, source, destination, outer in (
        (ECHO_REQUEST, ON_A, ON_B, (A, B)),
        (ECHO_REPLY, ON_B, ON_A, (B, A)),
    ):
        inner_packets = []
        for tap in taps:
            if tap.startswith("eth0"):
                (datagram,) = [p for p in capture.packets if p.tap == tap and carries_ping(p, kind)]
                assert datagram.ip is not None
                assert (str(datagram.ip.header.source), str(datagram.ip.header.destination)) == outer
                assert isinstance(datagram.ip.transport, UDP)
                assert datagram.ip.transport.source_port == datagram.ip.transport.destination_port == 8285
                inner = datagram.ip.inner
                assert inner is not None
                assert datagram.ip.header.total_length == inner.header.total_length + 28
                assert datagram.ip.payload == inner.data, "the payload is the inner packet, nothing else"
            else:
                (packet,) = [p for p in capture.packets if p.tap == tap and is_ping(p, kind)]
                assert packet.ip is not None
                inner = packet.ip
            inner_packets.append(inner)
            assert (str(inner.header.source), str(inner.header.destination)) == (source, destination)
            assert inner.header.total_length == 128
        assert len({inner.payload for inner in inner_packets}) == 1
    overlay_a, eth_a = (
        next(p for p in capture.packets if p.tap == tap and match(p, ECHO_REQUEST))
        for tap, match in (("overlay0 a", is_ping), ("eth0 a", carries_ping))
    )
    assert overlay_a.ip is not None
    assert eth_a.ip is not None
    assert eth_a.ip.payload == overlay_a.ip.data, "from the device to the wire, not a bit is changed"


def test_the_device_is_a_tun_with_the_documented_mtu_and_address(lab: Lab) -> None:
    for host, address in zip(lab.hosts, ("10.244.1.0", "10.244.2.0"), strict=True):
        (device,) = host.namespace.ip_json("address", "show", "dev", "overlay0")
        assert device["linkinfo"]["info_kind"] == "tun"
        assert device["linkinfo"]["info_data"]["type"] == "tun"
        assert "POINTOPOINT" in device["flags"]
        assert "UP" in device["flags"]
        assert device["mtu"] == 1472
        assert device["ifalias"].startswith("overlaynet")
        assert [(a["local"], a["prefixlen"]) for a in device["addr_info"] if a["family"] == "inet"] == [(address, 32)]


def test_each_host_has_the_documented_routes(lab: Lab) -> None:
    for host, subnet in zip(lab.hosts, ("10.244.1.0/24", "10.244.2.0/24"), strict=True):
        routes = {(r["type"], r["dst"]): r for r in host.namespace.ip_json("route", "show")}
        assert routes["unicast", subnet]["dev"] == "cni0"
        overlay = routes["unicast", "10.244.0.0/16"]
        assert overlay["dev"] == "overlay0"
        assert overlay["protocol"] == "82", "tagged as ours"
        assert "metric" not in overlay
        assert routes["unicast", "172.16.130.0/24"]["dev"] == "eth0"
        assert routes["unreachable", "10.244.0.0/16"]["protocol"] == "82"


def test_a_packet_of_the_mtu_passes_and_one_byte_more_does_not(lab: Lab) -> None:
    """20 bytes of IP header and 8 of ICMP come on top of what ping is told."""
    container = lab.containers[0]
    status, output = ping(container, ON_B, "-M", "do", "-s", str(1472 - 28))
    assert status == 0, output
    assert "1452 bytes from" in output
    status, output = ping(container, ON_B, "-M", "do", "-s", str(1473 - 28))
    assert status != 0
    assert "message too long, mtu=1472" in output.lower()


def test_a_container_with_a_larger_mtu_is_told_fragmentation_needed(lab: Lab) -> None:
    host, container = lab.hosts[0], lab.containers[0]
    host.namespace.ip("link set veth0 mtu 1500", "link set cni0 mtu 1500")
    container.namespace.ip("link set eth0 mtu 1500")
    try:
        status, output = ping(container, ON_B, "-M", "do", "-s", str(1473 - 28))
        assert status != 0
        assert "From 10.244.1.1" in output
        assert "Frag needed and DF set (mtu = 1472)" in output
    finally:
        container.namespace.ip("route flush cache", "link set eth0 mtu 1472")
        host.namespace.ip("link set veth0 mtu 1472", "link set cni0 mtu 1472")


def test_without_the_df_bit_a_larger_packet_passes_in_fragments(lab: Lab) -> None:
    status, output = ping(lab.containers[0], ON_B, "-M", "dont", "-s", "6000")
    assert status == 0, output


def test_hosts_reach_containers_and_each_other_over_the_overlay(lab: Lab) -> None:
    for source, destination in ((lab.hosts[0], ON_B), (lab.containers[0], "10.244.2.0"), (lab.hosts[1], "10.244.1.0")):
        status, output = ping(source, destination)
        assert status == 0, output


@pytest.mark.parametrize("sender", ["host", "container"])
def test_a_destination_that_nobody_leases_is_answered_with_network_unreachable(lab: Lab, sender: str) -> None:
    """flannel sends such an answer, too, but no sender ever gets it."""
    source = lab.hosts[0] if sender == "host" else lab.containers[0]
    code = (
        "import errno, socket, sys\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.settimeout(5)\n"
        "s.connect(('10.244.77.7', 9))\n"
        "s.setsockopt(socket.IPPROTO_IP, 11, 1)\n"  # IP_RECVERR: also for what comes later than the send
        "s.send(b'x')\n"
        "try:\n    s.recv(1)\n"
        "except OSError as error:\n    print(errno.errorcode.get(error.errno, error))\n"
    )
    result = source.namespace.execute(["python3", "-c", code], timeout=20)
    assert result.stdout.strip() == "ENETUNREACH"


def test_a_container_that_does_not_exist_is_answered_by_its_host_across_the_overlay(lab: Lab) -> None:
    status, output = ping(lab.containers[1], "10.244.1.77", "-W", "10")
    assert status != 0
    assert "From 10.244.1." in output
    assert "Destination Host Unreachable" in output


def test_tcp_is_carried_whole(lab: Lab) -> None:
    server_code = (
        "import hashlib, socket\n"
        "l = socket.create_server(('0.0.0.0', 5001))\nprint('listening', flush=True)\n"
        "c, _ = l.accept()\nh = hashlib.sha256()\nn = 0\n"
        "while d := c.recv(65536):\n    h.update(d); n += len(d)\n"
        "print(n, h.hexdigest())\n"
    )
    client_code = (
        "import hashlib, random, socket\n"
        "d = random.Random(7).randbytes(4_000_000)\n"
        f"s = socket.create_connection(('{ON_B}', 5001), timeout=20)\ns.sendall(d)\ns.close()\n"
        "print(len(d), hashlib.sha256(d).hexdigest())\n"
    )
    receiver = lab.containers[1].namespace.popen(["python3", "-c", server_code], stdout=-1)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == b"listening\n"
    sent = lab.containers[0].namespace.execute(["python3", "-c", client_code], timeout=60).stdout
    assert receiver.stdout.read().decode() == sent
    assert receiver.wait(20) == 0


def test_the_subnet_file_is_flannels(lab: Lab) -> None:
    for host, bridge in zip(lab.hosts, ("10.244.1.1", "10.244.2.1"), strict=True):
        assert host.subnet_file.read_text() == (
            f"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={bridge}/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
        )


def test_the_log_tells_the_story(lab: Lab) -> None:
    for host in lab.hosts:
        messages = [record["message"] for record in host.daemon.records]
        story = ["network found", "underlay chosen", "lease acquired", "device up", "subnet file written", "ready"]
        assert [message for message in messages if message in story] == story
        assert not [record for record in host.daemon.records if record["level"] in ("warning", "error")]


def test_counters_are_kept_by_peer(lab: Lab) -> None:
    before = _packets_sent(lab)
    ping(lab.containers[0], ON_B)
    assert _packets_sent(lab) == before + 1


def _packets_sent(lab: Lab) -> int:
    packets = ask(str(lab.hosts[0].status_socket))["packets"]
    assert isinstance(packets, dict)
    peer = packets["peers"]["10.244.2.0/24"]
    assert peer["address"] == B
    return int(peer["sent_packets"])


def test_nothing_appears_outside_of_the_lab(lab: Lab) -> None:
    names = {entry.name for entry in Path("/sys/class/net").iterdir()}
    assert not names & {"overlay0", "cni0", "switch0", "host-a", "host-b"}
