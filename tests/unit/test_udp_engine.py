"""The contract of packet engines, each of them: a socket pair stands for the device, the loopback for the underlay."""

import contextlib
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from overlaynet.backends.udp.engine import DeviceGone, Drop, Engine, EnginePeer, PeerCounters, PeerTable
from overlaynet.backends.udp.native_engine import NativeEngine
from overlaynet.backends.udp.python_engine import PythonEngine, TokenBucket, longest_match, prefixes_of
from overlaynet.model import Subnets

PATIENCE = 20.0
ENGINES = [pytest.param(PythonEngine, id="python"), pytest.param(NativeEngine, id="native")]
OWN = Subnets(IPv4Network("10.244.1.0/24"))
SECOND, THIRD = Subnets(IPv4Network("10.244.2.0/24")), Subnets(IPv4Network("10.244.3.0/24"))
MTU = 1472
Pair: TypeAlias = tuple[socket.socket, socket.socket]


def udp_socket(address: str) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, 0))
    made.settimeout(PATIENCE)
    return made


class Rig:
    """An engine between a pretended device and real UDP sockets, with two peers."""

    def __init__(
        self, engine: type[Engine], mtu: int = MTU, *, device: Pair | None = None, running: bool = True
    ) -> None:
        with contextlib.ExitStack() as stack:
            tun, self.kernel = seqpacket_pair() if device is None else device
            stack.enter_context(tun).setblocking(False)
            stack.enter_context(self.kernel).settimeout(PATIENCE)
            self.wire = stack.enter_context(udp_socket("127.0.0.1"))
            self.wire.setblocking(False)
            self.second = stack.enter_context(udp_socket("127.0.0.2"))
            self.third = stack.enter_context(udp_socket("127.0.0.3"))
            self.table = PeerTable(OWN, (peer(SECOND, self.second), peer(THIRD, self.third)))
            self.engine = engine(tun.fileno(), [self.wire.fileno()], mtu, self.table)
            stack.callback(self.engine.close)
            self.error: BaseException | None = None
            self.thread = threading.Thread(target=self._run)
            if running:
                self.run()
            self._stack = stack.pop_all()

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


def packet(source: str, destination: str, payload: bytes = b"payload") -> bytes:
    return bytes(IP(src=source, dst=destination) / UDP(sport=1, dport=2) / Raw(payload))


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> type[Engine]:
    made: type[Engine] = request.param
    return made


@pytest.fixture
def rig(engine: type[Engine]) -> Iterator[Rig]:
    with Rig(engine) as made:
        yield made


def test_packets_go_to_the_peer_that_has_the_destination(rig: Rig) -> None:
    for destination, sock in (("10.244.2.194", rig.second), ("10.244.3.1", rig.third), ("10.244.2.1", rig.second)):
        sent = packet("10.244.1.96", destination)
        rig.kernel.send(sent)
        assert sock.recvfrom(65535) == (sent, rig.wire.getsockname())
    rig.settle(3)
    counters = rig.engine.counters()
    assert counters.peers == {
        SECOND: PeerCounters(sent_packets=2, sent_bytes=70),
        THIRD: PeerCounters(sent_packets=1, sent_bytes=35),
    }
    assert set(counters.drops) == set(Drop)
    assert rig.drops() == {}


def test_packets_from_a_peer_reach_the_device(rig: Rig) -> None:
    sent = packet("10.244.2.194", "10.244.1.96")
    rig.arrive(sent, rig.second)
    assert rig.kernel.recv(65535) == sent
    with udp_socket("127.0.0.2") as other_port:
        rig.arrive(sent, other_port)
        assert rig.kernel.recv(65535) == sent
    rig.settle(2)
    assert rig.engine.counters().peers[SECOND] == PeerCounters(received_packets=2, received_bytes=70)
    assert rig.drops() == {}


@pytest.mark.parametrize("size", [20, 21, 1472, 1500, 65507])
def test_no_packet_is_cut(engine: type[Engine], size: int) -> None:
    with Rig(engine, mtu=65535) as rig:
        sent = packet("10.244.1.1", "10.244.2.1", bytes(size - 28)) if size >= 28 else whole(size)
        rig.kernel.send(sent)
        assert rig.second.recv(65535) == sent
        came = packet("10.244.2.1", "10.244.1.1", bytes(size - 28)) if size >= 28 else whole(size, back=True)
        rig.arrive(came, rig.second)
        assert rig.kernel.recv(65535) == came


def whole(size: int, *, back: bool = False) -> bytes:
    here, there = "10.244.1.1", "10.244.2.1"
    return bytes(IP(src=there if back else here, dst=here if back else there) / Raw(bytes(size - 20)))


