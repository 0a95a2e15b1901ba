"""The network of whole daemons with a real backend: its own code and sockets, with pretended devices."""

import asyncio
import contextlib
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import Any

import pytest

from overlaynet.api import Backend, Device, Lease, LeaseData, PacketDevice, Peer, Route, Underlay
from overlaynet.api import Network as Parameters
from overlaynet.backends.udp import UdpBackend
from overlaynet.testing import VIRTUAL_CLOCK, Network, sockets
from overlaynet.testing.flow import Kind

pytestmark = pytest.mark.anyio

UDP: dict[str, Any] = {
    "backend": "udp",
    "udp_engine": "python",
    "backend_options": {"Port": 18285},
    "patience": 1.0,
    "document": {"Network": "10.244.0.0/16"},
}


class Routed(Backend):
    """Routes packets for a peer to its host, unchanged."""

    async def open(self, network: Parameters, underlay: Underlay) -> LeaseData:
        self._underlay = underlay
        return LeaseData("example")

    async def start(self, lease: Lease) -> Device:
        return Device(self._underlay.interface, self._underlay.mtu, instance="example")

    async def set_peers(self, peers: Sequence[Peer]) -> None: ...

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        interface = self._underlay.interface
        return [Route(subnet, device=interface, gateway=peer.public_ipv4) for peer in peers for subnet in peer.subnets]


ROUTED: dict[str, Any] = {"backend": Routed, "backend_options": {"Type": "example"}}


@pytest.fixture
def anyio_backend() -> object:
    """Real sockets take real time."""
    return "asyncio"


async def test_a_packet_goes_through_the_backends_own_sockets() -> None:
    async with Network(2, **UDP) as network:
        a, b = network.nodes
        assert isinstance(a.backend, UdpBackend)
        packet = network.send(a, b, b"hello")
        await network.step()
        assert not packet.delivered
        await network.step()
        assert [step.kind for step in packet.steps] == [Kind.ROUTED, Kind.DELIVERED]
        assert packet.steps[-1].node == "b"
        peers: Any = b.backend.status()["peers"]
        assert peers[str(a.lease.subnets)]["received_packets"] == 1


async def test_what_a_backend_must_drop_is_dropped_with_its_reason() -> None:
    async with Network(3, **UDP) as network:
        a, b, c = network.nodes
        spoofed = network.send(a, b, source=c.address)
        for_nobody = network.send(a, "10.244.0.9")
        too_big = network.send(a, b, bytes(1472 - 27))
        largest = network.send(a, b, bytes(1472 - 28))
        leaking = network.send(a, "192.0.2.1")
        await network.deliver()
        assert spoofed.dropped == "spoofed_source: counted by the backend of b"
        assert spoofed.steps[-1].node == "b"
        assert for_nobody.dropped is not None
        assert for_nobody.dropped.startswith("answered: ")
        assert too_big.dropped == "too_big: 1473 bytes do not fit into the MTU of 1472"
        assert largest.delivered
        assert leaking.dropped is not None
        assert leaking.dropped.startswith("leaked: ")


async def test_the_kernel_keeps_the_sides_of_a_partition_apart() -> None:
    async with Network(3, **UDP) as network:
        a, b, c = network.nodes
        network.partition([a], [b, c])
        packets = [network.send(a, b), network.send(b, a), network.send(b, c)]
        await network.deliver()
        assert [packet.dropped for packet in packets[:2]] == ["partition: they are on two sides"] * 2
        assert packets[2].delivered
        network.heal()
        again = network.send(a, b)
        await network.deliver()
        assert again.delivered


async def test_links_lose_and_delay_what_they_are_told_to() -> None:
    loop = asyncio.get_running_loop()
    async with Network(2, **UDP) as network:
        a, b = network.nodes
        network.drop(a, b, 1)
        lost, carried = network.send(a, b), network.send(a, b)
        await network.deliver()
        assert lost.dropped == "drop: lost on the link"
        assert carried.delivered
        network.drop(a, b)
        lost, back = network.send(a, b), network.send(b, a)
        await network.deliver()
        assert lost.dropped == "drop: lost on the link"
        assert back.delivered
        network.heal()
        network.delay(a, b, 0.3)
        before = loop.time()
        late = network.send(a, b)
        await network.deliver()
        assert late.delivered
        assert late.steps[-1].time >= before + 0.3


