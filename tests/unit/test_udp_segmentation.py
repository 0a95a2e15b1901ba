"""Segmentation and coalescing, with scapy as the independent judge of headers and checksums."""

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_LSRR, IPOption_NOP, IPOption_RR, IPOption_SSRR, IPOption_Timestamp
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.packet import Packet, Raw

from overlaynet.backends.udp._native import coalesce, segment
from overlaynet.backends.udp.engine import Drop
from tests.unit.flows import in_order

NEEDS_CHECKSUM = 1
NONE, TCP4, TCP6, USO, ECN = 0, 1, 4, 5, 0x80
OPTIONS: tuple[list[Any], ...] = (
    [],
    [("Timestamp", (7, 9)), ("NOP", None), ("NOP", None)],
    [("NOP", None), ("NOP", None), ("SAck", (1, 2))],
)


def header(kind: int = NONE, size: int = 0, *, flags: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return struct.pack("=BBHHHH", flags, kind, 0, size, start, offset)


def handed_out(whole: bytes, kind: int, size: int) -> bytes:
    """A packet that is to be cut, as a TUN device hands it out: where the checksum belongs there is the sum of the
    pseudo-header that it begins with, and the header of virtio tells the place (Linux, skb_checksum_start_offset)."""
    layer = UDP if kind == USO else TCP
    transport = transport_of(whole)
    at = transport + (6 if layer is UDP else 16)
    rest = whole[transport:at] + bytes(2) + whole[at + 2 :]
    # All that the right checksum makes up for, but the part after the pseudo-header.
    partial = folded(~int.from_bytes(whole[at : at + 2], "big") & 0xFFFF, ~folded(*words(rest)) & 0xFFFF)
    with_partial = whole[:at] + partial.to_bytes(2, "big") + whole[at + 2 :]
    return header(kind, size, flags=NEEDS_CHECKSUM, start=transport, offset=at - transport) + with_partial


def transport_of(packet: bytes) -> int:
    """The offset of the transport header, by scapy."""
    read = IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)
    layer = read[TCP] if TCP in read else read[UDP]
    return len(packet) - len(bytes(layer))


def words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2))


def folded(*numbers: int) -> int:
    total = sum(numbers)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def built(packet: Packet) -> bytes:
    """A packet with its checksums, which scapy computes."""
    return bytes(packet.__class__(bytes(packet)))


def verified(packet: bytes) -> Packet:
    """The packet as scapy reads it, once scapy has found every length and checksum right."""
    read = IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)
    again = read.copy()
    for layer in (IP, IPv6, TCP, UDP):
        if layer in again:
            for name in ("len", "plen", "chksum"):
                if name in again[layer].fields:
                    del again[layer].fields[name]
    assert bytes(again) == packet
    return read


def ip(version: int, **fields: Any) -> Packet:
    if version == 6:
        return IPv6(src="fd00:1::1", dst="fd00:2::2", hlim=fields.get("ttl", 64), tc=fields.get("tos", 0))
    return IP(src="10.244.1.96", dst="10.244.2.194", **fields)


VERSIONS = st.sampled_from([4, 6])
# What can stand between the addresses and the transport: options of IPv4, extension headers of IPv6. With source routing, the
# checksum is over the last destination, which is not the one in the header (RFC 8200 section 8.1).
IP_OPTIONS: tuple[list[Packet], ...] = (
    [],
    [IPOption_NOP()] * 4,
    [IPOption_Timestamp()],
    [IPOption_RR(routers=["0.0.0.0"] * 9), IPOption_NOP()],
    [IPOption_LSRR(routers=["10.244.9.1", "10.244.9.2"]), IPOption_NOP()],
    [IPOption_SSRR(routers=["10.244.9.1"]), IPOption_NOP()],
)
EXTENSIONS: tuple[Packet | None, ...] = (
    None,
    IPv6ExtHdrDestOpt(),
    IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(12))]),
    IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(250))]),
    IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(addresses=["fd00:9::9"]) / IPv6ExtHdrDestOpt(),
    IPv6ExtHdrRouting(addresses=["fd00:9::9", "fd00:9::8"]),
    IPv6ExtHdrRouting(),
)


