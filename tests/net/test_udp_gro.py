"""TCP segments off the wire that the kernel joins as the Python engine writes them: GRO of the TUN device."""

import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from overlaynet import tun
from overlaynet.offload import Offload
from overlaynet.testing.lab import NETWORK, NETWORK6, Lab
from overlaynet.testing.namespaces import NetworkNamespace
from overlaynet.tun_device import TunDevice
from tests.net.traffic import UDP_SEGMENT

PATIENCE = 20.0
SEGMENTS, SEGMENT_SIZE = 20, 1000
LARGEST = 65535
ETH_P_IP, ETH_P_IPV6 = 0x0800, 0x86DD


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("gro", overlay=NETWORK, overlay6=NETWORK6) as lab:
        for host, engine in zip(lab.hosts, ("python", "native"), strict=True):
            host.start_overlaynet(lab.file_store, ["--udp-engine", engine])
            host.connect_containers()
        lab.wait_until_acquainted()
        yield lab


def segments(lab: Lab, version: int, payload: bytes, port: int) -> list[bytes]:
    """A run of TCP segments from the second host's container to the first's."""
    to, sender = lab.containers
    ip: Packet = IP(src=str(sender.ip), dst=str(to.ip)) if version == 4 else IPv6(src=str(sender.ip6), dst=str(to.ip6))
    made = []
    for at in range(0, len(payload), SEGMENT_SIZE):
        if version == 4:
            ip.id = at // SEGMENT_SIZE
        tcp = TCP(sport=port, dport=9, flags="A", seq=1000 + at, ack=1, window=500)
        made.append(raw(ip / tcp / Raw(payload[at : at + SEGMENT_SIZE])))
    return made


def receive(lab: Lab, packets: list[bytes], port: int, size: int) -> list[bytes]:
    """What the container's interface hands over of the TCP segments from a port, once so many bytes of payload are there."""
    host, other = lab.hosts
    container = lab.containers[0].namespace
    protocol = ETH_P_IP if packets[0][0] >> 4 == 4 else ETH_P_IPV6
    with (
        container.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as tap,
        other.namespace.socket(type=socket.SOCK_DGRAM) as sender,
    ):
        tap.settimeout(PATIENCE)
        tap.bind(("eth0", protocol))
        sender.bind((str(other.address.ip), 0))
        run = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("H", len(packets[0])))]
        sender.sendmsg(packets, run, 0, (str(host.address.ip), 8285))
        received: list[bytes] = []
        while sum(len(payload_of(packet)) for packet in received) < size:
            packet, (_, _, kind, *_) = tap.recvfrom(LARGEST)
            ip = read(packet)
            if kind == socket.PACKET_HOST and TCP in ip and ip[TCP].sport == port:
                received.append(packet)
        return received


def read(packet: bytes) -> Packet:
    return IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)


def transport_of(packet: bytes) -> bytes:
    """All but the IP header, whose TTL is one less when a packet arrives."""
    return packet[20 if packet[0] >> 4 == 4 else 40 :]


def payload_of(packet: bytes) -> bytes:
    return bytes(read(packet)[TCP].payload)


@pytest.mark.parametrize("version", [4, 6])
def test_segments_that_follow_on_each_other_reach_the_container_as_fewer_packets(lab: Lab, version: int) -> None:
    """Fewer, not one: how many are written before the kernel has waited for long enough is a matter of time."""
    packets: Any = lab.hosts[0].status()["packets"]
    assert packets["offloads"]["tun_gro"] == "on"
    payload = os.urandom(SEGMENTS * SEGMENT_SIZE)
    deadline = time.monotonic() + PATIENCE
    for port in range(20000, 30000):
        received = receive(lab, segments(lab, version, payload, port), port, len(payload))
        assert b"".join(map(payload_of, received)) == payload
        if len(received) < SEGMENTS / 2:
            return
        assert time.monotonic() < deadline


@pytest.mark.parametrize("version", [4, 6])
def test_a_segment_whose_checksum_is_wrong_is_joined_to_none_and_not_made_right(lab: Lab, version: int) -> None:
    payload = os.urandom(SEGMENTS * SEGMENT_SIZE)
    for port in range(30000, 30020):
        packets = segments(lab, version, payload, port)
        wrong = SEGMENTS // 2
        damaged = packets[wrong][:-1] + bytes([packets[wrong][-1] ^ 1])
        packets[wrong] = damaged
        received = receive(lab, packets, port, len(payload))
        assert transport_of(damaged) in map(transport_of, received)


# Where it cannot be had


def device(namespace: NetworkNamespace) -> Offload:
    """What a device says of its GRO."""

    async def make() -> Offload:
        made = await TunDevice.make("overlay0", backend="udp", gro=True)
        try:
            return made.gro
        finally:
            made.close()

    return namespace.run_async(make)


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    with NetworkNamespace(label="gro") as namespace:
        yield namespace


def test_where_the_file_system_shows_another_namespace_it_is_off(
    namespace: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As this process's /sys does, which was mounted in the first one; and so if that has an interface of this name."""
    assert device(namespace) == Offload(on=False, reason=errno.ENOENT)
    monkeypatch.setattr(tun, "INTERFACES", tmp_path)
    interface = tmp_path / "overlay0"
    interface.mkdir()
    (interface / "ifindex").write_text("4711\n")
    (interface / "gro_flush_timeout").write_text("0\n")
    assert device(namespace) == Offload(on=False, reason=errno.ENODEV)
    assert (interface / "gro_flush_timeout").read_text() == "0\n"


def test_a_device_that_was_made_without_has_none(namespace: NetworkNamespace) -> None:
    descriptor = namespace.run(tun.open_tun, "overlay0")
    try:
        with pytest.raises(OSError, match=os.strerror(errno.ENOTSUP)):
            namespace.run(tun.start_gro, "overlay0", descriptor)
    finally:
        os.close(descriptor)