async def test_a_crashed_node_finds_its_lease_again_and_its_port_is_free() -> None:
    async with Network(2, **UDP) as network:
        a, b = network.nodes
        lease = b.lease
        await b.crash()
        assert [route.kind for route in b.routes] == ["unreachable"]
        to_it = network.send(a, b)
        await network.deliver()
        assert to_it.dropped is not None
        b.start()
        await network.converge()
        assert b.lease.subnets == lease.subnets
        packet = network.send(a, b)
        await network.deliver()
        assert packet.delivered


async def test_without_the_store_traffic_goes_on() -> None:
    async with Network(2, **UDP) as network:
        a, b = network.nodes
        network.store_down()
        packet = network.send(a, b)
        await network.deliver()
        assert packet.delivered


async def test_a_backend_that_routes_to_hosts_is_forwarded_for() -> None:
    async with Network(3, **ROUTED) as network:
        a, b, c = network.nodes
        packet = network.send(a, b, b"hello")
        too_big = network.send(a, b, bytes(1473))
        network.partition([a, b], [c])
        apart = network.send(a, c)
        await network.deliver()
        assert packet.delivered
        assert too_big.dropped == "too_big: 1501 bytes do not fit into the MTU of 1500"
        assert apart.dropped == "partition: they are on two sides"


class Careless(Backend):
    """Sends every packet to its last peer, delivers whatever comes, and says when it is closed."""

    _wire: socket.socket
    _device: PacketDevice

    async def open(self, network: Parameters, underlay: Underlay) -> LeaseData:
        self._wire = socket.socket(type=socket.SOCK_DGRAM)
        self._wire.bind((str(underlay.ipv4), 18286))
        self._wire.setblocking(False)
        asyncio.get_running_loop().add_reader(self._wire, lambda: self._device.write(self._wire.recv(2000)))
        self._device = PacketDevice("careless0", "careless", self._send)
        await self._device.open()
        return LeaseData()

    def _send(self, packet: bytes) -> None:
        self._wire.sendto(packet, (str(self._peers[-1].public_ipv4), 18286))

    async def start(self, lease: Lease) -> Device:
        self._own = lease.subnets
        return await self._device.mend(1400, self._own)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        self._peers = sorted(peers, key=lambda peer: peer.node)
        await self._device.mend(1400, self._own)

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        return [Route(subnet, device="careless0") for peer in peers for subnet in peer.subnets]

    async def aclose(self) -> None:
        asyncio.get_running_loop().remove_reader(self._wire)
        with contextlib.suppress(OSError):
            self._send(b"goodbye")
        self._wire.close()
        self._device.close()


async def test_a_packet_that_comes_out_at_another_node_is_not_delivered() -> None:
    async with Network(3, backend=Careless, document=UDP["document"]) as network:
        a, b, c = network.nodes
        packet, other = network.send(a, b), network.send(a, c)
        await network.deliver()
        assert packet.dropped == f"misrouted: c does not have {b.address}"
        assert other.delivered


@pytest.mark.parametrize("crash", [True, False])
async def test_a_node_that_crashes_says_no_more(crash: bool) -> None:
    async with Network(3, backend=Careless, document=UDP["document"]) as network:
        a, b, c = network.nodes
        await (a.crash() if crash else a.stop())
        packet = network.send(b, c)
        await network.deliver()
        assert packet.delivered
        assert ("7 bytes" in network.diagram()) != crash


async def test_a_backend_that_publishes_another_type_is_told_how_to_be_named() -> None:
    with pytest.raises(AssertionError, match=r"give the network backend_options=\{'Type': 'example'\}"):
        async with Network(2, backend=Routed):
            pass


