"""Captured traffic through the engines, byte for byte: what kernels of two hosts said to each other (see tests/data)."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.packet import Packet

from overlaynet.backends.udp._native import segment
from overlaynet.backends.udp.engine import Engine, EnginePeer, PeerTable
from overlaynet.backends.udp.native_engine import NativeEngine
from overlaynet.backends.udp.packets import checksum
from overlaynet.backends.udp.python_engine import PythonEngine
from overlaynet.delivery import addresses
from overlaynet.model import Subnets
from tests.unit.flows import in_order

PATIENCE = 20.0
DATA = Path(__file__).parents[1] / "data"
NAMES = ["tcp", "udp", "icmp", "fragments", "extensions", "ecn"]
NODES = {number: Subnets(IPv4Network(f"10.244.{number}.0/24"), IPv6Network(f"fd00:{number}::/64")) for number in (1, 2)}
AT_ONCE = 50
"""Packets that wait in sockets and engines together: few enough to be lost by none."""


def captured(name: str) -> list[bytes]:
    """The packets of a file (https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-06.html)."""
    content = (DATA / f"{name}.pcap").read_bytes()
    packets, at = [], 24
    while at < len(content):
        (size,) = struct.unpack_from("<I", content, at + 8)
        packets.append(content[at + 16 : at + 16 + size])
        at += 16 + size
    return packets


def sent_by(number: int, packets: list[bytes]) -> list[bytes]:
    """Those whose source is one of the two hosts."""
    found = []
    for packet in packets:
        pair = addresses(packet)
        source = ip_address(pair[: len(pair) // 2])
        if any(source in subnet for subnet in NODES[number] if subnet.version == source.version):
            found.append(packet)
    return found


class Wired:
    """An engine of one of the two hosts, between a pretended device and a socket that stands for the other host."""

    def __init__(self, make: Callable[..., Engine], number: int, outer: str) -> None:
        family = socket.AF_INET6 if ":" in outer else socket.AF_INET
        with contextlib.ExitStack() as stack:
            # Datagrams, as a socket pair of another kind would hold too few packets.
            tun, self.device = (stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in "ab")
            for each in (tun, self.device):
                each.bind(("127.0.0.1", 0))
            tun.connect(self.device.getsockname())
            self.device.connect(tun.getsockname())
            wire, self.peer = (stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in "ab")
            for each in (wire, self.peer):
                each.bind((outer, 0))
            for each in (tun, wire):
                each.setblocking(False)
            for each in (self.device, self.peer):
                each.settimeout(PATIENCE)
            self.address = wire.getsockname()
            there = EnginePeer(NODES[3 - number], ip_address(outer), self.peer.getsockname()[1])
            self.engine = make(tun.fileno(), [wire.fileno()], 1500, PeerTable(NODES[number], (there,)))
            stack.callback(self.engine.close)
            thread = threading.Thread(target=self.engine.run)
            thread.start()
            stack.callback(thread.join, PATIENCE)
            stack.callback(self.engine.stop)
            self._stack = stack.pop_all()

    def __enter__(self) -> "Wired":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def unharmed(self, packets: list[bytes]) -> bool:
        """True if it has carried so many packets and bytes, and dropped nothing."""
        counters = self.engine.counters()
        (peer,) = counters.peers.values()
        packets_carried = peer.sent_packets + peer.received_packets
        bytes_carried = peer.sent_bytes + peer.received_bytes
        return (
            (packets_carried, bytes_carried) == (len(packets), sum(map(len, packets)))
            and not any(counters.drops.values())
            and counters.unreachables_sent == 0
        )


@pytest.fixture(params=["python", "native"])
def make(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    return PythonEngine if request.param == "python" else NativeEngine


@pytest.fixture(params=["127.0.0.1", "::1"])
def outer(request: pytest.FixtureRequest) -> str:
    made: str = request.param
    return made


def batches(packets: list[bytes]) -> Iterator[list[bytes]]:
    for at in range(0, len(packets), AT_ONCE):
        yield packets[at : at + AT_ONCE]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [1, 2])
def test_what_comes_out_of_the_device_is_sent_as_it_is(
    make: Callable[..., Engine], outer: str, name: str, number: int
) -> None:
    packets = sent_by(number, captured(name))
    with Wired(make, number, outer) as node:
        for batch in batches(packets):
            for packet in batch:
                node.device.send(packet)
            assert [node.peer.recv(65535) for _ in batch] == batch
    assert node.unharmed(packets)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [1, 2])
def test_what_comes_off_the_wire_is_delivered_as_it_is(
    make: Callable[..., Engine], outer: str, name: str, number: int
) -> None:
    packets = sent_by(3 - number, captured(name))
    with Wired(make, number, outer) as node:
        for batch in batches(packets):
            for packet in batch:
                node.peer.sendto(packet, node.address)
            assert [node.device.recv(65535) for _ in batch] == batch
    assert node.unharmed(packets)


@pytest.mark.parametrize("name", NAMES)
def test_runs_that_the_native_engine_makes_are_what_came(name: str) -> None:
    """To a device that takes runs, it writes runs; cut again, they are the same packets, those of a flow in their order."""
    packets = sent_by(2, captured(name))
    with Wired(lambda *given: NativeEngine(*given, device_header=True), 1, "127.0.0.1") as node:
        for batch in batches(packets):
            for packet in batch:
                node.peer.sendto(packet, node.address)
            got: list[bytes] = []
            while len(got) < len(batch):
                cut = segment(node.device.recv(65536 + 10))
                assert isinstance(cut, list)
                got += cut
            assert in_order(got) == in_order(batch)
    assert node.unharmed(packets)


def read(name: str) -> list[Packet]:
    return [IP(packet) if packet[0] >> 4 == 4 else IPv6(packet) for packet in captured(name)]


def test_the_captured_traffic_is_what_it_is_meant_to_be() -> None:
    tcp = read("tcp")
    for version in (IP, IPv6):
        options = {option for each in tcp if version in each and TCP in each for option, _ in each[TCP].options}
        assert {"MSS", "SAckOK", "Timestamp", "WScale", "SAck"} <= options
    assert any(each.ihl > 5 for each in tcp if IP in each)
    udp = [each for each in read("udp") if UDP in each]
    for version in (IP, IPv6):
        sizes = {len(each[UDP].payload) for each in udp if version in each and each[UDP].dport == 5002}
        assert {0, 1, 3, 33, 1001} <= sizes
        assert max(len(each) for each in udp if version in each) == 1452
    assert any(each[UDP].chksum == 0 for each in udp)
    assert {each.tos & 3 for each in udp if IP in each} == {each.tc & 3 for each in udp if IPv6 in each} == {0, 1, 2, 3}
    icmp = read("icmp")
    assert {each[ICMP].type for each in icmp if ICMP in each} == {0, 8}
    assert {bytes(each)[40] for each in icmp if IPv6 in each} == {128, 129}
    assert any(each.ihl == 15 for each in icmp if IP in each)
    fragments = read("fragments")
    assert {each.frag > 0 for each in fragments if IP in each and (each.frag or each.flags.MF)} == {True, False}
    assert {each[IPv6ExtHdrFragment].offset > 0 for each in fragments if IPv6ExtHdrFragment in each} == {True, False}
    extensions = read("extensions")
    for header in (IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt):
        for transport in (TCP, UDP):
            assert any(header in each and transport in each for each in extensions)
    assert any(IPv6ExtHdrHopByHop in each and IPv6ExtHdrFragment in each for each in extensions)
    ecn = read("ecn")
    for version in (IP, IPv6):
        of_version = [each for each in ecn if version in each]
        assert {(each.tos if version is IP else each.tc) & 3 for each in of_version} == {0, 2, 3}
        assert {"E", "C"} <= {flag for each in of_version for flag in str(each[TCP].flags)}


@pytest.mark.parametrize("name", NAMES)
def test_the_captured_headers_are_sound(name: str) -> None:
    for packet in captured(name):
        assert addresses(packet)
        assert packet[0] >> 4 == 6 or checksum(packet[: (packet[0] & 15) * 4]) == 0