FROM_DEVICE = [
    (b"", Drop.MALFORMED),
    (b"\x45", Drop.MALFORMED),
    (packet("10.244.1.1", "10.244.2.1") + b"1", Drop.MALFORMED),
    (bytes(IPv6(src="fd00::1", dst="fd00::2") / UDP()), Drop.UNSUPPORTED),
    (packet("10.244.1.1", "10.244.4.1"), Drop.NO_ROUTE),
    (packet("10.244.1.1", "10.244.1.2"), Drop.NO_ROUTE),
    (packet("10.244.1.1", "224.0.0.1"), Drop.NO_ROUTE),
    (packet("10.244.1.1", "10.244.2.1", bytes(MTU - 27)), Drop.TOO_BIG),
]


@pytest.mark.parametrize(("data", "reason"), FROM_DEVICE)
def test_what_is_not_sent_is_counted(rig: Rig, data: bytes, reason: Drop) -> None:
    rig.kernel.send(data)
    rig.settle(1)
    assert rig.drops() == {reason: 1}
    rig.kernel.send(packet("10.244.1.1", "10.244.2.1"))
    assert rig.second.recv(65535) == packet("10.244.1.1", "10.244.2.1")


FROM_WIRE = [
    (b"", Drop.MALFORMED),
    (b"\x45", Drop.MALFORMED),
    (packet("10.244.2.1", "10.244.1.1") + b"1", Drop.MALFORMED),
    (packet("10.244.2.1", "10.244.1.1")[:-1], Drop.MALFORMED),
    (b"\x45" + bytes(65506), Drop.MALFORMED),
    (bytes(IPv6(src="fd00::1", dst="fd00::2") / UDP()), Drop.UNSUPPORTED),
    (packet("10.244.3.1", "10.244.1.1"), Drop.SPOOFED_SOURCE),
    (packet("10.244.1.1", "10.244.1.1"), Drop.SPOOFED_SOURCE),
    (packet("8.8.8.8", "10.244.1.1"), Drop.SPOOFED_SOURCE),
    (packet("10.244.2.1", "10.244.3.1"), Drop.FOREIGN_DESTINATION),
    (packet("10.244.2.1", "127.0.0.1"), Drop.FOREIGN_DESTINATION),
    (packet("10.244.2.1", "255.255.255.255"), Drop.FOREIGN_DESTINATION),
]


@pytest.mark.parametrize(("data", "reason"), FROM_WIRE)
def test_what_is_not_delivered_is_counted(rig: Rig, data: bytes, reason: Drop) -> None:
    rig.arrive(data, rig.second)
    last = packet("10.244.2.1", "10.244.1.9", b"last")
    rig.arrive(last, rig.second)
    assert rig.kernel.recv(65535) == last
    assert rig.drops() == {reason: 1}


def test_a_stranger_is_not_heard(rig: Rig) -> None:
    with udp_socket("127.0.0.9") as stranger:
        rig.arrive(packet("10.244.2.1", "10.244.1.1"), stranger)
        rig.arrive(b"", stranger)
    rig.settle(2)
    assert rig.drops() == {Drop.UNKNOWN_PEER: 2}


def test_a_destination_that_no_peer_has_is_answered(rig: Rig) -> None:
    for destination in ("10.244.9.1", "10.244.1.77"):
        sent = packet("10.244.1.96", destination)
        rig.kernel.send(sent)
        answer = IP(rig.kernel.recv(65535))
        assert (answer.src, answer.dst) == ("10.244.1.0", "10.244.1.96")
        assert (answer[ICMP].type, answer[ICMP].code) == (3, 0)
        assert bytes(answer[ICMP].payload) == sent
    eventually(lambda: rig.engine.counters().unreachables_sent == 2)
    rig.kernel.send(packet("10.244.1.96", "224.0.0.1"))
    rig.settle(3)
    assert rig.drops() == {Drop.NO_ROUTE: 3}
    assert rig.engine.counters().unreachables_sent == 2


def test_the_errors_of_the_socket_are_counted_by_kind(engine: type[Engine]) -> None:
    with Rig(engine, mtu=65535) as rig:
        refused, failing = (Subnets(IPv4Network(f"10.244.{number}.0/24")) for number in (4, 5))
        peers = [
            *rig.table.peers,
            EnginePeer(refused, IPv4Address("127.255.255.255"), 9),  # a broadcast address
            EnginePeer(failing, IPv4Address("192.0.2.1"), 9),  # not to be reached from the loopback
        ]
        rig.engine.set_table(PeerTable(OWN, tuple(peers)))
        rig.kernel.send(packet("10.244.1.1", "10.244.2.1", bytes(65520 - 28)))
        for number in (4, 5):
            rig.kernel.send(packet("10.244.1.1", f"10.244.{number}.1"))
        rig.settle(3)
        assert rig.drops() == {Drop.TOO_BIG: 1, Drop.SEND_REFUSED: 1, Drop.SEND_FAILED: 1}
        assert all(each.sent_packets == 0 for each in rig.engine.counters().peers.values())


