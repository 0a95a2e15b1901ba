"""Reading IPv4 packets and answering them by ICMP, with scapy as the second opinion."""

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_Timestamp
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from overlaynet.backends.udp.engine import Drop
from overlaynet.backends.udp.packets import Refused, addresses, checksum, unreachable

HOST, FAR, OWN = "10.244.1.96", "10.244.2.194", IPv4Address("10.244.1.0")


def refusal(packet: bytes) -> Drop | None:
    try:
        addresses(packet, len(packet))
    except Refused as refused:
        return refused.reason
    return None


@given(st.ip_addresses(v=4), st.ip_addresses(v=4), st.binary(max_size=2000), st.integers(0, 40))
def test_whole_packets_are_read(source: IPv4Address, destination: IPv4Address, payload: bytes, options: int) -> None:
    packet = bytes(IP(src=str(source), dst=str(destination), options=[IPOption_NOP()] * options) / Raw(payload))
    assert addresses(packet, len(packet)) == (int(source), int(destination))
    # The packet may lie in a larger buffer, with the rest of an earlier one behind it.
    buffer = bytearray(packet + b"\xff" * 100)
    assert addresses(buffer, len(packet)) == (int(source), int(destination))


@given(
    st.one_of(
        st.binary(max_size=100),
        st.builds(
            lambda first, length, rest: bytes([first, 0]) + length.to_bytes(2, "big") + rest,
            st.sampled_from([0x44, 0x45, 0x46, 0x4F, 0x40, 0x55, 0x60]),
            st.integers(0, 70),
            st.binary(max_size=66),
        ),
    )
)
def test_no_bytes_but_one_whole_packet_are_accepted(data: bytes) -> None:
    header = IP(data[:20]) if len(data) >= 20 else None
    whole = (
        header is not None
        and header.version == 4
        and header.ihl >= 5
        and header.ihl * 4 <= header.len
        and header.len == len(data)
    )
    assert (refusal(data) is None) == whole
    if whole and header is not None:
        assert addresses(data, len(data)) == (int(IPv4Address(header.src)), int(IPv4Address(header.dst)))


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"", Drop.MALFORMED),
        (bytes(19), Drop.MALFORMED),
        (bytes(20), Drop.MALFORMED),
        (bytes(IP(src=HOST, dst=FAR) / b"12")[:-1], Drop.MALFORMED),
        (bytes(IP(src=HOST, dst=FAR) / b"12") + b"3", Drop.MALFORMED),
        (bytes(IP(src=HOST, dst=FAR, ihl=4)), Drop.MALFORMED),
        (bytes(IP(src=HOST, dst=FAR, ihl=6)), Drop.MALFORMED),
        (bytes(IP(src=HOST, dst=FAR, len=19)), Drop.MALFORMED),
        (bytes(IP(src=HOST, dst=FAR, version=5)), Drop.MALFORMED),
        (bytes(IPv6(src="fd00::1", dst="fd00::2") / UDP()), Drop.UNSUPPORTED),
        (bytes(IP(src=HOST, dst=FAR)), None),
        (bytes(IP(src=HOST, dst=FAR, ttl=0, chksum=0) / UDP()), None),
    ],
)
def test_packets_are_refused_for_a_reason(packet: bytes, reason: Drop | None) -> None:
    assert refusal(packet) == reason


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
]


@pytest.mark.parametrize("packet", FORBIDDEN, ids=lambda packet: packet.summary())
def test_no_icmp_error_where_the_rfcs_forbid_one(packet: Packet) -> None:
    assert unreachable(bytes(packet), OWN) is None


@given(st.binary(max_size=100), st.integers(5, 15), st.sampled_from([0, 1, 6, 17, 255]))
def test_whatever_is_accepted_can_be_answered(rest: bytes, words: int, protocol: int) -> None:
    packet = IP(src=HOST, dst=FAR, proto=protocol, options=[IPOption_NOP()] * (words - 5) * 4) / Raw(rest)
    answer = unreachable(bytes(packet), OWN)
    if answer is not None:
        assert len(answer) <= min(len(packet) + 28, 576)
        assert checksum(answer[:20]) == checksum(answer[20:]) == 0
