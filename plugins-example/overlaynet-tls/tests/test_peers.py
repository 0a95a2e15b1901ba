"""Who is let in, what is delivered, and that no peer waits for another: two backends on the loopback interface."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import attrs
import pytest

from overlaynet.api import BackendError, Lease, Network, Peer, Subnets, Underlay
from overlaynet.testing.conformance import eventually
from overlaynet.testing.pretended import PretendedHosts, datagram
from overlaynet.testing.tuns import FAR, NEAR
from overlaynet_tls import MOST_CALLERS, TlsBackend, TlsOptions
from overlaynet_tls.link import LONGEST_QUEUE
from overlaynet_tls.stream import Identity, call, frame

pytestmark = pytest.mark.anyio

NETWORK = Network()
NEAR_PEER = Peer(Subnets(IPv4Network("10.244.1.0/24")), NEAR)
FAR_PEER = Peer(Subnets(IPv4Network("10.244.2.0/24")), FAR)
NOBODY = Peer(Subnets(IPv4Network("10.244.3.0/24")), IPv4Address("127.0.0.3"))
TO_FAR = datagram("10.244.1.9", "10.244.2.9", b"to the far host")
TO_NEAR = datagram("10.244.2.9", "10.244.1.9", b"to the near host")
PORT = TlsOptions().port


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def hosts() -> Iterator[PretendedHosts]:
    with PretendedHosts() as hosts:
        yield hosts


class Host:
    """A backend that runs, and the kernel's end of its device."""

    def __init__(self, hosts: PretendedHosts, options: TlsOptions, own: Peer) -> None:
        self.own = own
        self.backend = TlsBackend(options)
        self._hosts = hosts

    async def start(self, *peers: Peer) -> None:
        address = self.own.public_ipv4
        with self._hosts.on(str(address)):
            await self.backend.open(NETWORK, Underlay("lo", 1500, ipv4=address, public_ipv4=address))
            await self.backend.start(Lease(self.own.subnets, address))
            await self.backend.set_peers(peers)

    @property
    def kernel(self) -> socket.socket:
        (device,) = self._hosts.devices(str(self.own.public_ipv4)).values()
        return device.kernel

    @property
    def drops(self) -> dict[str, int]:
        drops: Any = self.backend.status()["drops"]
        return dict(drops)

    def state(self, peer: Peer) -> str:
        """What has become of the link to a peer."""
        peers: Any = self.backend.status()["peers"]
        return str(peers[str(peer.subnets)]["state"])

    async def received(self) -> bytes:
        async with asyncio.timeout(20):
            return await asyncio.get_running_loop().sock_recv(self.kernel, 1 << 16)

    def has_received_nothing(self) -> bool:
        try:
            self.kernel.recv(1)
        except BlockingIOError:
            return True
        return False

    async def dropped(self, reason: str, count: int = 1) -> None:
        """Wait until so many packets or calls were dropped for a reason, and see that it is the only one."""
        await eventually(lambda: self.drops.get(reason, 0) >= count)
        assert self.drops == {reason: count}


@pytest.fixture
async def near(hosts: PretendedHosts, options: TlsOptions) -> AsyncIterator[Host]:
    host = Host(hosts, options, NEAR_PEER)
    await host.start(FAR_PEER)
    yield host
    await host.backend.aclose()


async def caller(options: TlsOptions, source: IPv4Address = FAR) -> asyncio.StreamWriter:
    """A connection to the near host, by hand."""
    identity = Identity(options.certificate, options.key, options.authority)
    return await call(identity, NEAR, PORT, source)


# Who is let in


async def test_a_stranger_is_turned_away_before_tls_begins(near: Host, options: TlsOptions) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - its kind is the kernel's choice
        await caller(options, IPv4Address("127.0.0.3"))
    await near.dropped("unknown_caller")


async def test_a_certificate_of_another_authority_is_refused(
    near: Host, options: TlsOptions, make_options: Callable[..., TlsOptions]
) -> None:
    foreign = attrs.evolve(make_options(str(FAR)), authority=options.authority)
    with pytest.raises((OSError, EOFError)):
        await caller(foreign)
    await near.dropped("refused_caller")


async def test_a_member_cannot_pass_for_another(hosts: PretendedHosts, make_options: Callable[..., TlsOptions]) -> None:
    other = make_options("192.0.2.77")
    host = Host(hosts, other, FAR_PEER)
    victim = Host(hosts, attrs.evolve(other, port=PORT + 1), NEAR_PEER)
    victim.own = attrs.evolve(NEAR_PEER, public_ipv4=IPv4Address("127.0.0.4"))
    await host.start(victim.own)
    await victim.start(FAR_PEER)
    try:
        identity = Identity(other.certificate, other.key, other.authority)
        with pytest.raises(ssl.CertificateError, match=r"does not name the address 127\.0\.0\.4"):
            await call(identity, IPv4Address("127.0.0.4"), PORT + 1, FAR)
        await victim.dropped("refused_caller")
    finally:
        await host.backend.aclose()
        await victim.backend.aclose()