def test_a_device_that_takes_nothing_is_counted(rig: Rig) -> None:
    rig.kernel.shutdown(socket.SHUT_RD)
    rig.arrive(packet("10.244.2.1", "10.244.1.1"), rig.second)
    rig.kernel.send(packet("10.244.1.1", "10.244.9.1"))
    eventually(lambda: rig.drops() == {Drop.DEVICE_FAILED: 2, Drop.NO_ROUTE: 1})
    assert rig.engine.counters().unreachables_sent == 0


def test_a_device_that_is_gone_ends_the_engine(rig: Rig) -> None:
    rig.kernel.close()
    rig.thread.join(PATIENCE)
    assert isinstance(rig.error, DeviceGone)


def test_a_peer_of_another_ip_version_than_the_sockets_counts_as_absent(rig: Rig) -> None:
    sixth = EnginePeer(SECOND, IPv6Address("::1"), 9)
    rig.engine.set_table(PeerTable(OWN, (sixth,)))
    rig.kernel.send(packet("10.244.1.1", "10.244.2.1"))
    rig.settle(1)
    assert rig.drops() == {Drop.NO_ROUTE: 1}
    assert rig.engine.counters().peers == {SECOND: PeerCounters()}


def test_a_peer_without_an_ipv4_subnet_gets_nothing(rig: Rig) -> None:
    sixth = Subnets(ipv6=IPv6Network("fd00:2::/64"))
    rig.engine.set_table(PeerTable(OWN, (peer(sixth, rig.second),)))
    rig.arrive(packet("10.244.2.1", "10.244.1.1"), rig.second)
    rig.settle(1)
    assert rig.drops() == {Drop.UNKNOWN_PEER: 1}
    assert rig.engine.counters().peers == {sixth: PeerCounters()}


def test_a_peer_that_stays_keeps_its_counts(rig: Rig) -> None:
    rig.kernel.send(packet("10.244.1.1", "10.244.2.1"))
    rig.kernel.send(packet("10.244.1.1", "10.244.3.1"))
    rig.settle(2)
    moved = peer(SECOND, rig.third)
    rig.engine.set_table(PeerTable(OWN, (moved,)))
    sent = packet("10.244.1.1", "10.244.2.2")
    rig.third.recv(65535)
    rig.kernel.send(sent)
    assert rig.third.recv(65535) == sent
    eventually(lambda: rig.engine.counters().peers == {SECOND: PeerCounters(sent_packets=2, sent_bytes=70)})
    rig.engine.set_table(rig.table)
    assert rig.engine.counters().peers[THIRD] == PeerCounters()
    # What was told once does not change behind the caller's back.
    before = rig.engine.counters()
    rig.kernel.send(sent)
    eventually(lambda: rig.engine.counters() != before)
    assert before.peers[SECOND].sent_packets == 2


def test_of_two_peers_with_one_subnet_the_first_has_it(rig: Rig) -> None:
    rig.engine.set_table(PeerTable(OWN, (peer(SECOND, rig.second), peer(SECOND, rig.third))))
    rig.kernel.send(packet("10.244.1.1", "10.244.2.1"))
    assert rig.second.recv(65535)


def test_a_peer_with_a_wider_subnet_does_not_get_what_is_for_others(rig: Rig) -> None:
    wide = Subnets(IPv4Network("10.244.0.0/16"))
    rig.engine.set_table(PeerTable(OWN, (peer(wide, rig.third), peer(SECOND, rig.second))))
    for destination in ("10.244.1.77", "10.244.2.1", "10.244.9.1"):
        rig.kernel.send(packet("10.244.1.1", destination))
    rig.settle(3)
    assert rig.drops() == {Drop.NO_ROUTE: 1}
    assert {subnets: each.sent_packets for subnets, each in rig.engine.counters().peers.items()} == {wide: 1, SECOND: 1}


def test_the_own_subnet_may_change(rig: Rig) -> None:
    rig.engine.set_table(PeerTable(THIRD, (peer(SECOND, rig.second),)))
    came = packet("10.244.2.1", "10.244.3.1")
    rig.arrive(came, rig.second)
    assert rig.kernel.recv(65535) == came
    rig.kernel.send(packet("10.244.3.1", "10.244.1.1"))
    assert IP(rig.kernel.recv(65535)).src == "10.244.3.0"


