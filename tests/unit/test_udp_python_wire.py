"""What the Python engine asks of the kernel at the wire: runs of packets, as far as the kernel takes them."""

import errno
import itertools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, ip_address

import pytest
from scapy.layers.inet import IP, UDP
from scapy.packet import Raw

from overlaynet.backends.udp.engine import Drop, EnginePeer, PeerTable
from overlaynet.backends.udp.python_engine import PythonEngine
from overlaynet.backends.udp.python_wire import Wire
from overlaynet.model import Subnets

OWN, SECOND = Subnets(IPv4Network("10.244.1.0/24")), Subnets(IPv4Network("10.244.2.0/24"))


def datagram_socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("127.0.0.1", 0))
    made.settimeout(20)
    return made


class Rig:
    """An engine that carries what waits when it is told to, and what it asked its socket to send."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, offload: bool = True) -> None:
        self.sends: list[int] = []
        self.error: OSError | None = None
        self.sockets = [datagram_socket() for _ in range(4)]
        self.tun, self.device, self.wire, self.peer = self.sockets
        self.tun.connect(self.device.getsockname())
        self.device.connect(self.tun.getsockname())
        self.tun.setblocking(False)
        there = EnginePeer(SECOND, ip_address("127.0.0.1"), self.peer.getsockname()[1])
        self.engine = PythonEngine(
            self.tun.fileno(), [self.wire.fileno()], 1472, PeerTable(OWN, (there,)), offload=offload
        )
        send = Wire.send

        def watched(wire: Wire, packets: list[bytes], mark: int, endpoint: tuple[str, int]) -> None:
            self.sends.append(len(packets))
            if len(packets) > 1 and self.error is not None:
                raise self.error
            send(wire, packets, mark, endpoint)

        monkeypatch.setattr(Wire, "send", watched)

    def carry(self, sizes: list[int], marks: Sequence[int] = ()) -> list[int]:
        """Let packets with payloads of these sizes (and ECN bits) come out of the device; returns how many each send had."""
        packets = [
            bytes(IP(src="10.244.1.1", dst="10.244.2.1", id=n, tos=mark) / UDP() / Raw(bytes(size)))
            for n, (size, mark) in enumerate(itertools.zip_longest(sizes, marks, fillvalue=0))
        ]
        for packet in packets:
            self.device.send(packet)
        self.sends.clear()
        self.engine._send_burst()
        if self.drops() == {}:
            assert [self.peer.recv(65535) for _ in packets] == packets
        return self.sends

    def drops(self) -> dict[Drop, int]:
        return {reason: count for reason, count in self.engine.counters().drops.items() if count}

    def offloads(self) -> dict[str, str]:
        return dict(self.engine.counters().offloads)

    def close(self) -> None:
        self.engine.close()
        for each in self.sockets:
            each.close()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(monkeypatch)
    yield made
    made.close()


def test_packets_of_one_size_share_a_send_which_a_smaller_one_ends(rig: Rig) -> None:
    assert rig.carry([100, 100, 100]) == [3]
    assert rig.carry([100, 100, 60, 100, 100]) == [3, 2]
    assert rig.carry([100, 200, 200]) == [1, 2]
    assert rig.carry([100] * 5, marks=[0, 0, 2, 2, 0]) == [2, 2, 1]
    assert rig.carry([1400] * 50) == [45, 5]  # 45 times 1428 bytes are the most that fit into a datagram
    assert rig.offloads() == {"udp_segment": "on", "udp_gro": "on"}


def test_without_offloads_each_packet_is_sent_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, offload=False)
    assert rig.carry([100, 100, 100]) == [1, 1, 1]
    assert rig.offloads() == {"udp_segment": "off", "udp_gro": "off"}
    rig.close()


def test_what_the_kernel_refuses_together_is_sent_singly_for_a_while(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rig.error = OSError(errno.EIO, os.strerror(errno.EIO))
    assert rig.carry([100, 100, 100]) == [3, 1, 1, 1]
    assert rig.offloads()["udp_segment"] == "failing: EIO (1 times)"
    assert rig.carry([100, 100]) == [1, 1]
    now[0] += 1.1
    assert rig.carry([100, 100]) == [2, 1, 1]
    rig.error = None
    now[0] += 1.1
    assert rig.carry([100, 100]) == [2]
    assert rig.offloads()["udp_segment"] == "on (failed 2 times)"
    assert rig.engine.counters().peers[SECOND].sent_packets == 9


def test_a_way_that_takes_no_runs_does_not_slow_down_the_others(rig: Rig) -> None:
    with datagram_socket() as other:
        third = EnginePeer(Subnets(IPv4Network("10.244.3.0/24")), ip_address("127.0.0.1"), other.getsockname()[1])
        second = EnginePeer(SECOND, ip_address("127.0.0.1"), rig.peer.getsockname()[1])
        rig.engine.set_table(PeerTable(OWN, (second, third)))
        rig.error = OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        assert rig.carry([100, 100]) == [2, 1, 1]
        rig.error = None
        assert rig.carry([100, 100]) == [1, 1]
        packet = bytes(IP(src="10.244.1.1", dst="10.244.3.1") / UDP() / Raw(bytes(100)))
        for _ in range(3):
            rig.device.send(packet)
        rig.sends.clear()
        rig.engine._send_burst()
        assert rig.sends == [3]
        assert [other.recv(65535) for _ in range(3)] == [packet] * 3


def test_what_is_refused_for_another_reason_is_counted_and_not_tried_again(rig: Rig) -> None:
    rig.error = OSError(errno.EPERM, os.strerror(errno.EPERM))
    assert rig.carry([100, 100, 100]) == [3]
    assert rig.drops() == {Drop.SEND_REFUSED: 3}
    assert rig.offloads()["udp_segment"] == "on"


def test_a_kernel_without_offloads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(socket.socket):
        def setsockopt(self, level: int, option: int, value: int) -> None:  # type: ignore[override]
            if level == socket.IPPROTO_UDP:
                raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
            super().setsockopt(level, option, value)

    monkeypatch.setattr(socket, "socket", Old)
    rig = Rig(monkeypatch)
    assert rig.offloads() == {"udp_segment": "off: ENOPROTOOPT", "udp_gro": "off: ENOPROTOOPT"}
    assert rig.carry([100, 100]) == [1, 1]
    rig.close()
