"""Packets read by overlaynet.testing.packets, with scapy as the oracle."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet, inet6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from overlaynet.testing.packets import (
    ETHERNET,
    ICMP,
    LOOPBACK,
    NO_LINK_HEADER,
    TCP,
    UDP,
    IPv4,
    IPv6,
    checksum,
    parse_frame,
    parse_ip,
)

PING = inet.IP(src="10.244.1.96", dst="10.244.2.194", ttl=63, id=4711, flags="DF", tos=0x10)
PING /= inet.ICMP(type=8, id=0x1234, seq=7) / Raw(bytes(range(56)))


def test_an_echo_request_is_read_as_scapy_wrote_it() -> None:
    data = bytes(PING)
    packet = parse_ip(data)
    oracle = inet.IP(data)
    assert packet.header == IPv4(
        source=IPv4Address("10.244.1.96"),
        destination=IPv4Address("10.244.2.194"),
        protocol=1,
        ttl=63,
        identification=4711,
        dont_fragment=True,
        more_fragments=False,
        fragment_offset=0,
        type_of_service=0x10,
        header_length=20,
        total_length=84,
        checksum=oracle.chksum,
    )
    assert packet.transport == ICMP(type=8, code=0, checksum=oracle[inet.ICMP].chksum, rest=0x12340007)
    assert (packet.transport.identifier, packet.transport.sequence) == (0x1234, 7)
    assert packet.payload == bytes(range(56))
    assert packet.data == data
    assert packet.inner is None


def test_a_datagram_of_the_overlay_has_the_inner_packet_and_28_bytes_more() -> None:
    outer = inet.IP(src="172.16.130.140", dst="172.16.130.164") / inet.UDP(sport=8285, dport=8285) / bytes(PING)
    packet = parse_ip(bytes(outer))
    assert isinstance(packet.transport, UDP)
    assert (packet.transport.source_port, packet.transport.destination_port) == (8285, 8285)
    assert packet.inner == parse_ip(bytes(PING))
    assert packet.header.total_length == 84 + 28
    assert packet.transport.length == 84 + 8


def test_another_datagram_has_no_inner_packet() -> None:
    outer = inet.IP(src="172.16.130.140", dst="172.16.130.164") / inet.UDP(sport=8285, dport=53) / bytes(PING)
    assert parse_ip(bytes(outer)).inner is None


def test_a_datagram_of_the_overlay_with_something_else_inside_is_told() -> None:
    outer = inet.IP(src="172.16.130.140", dst="172.16.130.164") / inet.UDP(sport=8285, dport=8285) / b"hello"
    packet = parse_ip(bytes(outer))
    with pytest.raises(ValueError, match="an IPv6 header"):
        _ = packet.inner


@pytest.mark.parametrize("flags", ["S", "SA", "A", "FA", "R", "PA", "FSRPAUEC"])
def test_a_tcp_segment_is_read_as_scapy_wrote_it(flags: str) -> None:
    written = inet.IP(src="10.244.1.96", dst="10.244.2.194", options=[]) / inet.TCP(
        sport=40000, dport=80, seq=1 << 31, ack=12345, flags=flags, window=501, options=[("MSS", 1432), ("NOP", None)]
    )
    data = bytes(written / Raw(b"GET /"))
    oracle = inet.IP(data)[inet.TCP]
    packet = parse_ip(data)
    assert packet.transport == TCP(
        source_port=40000,
        destination_port=80,
        sequence=1 << 31,
        acknowledgement=12345,
        flags=str(oracle.flags),
        window=501,
        header_length=oracle.dataofs * 4,
        checksum=oracle.chksum,
    )
    assert packet.payload == b"GET /"


def test_ipv6_is_read_as_scapy_wrote_it() -> None:
    written = inet6.IPv6(src="fd00::1", dst="fd00::2", hlim=5, tc=0xA5, fl=0x12345) / inet.UDP(sport=1, dport=2)
    packet = parse_ip(bytes(written / Raw(b"abc")))
    assert packet.header == IPv6(
        source=IPv6Address("fd00::1"),
        destination=IPv6Address("fd00::2"),
        protocol=17,
        ttl=5,
        more_fragments=False,
        fragment_offset=0,
        traffic_class=0xA5,
        flow_label=0x12345,
        header_length=40,
        total_length=51,
    )
    assert packet.payload == b"abc"


def test_ipv6_extension_headers_are_passed_over() -> None:
    written = (
        inet6.IPv6()
        / inet6.IPv6ExtHdrHopByHop(options=[inet6.RouterAlert()])
        / inet.UDP(sport=1, dport=2)
        / Raw(b"abc")
    )
    packet = parse_ip(bytes(written))
    assert (packet.header.protocol, packet.header.header_length) == (17, 48)
    assert isinstance(packet.transport, UDP)


def test_later_ipv6_fragments_have_no_transport_header() -> None:
    written = inet6.IPv6() / inet6.IPv6ExtHdrFragment(nh=17, offset=185, m=1, id=9) / Raw(b"x" * 16)
    packet = parse_ip(bytes(written))
    assert (packet.header.fragment_offset, packet.header.more_fragments) == (1480, True)
    assert (packet.transport, packet.payload) == (None, b"x" * 16)


def test_ipv4_fragments_are_told_apart() -> None:
    whole = inet.IP(id=1) / inet.UDP(sport=1, dport=2) / Raw(b"x" * 3000)
    parts = inet.fragment(whole, fragsize=1480)  # type: ignore[no-untyped-call]
    first, second, third = (parse_ip(bytes(part)) for part in parts)
    assert isinstance(first.transport, UDP)
    assert (first.header.fragment_offset, first.header.more_fragments) == (0, True)
    assert (second.header.fragment_offset, second.header.more_fragments) == (1480, True)
    assert (third.header.fragment_offset, third.header.more_fragments) == (2960, False)
    assert second.transport is None
    assert third.transport is None
    assert first.payload + second.payload + third.payload == b"x" * 3000


@pytest.mark.parametrize("hardware", [ETHERNET, LOOPBACK])
def test_the_link_header_comes_off_and_so_does_padding(hardware: int) -> None:
    frame = bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / PING) + bytes(10)
    link, packet = parse_frame(frame, hardware)
    assert link is not None
    assert (link.source, link.destination, link.protocol) == ("02:00:00:00:00:01", "02:00:00:00:00:02", 0x0800)
    assert packet == parse_ip(bytes(PING))


def test_tun_devices_have_no_link_header() -> None:
    assert parse_frame(bytes(PING), NO_LINK_HEADER) == (None, parse_ip(bytes(PING)))


def test_what_is_not_ip_is_no_ip_packet() -> None:
    link, packet = parse_frame(bytes(Ether() / ARP()), ETHERNET)
    assert link is not None
    assert (link.protocol, packet) == (0x0806, None)


def test_unknown_link_headers_are_refused() -> None:
    with pytest.raises(ValueError, match="type 32"):
        parse_frame(bytes(PING), 32)


def damaged(**fields: Any) -> bytes:
    packet = PING.copy()
    for name, value in fields.items():
        setattr(packet, name, value)
    return bytes(packet)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an IP header"),
        (b"\x45" + bytes(18), "an IPv4 header that needs 20 bytes and has 19"),
        (damaged(version=5), "version 5"),
        (damaged(ihl=4), "an IPv4 header of 16 bytes"),
        (damaged(ihl=6, len=20), "an IPv4 packet of 20 bytes with a header of 24"),
        (bytes(PING)[:-1], "an IPv4 packet that needs 84 bytes and has 83"),
        (damaged(chksum=1), "checksum is wrong"),
        (bytes(inet.IP(proto=17) / Raw(b"1234567")), "a UDP header"),
        (bytes(inet.IP() / inet.UDP(len=7)), "a UDP datagram of 7 bytes"),
        (bytes(inet.IP() / inet.UDP(len=9)), "a UDP datagram that needs 9 bytes and has 8"),
        (bytes(inet.IP(proto=6) / Raw(bytes(19))), "a TCP header"),
        (bytes(inet.IP() / inet.TCP(dataofs=4)), "a TCP header of 16 bytes"),
        (bytes(inet.IP() / inet.TCP(dataofs=6)), "a TCP header that needs 24 bytes and has 20"),
        (bytes(inet.IP(proto=1) / Raw(bytes(7))), "an ICMP header"),
        (bytes(inet6.IPv6() / inet.UDP())[:39], "an IPv6 header"),
        (bytes(inet6.IPv6(plen=9) / inet.UDP()), "an IPv6 packet that needs 49 bytes and has 48"),
        (bytes(inet6.IPv6(nh=0) / Raw(b"\x11\x01" + bytes(6))), "an IPv6 extension header"),
    ],
)
def test_damaged_packets_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_ip(data)


@given(st.binary(max_size=200), st.sampled_from([ETHERNET, NO_LINK_HEADER]))
def test_no_input_does_worse_than_being_refused(data: bytes, hardware: int) -> None:
    try:
        link, packet = parse_frame(data, hardware)
    except ValueError:
        return
    assert (link is None) == (hardware == NO_LINK_HEADER)
    if packet is not None:
        assert packet.data in data


@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255))
def test_no_change_of_one_byte_does_worse_than_being_refused(payload: bytes, place: int, value: int) -> None:
    inner = bytes(inet6.IPv6() / inet6.IPv6ExtHdrHopByHop() / inet.TCP() / Raw(payload))
    data = bytearray(bytes(inet.IP() / inet.UDP(sport=8285, dport=8285) / inner))
    data[place % len(data)] = value
    try:
        packet = parse_ip(bytes(data))
        assert packet.inner is None or packet.inner.data in bytes(data)
    except ValueError:
        pass


@given(st.binary(max_size=64))
def test_the_checksum_is_that_of_scapy(data: bytes) -> None:
    from scapy.utils import checksum as oracle  # noqa: PLC0415

    assert checksum(data) == oracle(data)