def test_a_change_of_the_table_does_not_touch_other_packets(rig: Rig) -> None:
    swapping = threading.Event()
    swapping.set()

    def swap() -> None:
        number = 0
        while swapping.is_set():
            number += 1
            extra = EnginePeer(
                Subnets(IPv4Network((f"10.244.{100 + number % 100}.0", 24))), IPv4Address("127.0.0.7"), 9
            )
            rig.engine.set_table(PeerTable(OWN, (*rig.table.peers, extra)))

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for number in range(200):
            sent = packet("10.244.1.1", "10.244.2.1", number.to_bytes(4, "big"))
            rig.kernel.send(sent)
            assert rig.second.recv(65535) == sent
    finally:
        swapping.clear()
        swapper.join()
    rig.settle(200)
    assert rig.drops() == {}
    assert rig.engine.counters().peers[SECOND].sent_packets == 200


def test_neither_direction_starves(engine: type[Engine]) -> None:
    with Rig(engine, device=udp_pair(), running=False) as rig:
        for _ in range(90):
            rig.kernel.send(packet("10.244.1.1", "10.244.9.1"))
        for _ in range(150):
            rig.arrive(packet("10.244.2.1", "10.244.1.1"), rig.second)
        rig.run()
        # Both directions end in the device: errors about what came out of it, and what came off the wire.
        protocols = [IP(rig.kernel.recv(65535)).proto for _ in range(240)]
    last_error, last_delivered = (239 - protocols[::-1].index(protocol) for protocol in (1, 17))
    assert protocols.index(17) < last_error
    assert last_error < last_delivered


def test_a_busy_engine_stops(rig: Rig) -> None:
    over = threading.Event()

    def flood_the_device() -> None:
        sent = packet("10.244.1.1", "10.244.2.1")
        rig.kernel.setblocking(False)
        while not over.is_set():
            with contextlib.suppress(BlockingIOError):
                rig.kernel.send(sent)

    def flood_the_wire() -> None:
        # What cannot be delivered costs the engine no room in the device.
        came = packet("10.244.2.1", "10.244.9.1")
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


@pytest.fixture(scope="module", params=ENGINES)
def long_lived(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(request.param) as made:
        yield made


ADDRESSES = st.sampled_from(
    ["10.244.1.0", "10.244.1.255", "10.244.2.0", "10.244.2.255", "10.244.3.7", "10.244.4.1", "127.0.0.1", "0.0.0.0"]
)
NEARLY_PACKETS = st.one_of(
    st.binary(max_size=64),
    st.builds(packet, ADDRESSES, ADDRESSES, st.binary(max_size=40)),
    st.builds(
        lambda source, destination, cut, extra: packet(source, destination)[:cut] + extra,
        ADDRESSES,
        ADDRESSES,
        st.integers(0, 40),
        st.binary(max_size=4),
    ),
    st.builds(
        lambda source, destination, at, value: (p := packet(source, destination))[:at] + bytes([value]) + p[at + 1 :],
        ADDRESSES,
        ADDRESSES,
        st.integers(0, 34),
        st.integers(0, 255),
    ),
)


@settings(max_examples=300, deadline=None)
@given(data=NEARLY_PACKETS, third=st.booleans())
def test_whatever_comes_only_what_may_be_delivered_is(long_lived: Rig, data: bytes, third: bool) -> None:
    sender, subnet = (long_lived.third, THIRD.ipv4) if third else (long_lived.second, SECOND.ipv4)
    assert subnet is not None
    assert OWN.ipv4 is not None
    marker = packet(str(subnet[1]), "10.244.1.1", b"the end of this example")
    long_lived.arrive(data, sender)
    long_lived.arrive(marker, sender)
    received: list[bytes] = []
    while not received or received[-1] != marker:
        received.append(long_lived.kernel.recv(65535))
    may = (
        len(data) >= 20
        and data[0] >> 4 == 4
        and 20 <= (data[0] & 15) * 4 <= len(data)
        and int.from_bytes(data[2:4], "big") == len(data)
        and IPv4Address(data[12:16]) in subnet
        and IPv4Address(data[16:20]) in OWN.ipv4
    )
    assert received == ([data, marker] if may else [marker])


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
    st.lists(st.integers(0, 2**32 - 1), max_size=20),
    st.randoms(use_true_random=False),
)
def test_the_longest_prefix_wins(networks: list[tuple[int, int]], addresses: list[int], chance: random.Random) -> None:
    subnets: list[IPv4Network] = list(dict.fromkeys(IPv4Network(network, strict=False) for network in networks))
    entries = [(subnet, PeerCounters()) for subnet in subnets]
    found = prefixes_of(entries)
    near = [int(subnet[0]) + chance.randrange(-1, subnet.num_addresses + 1) for subnet in subnets]
    for address in [*addresses, *(each for each in near if 0 <= each < 2**32)]:
        containing = [(subnet.prefixlen, holder) for subnet, holder in entries if IPv4Address(address) in subnet]
        expected = max(containing, key=lambda each: each[0])[1] if containing else None
        assert longest_match(found, address) is expected


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