async def test_a_name_that_is_not_installed_is_refused() -> None:
    with pytest.raises(Exception, match="there is no backend 'upd'; did you mean 'udp'"):
        Network(2, backend="upd")


async def test_an_underlay_that_loopback_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="loopback has only one of IPv6"):
        Network(2, backend="udp", underlay=(6,))


async def test_peers_at_loopback_addresses_are_refused_again_afterwards() -> None:
    from overlaynet import reconcile  # noqa: PLC0415

    async with Network(2, **ROUTED):
        pass
    assert not reconcile._reachable(IPv4Address("127.0.0.2"))


class TestOnAVirtualClock:
    @pytest.fixture
    def anyio_backend(self) -> object:
        return VIRTUAL_CLOCK

    async def test_a_real_backend_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="leave VIRTUAL_CLOCK out"):
            async with Network(2, **UDP):
                pass


NEAR, FAR, OTHER = IPv4Address("127.0.9.1"), IPv4Address("127.0.9.2"), IPv4Address("127.0.9.3")


def bound(address: IPv4Address, kind: socket.SocketKind = socket.SOCK_DGRAM) -> socket.socket:
    made = socket.socket(type=kind)
    made.bind((str(address), 0))
    made.settimeout(0.3)
    return made


def test_the_kernel_drops_what_comes_from_blocked_senders_only() -> None:
    with bound(NEAR) as near, bound(FAR) as far, bound(OTHER) as other:
        sockets.block(NEAR, [IPv4Address("127.0.9.77"), FAR])
        far.sendto(b"blocked", near.getsockname())
        other.sendto(b"let through", near.getsockname())
        assert near.recv(100) == b"let through"
        near.sendto(b"back", far.getsockname())
        assert far.recv(100) == b"back"
        sockets.block(NEAR, [])
        sockets.block(NEAR, [])
        far.sendto(b"again", near.getsockname())
        assert near.recv(100) == b"again"


def test_a_connection_hangs_while_its_other_end_is_blocked() -> None:
    with bound(NEAR, socket.SOCK_STREAM) as listener, bound(FAR, socket.SOCK_STREAM) as caller:
        listener.listen()
        caller.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted, bound(FAR, socket.SOCK_STREAM) as second:
            accepted.settimeout(0.3)
            sockets.block(NEAR, [FAR])
            caller.sendall(b"waiting")
            with pytest.raises(TimeoutError):
                accepted.recv(100)
            with pytest.raises(TimeoutError):
                second.connect(listener.getsockname())
            sockets.block(NEAR, [])
            accepted.settimeout(20)
            assert accepted.recv(100) == b"waiting"


def test_sockets_that_are_taken_away_are_gone_for_everybody() -> None:
    listener = socket.create_server((str(NEAR), 0))
    with listener, bound(FAR, socket.SOCK_STREAM) as caller, bound(OTHER) as other:
        caller.connect(listener.getsockname())
        name, kept = listener.getsockname(), other.getsockname()
        with listener.accept()[0]:
            sockets.take_away(NEAR)
            assert caller.recv(100) == b""  # its end is told
            with socket.socket() as again:
                again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                again.bind(name)
            assert other.getsockname() == kept


def test_senders_that_do_not_fit_into_a_filter_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 200"):
        sockets.block(NEAR, [NEAR + number for number in range(201)])


_WITH_HOSTS = """
from overlaynet.testing.pretended import PretendedHosts
with PretendedHosts(), PretendedHosts():
    print("has them", flush=True)
    input()
"""


def test_pretended_hosts_of_two_processes_wait_for_each_other() -> None:
    command = [sys.executable, "-P", "-c", _WITH_HOSTS]
    with contextlib.ExitStack() as stack:

        def begin() -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            return process

        first = begin()
        assert first.stdout is not None
        assert first.stdout.readline() == "has them\n"
        second = begin()
        assert second.stdout is not None
        assert not select.select([second.stdout], [], [], 2)[0], "both have them"
        first.kill()
        assert second.stdout.readline() == "has them\n"
