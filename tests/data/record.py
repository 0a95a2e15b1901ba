"""Record the traffic in this directory: ``python tests/data/record.py``, as root, on Linux.

Two hosts, each a network namespace with a TUN device; between the devices, this program. Every packet that it passes on
was made by a kernel, with its checksums, and is written to a file (pcap, link type RAW: each packet begins with its IP
header). It loses some packets and marks others (which are written with their marks), as a network would, so that senders
have something to answer.

The hosts have the addresses 10.244.1.1 and fd00:1::1, and 10.244.2.1 and fd00:2::1.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

from overlaynet.backends.udp.packets import CAPABLE_0, CONGESTION, congestion_mark, decapsulate
from overlaynet.delivery import addresses
from overlaynet.testing.namespaces import NetworkNamespace
from overlaynet.tun import open_tun

MTU = 1452
HERE4, HERE6, THERE4, THERE6 = "10.244.1.1", "fd00:1::1", "10.244.2.1", "fd00:2::1"
PAIRS = {4: (HERE4, THERE4), 6: (HERE6, THERE6)}
LINKTYPE_RAW = 101
# Of Linux; missing from the socket module.
SO_NO_CHECK, IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, IP_PMTUDISC_DONT = 11, 10, 23, 0

Disturb = Callable[[int, bytes], bytes | None]
"""What becomes of the packet with that number on its way."""


class Relay:
    """Passes packets between two devices and keeps them; a context manager."""

    def __init__(self, devices: tuple[int, int], disturb: Disturb) -> None:
        self.packets: list[tuple[float, bytes]] = []
        self._devices = devices
        self._disturb = disturb
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._pass_on)

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        time.sleep(0.3)  # what is on its way arrives
        self._over.set()
        self._thread.join()

    def _pass_on(self) -> None:
        one, other = self._devices
        known = {ip_address(address).packed for pair in PAIRS.values() for address in pair}
        while not self._over.is_set():
            for readable in select.select(self._devices, [], [], 0.05)[0]:
                packet = os.read(readable, 65535)
                pair = addresses(packet)
                half = len(pair) // 2
                if pair[:half] not in known or pair[half:] not in known:
                    continue  # the kernel's own business, such as multicast
                delivered = self._disturb(len(self.packets), packet)
                self.packets.append((time.time(), packet if delivered is None else delivered))
                if delivered is not None:
                    os.write(other if readable == one else one, delivered)


def pass_all(number: int, packet: bytes) -> bytes | None:
    return packet


def lose_some(number: int, packet: bytes) -> bytes | None:
    """Lose large packets now and then, so that there are selective acknowledgements."""
    return None if len(packet) > 1000 and number % 7 == 3 else packet


def mark_some(number: int, packet: bytes) -> bytes | None:
    return decapsulate(packet, CONGESTION) if congestion_mark(packet) == CAPABLE_0 and number % 5 == 0 else packet


@contextlib.contextmanager
def hosts() -> Iterator[tuple[NetworkNamespace, NetworkNamespace, tuple[int, int]]]:
    with contextlib.ExitStack() as stack:
        here, there = (stack.enter_context(NetworkNamespace(label=label)) for label in ("here", "there"))
        devices = []
        for namespace, own in ((here, (HERE4, HERE6)), (there, (THERE4, THERE6))):
            devices.append(namespace.run(open_tun, "tun0"))
            stack.callback(os.close, devices[-1])
            namespace.ip(
                "link set lo up",
                f"link set tun0 mtu {MTU} up",
                *(f"address add {address} dev tun0 nodad" for address in own[1:]),
                f"address add {own[0]}/32 dev tun0",
                "route add 10.244.0.0/16 dev tun0",
                "route add fd00::/16 dev tun0",
            )
            namespace.set_sysctl("net.ipv4.tcp_ecn", 1)
        yield here, there, (devices[0], devices[1])


def family(version: int) -> socket.AddressFamily:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def stream(
    here: NetworkNamespace, there: NetworkNamespace, version: int, size: int, *options: tuple[int, int, bytes]
) -> None:
    """One TCP connection that carries ``size`` bytes there and some back."""
    near, far = PAIRS[version]
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(there.socket(family(version)))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((far, 5001))
        listener.listen()
        client = stack.enter_context(here.socket(family(version)))
        for option in options:
            client.setsockopt(*option)
        client.bind((near, 0))
        client.settimeout(20)
        client.connect((far, 5001))
        server, _ = listener.accept()
        stack.enter_context(server).settimeout(20)
        sender = threading.Thread(target=client.sendall, args=(os.urandom(size),))
        sender.start()
        received = 0
        while received < size:
            received += len(server.recv(65536))
        sender.join()
        server.sendall(b"thank you")
        client.recv(100)


def datagrams(
    here: NetworkNamespace, there: NetworkNamespace, version: int, sizes: list[int], *options: tuple[int, int, object]
) -> None:
    """Datagrams of some sizes to a port that is open, and the last one to one that is closed."""
    near, far = PAIRS[version]
    with (
        there.socket(family(version), socket.SOCK_DGRAM) as server,
        here.socket(family(version), socket.SOCK_DGRAM) as client,
    ):
        server.bind((far, 5002))
        server.settimeout(20)
        client.bind((near, 0))
        for level, name, value in options:
            client.setsockopt(level, name, value)  # type: ignore[call-overload]
        for size in sizes:
            client.sendto(os.urandom(size), (far, 5002))
            data, sender = server.recvfrom(65535)
            server.sendto(data[::-1], sender)
        client.sendto(b"nobody is there", (far, 5003))


def record_tcp(here: NetworkNamespace, there: NetworkNamespace) -> None:
    for version in (4, 6):
        stream(here, there, version, 40_001)
    # Loose the size of a segment, so that there are small ones, too.
    stream(here, there, 4, 1_001, (socket.IPPROTO_TCP, socket.TCP_MAXSEG, struct.pack("i", 211)))
    # A record-route option (RFC 791) in each packet.
    stream(here, there, 4, 3_000, (socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([7, 7, 4, 0, 0, 0, 0, 0])))


def record_udp(here: NetworkNamespace, there: NetworkNamespace) -> None:
    for version in (4, 6):
        most = MTU - (28 if version == 4 else 48)
        datagrams(here, there, version, [0, 1, 2, 3, 33, 512, 1001, most - 1, most])
    datagrams(here, there, 4, [0, 33], (socket.SOL_SOCKET, SO_NO_CHECK, 1))
    for mark in range(4):
        datagrams(here, there, 4, [7], (socket.IPPROTO_IP, socket.IP_TOS, 0xB8 | mark))
        datagrams(here, there, 6, [7], (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0xB8 | mark))
    datagrams(here, there, 4, [7], (socket.IPPROTO_IP, socket.IP_TTL, 1))
    datagrams(here, there, 6, [7], (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1))


def record_icmp(here: NetworkNamespace, there: NetworkNamespace) -> None:
    for far in (THERE4, THERE6):
        for arguments in (["-s", "0"], ["-s", "56"], ["-s", "1001", "-Q", "0xb9"], ["-t", "1"]):
            here.execute(["ping", "-n", "-c", "1", *arguments, far])
    for arguments in (["-R"], ["-T", "tsonly"], ["-T", "tsandaddr"]):
        here.execute(["ping", "-n", "-c", "1", *arguments, THERE4])


def record_fragments(here: NetworkNamespace, there: NetworkNamespace) -> None:
    for far in (THERE4, THERE6):
        here.execute(["ping", "-n", "-c", "1", "-M", "dont", "-s", "5001", far])
    datagrams(here, there, 4, [4_000], (socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT))
    datagrams(here, there, 6, [4_000], (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IP_PMTUDISC_DONT))


PADDING = bytes([1, 4, 0, 0, 0, 0])
"""The option PadN (RFC 8200), which fills an extension header of 8 bytes."""


def record_extensions(here: NetworkNamespace, there: NetworkNamespace) -> None:
    headers = {socket.IPV6_HOPOPTS: bytes([0, 0]) + PADDING, socket.IPV6_DSTOPTS: bytes([0, 0]) + PADDING}
    six = socket.IPPROTO_IPV6
    for name, content in headers.items():
        datagrams(here, there, 6, [0, 33, 1_000], (six, name, content))
        stream(here, there, 6, 2_000, (six, name, content))
    both = [(six, name, content) for name, content in headers.items()]
    stream(here, there, 6, 2_000, *both)
    datagrams(here, there, 6, [3_001], *both, (six, IPV6_MTU_DISCOVER, IP_PMTUDISC_DONT))


def record_ecn(here: NetworkNamespace, there: NetworkNamespace) -> None:
    for version in (4, 6):
        stream(here, there, version, 20_000)


RECORDINGS: dict[str, tuple[Callable[[NetworkNamespace, NetworkNamespace], None], Disturb]] = {
    "tcp": (record_tcp, lose_some),
    "udp": (record_udp, pass_all),
    "icmp": (record_icmp, pass_all),
    "fragments": (record_fragments, pass_all),
    "extensions": (record_extensions, pass_all),
    "ecn": (record_ecn, mark_some),
}


def main() -> None:
    for name, (generate, disturb) in RECORDINGS.items():
        with hosts() as (here, there, devices), Relay(devices, disturb) as relay:
            generate(here, there)
        content = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, LINKTYPE_RAW)
        for moment, packet in relay.packets:
            seconds, fraction = divmod(moment, 1)
            content += struct.pack("<IIII", int(seconds), int(fraction * 1e6), len(packet), len(packet)) + packet
        (Path(__file__).parent / f"{name}.pcap").write_bytes(content)
        sys.stdout.write(f"{name}.pcap: {len(relay.packets)} packets, {len(content)} bytes\n")


if __name__ == "__main__":
    main()
