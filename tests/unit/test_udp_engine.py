"""The contract of packet engines, each of them: a socket pair stands for the device, the loopback for the underlay."""

import contextlib
import os
import random
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.packet import Packet, Raw

from overlaynet.backends.udp.engine import Drop, Engine, EnginePeer, PeerCounters, PeerTable
from overlaynet.backends.udp.native_engine import NativeEngine
from overlaynet.backends.udp.packets import checksum
from overlaynet.backends.udp.python_engine import PythonEngine, TokenBucket
from overlaynet.delivery import longest_match, prefixes_of
from overlaynet.errors import DeviceGone
from overlaynet.model import IPAddress, IPNetwork, Subnets

PATIENCE = 20.0
ENGINES = [pytest.param(PythonEngine, id="python"), pytest.param(NativeEngine, id="native")]
FAMILIES = [pytest.param((inner, outer), id=f"{inner}in{outer}") for inner in (4, 6) for outer in (4, 6)]
MTU = 1472
Pair: TypeAlias = tuple[socket.socket, socket.socket]
# The tests' addresses are those of IPv4; each of these, and those of the overlay, stands for another over IPv6.
SIXTH = {
    "8.8.8.8": "2001:db8::8",
    "127.0.0.1": "::1",
    "0.0.0.0": "::",
    "224.0.0.1": "ff02::1",
    "255.255.255.255": "ff0e::ffff",
}


def sixth(address: str) -> str:
    """The IPv6 address that stands for one of IPv4: fd00:2::194 for 10.244.2.194."""
    if address.startswith("10.244."):
        _, _, node, number = address.split(".")
        return f"fd00:{node}::{number}"
    return SIXTH[address]


def node(number: int) -> Subnets:
    return Subnets(IPv4Network(f"10.244.{number}.0/24"), IPv6Network(f"fd00:{number}::/64"))


OWN, SECOND, THIRD = node(1), node(2), node(3)


def udp_socket(address: str) -> socket.socket:
    """A socket of the underlay. Without root, IPv6 has but one address here: hosts there differ by port alone."""
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, 0))
    made.settimeout(PATIENCE)
    return made


def packet(source: str, destination: str, payload: bytes = b"payload", version: int = 4, ecn: int = 0) -> bytes:
    header = (
        IP(src=source, dst=destination, tos=0xB8 | ecn)
        if version == 4
        else IPv6(src=sixth(source), dst=sixth(destination), tc=0xB8 | ecn, fl=0x12345)
    )
    return bytes(header / UDP(sport=1, dport=2) / Raw(payload))


class Rig:
    """An engine between a pretended device and real UDP sockets, with two peers."""

    def __init__(
        self,
        engine: type[Engine],
        families: tuple[int, int] = (4, 4),
        mtu: int = MTU,
        *,
        device: Pair | None = None,
        running: bool = True,
    ) -> None:
        self.inner, self.outer = families
        self.headers = 28 if self.inner == 4 else 48
        """Bytes that come before the payload of :meth:`packet`."""
        with contextlib.ExitStack() as stack:
            tun, self.kernel = seqpacket_pair() if device is None else device
            stack.enter_context(tun).setblocking(False)
            stack.enter_context(self.kernel).settimeout(PATIENCE)
            self.wire, self.second, self.third = (stack.enter_context(self.host(number)) for number in (1, 2, 3))
            self.wire.setblocking(False)
            self.table = PeerTable(OWN, (peer(SECOND, self.second), peer(THIRD, self.third)))
            self.engine = engine(tun.fileno(), [self.wire.fileno()], mtu, self.table)
            stack.callback(self.engine.close)
            self.error: BaseException | None = None
            self.thread = threading.Thread(target=self._run)
            if running:
                self.run()
            self._stack = stack.pop_all()

    def host(self, number: int) -> socket.socket:
        """A socket of one host of the underlay, on a port of its own."""
        return udp_socket(f"127.0.0.{number}" if self.outer == 4 else "::1")

    def packet(self, source: str, destination: str, payload: bytes = b"payload", ecn: int = 0) -> bytes:
        return packet(source, destination, payload, self.inner, ecn)

    def read(self, data: bytes) -> Packet:
        """A packet that came out of the engine."""
        return IP(data) if self.inner == 4 else IPv6(data)

    def run(self) -> None:
        """Start the engine, if it was not to run at once."""
        self.thread.start()

    def _run(self) -> None:
        try:
            self.engine.run()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.stop()
        if self.thread.ident is not None:
            self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self._stack.close()

    def drops(self) -> dict[Drop, int]:
        return {reason: count for reason, count in self.engine.counters().drops.items() if count}

    def arrive(self, packet: bytes, sender: socket.socket) -> None:
        """Send a datagram to the engine."""
        sender.sendto(packet, self.wire.getsockname())

    def settle(self, packets: int) -> None:
        """Wait until the engine has dealt with so many packets in all."""

        def dealt_with() -> bool:
            counters = self.engine.counters()
            carried = sum(each.sent_packets + each.received_packets for each in counters.peers.values())
            return carried + sum(counters.drops.values()) >= packets

        eventually(dealt_with)