async def test_who_speaks_no_tls_is_refused(near: Host) -> None:
    with socket.socket() as connection:
        connection.bind((str(FAR), 0))
        connection.connect((str(NEAR), PORT))
        connection.sendall(frame(TO_NEAR) * 100)
        await near.dropped("refused_caller")
    assert near.has_received_nothing()


async def test_one_address_has_a_bounded_number_of_connections(near: Host) -> None:
    connections = []
    for _ in range(MOST_CALLERS + 1):
        connections.append(socket.create_connection((str(NEAR), PORT), source_address=(str(FAR), 0)))
    await near.dropped("too_many_callers")
    for connection in connections:
        connection.close()


async def test_who_is_no_longer_a_peer_is_cut_off(near: Host, options: TlsOptions) -> None:
    writer = await caller(options)
    writer.write(frame(TO_NEAR))
    assert await near.received() == TO_NEAR
    await near.backend.set_peers([])
    await eventually(writer.is_closing)
    await near.backend.set_peers([FAR_PEER])
    writer = await caller(options)
    writer.write(frame(TO_NEAR))
    assert await near.received() == TO_NEAR
    writer.transport.abort()


# What is delivered


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"", "malformed"),
        (b"\x45\0\0", "malformed"),
        (TO_NEAR[:-1], "malformed"),
        (datagram("10.244.3.9", "10.244.1.9"), "spoofed_source"),
        (datagram("10.244.1.9", "10.244.1.9"), "spoofed_source"),
        (datagram("10.244.2.9", "10.244.3.9"), "foreign_destination"),
    ],
)
async def test_what_a_member_must_not_send_is_dropped_and_counted(
    near: Host, options: TlsOptions, packet: bytes, reason: str
) -> None:
    writer = await caller(options)
    writer.write(frame(packet) + frame(TO_NEAR))
    assert await near.received() == TO_NEAR
    await near.dropped(reason)
    writer.transport.abort()


# Links


async def test_a_peer_that_comes_back_is_called_again(near: Host, hosts: PretendedHosts, options: TlsOptions) -> None:
    for _ in range(2):
        far = Host(hosts, options, FAR_PEER)
        await far.start(NEAR_PEER)
        receiving = asyncio.create_task(far.received())
        while not receiving.done():  # what is sent while there is no connection is dropped
            near.kernel.send(TO_FAR)
            await asyncio.sleep(0.05)
        assert receiving.result() == TO_FAR
        await far.backend.aclose()


async def test_a_peer_that_cannot_be_reached_keeps_no_other_waiting(
    near: Host, hosts: PretendedHosts, options: TlsOptions
) -> None:
    far = Host(hosts, options, FAR_PEER)
    await far.start(NEAR_PEER)
    with socket.create_server((str(NOBODY.public_ipv4), PORT)):  # it takes calls, and never answers
        await near.backend.set_peers([NOBODY, FAR_PEER])
        for _ in range(LONGEST_QUEUE + 10):
            near.kernel.send(datagram("10.244.1.9", "10.244.3.9"))
            await asyncio.sleep(0)
        near.kernel.send(TO_FAR)
        assert await far.received() == TO_FAR
        await near.dropped("queue_full", 10)
    await far.backend.aclose()


async def test_packets_for_a_peer_without_a_connection_are_dropped_and_counted(near: Host) -> None:
    near.kernel.send(TO_FAR)
    await eventually(lambda: near.state(FAR_PEER) == "failed")
    near.kernel.send(TO_FAR)
    await near.dropped("not_connected")


async def test_certificates_are_read_again_for_each_connection(
    near: Host, hosts: PretendedHosts, options: TlsOptions, tmp_path: Path
) -> None:
    files = attrs.evolve(options, certificate=str(tmp_path / "certificate"), key=str(tmp_path / "key"))
    Path(files.certificate).write_bytes(Path(options.certificate).read_bytes())
    Path(files.key).write_bytes(Path(options.key).read_bytes())
    far = Host(hosts, files, FAR_PEER)
    await far.start(NEAR_PEER)
    Path(files.key).write_text("half written")
    far.kernel.send(TO_NEAR)
    await eventually(lambda: far.state(NEAR_PEER) == "failed")
    Path(files.key).write_bytes(Path(options.key).read_bytes())
    receiving = asyncio.create_task(near.received())
    while not receiving.done():
        far.kernel.send(TO_NEAR)
        await asyncio.sleep(0.05)
    await far.backend.aclose()


@pytest.mark.parametrize("missing", ["certificate", "key", "authority"])
async def test_a_file_that_is_missing_is_told_before_anything_is_changed(
    options: TlsOptions, hosts: PretendedHosts, missing: str
) -> None:
    changes: dict[str, Any] = {missing: "/nowhere/file.pem"}
    broken = attrs.evolve(options, **changes)
    host = Host(hosts, broken, FAR_PEER)
    with pytest.raises(BackendError, match=r"/nowhere/file\.pem"):
        await host.start()
    assert hosts.devices(str(FAR)) == {}
