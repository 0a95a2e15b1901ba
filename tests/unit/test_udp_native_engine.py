"""What only the native engine does: packets behind the header of IFF_VNET_HDR, runs of them; socket pairs stand for devices."""

import contextlib
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import TypeAlias

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, PadN
from scapy.packet import Packet, Raw

from overlaynet.backends.udp.engine import Drop, EnginePeer, PeerTable
from overlaynet.backends.udp.native_engine import NativeEngine
from overlaynet.errors import DeviceGone
from overlaynet.model import Subnets

PATIENCE = 20.0
OWN = Subnets(IPv4Network("10.244.1.0/24"), IPv6Network("fd00:1::/64"))
SECOND = Subnets(IPv4Network("10.244.2.0/24"), IPv6Network("fd00:2::/64"))
PLAIN = bytes(10)
FAMILIES = (socket.AF_INET, socket.AF_INET6)
TSO4 = struct.pack("=BBHHHH", 1, 1, 0, 1000, 20, 16)
Pair: TypeAlias = tuple[socket.socket, socket.socket]


class Rig:
    def __init__(
        self, *, offload: bool = True, header: bool = True, running: bool = True, device: Pair | None = None
    ) -> None:
        with contextlib.ExitStack() as stack:
            tun, self.kernel = device or socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(tun).setblocking(False)
            stack.enter_context(self.kernel).settimeout(PATIENCE)
            self.wire, self.peer = (
                stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2)
            )
            self.wire.bind(("127.0.0.1", 0))
            self.wire.setblocking(False)
            self.peer.bind(("127.0.0.2", 0))
            self.peer.settimeout(PATIENCE)
            address, port = self.peer.getsockname()
            table = PeerTable(OWN, (EnginePeer(SECOND, ip_address(address), port),))
            self.engine = NativeEngine(
                tun.fileno(), [self.wire.fileno()], 1472, table, offload=offload, device_header=header
            )
            stack.callback(self.engine.close)
            self._stack = stack.pop_all()
            if running:
                self.run()

    def run(self) -> None:
        thread = threading.Thread(target=self.engine.run)
        thread.start()
        self._stack.callback(thread.join, PATIENCE)
        self._stack.callback(self.engine.stop)

    def close(self) -> None:
        self._stack.close()

    def drops(self) -> dict[Drop, int]:
        return {reason: count for reason, count in self.engine.counters().drops.items() if count}

    def eventually_dropped(self, expected: dict[Drop, int]) -> None:
        self._eventually(self.drops, expected)

    def eventually_counted(self, **expected: int) -> None:
        """Wait for these counters of the peer: a packet is counted a moment after it was sent or written."""

        def counted() -> dict[str, int]:
            counters = self.engine.counters().peers[SECOND]
            return {name: getattr(counters, name) for name in expected}

        self._eventually(counted, expected)

    def _eventually(self, found: Callable[[], object], expected: object) -> None:
        deadline = time.monotonic() + PATIENCE
        while found() != expected:
            assert time.monotonic() < deadline, found()
            time.sleep(0.002)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def udp_pair() -> Pair:
    near, far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for end in (near, far):
        end.bind(("127.0.0.1", 0))
    near.connect(far.getsockname())
    far.connect(near.getsockname())
    return near, far


def built(packet: Packet) -> bytes:
    return bytes(packet)


def stream(
    size: int, destination: str = "10.244.2.194", *, source: str = "10.244.1.96", sequence: int = 0, flags: str = "PA"
) -> bytes:
    segment = TCP(sport=1, dport=2, seq=sequence, flags=flags)
    return built(IP(src=source, dst=destination, flags="DF") / segment / Raw(bytes(size)))


def test_a_run_of_segments_is_cut(rig: Rig) -> None:
    rig.kernel.send(TSO4 + stream(64000))
    packets = [IP(rig.peer.recv(65535)) for _ in range(64)]
    assert [packet[TCP].seq for packet in packets] == [number * 1000 for number in range(64)]
    assert all(len(packet) == 1040 for packet in packets)
    assert [str(packet[TCP].flags) for packet in packets] == ["A"] * 63 + ["PA"]
    rig.eventually_counted(sent_packets=64, sent_bytes=64 * 1040)