def ip_with(version: int, between: int, **fields: Any) -> Packet:
    """An IP header with some of these options or extension headers."""
    if version == 4:
        return ip(4, options=IP_OPTIONS[between % len(IP_OPTIONS)], **fields)
    extension = EXTENSIONS[between % len(EXTENSIONS)]
    return ip(6, **fields) if extension is None else ip(6, **fields) / extension


PAYLOADS = st.integers(1, 9000).flatmap(
    lambda size: st.binary(min_size=min(size, 64), max_size=64).map(
        lambda seed: (seed * (size // len(seed) + 1))[:size]
    )
)


@settings(max_examples=150, deadline=None)
@given(
    version=VERSIONS,
    payload=PAYLOADS,
    size=st.integers(100, 1448),
    sequence=st.integers(0, 2**32 - 1),
    identification=st.integers(0, 2**16 - 1),
    flags=st.sampled_from(["A", "PA", "FA", "FPA", "EA", "PEA"]),
    options=st.sampled_from(OPTIONS),
    tos=st.integers(0, 255),
    between=st.integers(0, 6),
)
def test_tcp_is_cut_as_the_sender_would_and_put_together_again(  # noqa: PLR0917
    version: int,
    payload: bytes,
    size: int,
    sequence: int,
    identification: int,
    flags: str,
    options: list[Any],
    tos: int,
    between: int,
) -> None:
    tcp = TCP(sport=5201, dport=40000, seq=sequence, ack=77, flags=flags, window=501, options=options)
    first = ip_with(version, between, id=identification, tos=tos, flags="DF", ttl=63)
    whole = built(first / tcp / Raw(payload))
    packets = segment(handed_out(whole, TCP4 if version == 4 else TCP6, size))
    assert isinstance(packets, list)
    read = [verified(packet) for packet in packets]
    assert b"".join(bytes(each[TCP].payload) for each in read) == payload
    assert all(len(each[TCP].payload) == size for each in read[:-1])
    expected = sequence
    for number, each in enumerate(read):
        assert each[TCP].seq == expected
        expected = (expected + len(each[TCP].payload)) % 2**32
        last = number == len(read) - 1
        assert set(str(each[TCP].flags)) == (set(flags) if last else set(flags) - set("PF"))
        assert (each[TCP].ack, each[TCP].window, each[TCP].options) == (77, 501, tcp.options)
        if version == 4:
            assert (each.id, each.tos, each.ttl) == ((identification + number) % 2**16, tos, 63)
            assert each.flags == "DF"
            assert each.options == IP(whole).options
        else:
            assert bytes(each)[40 : transport_of(bytes(each))] == whole[40 : transport_of(whole)]
    again = coalesce(packets)
    if transport_of(whole) != (20 if version == 4 else 40):
        assert again == [bytes(10) + packet for packet in packets]
        return
    assert len(again) == 1
    (run,) = again
    assert without_transport_checksum(run[10:]) == without_transport_checksum(whole)
    if len(packets) > 1:
        assert segment(run) == packets
        assert run[1] == (TCP4 if version == 4 else TCP6)
        assert struct.unpack("=HHH", run[4:10]) == (size, 20 if version == 4 else 40, 16)


@settings(max_examples=150, deadline=None)
@given(
    version=VERSIONS,
    payload=PAYLOADS,
    size=st.integers(142, 1472),
    identification=st.integers(0, 2**16 - 1),
    between=st.integers(0, 6),
)
def test_udp_is_cut_into_datagrams_and_put_together_again(
    version: int, payload: bytes, size: int, identification: int, between: int
) -> None:
    first = ip_with(version, between, id=identification, ttl=63)
    whole = built(first / UDP(sport=1, dport=2) / Raw(payload))
    packets = segment(handed_out(whole, USO, size))
    assert isinstance(packets, list)
    read = [verified(packet) for packet in packets]
    assert b"".join(bytes(each[UDP].payload) for each in read) == payload
    assert all(each[UDP].chksum != 0 for each in read)
    again = coalesce(packets)
    if transport_of(whole) != (20 if version == 4 else 40):
        assert again == [bytes(10) + packet for packet in packets]
        return
    assert len(again) == 1
    assert without_transport_checksum(again[0][10:]) == without_transport_checksum(whole)
    if len(packets) > 1:
        assert segment(again[0]) == packets


def without_transport_checksum(packet: bytes) -> bytes:
    length = (packet[0] & 15) * 4 if packet[0] >> 4 == 4 else 40
    at = length + (16 if packet[9 if packet[0] >> 4 == 4 else 6] == 6 else 6)
    return packet[:at] + bytes(2) + packet[at + 2 :]


PACKETS = st.builds(
    lambda version, kind, port, sequence, size, flags, number, broken: damaged(
        built(
            ip(version, id=number, flags="DF")
            / (
                TCP(sport=port, dport=2, seq=sequence * 10, ack=1, flags=flags)
                if kind == "tcp"
                else UDP(sport=port, dport=2)
            )
            / Raw(bytes(range(size)))
        ),
        broken,
    ),
    VERSIONS,
    st.sampled_from(["tcp", "udp"]),
    st.integers(1, 3),
    st.integers(0, 6),
    st.sampled_from([0, 5, 10, 10, 10, 11]),
    st.sampled_from(["A", "A", "A", "A", "PA", "FA", "SA", "RA", "UA", "CA", "EA"]),
    st.integers(0, 5),
    st.sampled_from([None] * 12 + [1, 8, 10, 22, 40, 45, 62]),
)


def damaged(packet: bytes, at: int | None) -> bytes:
    if at is None or at >= len(packet) or at in (0, 2, 3, 4, 5):
        return packet
    return packet[:at] + bytes([packet[at] ^ 0x55]) + packet[at + 1 :]


WITHOUT_PORTS = st.builds(
    lambda version, kind, number: bytes(
        {
            (4, "fragment"): ip(4, id=number, flags="MF") / UDP(sport=1, dport=2) / Raw(bytes(8)),
            (4, "last"): ip(4, id=number, frag=2, proto=17) / Raw(bytes(10)),
            (4, "other"): ip(4, id=number, proto=50) / Raw(bytes(20)),
            (6, "fragment"): ip(6) / IPv6ExtHdrFragment(id=number, m=1) / UDP(sport=1, dport=2) / Raw(bytes(8)),
            (6, "last"): ip(6) / IPv6ExtHdrDestOpt() / TCP(sport=1, dport=2, seq=number, flags="A") / Raw(bytes(10)),
            (6, "other"): ip(6) / IPv6ExtHdrDestOpt(nh=59) / Raw(bytes([number])),
        }[version, kind]
    ),
    VERSIONS,
    st.sampled_from(["fragment", "last", "other"]),
    st.integers(0, 5),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(PACKETS, PACKETS, PACKETS, WITHOUT_PORTS), max_size=40))
def test_whatever_comes_each_flow_comes_out_as_it_went_in(packets: list[bytes]) -> None:
    out: list[bytes] = []
    for run in coalesce(packets):
        if run[1] == NONE:
            assert run[:10] == bytes(10)
            out.append(run[10:])
        else:
            cut = segment(run)
            assert isinstance(cut, list)
            assert len(cut) > 1
            for each in cut:
                verified(each)
            out += cut
    assert len(out) == len(packets)
    assert in_order(map(same_identification, out)) == in_order(map(same_identification, packets))


def same_identification(packet: bytes) -> bytes:
    """With "don't fragment" the identification means nothing, and may change (RFC 6864)."""
    if packet[0] >> 4 == 6 or not packet[6] & 0x40 or len(packet) < 20:
        return packet
    return packet[:4] + bytes(2) + packet[6:10] + bytes(2) + packet[12:]


def data(number: int, *, port: int = 1, size: int = 100, **fields: Any) -> bytes:
    given: dict[str, Any] = {"sport": port, "dport": 2, "seq": number * size, "flags": "A"} | fields
    tcp = TCP(**given)
    return built(IP(src="10.244.1.1", dst="10.244.2.1", id=number, flags="DF") / tcp / Raw(bytes(size)))


def test_streams_are_put_together_side_by_side() -> None:
    runs = coalesce([data(number, port=port) for number in range(20) for port in (1, 2, 3, 4)])
    assert [len(run) for run in runs] == [10 + 40 + 20 * 100] * 4


def test_an_acknowledgement_does_not_wait_for_the_data_of_others() -> None:
    acknowledgement = built(IP(src="10.244.1.1", dst="10.244.2.1") / TCP(sport=9, dport=9, flags="A"))
    assert coalesce([data(0), acknowledgement, data(1)])[0] == bytes(10) + acknowledgement


@pytest.mark.parametrize("version", [4, 6])
def test_what_may_be_of_the_same_flow_does_not_pass_it(version: int) -> None:
    """A fragment, or a packet with extension headers, waits for no run, and overtakes none between the same addresses."""
    later = (
        ip(4, flags="MF") / UDP(sport=1, dport=2) / Raw(bytes(64))
        if version == 4
        else ip(6) / IPv6ExtHdrDestOpt() / UDP(sport=1, dport=2) / Raw(bytes(64))
    )
    flow = [built(ip(version, id=number) / UDP(sport=1, dport=2) / Raw(bytes([number]) * 64)) for number in range(3)]
    other = data(0)
    runs = coalesce([other, flow[0], flow[1], bytes(later), flow[2]])
    assert segment(runs[0]) == flow[:2]
    assert runs[1:] == [bytes(10) + packet for packet in (bytes(later), other, flow[2])]


@pytest.mark.parametrize(
    "second",
    [
        data(2),
        data(1, ack=5),
        data(1, window=9),
        data(1, flags="EA"),
        data(1, flags="CA"),
        data(1, options=[("Timestamp", (1, 2))]),
        data(1, size=101),
        damaged(data(1), 8),
        damaged(data(1), 99),
    ],
)
def test_what_does_not_continue_the_run_is_not_put_to_it(second: bytes) -> None:
    assert coalesce([data(0), second]) == [bytes(10) + data(0), bytes(10) + second]


def test_cwr_belongs_to_the_first_segment_alone() -> None:
    packets = segment(header(TCP4 | ECN, 100) + data(0, size=250, flags="CA"))
    assert isinstance(packets, list)
    assert [str(verified(packet)[TCP].flags) for packet in packets] == ["AC", "A", "A"]


@pytest.mark.parametrize("make", [TCP, UDP])
def test_a_checksum_is_completed(make: Callable[..., Packet]) -> None:
    whole = built(IP(src="10.0.0.1", dst="10.0.0.2") / make(sport=1, dport=2) / Raw(b"odd"))
    at = 36 if make is TCP else 26
    pseudo = whole[12:20] + struct.pack("!HH", whole[9], len(whole) - 20)
    total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
    partial = whole[:at] + struct.pack("!H", (total & 0xFFFF) + (total >> 16)) + whole[at + 2 :]
    assert segment(header(flags=NEEDS_CHECKSUM, start=20, offset=at - 20) + partial) == [whole]


@pytest.mark.parametrize(
    "outer",
    [
        IP(src="10.0.0.1", dst="10.0.0.2") / IP(src="10.9.0.1", dst="10.9.0.2"),
        IP(src="10.0.0.1", dst="10.0.0.2") / IPv6(src="fd00:9::1", dst="fd00:9::2"),
        IPv6(src="fd00:1::1", dst="fd00:2::2") / IPv6ExtHdrDestOpt(),
        IPv6(src="fd00:1::1", dst="fd00:2::2"),
    ],
    ids=lambda packet: str(packet.summary()),
)
def test_a_completed_checksum_of_zero_is_written_as_its_other_form(outer: Packet) -> None:
    """Zero would say that there is none, wherever in the packet UDP hides; so does the kernel (skb_checksum_help)."""
    plain = built(outer / UDP(sport=1, dport=2) / Raw(bytes(2)))
    # The payload makes up for all that is summed up else.
    whole = built(outer / UDP(sport=1, dport=2) / Raw(plain[-4:-2]))
    assert whole[-4:-2] == b"\xff\xff"
    at = len(whole) - 4
    partial = folded(~folded(*words(whole[at - 6 : at] + bytes(2) + whole[-2:])) & 0xFFFF)
    given_by_device = whole[:at] + partial.to_bytes(2, "big") + whole[-2:]
    assert segment(header(flags=NEEDS_CHECKSUM, start=at - 6, offset=6) + given_by_device) == [whole]


def test_headers_may_be_as_long_as_they_can_be() -> None:
    longest = [PadN(optdata=bytes(254))] * 7 + [PadN(optdata=bytes(252))]
    extensions = (
        IPv6ExtHdrHopByHop(options=longest)
        / IPv6ExtHdrDestOpt(options=longest)
        / IPv6ExtHdrRouting(addresses=["fd00:9::9"] * 127)
        / IPv6ExtHdrDestOpt(options=longest)
    )
    tcp = TCP(sport=1, dport=2, options=[("NOP", None)] * 40)
    whole = built(ip(6) / extensions / tcp / Raw(bytes(250)))
    assert len(whole) == 40 + 4 * 2048 - 8 + 60 + 250
    packets = segment(handed_out(whole, TCP6, 100))
    assert isinstance(packets, list)
    assert b"".join(bytes(verified(packet)[TCP].payload) for packet in packets) == bytes(250)


SIX = built(ip(6) / IPv6ExtHdrDestOpt() / TCP(sport=1, dport=2) / Raw(bytes(100)))
SIX_OF_FRAGMENTS = bytes(ip(6) / IPv6ExtHdrFragment() / TCP(sport=1, dport=2) / Raw(bytes(100)))


@pytest.mark.parametrize(
    ("given_by_device", "reason"),
    [
        (b"", Drop.MALFORMED),
        (header(), Drop.MALFORMED),
        (header(flags=NEEDS_CHECKSUM, start=139, offset=1) + data(0), Drop.MALFORMED),
        (header(flags=NEEDS_CHECKSUM, start=65535, offset=65535) + data(0), Drop.MALFORMED),
        (header(TCP4, 0) + data(0), Drop.MALFORMED),
        (header(USO, 10) + data(0), Drop.MALFORMED),
        (header(3, 10) + data(0), Drop.UNSUPPORTED),
        (header(TCP4, 10) + data(0, size=5)[:32] + b"\xf0" + data(0, size=5)[33:], Drop.MALFORMED),
        (header(TCP4, 10, flags=NEEDS_CHECKSUM, start=24, offset=16) + data(0), Drop.MALFORMED),
        (header(TCP6, 10, flags=NEEDS_CHECKSUM, start=40, offset=16) + SIX, Drop.MALFORMED),
        (header(TCP6, 10, flags=NEEDS_CHECKSUM, start=48, offset=16) + SIX[:60], Drop.MALFORMED),
        (header(TCP6, 10) + SIX_OF_FRAGMENTS, Drop.MALFORMED),
    ],
)
def test_what_makes_no_sense_is_refused(given_by_device: bytes, reason: Drop) -> None:
    assert segment(given_by_device) == reason
