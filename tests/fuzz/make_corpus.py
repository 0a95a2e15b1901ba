"""Write the seeds of the fuzzers' corpora, from packets that scapy makes: ``python tests/fuzz/make_corpus.py``.

The rest of each corpus is what ``make fuzz`` has found.
"""

import struct
from pathlib import Path
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.packet import Packet, Raw

# As in fuzz_packets.c:
BOTH = b"\x03"
COMPLETE, CUT, PARTIAL, LARGE, BEGINNING = 1, 8, 16, 128, 100
TCP4, TCP6, UDP_RUN, ECN = 1, 4, 5, 0x80
# As in fuzz_receive.c:
EVERYTHING = 1 | 2 | 4 | 8 | 16
GRO, SENDER6 = 64, 8

EXTENSIONS = IPv6ExtHdrHopByHop() / IPv6ExtHdrRouting(addresses=["fd00:9::9"]) / IPv6ExtHdrDestOpt()
SOURCE_ROUTE = b"\x83\x07\x04\x0a\xf4\x01\x02\x00"


def ips(number: int) -> list[Packet]:
    return [IP(src="10.244.2.1", dst="10.244.1.1", id=number, flags="DF"), IPv6(src="fd00:2::1", dst="fd00:1::1")]


def entry(packet: Packet, flags: int = COMPLETE, kind: int = 0, size: int = 0) -> bytes:
    data = bytes(packet)
    given = data[:BEGINNING] if flags & LARGE else data
    return struct.pack("!BH", flags, len(data)) + struct.pack("=BBHHHH", 0, kind, 0, size, 0, 0) + given


def stream(version: int, count: int, size: int, **fields: Any) -> list[Packet]:
    made = []
    for number in range(count):
        given: dict[str, Any] = {"sport": 1, "dport": 2, "seq": number * size, "flags": "A"} | fields
        made.append(ips(number)[version] / TCP(**given) / Raw(bytes(size)))
    return made


def datagrams(version: int, count: int, size: int) -> list[Packet]:
    return [ips(number)[version] / UDP(sport=1, dport=2) / Raw(bytes(size)) for number in range(count)]


def runs() -> dict[str, list[Packet]]:
    times = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]
    return {
        "tcp4": stream(0, 5, 40),
        "tcp6-timestamps": stream(1, 5, 41, options=times),
        "udp4": datagrams(0, 5, 33),
        "udp6": datagrams(1, 5, 12),
        "mixed": [*stream(0, 2, 20), ips(2)[0] / ICMP() / Raw(b"ping"), *stream(1, 2, 20, flags="PA")],
        "options": [IP(src="10.244.2.1", dst="10.244.1.1", options=[b"\x94\x04\x00\x00"]) / UDP() / Raw(b"x")],
        "cut-short": [IPv6(src="fd00:2::1", dst="fd00:1::1", nh=44) / Raw(b"\x3a\x00")],
        "authenticated": [
            ips(7)[1] / AH(nh=58, payloadlen=4, icv=bytes(12)) / ICMPv6EchoRequest(),
            ips(7)[0] / AH(nh=1, payloadlen=4, icv=bytes(12)) / ICMP(),
        ],
        "fragments": [
            IP(src="10.244.2.1", dst="10.244.1.1", flags="MF") / UDP() / Raw(bytes(32)),
            IPv6(src="fd00:2::1", dst="fd00:1::1") / IPv6ExtHdrFragment() / ICMPv6EchoRequest(),
        ],
    }


def packets() -> dict[str, bytes]:
    times = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]
    cut = CUT | COMPLETE | PARTIAL
    four, six = ips(7)
    entries = {name: b"".join(map(entry, run)) for name, run in runs().items()} | {
        "tso4": entry(four / TCP(flags="FPA", options=times) / Raw(bytes(301)), cut, TCP4, 100),
        "tso6": entry(six / TCP(flags="PAC") / Raw(bytes(301)), cut, TCP6 | ECN, 100),
        "uso4": entry(four / UDP() / Raw(bytes(301)), cut, UDP_RUN, 100),
        "uso6": entry(six / UDP() / Raw(bytes(301)), cut, UDP_RUN, 100),
        "tso6-extensions": entry(six / EXTENSIONS / TCP(flags="PA") / Raw(bytes(301)), cut, TCP6, 100),
        "uso6-extensions": entry(six / IPv6ExtHdrDestOpt() / UDP() / Raw(bytes(301)), cut, UDP_RUN, 100),
        "tso4-source-routed": entry(
            IP(src="10.244.2.1", dst="10.244.1.1", options=[SOURCE_ROUTE]) / TCP() / Raw(bytes(301)), cut, TCP4, 100
        ),
        "tso4-large": entry(four / TCP(flags="A") / Raw(bytes(65535 - 40)), cut | LARGE, TCP4, 1400),
        # The last packet does not fit beside the others.
        "tso4-full": entry(four / TCP(flags="A", seq=0) / Raw(bytes(46 * 1400)), cut | LARGE, TCP4, 1400)
        + entry(ips(7 + 46)[0] / TCP(flags="A", seq=46 * 1400) / Raw(bytes(1400)), COMPLETE | LARGE),
        "uso6-large": entry(six / UDP() / Raw(bytes(65535 - 48)), cut | LARGE, UDP_RUN, 1200),
        "checksums": b"".join(
            entry(each, cut)
            for each in (four / UDP() / Raw(b"odd"), six / UDP() / Raw(b"odd"), six / TCP() / Raw(b"odd"))
        ),
    }
    return {name: BOTH + content for name, content in entries.items()}


def datagram(data: bytes, segment: int = 0, flags: int = COMPLETE) -> bytes:
    return struct.pack("!BHH", flags | (GRO if segment else 0), len(data), segment) + data


def received() -> dict[str, bytes]:
    # Our subnets of 1; a peer with those of 2, behind an IPv4 address; and one with those of 3, behind an IPv6 address.
    table = bytes([4, 1, 4, 1, *(0, 4, 2, 4, 2), *(SENDER6, 4, 3, 4, 3), *(16, 0, 0, 0, 0)])
    made = {}
    for name, run in runs().items():
        for number, refused in enumerate(("", "-refused", "-no-room", "-all-refused")):
            head = bytes([EVERYTHING, (1 << number) >> 1]) + table
            made[name + refused] = head + b"".join(datagram(bytes(packet)) for packet in run)
            made[f"{name}-run{refused}"] = head + datagram(b"".join(map(bytes, run)), len(run[0]))
    made["spoofed"] = bytes([EVERYTHING, 0]) + table + datagram(bytes(ips(0)[0] / UDP()), flags=COMPLETE | SENDER6)
    return made


def main() -> None:
    for target, seeds in {"packets": packets(), "receive": received()}.items():
        corpus = Path(__file__).parent / "corpus" / target
        corpus.mkdir(parents=True, exist_ok=True)
        for name, content in seeds.items():
            (corpus / name).write_bytes(content)


if __name__ == "__main__":
    main()
