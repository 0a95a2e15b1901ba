"""Write the seeds of the fuzzer's corpus, from packets that scapy makes: ``python tests/fuzz/make_corpus.py``."""

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

FIX, CUT = 1, 8
EXTENSIONS = IPv6ExtHdrHopByHop() / IPv6ExtHdrRouting(addresses=["fd00:9::9"]) / IPv6ExtHdrDestOpt()


def entry(packet: Packet, flags: int = FIX, kind: int = 0, size: int = 0, start: int = 0) -> bytes:
    """With ``start``, the packet's checksum is to be completed from there, as TUN devices ask for it."""
    data = bytes(packet)
    offload = struct.pack("=BBHHHH", 1 if start else 0, kind, 0, size, start, 16 if start else 0)
    return struct.pack("!BH", flags, len(data)) + offload + data


def ips(number: int) -> list[Packet]:
    return [IP(src="10.244.2.1", dst="10.244.1.1", id=number, flags="DF"), IPv6(src="fd00:2::1", dst="fd00:1::1")]


def stream(version: int, count: int, size: int, **fields: Any) -> bytes:
    made = b""
    for number in range(count):
        given: dict[str, Any] = {"sport": 1, "dport": 2, "seq": number * size, "flags": "A"} | fields
        tcp = TCP(**given)
        made += entry(ips(number)[version] / tcp / Raw(bytes(size)))
    return made


def main() -> None:
    times = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]
    seeds = {
        "tcp4": stream(0, 5, 40),
        "tcp6-timestamps": stream(1, 5, 41, options=times),
        "udp4": b"".join(entry(ips(number)[0] / UDP(sport=1, dport=2) / Raw(bytes(33))) for number in range(5)),
        "udp6": b"".join(entry(ips(number)[1] / UDP(sport=1, dport=2) / Raw(bytes(12))) for number in range(5)),
        "tso4": entry(ips(7)[0] / TCP(flags="FPA", options=times) / Raw(bytes(301)), CUT | FIX, 1, 100),
        "tso6": entry(ips(7)[1] / TCP(flags="PAC") / Raw(bytes(301)), CUT | FIX, 0x84, 100),
        "uso4": entry(ips(7)[0] / UDP() / Raw(bytes(301)), CUT | FIX, 5, 100),
        "uso6": entry(ips(7)[1] / UDP() / Raw(bytes(301)), CUT | FIX, 5, 100),
        "tso6-extensions": entry(ips(7)[1] / EXTENSIONS / TCP(flags="PA") / Raw(bytes(301)), CUT | FIX, 4, 100, 80),
        "uso6-extensions": entry(ips(7)[1] / IPv6ExtHdrDestOpt() / UDP() / Raw(bytes(301)), CUT | FIX, 5, 100, 48),
        "tso4-source-routed": entry(
            IP(src="10.244.2.1", dst="10.244.1.1", options=[b"\x83\x07\x04\x0a\xf4\x01\x02\x00"])
            / TCP()
            / Raw(bytes(301)),
            CUT | FIX,
            1,
            100,
            28,
        ),
        "authenticated": entry(ips(7)[1] / AH(nh=58, payloadlen=4, icv=bytes(12)) / ICMPv6EchoRequest())
        + entry(ips(7)[0] / AH(nh=1, payloadlen=4, icv=bytes(12)) / ICMP()),
        "mixed": stream(0, 2, 20) + entry(ips(2)[0] / ICMP() / Raw(b"ping")) + stream(1, 2, 20, flags="PA"),
        "options": entry(IP(src="10.244.2.1", dst="10.244.1.1", options=[b"\x94\x04\x00\x00"]) / UDP() / Raw(b"x")),
        "fragments": entry(IP(src="10.244.2.1", dst="10.244.1.1", flags="MF") / UDP() / Raw(bytes(32)))
        + entry(IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrFragment() / ICMPv6EchoRequest()),
    }
    corpus = Path(__file__).parent / "corpus"
    corpus.mkdir(exist_ok=True)
    for name, content in seeds.items():
        (corpus / name).write_bytes(content)


if __name__ == "__main__":
    main()