def test_the_last_segments_of_a_run_share_a_send_with_the_next_run() -> None:
    """Three runs of 40 segments that are there already: 62 segments of 1040 bytes fit into one send."""
    rig = Rig(running=False)
    try:
        rig.peer.setsockopt(socket.IPPROTO_UDP, 104, 1)  # UDP_GRO: what was sent at once is received at once
        rig.kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for number in range(3):
            rig.kernel.send(TSO4 + stream(40000, sequence=number * 40000))
        rig.run()
        sends = [rig.peer.recv(65535) for _ in range(2)]
        assert [len(send) / 1040 for send in sends] == [62, 58]
        packets = [IP(send[at : at + 1040]) for send in sends for at in range(0, len(send), 1040)]
        assert [packet[TCP].seq for packet in packets] == [number * 1000 for number in range(120)]
    finally:
        rig.close()


def test_packets_that_the_device_refuses_as_a_run_are_written_one_by_one() -> None:
    """A UDP socket stands for the device, and says EMSGSIZE to more than 65507 bytes."""
    rig = Rig(running=False, device=udp_pair())
    try:
        sent = [
            stream(1423, "10.244.1.96", source="10.244.2.194", sequence=number * 1423, flags="A")
            for number in range(46)
        ]
        whole_run = len(PLAIN) + 40 + 46 * 1423
        assert whole_run > 65507
        for part in (sent[:44], sent[44:]):
            control = (socket.IPPROTO_UDP, 103, struct.pack("=H", 1463))  # UDP_SEGMENT
            rig.peer.sendmsg([b"".join(part)], [control], 0, rig.wire.getsockname())
        rig.run()
        assert [rig.kernel.recv(65535) for _ in sent] == [PLAIN + packet for packet in sent]
        rig.eventually_counted(received_packets=46)
        counters = rig.engine.counters()
        assert counters.offloads["tun_tcp"] == "failing: EMSGSIZE (1 times)"
        assert not any(counters.drops.values())
    finally:
        rig.close()


def test_single_packets_of_a_burst_arrive_in_order_whatever_their_sizes(rig: Rig) -> None:
    sizes = [100, 100, 100, 60, 100, 100, 0, 0, 200, 199, 200] * 4
    sent = [
        built(IP(src="10.244.1.96", dst="10.244.2.1", id=number) / UDP(sport=1, dport=2) / Raw(bytes(size)))
        for number, size in enumerate(sizes)
    ]
    for packet in sent:
        rig.kernel.send(PLAIN + packet)
    assert [rig.peer.recv(65535) for _ in sent] == sent


def test_without_offloads_each_packet_goes_alone() -> None:
    rig = Rig(offload=False, header=False)
    try:
        rig.kernel.send(stream(1000))
        assert rig.peer.recv(65535) == stream(1000)
        assert set(rig.engine.counters().offloads.values()) == {"off"}
    finally:
        rig.close()


def test_runs_off_the_wire_reach_the_device_as_one(rig: Rig) -> None:
    first = IP(src="10.244.2.1", dst="10.244.1.1", flags="DF", id=1) / UDP(sport=1, dport=2) / Raw(bytes(500))
    segments = [built(first.__class__(built(first))) for _ in range(10)]
    udp_segment = 103
    size = struct.pack("H", len(segments[0]))
    rig.peer.sendmsg([b"".join(segments)], [(socket.IPPROTO_UDP, udp_segment, size)], 0, rig.wire.getsockname())
    got = rig.kernel.recv(65535)
    assert got[1] == 5
    assert len(got) == 10 + 28 + 10 * 500
    rig.eventually_counted(received_packets=10, received_bytes=5280)


