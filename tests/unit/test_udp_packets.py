"""Reading IP packets, marking them and answering them by ICMP, with scapy as the second opinion."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_Timestamp
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_Redirect,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.ipsec import AH
from scapy.packet import Packet, Raw

from overlaynet.backends.udp.engine import PeerTable
from overlaynet.backends.udp.native_engine import NativeEngine
from overlaynet.backends.udp.packets import checksum, congestion_mark, decapsulate, unreachable
from overlaynet.delivery import addresses
from overlaynet.model import Subnets

HOST, FAR, OWN = "10.244.1.96", "10.244.2.194", IPv4Address("10.244.1.0")
HOST6, FAR6, OWN6 = "fd00:1::96", "fd00:2::194", IPv6Address("fd00:1::")


@given(st.ip_addresses(v=4), st.ip_addresses(v=4), st.binary(max_size=2000), st.integers(0, 40))
def test_whole_packets_are_read(source: IPv4Address, destination: IPv4Address, payload: bytes, options: int) -> None:
    packet = bytes(IP(src=str(source), dst=str(destination), options=[IPOption_NOP()] * options) / Raw(payload))
    assert addresses(packet) == source.packed + destination.packed


@given(st.ip_addresses(v=6), st.ip_addresses(v=6), st.binary(max_size=2000))
def test_whole_ipv6_packets_are_read(source: IPv6Address, destination: IPv6Address, payload: bytes) -> None:
    packet = bytes(IPv6(src=str(source), dst=str(destination)) / Raw(payload))
    assert addresses(packet) == source.packed + destination.packed


@given(
    st.one_of(
        st.binary(max_size=100),
        st.builds(
            lambda first, length, rest: bytes([first, 0]) + length.to_bytes(2, "big") + rest,
            st.sampled_from([0x44, 0x45, 0x46, 0x4F, 0x40, 0x55]),
            st.integers(0, 70),
            st.binary(min_size=14, max_size=66),
        ),
        st.builds(
            lambda first, length, rest: bytes([first, 0, 0, 0]) + length.to_bytes(2, "big") + rest,
            st.sampled_from([0x60, 0x6F, 0x70]),
            st.integers(0, 40),
            st.binary(min_size=30, max_size=80),
        ),
    )
)
def test_no_bytes_but_one_whole_packet_are_accepted(data: bytes) -> None:
    expected = b""
    if len(data) >= 20 and data[0] >> 4 == 4:
        header = IP(data[:20])
        if header.ihl >= 5 and header.ihl * 4 <= header.len == len(data):
            expected = IPv4Address(header.src).packed + IPv4Address(header.dst).packed
    elif len(data) >= 40 and data[0] >> 4 == 6:
        sixth = IPv6(data[:40])
        if sixth.plen + 40 == len(data):
            expected = IPv6Address(sixth.src).packed + IPv6Address(sixth.dst).packed
    assert addresses(data) == expected


@pytest.mark.parametrize(
    ("packet", "size"),
    [
        (b"", 0),
        (bytes(19), 0),
        (bytes(20), 0),
        (bytes(IP(src=HOST, dst=FAR) / b"12")[:-1], 0),
        (bytes(IP(src=HOST, dst=FAR) / b"12") + b"3", 0),
        (bytes(IP(src=HOST, dst=FAR, ihl=4)), 0),
        (bytes(IP(src=HOST, dst=FAR, ihl=6)), 0),
        (bytes(IP(src=HOST, dst=FAR, len=19)), 0),
        (bytes(IP(src=HOST, dst=FAR, version=5)), 0),
        (bytes(IPv6(src=HOST6, dst=FAR6) / UDP())[:-1], 0),
        (bytes(IPv6(src=HOST6, dst=FAR6) / UDP()) + b"1", 0),
        (bytes(IPv6(src=HOST6, dst=FAR6))[:39], 0),
        (bytes(IPv6(src=HOST6, dst=FAR6, version=7)), 0),
        (bytes(IPv6(src=HOST6, dst=FAR6, plen=0) / bytes(8)), 0),  # a jumbogram (RFC 2675), say
        (bytes(IPv6(src=HOST6, dst=FAR6)), 32),
        (bytes(IPv6(src=HOST6, dst=FAR6, hlim=0) / UDP()), 32),
        (bytes(IP(src=HOST, dst=FAR)), 8),
        (bytes(IP(src=HOST, dst=FAR, ttl=0, chksum=0) / UDP()), 8),
    ],
)
def test_what_is_no_whole_packet_has_no_addresses(packet: bytes, size: int) -> None:
    assert len(addresses(packet)) == size


@given(st.integers(0, 255), st.integers(0, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_decapsulation_changes_the_mark_and_the_checksum_alone(
    service: int, outer: int, number: int, six: bool
) -> None:
    def made(service: int) -> bytes:
        if six:
            return bytes(IPv6(src=HOST6, dst=FAR6, tc=service, fl=number & 0xFFFFF) / UDP() / b"x")
        return bytes(IP(src=HOST, dst=FAR, tos=service, id=number & 0xFFFF, ttl=number >> 24) / UDP() / b"x")

    packet = made(service)
    assert congestion_mark(packet) == service & 3
    got = decapsulate(packet, outer)
    if outer == 3 and service & 3 == 0:
        assert got is None
    else:
        # RFC 6040, figure 4, in few words: the stronger of the two signals, where the inner one allows any.
        signal = {0: 0, 2: 1, 1: 2, 3: 3}
        inner = service & 3
        marked = max(inner, outer, key=signal.__getitem__) if inner else 0
        assert got == made(service & 0xFC | marked)


@given(st.binary(max_size=300))
def test_a_checksum_makes_the_sum_zero(data: bytes) -> None:
    data += bytes(len(data) % 2)
    assert checksum(data + checksum(data).to_bytes(2, "big")) == 0


PACKETS = [
    IP(src=HOST, dst=FAR) / UDP(sport=4, dport=5) / b"hello",
    IP(src=HOST, dst=FAR) / UDP(sport=4, dport=5) / bytes(1400),
    IP(src=HOST, dst=FAR, tos=0x10, id=77, ttl=3, flags="DF") / TCP(sport=4, dport=80, flags="S"),
    IP(src=HOST, dst=FAR) / ICMP(type=8) / b"ping",
    IP(src=HOST, dst=FAR, flags="MF") / UDP() / bytes(16),
    IP(src=HOST, dst=FAR, options=[IPOption_Timestamp()]) / UDP(),
    IP(src=HOST, dst=FAR, options=[IPOption_NOP()] * 40) / TCP(),
    IP(src=HOST, dst=FAR, proto=17),
    IP(src=HOST, dst=FAR, proto=132) / b"1",
    IP(src=HOST, dst=FAR, proto=51) / AH(nh=1, payloadlen=4, icv=bytes(12)) / ICMP(type=8) / b"ping",
    IP(src=HOST, dst=FAR, proto=51) / AH(nh=17, payloadlen=4, icv=bytes(12)) / UDP(),
]


@pytest.mark.parametrize("packet", PACKETS, ids=lambda packet: packet.summary())
def test_the_sender_gets_a_right_icmp_error(packet: Packet) -> None:
    data = bytes(packet)
    answer = unreachable(data, OWN)
    assert answer is not None
    read = IP(answer)
    assert (read.src, read.dst, read.proto) == (str(OWN), HOST, 1)
    assert (read.len, read.ihl, read.frag, read.tos >> 5) == (len(answer), 5, 0, 6)
    assert answer[20:22] + answer[24:28] == bytes([3, 0, 0, 0, 0, 0])
    quote = answer[28:]
    assert data.startswith(quote)
    assert len(quote) == min(len(data), 548)
    # Scapy computes what is not given.
    again = IP(src=read.src, dst=read.dst, tos=read.tos, id=read.id, ttl=read.ttl) / ICMP(type=3, code=0) / Raw(quote)
    assert bytes(again) == answer


FORBIDDEN = [
    *(IP(src=HOST, dst=FAR) / ICMP(type=kind) / bytes(40) for kind in (3, 4, 5, 11, 12, 1, 200)),
    IP(src=HOST, dst=FAR, proto=1),
    IP(src=HOST, dst=FAR, frag=1) / bytes(40),
    IP(src=HOST, dst=FAR, frag=1, flags="MF") / bytes(40),
    *(IP(src=HOST, dst=far) / UDP() for far in ("224.0.0.1", "239.1.2.3", "255.255.255.255")),
    *(
        IP(src=sender, dst=FAR) / UDP()
        for sender in ("0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.5", "255.255.255.255", "240.0.0.1")
    ),
    IP(src=HOST, dst=FAR, chksum=0x1234) / UDP(),
    IP(src=HOST, dst=FAR, proto=51) / AH(nh=1, payloadlen=4, icv=bytes(12)) / ICMP(type=3) / bytes(40),
    IP(src=HOST, dst=FAR, proto=51) / AH(nh=1, payloadlen=4, icv=bytes(12)),
    IP(src=HOST, dst=FAR, proto=51) / bytes([1, 0, 0, 0, 0, 0, 0]),
]


@pytest.mark.parametrize("packet", FORBIDDEN, ids=lambda packet: packet.summary())
def test_no_icmp_error_where_the_rfcs_forbid_one(packet: Packet) -> None:
    assert unreachable(bytes(packet), OWN) is None


PACKETS6 = [
    IPv6(src=HOST6, dst=FAR6) / UDP(sport=4, dport=5) / b"hello",
    IPv6(src=HOST6, dst=FAR6) / UDP(sport=4, dport=5) / bytes(1400),
    IPv6(src=HOST6, dst=FAR6, tc=0x10, fl=77, hlim=3) / TCP(sport=4, dport=80, flags="S"),
    IPv6(src=HOST6, dst=FAR6) / ICMPv6EchoRequest(data=b"ping"),
    IPv6(src=HOST6, dst=FAR6) / ICMPv6EchoReply(data=b"ping"),
    IPv6(src=HOST6, dst=FAR6) / IPv6ExtHdrFragment(m=1) / ICMPv6EchoRequest(data=bytes(16)),
    IPv6(src=HOST6, dst=FAR6) / IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(12))]) / IPv6ExtHdrDestOpt() / UDP(),
    IPv6(src=HOST6, dst=FAR6) / IPv6ExtHdrRouting() / ICMPv6EchoRequest(),
    IPv6(src=HOST6, dst=FAR6, nh=59),
    IPv6(src=HOST6, dst=FAR6, nh=132) / b"1",
    IPv6(src=HOST6, dst=FAR6, nh=51) / AH(nh=58, payloadlen=4, icv=bytes(12)) / ICMPv6EchoRequest(data=b"ping"),
]


@pytest.mark.parametrize("packet", PACKETS6, ids=lambda packet: packet.summary())
def test_the_sender_gets_a_right_icmpv6_error(packet: Packet) -> None:
    data = bytes(packet)
    answer = unreachable(data, OWN6)
    assert answer is not None
    quote = data[: 1280 - 48]
    # Scapy computes what is not given.
    again = IPv6(src=str(OWN6), dst=HOST6, nh=58) / ICMPv6DestUnreach(code=0) / Raw(quote)
    assert answer == bytes(again)


FORBIDDEN6 = [
    *(IPv6(src=HOST6, dst=FAR6, nh=58) / Raw(bytes([kind]) + bytes(40)) for kind in (1, 2, 3, 4, 100, 127)),
    IPv6(src=HOST6, dst=FAR6) / ICMPv6PacketTooBig() / bytes(40),
    IPv6(src=HOST6, dst=FAR6) / ICMPv6ND_Redirect(),
    IPv6(src=HOST6, dst=FAR6) / IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(12))]) / ICMPv6PacketTooBig(),
    IPv6(src=HOST6, dst=FAR6) / IPv6ExtHdrFragment(m=1) / ICMPv6PacketTooBig(),
    IPv6(src=HOST6, dst=FAR6) / IPv6ExtHdrFragment(offset=1, nh=17) / bytes(40),
    IPv6(src=HOST6, dst=FAR6, nh=51) / AH(nh=58, payloadlen=4, icv=bytes(12)) / ICMPv6PacketTooBig() / bytes(40),
    IPv6(src=HOST6, dst=FAR6, nh=51)
    / AH(nh=60, payloadlen=4, icv=bytes(12))
    / IPv6ExtHdrDestOpt(nh=58)
    / ICMPv6PacketTooBig(),
    IPv6(src=HOST6, dst=FAR6, nh=58),
    IPv6(src=HOST6, dst=FAR6, nh=0) / bytes([58, 200, 0, 0, 0, 0, 0, 0]),
    IPv6(src=HOST6, dst=FAR6, nh=0) / b"1234567",
    *(IPv6(src=HOST6, dst=far) / UDP() for far in ("ff02::1", "ff0e::1234")),
    *(IPv6(src=sender, dst=FAR6) / UDP() for sender in ("::", "::1", "ff02::1")),
]


@pytest.mark.parametrize("packet", FORBIDDEN6, ids=lambda packet: packet.summary())
def test_no_icmpv6_error_where_the_rfc_forbids_one(packet: Packet) -> None:
    assert unreachable(bytes(packet), OWN6) is None


@given(st.sampled_from([0, 43, 44, 51, 60, 6, 17, 58]), st.binary(max_size=100))
def test_whatever_ipv6_is_accepted_can_be_answered(following: int, rest: bytes) -> None:
    packet = bytes(IPv6(src=HOST6, dst=FAR6, nh=following) / Raw(rest))
    answer = unreachable(packet, OWN6)
    if answer is not None:
        assert answer[48:] == packet
        pseudo_header = (
            OWN6.packed + IPv6Address(HOST6).packed + (len(packet) + 8).to_bytes(4, "big") + bytes([0, 0, 0, 58])
        )
        assert checksum(pseudo_header + answer[40:]) == 0


@given(st.binary(max_size=100), st.integers(5, 15), st.sampled_from([0, 1, 6, 17, 51, 255]))
def test_whatever_is_accepted_can_be_answered(rest: bytes, words: int, protocol: int) -> None:
    packet = IP(src=HOST, dst=FAR, proto=protocol, options=[IPOption_NOP()] * (words - 5) * 4) / Raw(rest)
    answer = unreachable(bytes(packet), OWN)
    if answer is not None:
        assert len(answer) <= min(len(packet) + 28, 576)
        assert checksum(answer[:20]) == checksum(answer[20:]) == 0


@pytest.fixture(scope="module")
def native_device() -> Iterator[socket.socket]:
    """The device of a native engine that knows no peer."""
    with contextlib.ExitStack() as stack:
        tun, kernel = (stack.enter_context(each) for each in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        wire = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        wire.bind(("127.0.0.1", 0))
        for each in (tun, wire):
            each.setblocking(False)
        kernel.settimeout(20)
        own = Subnets(IPv4Network((OWN, 24)), IPv6Network((OWN6, 64)))
        engine = NativeEngine(tun.fileno(), [wire.fileno()], 1472, PeerTable(own))
        stack.callback(engine.close)
        thread = threading.Thread(target=engine.run)
        thread.start()
        stack.callback(thread.join, 20)
        stack.callback(engine.stop)
        yield kernel


@pytest.mark.parametrize("packet", [*PACKETS, *FORBIDDEN, *PACKETS6, *FORBIDDEN6], ids=lambda packet: packet.summary())
def test_the_native_engine_gives_the_same_answers(native_device: socket.socket, packet: Packet) -> None:
    last = bytes(IP(src=HOST, dst=FAR) / UDP() / b"the end of this example")
    for sent in (bytes(packet), last):
        native_device.send(sent)
    expected = [unreachable(sent, OWN if sent[0] >> 4 == 4 else OWN6) for sent in (bytes(packet), last)]
    assert [native_device.recv(65535) for answer in expected if answer is not None] == [a for a in expected if a]