def peer(subnets: Subnets, sock: socket.socket) -> EnginePeer:
    name = sock.getsockname()
    return EnginePeer(subnets, ip_address(name[0]), name[1])


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def udp_pair() -> Pair:
    """A device that holds many packets, which a socket pair does not."""
    near, far = udp_socket("127.0.0.1"), udp_socket("127.0.0.1")
    near.connect(far.getsockname())
    far.connect(near.getsockname())
    return near, far


def seqpacket_pair() -> Pair:
    """A device whose end can be noticed."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> type[Engine]:
    made: type[Engine] = request.param
    return made


@pytest.fixture(params=FAMILIES)
def families(request: pytest.FixtureRequest) -> tuple[int, int]:
    """The IP versions of the overlay and of the underlay."""
    made: tuple[int, int] = request.param
    return made


@pytest.fixture
def rig(engine: type[Engine], families: tuple[int, int]) -> Iterator[Rig]:
    with Rig(engine, families) as made:
        yield made


def test_packets_go_to_the_peer_that_has_the_destination(rig: Rig) -> None:
    for destination, sock in (("10.244.2.194", rig.second), ("10.244.3.1", rig.third), ("10.244.2.1", rig.second)):
        sent = rig.packet("10.244.1.96", destination)
        rig.kernel.send(sent)
        assert sock.recvfrom(65535) == (sent, rig.wire.getsockname())
    rig.settle(3)
    counters = rig.engine.counters()
    assert counters.peers == {
        SECOND: PeerCounters(sent_packets=2, sent_bytes=2 * (rig.headers + 7)),
        THIRD: PeerCounters(sent_packets=1, sent_bytes=rig.headers + 7),
    }
    assert set(counters.drops) == set(Drop)
    assert rig.drops() == {}


def test_packets_from_a_peer_reach_the_device(rig: Rig) -> None:
    sent = rig.packet("10.244.2.194", "10.244.1.96")
    rig.arrive(sent, rig.second)
    assert rig.kernel.recv(65535) == sent
    with rig.host(2) as other_port:
        rig.arrive(sent, other_port)
        assert rig.kernel.recv(65535) == sent
    rig.settle(2)
    assert rig.engine.counters().peers[SECOND] == PeerCounters(received_packets=2, received_bytes=2 * (rig.headers + 7))
    assert rig.drops() == {}


@pytest.mark.parametrize("size", [20, 40, 41, 1452, 1472, 1473, 1500, 65507])
def test_no_packet_is_cut(engine: type[Engine], families: tuple[int, int], size: int) -> None:
    with Rig(engine, families, mtu=65535) as rig:
        sent, came = whole(rig, "10.244.1.1", "10.244.2.1", size), whole(rig, "10.244.2.1", "10.244.1.1", size)
        rig.kernel.send(sent)
        assert rig.second.recv(65535) == sent
        rig.arrive(came, rig.second)
        assert rig.kernel.recv(65535) == came


def whole(rig: Rig, source: str, destination: str, size: int) -> bytes:
    """A packet of so many bytes, or the smallest there is, of a protocol that nobody knows."""
    if rig.inner == 4:
        return bytes(IP(src=source, dst=destination, proto=253) / Raw(bytes(size - 20)))
    return bytes(IPv6(src=sixth(source), dst=sixth(destination), nh=253) / Raw(bytes(max(0, size - 40))))


Made: TypeAlias = Callable[[Rig], bytes]
FROM_DEVICE: list[tuple[Made, Drop]] = [
    (lambda rig: b"", Drop.MALFORMED),
    (lambda rig: b"\x45", Drop.MALFORMED),
    (lambda rig: b"\x60", Drop.MALFORMED),
    (lambda rig: b"\x60" + bytes(38), Drop.MALFORMED),
    (lambda rig: b"\x50" + bytes(39), Drop.MALFORMED),
    (lambda rig: rig.packet("10.244.1.1", "10.244.2.1")[:-1], Drop.MALFORMED),
    (lambda rig: rig.packet("10.244.1.1", "10.244.2.1") + b"1", Drop.MALFORMED),
    (lambda rig: rig.packet("10.244.1.1", "10.244.4.1"), Drop.NO_ROUTE),
    (lambda rig: rig.packet("10.244.1.1", "10.244.1.2"), Drop.NO_ROUTE),
    (lambda rig: rig.packet("10.244.1.1", "224.0.0.1"), Drop.NO_ROUTE),
    (lambda rig: rig.packet("10.244.1.1", "10.244.2.1", bytes(MTU + 1 - rig.headers)), Drop.TOO_BIG),
    (lambda rig: rig.packet("10.244.1.1", "10.244.4.1", bytes(MTU + 1 - rig.headers)), Drop.TOO_BIG),
]


@pytest.mark.parametrize(("made", "reason"), FROM_DEVICE)
def test_what_is_not_sent_is_counted(rig: Rig, made: Made, reason: Drop) -> None:
    last = rig.packet("10.244.1.1", "10.244.2.1")
    # Before and after one that is sent: what is remembered of it must not help the other.
    for number in (1, 2):
        rig.kernel.send(made(rig))
        rig.kernel.send(last)
        assert rig.second.recv(65535) == last
        assert rig.drops() == {reason: number}


FROM_WIRE: list[tuple[Made, Drop]] = [
    (lambda rig: b"", Drop.MALFORMED),
    (lambda rig: b"\x45", Drop.MALFORMED),
    (lambda rig: b"\x60" + bytes(38), Drop.MALFORMED),
    (lambda rig: b"\x50" + bytes(39), Drop.MALFORMED),
    (lambda rig: rig.packet("10.244.2.1", "10.244.1.1") + b"1", Drop.MALFORMED),
    (lambda rig: rig.packet("10.244.2.1", "10.244.1.1")[:-1], Drop.MALFORMED),
    (lambda rig: b"\x45" + bytes(65506), Drop.MALFORMED),
    (lambda rig: rig.packet("10.244.4.1", "10.244.1.1"), Drop.SPOOFED_SOURCE),
    (lambda rig: rig.packet("10.244.1.1", "10.244.1.1"), Drop.SPOOFED_SOURCE),
    (lambda rig: rig.packet("8.8.8.8", "10.244.1.1"), Drop.SPOOFED_SOURCE),
    (lambda rig: rig.packet("10.244.2.1", "10.244.3.1"), Drop.FOREIGN_DESTINATION),
    (lambda rig: rig.packet("10.244.2.1", "127.0.0.1"), Drop.FOREIGN_DESTINATION),
    (lambda rig: rig.packet("10.244.2.1", "255.255.255.255"), Drop.FOREIGN_DESTINATION),
]


@pytest.mark.parametrize(("made", "reason"), FROM_WIRE)
def test_what_is_not_delivered_is_counted(rig: Rig, made: Made, reason: Drop) -> None:
    last = rig.packet("10.244.2.1", "10.244.1.9", b"last")
    for number in (1, 2):
        rig.arrive(made(rig), rig.second)
        rig.arrive(last, rig.second)
        assert rig.kernel.recv(65535) == last
        assert rig.drops() == {reason: number}


@pytest.mark.parametrize("inner", [4, 6])
def test_a_stranger_is_not_heard(engine: type[Engine], inner: int) -> None:
    with Rig(engine, (inner, 4)) as rig, udp_socket("127.0.0.9") as stranger:
        for _ in range(2):
            rig.arrive(rig.packet("10.244.2.1", "10.244.1.1"), stranger)
            rig.arrive(b"", stranger)
            rig.arrive(rig.packet("10.244.2.1", "10.244.1.1"), rig.second)
        rig.settle(6)
        assert rig.drops() == {Drop.UNKNOWN_PEER: 4}


@pytest.mark.parametrize("inner", [4, 6])
def test_a_peer_does_not_speak_for_another(engine: type[Engine], inner: int) -> None:
    with Rig(engine, (inner, 4)) as rig:
        for sender in (rig.third, rig.second):
            rig.arrive(rig.packet("10.244.3.1", "10.244.1.1"), sender)
        rig.settle(2)
        assert rig.drops() == {Drop.SPOOFED_SOURCE: 1}


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
def test_what_this_node_has_no_subnet_of_is_not_carried(engine: type[Engine], inner: int, outer: int) -> None:
    with Rig(engine, (inner, outer)) as rig:
        own = Subnets(ipv6=OWN.ipv6) if inner == 4 else Subnets(OWN.ipv4)
        rig.engine.set_table(PeerTable(own, rig.table.peers))
        rig.kernel.send(rig.packet("10.244.1.1", "10.244.2.1"))
        rig.arrive(rig.packet("10.244.2.1", "10.244.1.1"), rig.second)
        rig.settle(2)
        assert rig.drops() == {Drop.UNSUPPORTED: 2}
        other = packet("10.244.1.1", "10.244.2.1", version=10 - inner)
        rig.kernel.send(other)
        assert rig.second.recv(65535) == other


def test_a_destination_that_no_peer_has_is_answered(rig: Rig) -> None:
    for destination in ("10.244.9.1", "10.244.1.77"):
        sent = rig.packet("10.244.1.96", destination, bytes(1300))
        rig.kernel.send(sent)
        data = rig.kernel.recv(65535)
        answer = rig.read(data)
        if rig.inner == 4:
            assert (answer.src, answer.dst) == ("10.244.1.0", "10.244.1.96")
            assert (answer[ICMP].type, answer[ICMP].code) == (3, 0)
            assert len(data) == 576
        else:
            assert (answer.src, answer.dst) == ("fd00:1::", "fd00:1::96")
            assert answer[ICMPv6DestUnreach].code == 0
            assert len(data) == 1280
        assert sent.startswith(data[rig.headers :])
    eventually(lambda: rig.engine.counters().unreachables_sent == 2)
    rig.kernel.send(rig.packet("10.244.1.96", "224.0.0.1"))
    rig.settle(3)
    assert rig.drops() == {Drop.NO_ROUTE: 3}
    assert rig.engine.counters().unreachables_sent == 2


ECN_LEVELS = {4: (socket.IPPROTO_IP, socket.IP_TOS, socket.IP_RECVTOS)}
ECN_LEVELS[6] = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, socket.IPV6_RECVTCLASS)


def test_ecn_is_copied_to_the_outer_header_and_nothing_else_is(rig: Rig) -> None:
    level, option, receive = ECN_LEVELS[rig.outer]
    rig.second.setsockopt(level, receive, 1)
    for ecn in (0, 1, 2, 3, 0, 2, 2, 0):
        sent = rig.packet("10.244.1.96", "10.244.2.1", ecn=ecn)
        rig.kernel.send(sent)
        data, ((*kind, mark),), _, _ = rig.second.recvmsg(65535, 100)
        assert data == sent
        assert kind == [level, option]
        assert int.from_bytes(mark, sys.byteorder) == ecn


# RFC 6040, figure 4: inner, outer, and what leaves the tunnel.
ECN_OUT = [
    (0, 0, 0),
    (0, 1, 0),
    (0, 2, 0),
    (0, 3, None),
    (1, 0, 1),
    (1, 1, 1),
    (1, 2, 1),
    (1, 3, 3),
    (2, 0, 2),
    (2, 1, 1),
    (2, 2, 2),
    (2, 3, 3),
    (3, 0, 3),
    (3, 1, 3),
    (3, 2, 3),
    (3, 3, 3),
]


def test_ecn_of_the_outer_header_counts(rig: Rig) -> None:
    level, option, _ = ECN_LEVELS[rig.outer]
    for inner, outer, result in ECN_OUT:
        rig.second.setsockopt(level, option, 0xB8 | outer)
        rig.arrive(rig.packet("10.244.2.1", "10.244.1.1", ecn=inner), rig.second)
        if result is None:
            eventually(lambda: rig.drops() == {Drop.CONGESTION: 1})
        else:
            assert rig.kernel.recv(65535) == rig.packet("10.244.2.1", "10.244.1.1", ecn=result), (inner, outer)
    rig.settle(16)  # a packet is counted a moment after it was written
    assert rig.drops() == {Drop.CONGESTION: 1}
    assert rig.engine.counters().peers[SECOND].received_packets == 15


@pytest.mark.parametrize("right", [True, False])
def test_marking_a_packet_leaves_a_damaged_header_damaged(engine: type[Engine], right: bool) -> None:
    with Rig(engine) as rig:
        rig.second.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 3)
        for identification in range(0, 65536, 257):
            came = IP(src="10.244.2.1", dst="10.244.1.1", tos=2, id=identification) / UDP() / Raw(b"x")
            if not right:
                came.chksum = 0x1234
            rig.arrive(bytes(came), rig.second)
            got = IP(rig.kernel.recv(65535))
            assert (got.tos, checksum(bytes(got)[:20]) == 0) == (3, right)


@pytest.mark.parametrize("inner", [4, 6])
def test_the_errors_of_the_socket_are_counted_by_kind(engine: type[Engine], inner: int) -> None:
    with Rig(engine, (inner, 4), mtu=65535) as rig:
        peers = [
            *rig.table.peers,
            EnginePeer(node(4), IPv4Address("127.255.255.255"), 9),  # a broadcast address
            EnginePeer(node(5), IPv4Address("192.0.2.1"), 9),  # not to be reached from the loopback
        ]
        rig.engine.set_table(PeerTable(OWN, tuple(peers)))
        rig.kernel.send(rig.packet("10.244.1.1", "10.244.2.1", bytes(65520 - rig.headers)))
        for number in (4, 5):
            rig.kernel.send(rig.packet("10.244.1.1", f"10.244.{number}.1"))
        rig.settle(3)
        assert rig.drops() == {Drop.TOO_BIG: 1, Drop.SEND_REFUSED: 1, Drop.SEND_FAILED: 1}
        assert all(each.sent_packets == 0 for each in rig.engine.counters().peers.values())


def test_a_device_that_takes_nothing_is_counted(rig: Rig) -> None:
    rig.kernel.shutdown(socket.SHUT_RD)
    rig.arrive(rig.packet("10.244.2.1", "10.244.1.1"), rig.second)
    rig.kernel.send(rig.packet("10.244.1.1", "10.244.9.1"))
    eventually(lambda: rig.drops() == {Drop.DEVICE_FAILED: 2, Drop.NO_ROUTE: 1})
    assert rig.engine.counters().unreachables_sent == 0


def test_a_device_that_is_gone_ends_the_engine(rig: Rig) -> None:
    rig.kernel.close()
    rig.thread.join(PATIENCE)
    assert isinstance(rig.error, DeviceGone)


def test_a_peer_of_another_ip_version_than_the_sockets_counts_as_absent(rig: Rig) -> None:
    other = EnginePeer(SECOND, ip_address("::1" if rig.outer == 4 else "127.0.0.1"), 9)
    rig.engine.set_table(PeerTable(OWN, (other,)))
    rig.kernel.send(rig.packet("10.244.1.1", "10.244.2.1"))
    rig.settle(1)
    assert rig.drops() == {Drop.NO_ROUTE: 1}
    assert rig.engine.counters().peers == {SECOND: PeerCounters()}


@pytest.mark.parametrize("inner", [4, 6])
def test_with_a_socket_of_each_version_each_peer_is_reached_by_its_own(engine: type[Engine], inner: int) -> None:
    with contextlib.ExitStack() as stack:
        tun, kernel = (stack.enter_context(each) for each in seqpacket_pair())
        tun.setblocking(False)
        kernel.settimeout(PATIENCE)
        wires = [stack.enter_context(udp_socket(address)) for address in ("127.0.0.1", "::1")]
        peers = [stack.enter_context(udp_socket(address)) for address in ("127.0.0.2", "::1")]
        for wire in wires:
            wire.setblocking(False)
        table = PeerTable(OWN, (peer(SECOND, peers[0]), peer(THIRD, peers[1])))
        made = engine(tun.fileno(), [wire.fileno() for wire in wires], MTU, table)
        stack.callback(made.close)
        thread = threading.Thread(target=made.run)
        thread.start()
        stack.callback(thread.join, PATIENCE)
        stack.callback(made.stop)
        for number, wire, far in zip((2, 3), wires, peers, strict=True):
            sent = packet("10.244.1.1", f"10.244.{number}.1", version=inner)
            kernel.send(sent)
            assert far.recv(65535) == sent
            came = packet(f"10.244.{number}.1", "10.244.1.1", version=inner)
            far.sendto(came, wire.getsockname())
            assert kernel.recv(65535) == came
        # The peer's address of the other version is not known, so it is a stranger's.
        with udp_socket("127.0.0.1") as stranger:
            stranger.sendto(packet("10.244.3.1", "10.244.1.1", version=inner), wires[0].getsockname())
        eventually(lambda: made.counters().drops[Drop.UNKNOWN_PEER] == 1)


def test_a_peer_without_a_subnet_of_the_version_gets_nothing(rig: Rig) -> None:
    other = Subnets(ipv6=SECOND.ipv6) if rig.inner == 4 else Subnets(SECOND.ipv4)
    rig.engine.set_table(PeerTable(OWN, (peer(other, rig.second),)))
    rig.arrive(rig.packet("10.244.2.1", "10.244.1.1"), rig.second)
    rig.kernel.send(rig.packet("10.244.1.1", "10.244.2.1"))
    rig.settle(2)
    assert rig.drops() == {Drop.SPOOFED_SOURCE: 1, Drop.NO_ROUTE: 1}
    assert rig.engine.counters().peers == {other: PeerCounters()}


def test_a_peer_with_which_no_version_is_shared_is_a_stranger(rig: Rig) -> None:
    own, other = Subnets(OWN.ipv4), Subnets(ipv6=SECOND.ipv6)
    if rig.inner == 6:
        own, other = Subnets(ipv6=OWN.ipv6), Subnets(SECOND.ipv4)
    rig.engine.set_table(PeerTable(own, (peer(other, rig.second),)))
    rig.arrive(rig.packet("10.244.2.1", "10.244.1.1"), rig.second)
    rig.settle(1)
    assert rig.drops() == {Drop.UNKNOWN_PEER: 1}
    assert rig.engine.counters().peers == {other: PeerCounters()}


def test_a_peer_that_stays_keeps_its_counts(rig: Rig) -> None:
    rig.kernel.send(rig.packet("10.244.1.1", "10.244.2.1"))
    rig.kernel.send(rig.packet("10.244.1.1", "10.244.3.1"))
    rig.settle(2)
    moved = peer(SECOND, rig.third)
    rig.engine.set_table(PeerTable(OWN, (moved,)))
    sent = rig.packet("10.244.1.1", "10.244.2.2")
    rig.third.recv(65535)
    rig.kernel.send(sent)
    assert rig.third.recv(65535) == sent
    eventually(
        lambda: rig.engine.counters().peers == {SECOND: PeerCounters(sent_packets=2, sent_bytes=2 * (rig.headers + 7))}
    )
    rig.engine.set_table(rig.table)
    assert rig.engine.counters().peers[THIRD] == PeerCounters()
    # What was told once does not change behind the caller's back.
    before = rig.engine.counters()
    rig.kernel.send(sent)
    eventually(lambda: rig.engine.counters() != before)
    assert before.peers[SECOND].sent_packets == 2


def test_of_two_peers_with_one_subnet_the_first_has_it(rig: Rig) -> None:
    rig.engine.set_table(PeerTable(OWN, (peer(SECOND, rig.second), peer(SECOND, rig.third))))
    rig.kernel.send(rig.packet("10.244.1.1", "10.244.2.1"))
    assert rig.second.recv(65535)


def test_a_peer_with_a_wider_subnet_does_not_get_what_is_for_others(rig: Rig) -> None:
    wide = Subnets(IPv4Network("10.244.0.0/16"), IPv6Network("fd00::/16"))
    rig.engine.set_table(PeerTable(OWN, (peer(wide, rig.third), peer(SECOND, rig.second))))
    for destination in ("10.244.1.77", "10.244.2.1", "10.244.9.1"):
        rig.kernel.send(rig.packet("10.244.1.1", destination))
    rig.settle(3)
    assert rig.drops() == {Drop.NO_ROUTE: 1}
    assert {subnets: each.sent_packets for subnets, each in rig.engine.counters().peers.items()} == {wide: 1, SECOND: 1}


def test_the_own_subnet_may_change(rig: Rig) -> None:
    rig.engine.set_table(PeerTable(THIRD, (peer(SECOND, rig.second),)))
    came = rig.packet("10.244.2.1", "10.244.3.1")
    rig.arrive(came, rig.second)
    assert rig.kernel.recv(65535) == came
    rig.kernel.send(rig.packet("10.244.3.1", "10.244.1.1"))
    assert rig.read(rig.kernel.recv(65535)).src == ("10.244.3.0" if rig.inner == 4 else "fd00:3::")


def test_a_change_of_the_table_does_not_touch_other_packets(rig: Rig) -> None:
    swapping = threading.Event()
    swapping.set()

    def swap() -> None:
        number = 0
        while swapping.is_set():
            number += 1
            extra = EnginePeer(node(100 + number % 100), ip_address(rig.wire.getsockname()[0]), 9)
            rig.engine.set_table(PeerTable(OWN, (*rig.table.peers, extra)))
            time.sleep(0.0005)  # or an engine in Python would wait for the interpreter most of the time

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for number in range(200):
            sent = rig.packet("10.244.1.1", "10.244.2.1", number.to_bytes(4, "big"))
            rig.kernel.send(sent)
            assert rig.second.recv(65535) == sent
    finally:
        swapping.clear()
        swapper.join()
    rig.settle(200)
    assert rig.drops() == {}
    assert rig.engine.counters().peers[SECOND].sent_packets == 200


def test_neither_direction_starves(engine: type[Engine], families: tuple[int, int]) -> None:
    with Rig(engine, families, device=udp_pair(), running=False) as rig:
        for _ in range(90):
            rig.kernel.send(rig.packet("10.244.1.1", "10.244.9.1"))
        for _ in range(150):
            rig.arrive(rig.packet("10.244.2.1", "10.244.1.1"), rig.second)
        rig.run()
        # Both directions end in the device: errors about what came out of it, and what came off the wire.
        packets = [rig.kernel.recv(65535) for _ in range(240)]
    protocols = [packet[9] if rig.inner == 4 else packet[6] for packet in packets]
    last_error, last_delivered = (239 - protocols[::-1].index(protocol) for protocol in (protocols[0], 17))
    assert protocols.index(17) < last_error
    assert last_error < last_delivered


SIZES = [100, 100, 100, 60, 100, 100, 0, 0, 200, 199, 200, 1300, 1300, 1300, 7]


def test_packets_that_may_share_a_send_arrive_one_by_one_and_in_order(
    engine: type[Engine], families: tuple[int, int]
) -> None:
    with Rig(engine, families, device=udp_pair(), running=False) as rig:
        sent = [
            rig.packet("10.244.1.1", "10.244.2.1", bytes([number]) * size, ecn=number // 7 % 3)
            for number, size in enumerate(SIZES * 4)
        ]
        for each in sent:
            rig.kernel.send(each)
        rig.run()
        assert [rig.second.recv(65535) for _ in sent] == sent
        rig.settle(len(sent))
        counters = rig.engine.counters().peers[SECOND]
        assert (counters.sent_packets, counters.sent_bytes) == (len(sent), sum(map(len, sent)))
        assert rig.drops() == {}


UDP_SEGMENT = 103


def test_each_packet_of_a_run_off_the_wire_is_looked_at(rig: Rig) -> None:
    good = [rig.packet("10.244.2.1", "10.244.1.1", bytes(40)), rig.packet("10.244.2.2", "10.244.1.1", bytes(40))]
    size = len(good[0])
    run = [
        good[0],
        rig.packet("10.244.4.1", "10.244.1.1", bytes(40)),
        rig.packet("10.244.2.1", "10.244.3.1", bytes(40)),
        bytes(size),
        good[1],
        good[0][:-1],
    ]
    control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", size))]
    rig.second.sendmsg(run, control, 0, rig.wire.getsockname())
    assert {rig.kernel.recv(65535) for _ in good} == set(good)
    rig.settle(6)
    assert rig.drops() == {Drop.SPOOFED_SOURCE: 1, Drop.FOREIGN_DESTINATION: 1, Drop.MALFORMED: 2}


def test_a_busy_engine_stops(rig: Rig) -> None:
    over = threading.Event()

    def flood_the_device() -> None:
        sent = rig.packet("10.244.1.1", "10.244.2.1")
        rig.kernel.setblocking(False)
        while not over.is_set():
            with contextlib.suppress(BlockingIOError):
                rig.kernel.send(sent)

    def flood_the_wire() -> None:
        # What cannot be delivered costs the engine no room in the device.
        came = rig.packet("10.244.2.1", "10.244.9.1")
        while not over.is_set():
            rig.arrive(came, rig.second)

    floods = [threading.Thread(target=flood_the_device), threading.Thread(target=flood_the_wire)]
    for each in floods:
        each.start()
    try:
        eventually(
            lambda: (
                rig.engine.counters().peers[SECOND].sent_packets > 500
                and rig.drops().get(Drop.FOREIGN_DESTINATION, 0) > 500
            )
        )
        rig.engine.stop()
        rig.thread.join(PATIENCE)
        assert not rig.thread.is_alive()
        assert rig.error is None
    finally:
        over.set()
        for each in floods:
            each.join()


def test_stopping_is_possible_at_any_time(engine: type[Engine]) -> None:
    with contextlib.ExitStack() as stack:
        tun, _ = (stack.enter_context(each) for each in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        wire = stack.enter_context(udp_socket("127.0.0.1"))
        made = engine(tun.fileno(), [wire.fileno()], MTU, PeerTable(OWN))
        made.stop()
        made.stop()
        made.run()
        made.close()
        made.close()
        made.stop()
        assert made.counters().peers == {}
        # The descriptors are the caller's: they are open still.
        os.fstat(tun.fileno())
        os.fstat(wire.fileno())


@pytest.fixture(
    scope="module",
    params=[(engine, inner) for engine in (PythonEngine, NativeEngine) for inner in (4, 6)],
    ids=lambda param: f"{param[0].name}-{param[1]}in4",
)
def long_lived(request: pytest.FixtureRequest) -> Iterator[Rig]:
    engine, inner = request.param
    with Rig(engine, (inner, 4)) as made:
        yield made


ADDRESSES = st.sampled_from(
    ["10.244.1.0", "10.244.1.255", "10.244.2.0", "10.244.2.255", "10.244.3.7", "10.244.4.1", "127.0.0.1", "0.0.0.0"]
)
VERSIONS = st.sampled_from([4, 6])
WHOLE_PACKETS = st.builds(packet, ADDRESSES, ADDRESSES, st.binary(max_size=40), VERSIONS)
NEARLY_PACKETS = st.one_of(
    st.binary(max_size=64),
    WHOLE_PACKETS,
    st.builds(lambda whole, cut, extra: whole[:cut] + extra, WHOLE_PACKETS, st.integers(0, 60), st.binary(max_size=4)),
    st.builds(
        lambda whole, at, value: whole[:at] + bytes([value]) + whole[at + 1 :],
        WHOLE_PACKETS,
        st.integers(0, 60),
        st.integers(0, 255),
    ),
)


def may_be_delivered(data: bytes, source: Subnets) -> bool:
    """What law 5 says, in other words than the engines' own."""
    assert source.ipv4 is not None
    assert source.ipv6 is not None
    assert OWN.ipv4 is not None
    assert OWN.ipv6 is not None
    if len(data) >= 20 and data[0] >> 4 == 4:
        return (
            20 <= (data[0] & 15) * 4 <= len(data)
            and int.from_bytes(data[2:4], "big") == len(data)
            and IPv4Address(data[12:16]) in source.ipv4
            and IPv4Address(data[16:20]) in OWN.ipv4
        )
    return (
        len(data) >= 40
        and data[0] >> 4 == 6
        and int.from_bytes(data[4:6], "big") == len(data) - 40
        and IPv6Address(data[8:24]) in source.ipv6
        and IPv6Address(data[24:40]) in OWN.ipv6
    )