def test_each_packet_of_a_run_is_looked_at(rig: Rig) -> None:
    def made(source: str, destination: str) -> bytes:
        return built(IP(src=source, dst=destination) / UDP(sport=1, dport=2) / Raw(bytes(72)))

    packets = [
        made("10.244.2.1", "10.244.1.1"),
        made("10.244.3.1", "10.244.1.1"),
        made("10.244.2.1", "10.244.3.1"),
        bytes(100),
        made("10.244.2.2", "10.244.1.1"),
    ]
    rig.peer.sendmsg([b"".join(packets)], [(socket.IPPROTO_UDP, 103, struct.pack("H", 100))], 0, rig.wire.getsockname())
    assert {rig.kernel.recv(65535) for _ in range(2)} == {PLAIN + packets[0], PLAIN + packets[4]}
    rig.eventually_dropped({Drop.SPOOFED_SOURCE: 1, Drop.FOREIGN_DESTINATION: 1, Drop.MALFORMED: 1})


def test_a_run_for_nobody_is_answered_once_and_counted_by_packet(rig: Rig) -> None:
    rig.kernel.send(TSO4 + stream(5000, "10.244.9.1"))
    answer = rig.kernel.recv(65535)
    assert answer[:10] == PLAIN
    read = IP(answer[10:])
    assert (read.src, read.dst, read[ICMP].type) == ("10.244.1.0", "10.244.1.96", 3)
    assert IP(bytes(read[ICMP].payload)).len == 1040
    rig.eventually_dropped({Drop.NO_ROUTE: 5})


def test_segments_larger_than_the_mtu_are_dropped(rig: Rig) -> None:
    rig.kernel.send(struct.pack("=BBHHHH", 1, 1, 0, 1433, 20, 16) + stream(2866))
    rig.eventually_dropped({Drop.TOO_BIG: 2})


@pytest.mark.parametrize(
    ("given", "reason", "count"),
    [
        # The kernel says that TCP begins elsewhere than it does.
        (struct.pack("=BBHHHH", 1, 1, 0, 1000, 24, 16) + stream(5000), Drop.MALFORMED, 5),
        # A kind of run that is not known, a length that is not the packet's, a size of nothing.
        (struct.pack("=BBHHHH", 1, 3, 0, 1000, 20, 16) + stream(5000), Drop.UNSUPPORTED, 5),
        (TSO4 + stream(5000)[:-1000], Drop.MALFORMED, 4),
        (struct.pack("=BBHHHH", 1, 1, 0, 0, 20, 16) + stream(5000), Drop.MALFORMED, 1),
    ],
)
def test_a_run_that_is_refused_counts_as_the_packets_in_it(rig: Rig, given: bytes, reason: Drop, count: int) -> None:
    rig.kernel.send(given)
    rig.eventually_dropped({reason: count})


def test_segments_with_long_headers_are_sent_as_others_are(rig: Rig) -> None:
    """With 1 KiB of extension headers before each, the memory for headers is filled several times over."""
    rig.kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    extensions = IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(254))] * 4)
    addresses = IPv6(src="fd00:1::96", dst="fd00:2::194")
    before_payload = len(addresses / extensions / TCP())
    assert 100 * before_payload > 3 * 32 * 1024
    for number in range(3):
        segment = TCP(sport=1, dport=2, seq=number * 10000, flags="A")
        whole = built(addresses / extensions / segment / Raw(bytes([number]) * 10000))
        rig.kernel.send(struct.pack("=BBHHHH", 0, 4, 0, 100, 0, 0) + whole)
        packets = [IPv6(rig.peer.recv(65535)) for _ in range(100)]
        assert [packet[TCP].seq for packet in packets] == [number * 10000 + each * 100 for each in range(100)]
        assert all(bytes(packet[TCP].payload) == bytes([number]) * 100 for packet in packets)
        assert all(len(packet) == before_payload + 100 for packet in packets)
    rig.eventually_counted(sent_packets=300)


