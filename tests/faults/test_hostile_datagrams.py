"""A flood of datagrams from strangers and from a peer gone wild: delivered none, counted all, and traffic goes on."""

import contextlib
import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest
from scapy.layers.inet import IP, UDP
from scapy.packet import Raw

from bench.sendmmsg import Batch
from overlaynet.testing.daemons import wait_until
from overlaynet.testing.lab import SWITCH_ADDRESS, Container, Host, Lab
from overlaynet.testing.namespaces import NetworkNamespace

RATE = 110_000
"""Datagrams a second, of two senders together."""
SECONDS = 4
BATCH = 64
"""Datagrams in one system call."""
CHUNK = random.Random(1).randbytes(2**16)
"""What the legitimate stream consists of, again and again."""
ETH_P_ALL = 3


@pytest.fixture(params=["native", "python"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab("hostile") as lab:
        for host in lab.hosts:
            host.start_overlaynet(lab.file_store, ["--udp-engine", request.param])
            host.connect_containers()
        for host in lab.hosts:
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


class Flood:
    """Sends datagrams to a host from any port, as many as it has to and no faster; but for what the machine cannot do."""

    def __init__(self, namespace: NetworkNamespace, source: IPv4Address, target: Host, datagrams: list[bytes]) -> None:
        self._socket = namespace.socket(type=socket.SOCK_DGRAM)
        self._socket.bind((str(source), 0))
        self._socket.connect((str(target.address.ip), 8285))
        chosen = [datagrams[number % len(datagrams)] for number in range(BATCH * len(datagrams))]
        self._batches = [Batch(chosen[at : at + BATCH]) for at in range(0, len(chosen), BATCH)]
        self.sent = 0

    def send(self, count: int, rate: float) -> None:
        """Send at least ``count`` datagrams, ``rate`` a second."""
        began, until = time.monotonic(), self.sent + count
        first = self.sent
        for batch in itertools.cycle(self._batches):
            if self.sent >= until:
                return
            with contextlib.suppress(ConnectionRefusedError):
                self.sent += batch.send(self._socket.fileno())
            time.sleep(max(0.0, began + (self.sent - first) / rate - time.monotonic()))

    def close(self) -> None:
        self._socket.close()


def flood_from_both(floods: list[Flood], count: int) -> float:
    """Have all send at once, ``count`` datagrams together; how many seconds that took."""
    began = time.monotonic()
    share = len(floods)
    threads = [threading.Thread(target=each.send, args=(count / share, RATE / share)) for each in floods]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - began


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


class Stream:
    """A TCP stream from one container to the other, until it is told to end; what arrives is compared with what was sent."""

    def __init__(self, sender: Container, receiver: Container) -> None:
        self.arrived = 0
        self.damaged = False
        self._sent = 0
        self._over = threading.Event()
        with receiver.namespace.socket() as listener:
            listener.bind((str(receiver.ip), 5000))
            listener.listen()
            listener.settimeout(60)
            self._out = sender.namespace.socket()
            self._out.settimeout(60)
            self._out.connect((str(receiver.ip), 5000))
            self._in, _ = listener.accept()
        self._in.settimeout(60)
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._over.is_set():
            self._out.sendall(CHUNK)
            self._sent += len(CHUNK)
        self._out.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while chunk := self._in.recv(len(CHUNK)):
            at = self.arrived % len(CHUNK)
            self.damaged |= chunk != (CHUNK + CHUNK)[at : at + len(chunk)]
            self.arrived += len(chunk)

    def end(self) -> None:
        """Let all arrive that was sent."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._out.close()
        self._in.close()
        assert self.arrived == self._sent
        assert not self.damaged


def packets_of(host: Host) -> dict[str, int]:
    """The daemon's counts of packets that came off the wire: delivered, and dropped by each reason or by the kernel."""
    status = host.status()["packets"]
    assert isinstance(status, dict)
    counts = {reason: count for reason, count in status["drops"].items() if count}
    counts["delivered"] = sum(peer["received_packets"] for peer in status["peers"].values())
    return counts


def test_a_flood_is_counted_and_traffic_goes_on(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    a, b = lab.hosts
    ours, theirs = a.containers[0], b.containers[0]
    wild = hostile(ours, theirs)
    small = [
        datagram for datagram in wild if len(datagram) < 2000
    ]  # the largest come in many fragments, which get lost
    strange = inner(str(theirs.ip), str(ours.ip))
    with contextlib.ExitStack() as stack:
        both = {theirs.ip.packed + ours.ip.packed, ours.ip.packed + theirs.ip.packed}
        tap = stack.enter_context(contextlib.closing(Tap(a, both)))

        def flood(namespace: NetworkNamespace, source: IPv4Address, datagrams: list[bytes]) -> Flood:
            return stack.enter_context(contextlib.closing(Flood(namespace, source, a, datagrams)))

        floods = [
            flood(b.namespace, b.address.ip, small),
            flood(lab.switch, SWITCH_ADDRESS.ip, [*small, strange]),
        ]
        before = packets_of(a)

        def counted() -> tuple[int, int]:
            """How many the engine and the kernel have dropped."""
            now = packets_of(a)
            dropped = {reason: now[reason] - before.get(reason, 0) for reason in now if reason != "delivered"}
            kernel = dropped.pop("receive_congested", 0)
            return sum(dropped.values()), kernel

        # Alone, every single one is accounted for, the largest included while there is time.
        for source in (flood(b.namespace, b.address.ip, wild), flood(lab.switch, SWITCH_ADDRESS.ip, [*wild, strange])):
            source.send(1, 1000)
            floods.append(source)
        flood_from_both(floods[:2], RATE)
        wait_until(lambda: sum(counted()) == sum(each.sent for each in floods), 30, "every datagram to be counted")

        stream = Stream(theirs, ours)
        wait_until(lambda: stream.arrived > len(CHUNK), 30, "the stream to begin")
        at_first = stream.arrived
        seconds = flood_from_both(floods[:2], RATE * SECONDS)
        in_between = stream.arrived
        stream.end()
        assert in_between > at_first, "nothing arrived during the flood"

        sent = sum(each.sent for each in floods)
        engine, kernel = counted()
        assert sent >= RATE * (SECONDS + 1)
        assert engine <= sent, "something legitimate was dropped"
        # The kernel drops datagrams of the stream, too, which TCP sends again.
        wait_until(lambda: sum(counted()) >= sent, 30, "every datagram to be counted")
        assert tap.foreign == []
        reasons = packets_of(a).keys() - {"delivered", "receive_congested"}
        assert reasons == {"malformed", "unsupported", "spoofed_source", "foreign_destination", "unknown_peer"}
        told = f"{RATE * SECONDS / seconds:,.0f} datagrams a second, {kernel:,} of {sent:,} dropped by the kernel"
        record_property("flood", told)  # of how many a second, the machine decides, too
    assert a.daemon.running
    assert a.daemon.stop() == 0
