"""Streams and datagrams between namespaces, compared when they arrive, and what kernels count of packets that are wrong."""

import contextlib
import hashlib
import os
import socket
import threading
from pathlib import Path

from overlaynet.testing.namespaces import NetworkNamespace

PATIENCE = 60.0
STREAM = bytes(range(251)) * 20000
UDP_SEGMENT = 103
"""Of linux/udp.h, which Python does not name."""


def transfer(sender: NetworkNamespace, receiver: NetworkNamespace, address: str, streams: int = 3) -> None:
    """Send several streams at once, and compare what arrives."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with receiver.socket(family) as listener, contextlib.ExitStack() as stack:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of an earlier transfer, ends may linger
        listener.bind((address, 5000))
        listener.listen()
        listener.settimeout(PATIENCE)
        digests: list[str] = []

        def receive(connection: socket.socket) -> None:
            digest = hashlib.sha256()
            with connection:
                connection.settimeout(PATIENCE)
                while piece := connection.recv(1 << 16):
                    digest.update(piece)
            digests.append(digest.hexdigest())

        def send(client: socket.socket) -> None:
            client.sendall(STREAM)
            client.shutdown(socket.SHUT_WR)

        threads = []
        for _ in range(streams):
            client = stack.enter_context(sender.socket(family))
            client.settimeout(PATIENCE)
            client.connect((address, 5000))
            threads += [
                threading.Thread(target=receive, args=(listener.accept()[0],)),
                threading.Thread(target=send, args=(client,)),
            ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert digests == [hashlib.sha256(STREAM).hexdigest()] * streams


def send_segmented(
    sender: NetworkNamespace, receiver: NetworkNamespace, version: int, source: str, address: str
) -> int:
    """Leave it to the kernel to cut datagrams out of larger ones, as QUIC does, and compare what arrives; return how many."""
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    mtu = 1472 - (48 if version == 6 else 28)
    sent = 0
    with receiver.socket(family, socket.SOCK_DGRAM) as into, sender.socket(family, socket.SOCK_DGRAM) as out:
        into.settimeout(PATIENCE)
        into.bind((address, 5000))
        out.bind((source, 0))
        # The last is smaller, of an odd size, of one byte, and none is smaller.
        for segment, size in (
            (1000, 10333),
            (1201, 7 * 1201 + 1),
            (mtu, 20 * mtu + 77),
            (mtu, 30 * mtu),
            (33, 64 * 33),
        ) * 3:
            payload = os.urandom(size)
            out.setsockopt(socket.SOL_UDP, UDP_SEGMENT, segment)
            out.sendto(payload, (address, 5000))
            for at in range(0, size, segment):
                assert into.recv(1 << 16) == payload[at : at + segment]
                sent += 1
    return sent


def taken_out(host: NetworkNamespace) -> int:
    """Packets that the host's engine has been handed by the kernel; one that is still to be cut counts once."""
    (link,) = host.ip_json("-s", "link", "show", "overlay0")
    return int(link["stats64"]["tx"]["packets"])


def errors(host: NetworkNamespace) -> dict[str, int]:
    """What the kernel has counted of packets whose checksum or header is wrong."""
    lines = host.run(Path("/proc/thread-self/net/snmp").read_text).splitlines()
    counts = {}
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        for name, value in zip(names.split()[1:], values.split()[1:], strict=True):
            counts[f"{names.split()[0]}{name}"] = int(value)
    for line in host.run(Path("/proc/thread-self/net/snmp6").read_text).splitlines():
        name, value = line.split()
        counts[name] = int(value)
    kinds = (
        "Tcp:InErrs",
        "Tcp:InCsumErrors",
        "Udp:InErrors",
        "Udp:InCsumErrors",
        "Ip:InHdrErrors",
        "Icmp:InCsumErrors",
    )
    kinds6 = ("Udp6InErrors", "Udp6InCsumErrors", "Ip6InHdrErrors", "Ip6InTruncatedPkts", "Icmp6InCsumErrors")
    return {name: counts[name] for name in (*kinds, *kinds6)}