class TestSeveralQueues:
    """Two queues of a device, each with a socket: datagrams reach the one or the other by their sender."""

    @pytest.fixture
    def stack(self) -> Iterator[contextlib.ExitStack]:
        with contextlib.ExitStack() as stack:
            yield stack

    def pair(self, stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(near).setblocking(False)
        stack.enter_context(far).settimeout(PATIENCE)
        return near, far

    def udp(self, stack: contextlib.ExitStack, address: str, port: int = 0) -> socket.socket:
        made = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind((address, port))
        made.settimeout(PATIENCE)
        return made

    def test_all_are_served_and_counted_together(self, stack: contextlib.ExitStack) -> None:
        (near_1, far_1), (near_2, far_2) = self.pair(stack), self.pair(stack)
        wires = [self.udp(stack, "127.0.0.1")]
        port = wires[0].getsockname()[1]
        wires.append(self.udp(stack, "127.0.0.1", port))
        for wire in wires:
            wire.setblocking(False)
        peers = [self.udp(stack, "127.0.0.2") for _ in range(32)]
        address, peer_port = peers[0].getsockname()
        table = PeerTable(OWN, (EnginePeer(SECOND, ip_address(address), peer_port),))
        engine = NativeEngine(
            near_1.fileno(),
            [wires[0].fileno()],
            1472,
            table,
            more_queues=[(near_2.fileno(), [wires[1].fileno()])],
            device_header=False,
        )
        stack.callback(engine.close)
        thread = threading.Thread(target=engine.run)
        thread.start()
        stack.callback(thread.join, PATIENCE)
        stack.callback(engine.stop)

        out = built(IP(src="10.244.1.96", dst="10.244.2.194") / UDP(sport=1, dport=2) / Raw(b"out"))
        for far in (far_1, far_2):
            far.send(out)
            assert peers[0].recv(65535) == out
        back = built(IP(src="10.244.2.194", dst="10.244.1.96") / UDP(sport=2, dport=1) / Raw(b"back"))
        for (
            peer
        ) in peers:  # of 32 ports, some are hashed to each socket; that all are to one is as likely as 1 in 2 ** 31
            peer.sendto(back, ("127.0.0.1", port))
        selector = selectors.DefaultSelector()
        stack.callback(selector.close)
        for far in (far_1, far_2):
            selector.register(far, selectors.EVENT_READ)
        arrived = {far_1: 0, far_2: 0}
        while sum(arrived.values()) < len(peers):
            ready = selector.select(PATIENCE)
            assert ready, arrived
            for key, _ in ready:
                readable = key.fileobj
                assert isinstance(readable, socket.socket)
                assert readable.recv(65535) == back
                arrived[readable] += 1
        assert all(arrived.values())
        counters = engine.counters()
        assert counters.peers[SECOND].sent_packets == 2
        assert counters.peers[SECOND].received_packets == 32
        assert not any(counters.drops.values())

    def test_one_that_ends_ends_all(self, stack: contextlib.ExitStack) -> None:
        (near_1, _), (near_2, far_2) = self.pair(stack), self.pair(stack)
        engine = NativeEngine(
            near_1.fileno(), [], 1472, PeerTable(OWN), more_queues=[(near_2.fileno(), [])], device_header=False
        )
        stack.callback(engine.close)
        far_2.close()
        with pytest.raises(DeviceGone):
            engine.run()

    def test_there_is_at_least_one_and_each_has_a_socket_for_a_version_at_most(self) -> None:
        with pytest.raises(ValueError, match="1 to 64 queues"):
            NativeEngine(0, [], 1472, PeerTable(OWN), more_queues=[(0, [])] * 64)
        with pytest.raises(ValueError, match="one socket for each IP version"):
            NativeEngine(0, [1, 2, 3], 1472, PeerTable(OWN))

    def test_all_have_sockets_of_the_same_ip_versions(self, stack: contextlib.ExitStack) -> None:
        """A peer is reached by any of them."""
        wires = [stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for family in FAMILIES]
        (first, _), (second, _) = self.pair(stack), self.pair(stack)
        for more in ([], [wires[1].fileno()], [wire.fileno() for wire in wires]):
            with pytest.raises(OSError, match="Invalid argument"):
                NativeEngine(
                    first.fileno(),
                    [wires[0].fileno()],
                    1472,
                    PeerTable(OWN),
                    more_queues=[(second.fileno(), more)],
                    device_header=False,
                )

    def test_numbers_that_do_not_fit_are_refused_and_not_cut_short(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
            for tun, descriptor, mtu in (
                (0, wire.fileno() + 2**32, 1472),
                (2**32, wire.fileno(), 1472),
                (0, wire.fileno(), 1472 + 2**32),
            ):
                with pytest.raises(OverflowError):
                    NativeEngine(tun, [descriptor], mtu, PeerTable(OWN), device_header=False)
            with pytest.raises(ValueError, match="an MTU is at least 1"):
                NativeEngine(0, [wire.fileno()], 0, PeerTable(OWN), device_header=False)


FORKS = """
import os, signal, socket
from ipaddress import IPv4Network
from overlaynet.backends.udp.engine import PeerTable
from overlaynet.backends.udp.native_engine import NativeEngine
from overlaynet.model import Subnets

pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
queues = [(near.fileno(), []) for near, _ in pairs]
own = PeerTable(Subnets(IPv4Network("10.244.1.0/24")))
engine = NativeEngine(*queues[0], 1472, own, more_queues=queues[1:], device_header=False)
assert engine._engine.start() == (3, 0)
child = os.fork()
if child == 0:
    signal.alarm(20)
    engine.stop()
    engine.close()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(len(os.listdir("/proc/self/task")))
fdinfo = [open(entry).read() for entry in os.scandir("/proc/self/fdinfo") if os.path.exists(entry)]
print(*[line.split()[1] for info in fdinfo for line in info.splitlines() if line.startswith("eventfd-count:")])
engine.close()
"""


def test_a_child_that_was_forked_off_leaves_its_parents_engine_alone() -> None:
    """The child has a copy of the engine, but none of its threads; and what wakes them is the same in both."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["0", "3", "0"]), done.stderr


FEW_TASKS = """
import logging, os, resource, socket, struct, threading
from ipaddress import IPv4Network, ip_address
from overlaynet.backends.udp.engine import EnginePeer, PeerTable
from overlaynet.backends.udp.native_engine import NativeEngine
from overlaynet.model import Subnets
import encodings.idna

logging.basicConfig(format="%(message)s")
def bound(address, port=0):
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind((address, port))
    made.settimeout(20)
    return made

pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(4)]
wires = [bound("127.0.0.1")]
wires += [bound("127.0.0.1", wires[0].getsockname()[1]) for _ in range(3)]
for near in (*wires, *(near for near, _ in pairs)):
    near.setblocking(False)
peer = bound("127.0.0.2")
own, second = Subnets(IPv4Network("10.244.1.0/24")), Subnets(IPv4Network("10.244.2.0/24"))
table = PeerTable(own, (EnginePeer(second, ip_address("127.0.0.2"), peer.getsockname()[1]),))
(first, *more) = [(near.fileno(), [wire.fileno()]) for (near, _), wire in zip(pairs, wires)]
engine = NativeEngine(*first, 1472, table, more_queues=more, device_header=False)

def look():
    try:
        for number, (_, far) in enumerate(pairs * 2):
            packet = bytes([0x45, 0, 0, 24, 0, number, 0, 0, 64, 17, 0, 0, 10, 244, 1, 1, 10, 244, 2, 1, 0, 0, 0, 0])
            far.send(packet)
            assert peer.recv(65535) == packet
    finally:
        engine.stop()

# The main thread, the one that looks, and one of the three that the engine would like to have.
os.setuid(61317)
resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))
threading.Thread(target=look).start()
engine.run()
print(engine.threads, engine.counters().peers[second].sent_packets)
engine.close()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="root alone can be another user, who has no other tasks")
def test_where_the_kernel_gives_fewer_threads_these_serve_all_queues() -> None:
    done = subprocess.run([sys.executable, "-c", FEW_TASKS], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "2 8\n"), done.stderr
    assert done.stderr == "fewer threads than asked for\n"
