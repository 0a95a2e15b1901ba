"""A flood of datagrams from strangers and from a peer gone wild: delivered none, counted all, and traffic goes on."""

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from scapy.layers.inet import IP, UDP
from scapy.packet import Raw

from overlaynet.testing.daemons import wait_until
from overlaynet.testing.lab import SWITCH_ADDRESS, Container, Host, Lab
from overlaynet.testing.namespaces import NetworkNamespace

DATAGRAMS = 50_000
"""From each of the two senders; they send as fast as they can."""
STREAM = 4 * 2**20
ETH_P_ALL = 3


@pytest.fixture(params=["native", "python"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab("hostile") as lab:
        for host in lab.hosts:
            host.start_overlaynet(lab.file_store, ["--udp-engine", request.param])
            host.connect_containers()
        for host in lab.hosts:
            assert host.daemon is not None
            host.daemon.wait_for("peer added")
        yield lab


def inner(source: str, destination: str, payload: bytes = b"hostile") -> bytes:
    return bytes(IP(src=source, dst=destination) / UDP(sport=1, dport=2) / Raw(payload))


def hostile(ours: Container, theirs: Container) -> list[bytes]:
    """Datagrams of which none may be delivered, though a peer sends them."""
    chance = random.Random(20261124)
    right = inner(str(theirs.ip), str(ours.ip), bytes(1000))
    packets = [
        b"",
        b"\x45",
        right[:-1],  # truncated
        right[:19],
        right + b"\0",  # more than it says
        b"\x45\x00" + struct.pack("!H", 60000) + right[4:],  # says more than there is
        b"\x4f" + right[1:40],  # options that are not there
        b"\x55" + right[1:],  # no version of IP
        b"\x65" + right[1:],
        bytes(65507),
        b"\x60" + bytes(7) + bytes(32),  # a whole IPv6 packet, where only IPv4 is carried
        inner("10.244.77.1", str(ours.ip)),  # spoofed: nobody's, ours, the world's, everybody's
        inner(str(ours.ip), str(ours.ip)),
        inner("8.8.8.8", str(ours.ip)),
        inner("255.255.255.255", str(ours.ip)),
        inner(str(theirs.ip), "10.244.77.1"),  # for others
        inner(str(theirs.ip), "172.16.130.140"),
        inner(str(theirs.ip), "127.0.0.1"),
        inner(str(theirs.ip), "224.0.0.1"),
    ]
    noise = [chance.randbytes(chance.randrange(200)) for _ in range(40)]
    # Noise that begins like an IP packet of the right length would be one, of whomever it names.
    return packets + [each for each in noise if not each or each[0] >> 4 not in (4, 6)]


def flood(namespace: NetworkNamespace, source: IPv4Address, target: Host, datagrams: list[bytes]) -> int:
    """Send :data:`DATAGRAMS`, from any port; returns how many the kernel took."""
    taken = 0
    with namespace.socket(type=socket.SOCK_DGRAM) as sender:
        sender.bind((str(source), 0))
        sender.connect((str(target.address.ip), 8285))
        for number in range(DATAGRAMS):
            with contextlib.suppress(ConnectionRefusedError):
                sender.send(datagrams[number % len(datagrams)])
                taken += 1
    return taken


class Tap:
    """Watches the TUN device: the packets in it that are not of the two containers."""

    def __init__(self, host: Host, expected: set[bytes]) -> None:
        self.foreign: list[bytes] = []
        self._expected = expected
        self._socket = host.namespace.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**23)
        self._socket.bind(("overlay0", ETH_P_ALL))
        self._socket.settimeout(0.1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                packet = self._socket.recv(65535)
                if packet[12:20] not in self._expected:
                    self.foreign.append(packet)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()


def transfer(sender: Container, receiver: Container) -> bytes:
    """A TCP stream from one container to the other; returns what arrived."""
    with receiver.namespace.socket() as listener, sender.namespace.socket() as out:
        listener.bind((str(receiver.ip), 5000))
        listener.listen()
        listener.settimeout(60)
        out.settimeout(60)
        out.connect((str(receiver.ip), 5000))
        arrived, _ = listener.accept()
        with arrived:
            arrived.settimeout(60)
            thread = threading.Thread(target=_send_all, args=(out,))
            thread.start()
            received = bytearray()
            while chunk := arrived.recv(65536):
                received += chunk
            thread.join()
            return bytes(received)


def _send_all(out: socket.socket) -> None:
    out.sendall(random.Random(1).randbytes(STREAM))
    out.shutdown(socket.SHUT_WR)


def lost_in_the_kernel(host: Host) -> int:
    """Datagrams that found the socket's buffer full."""
    names, values = (
        line.split()
        for line in host.namespace.execute(["cat", "/proc/net/snmp"]).stdout.splitlines()
        if line.startswith("Udp:")
    )
    return int(dict(zip(names, values, strict=True))["RcvbufErrors"])


def packets_of(host: Host) -> dict[str, int]:
    """The daemon's counts of packets that came off the wire: delivered, and dropped by each reason."""
    status = host.status()["packets"]
    assert isinstance(status, dict)
    counts = {reason: count for reason, count in status["drops"].items() if count}
    counts["delivered"] = sum(peer["received_packets"] for peer in status["peers"].values())
    return counts


def test_a_flood_is_counted_and_traffic_goes_on(lab: Lab) -> None:
    a, b = lab.hosts
    ours, theirs = a.containers[0], b.containers[0]
    wild = hostile(ours, theirs)
    before, lost_before = packets_of(a), lost_in_the_kernel(a)
    with contextlib.closing(Tap(a, {theirs.ip.packed + ours.ip.packed, ours.ip.packed + theirs.ip.packed})) as tap:
        sent: list[int] = []
        senders = [
            threading.Thread(target=lambda: sent.append(flood(b.namespace, b.address.ip, a, wild))),
            threading.Thread(
                target=lambda: sent.append(
                    flood(lab.switch, SWITCH_ADDRESS.ip, a, [*wild, inner(str(theirs.ip), str(ours.ip))])
                )
            ),
        ]
        for sender in senders:
            sender.start()
        received = transfer(theirs, ours)
        for sender in senders:
            sender.join()
        assert received == random.Random(1).randbytes(STREAM)
        assert len(sent) == 2

        def counted() -> bool:
            now = packets_of(a)
            dropped = sum(now.get(reason, 0) - before.get(reason, 0) for reason in now if reason != "delivered")
            assert dropped <= sum(sent)
            # The kernel's count has datagrams of the stream, too, which TCP sends again.
            return dropped + lost_in_the_kernel(a) - lost_before >= sum(sent)

        wait_until(counted, 30, "every datagram to be counted")
        assert tap.foreign == []
        reasons = packets_of(a).keys() - {"delivered"}
        assert reasons == {"malformed", "unsupported", "spoofed_source", "foreign_destination", "unknown_peer"}
    assert a.daemon is not None
    assert a.daemon.running
    assert a.daemon.stop() == 0