@settings(max_examples=300, deadline=None)
@given(data=NEARLY_PACKETS, third=st.booleans())
def test_whatever_comes_only_what_may_be_delivered_is(long_lived: Rig, data: bytes, third: bool) -> None:
    sender, subnets, number = (long_lived.third, THIRD, 3) if third else (long_lived.second, SECOND, 2)
    marker = long_lived.packet(f"10.244.{number}.1", "10.244.1.1", b"the end of this example")
    long_lived.arrive(data, sender)
    long_lived.arrive(marker, sender)
    received: list[bytes] = []
    while not received or received[-1] != marker:
        received.append(long_lived.kernel.recv(65535))
    assert received == ([data, marker] if may_be_delivered(data, subnets) else [marker])


@settings(max_examples=300, deadline=None)
@given(data=NEARLY_PACKETS.filter(bool))
def test_whatever_the_device_gives_is_sent_answered_or_counted(long_lived: Rig, data: bytes) -> None:
    def dealt_with() -> int:
        counters = long_lived.engine.counters()
        return sum(each.sent_packets for each in counters.peers.values()) + sum(counters.drops.values())

    before = dealt_with()
    long_lived.kernel.send(data)
    eventually(lambda: dealt_with() == before + 1)
    assert long_lived.error is None
    for sock in (long_lived.second, long_lived.third, long_lived.kernel):
        while select.select([sock], [], [], 0)[0]:
            sock.recv(65535)


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)), max_size=20),
    st.lists(st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)), max_size=20),
    st.lists(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), max_size=20),
    st.randoms(use_true_random=False),
)
def test_the_longest_prefix_wins(
    networks4: list[tuple[int, int]],
    networks6: list[tuple[int, int]],
    addresses: list[IPAddress],
    chance: random.Random,
) -> None:
    subnets: list[IPNetwork] = [IPv4Network(network, strict=False) for network in networks4]
    subnets += [IPv6Network(network, strict=False) for network in networks6]
    entries = [(subnet, PeerCounters()) for subnet in dict.fromkeys(subnets)]
    found = prefixes_of(entries)
    for subnet, _ in entries:
        near = int(subnet[0]) + chance.randrange(-1, subnet.num_addresses + 1)
        if 0 <= near < 2**subnet.max_prefixlen:
            addresses = [*addresses, type(subnet[0])(near)]
    for address in addresses:
        containing = [(subnet.prefixlen, holder) for subnet, holder in entries if address in subnet]
        expected = max(containing, key=lambda each: each[0])[1] if containing else None
        assert longest_match(found, address.packed) is expected


def test_a_token_bucket_allows_a_burst_and_then_a_rate() -> None:
    now = [100.0]
    bucket = TokenBucket(rate=8, burst=5, clock=lambda: now[0])
    assert [bucket.take() for _ in range(7)] == [True] * 5 + [False] * 2
    now[0] += 1 / 8
    assert [bucket.take() for _ in range(2)] == [True, False]
    now[0] += 1000
    assert [bucket.take() for _ in range(6)] == [True] * 5 + [False]
    allowed = 0
    for _ in range(64 * 10):
        now[0] += 1 / 64
        allowed += bucket.take()
    assert allowed == 8 * 10
