"""The life of the udp backend without root: its device is one end of a socket pair, and the kernel is pretended."""

import asyncio
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_interface
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest

from overlaynet import devices, options, tun, tun_device
from overlaynet.backends.udp import UdpBackend, UdpOptions, backend
from overlaynet.backends.udp.python_engine import PythonEngine
from overlaynet.errors import BackendError, ConfigError
from overlaynet.model import Device, IPAddress, Lease, LeaseData, Peer, Route, Subnets, Underlay
from overlaynet.netlink import IPInterface, Link, NetlinkError
from overlaynet.network import Network, parse

T = TypeVar("T")

pytestmark = pytest.mark.anyio

NETWORK = parse('{"Network": "10.244.0.0/16"}')
SIX = parse('{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}')
DUAL = parse('{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}')
LOOPBACK, LOOPBACK6 = IPv4Address("127.0.0.1"), IPv6Address("::1")
LEASE = Lease(Subnets(IPv4Network("10.244.1.0/24")))
LEASE_SIX = Lease(Subnets(ipv6=IPv6Network("fd00:10:244:1::/64")))
LEASE_DUAL = Lease(Subnets(LEASE.subnets.ipv4, LEASE_SIX.subnets.ipv6))
SECOND = Peer(Subnets(IPv4Network("10.244.2.0/24")), IPv4Address("127.0.0.2"))
SECOND_SIX = attrs.evolve(SECOND, public_ipv6=IPv6Address("::2"))
THIRD = Peer(Subnets(IPv4Network("10.244.3.0/24")), IPv4Address("127.0.0.3"))
SIXTH = Peer(Subnets(IPv4Network("10.244.6.0/24")), public_ipv6=IPv6Address("fd00::6"))


def ipv4_packet(source: str, destination: str) -> bytes:
    addresses = IPv4Address(source).packed + IPv4Address(destination).packed
    return bytes((0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0)) + addresses


@pytest.fixture
def anyio_backend() -> object:
    """The engine's thread lives in real time."""
    return "asyncio"


class PretendedKernel:
    """One link, and what was done to it."""

    def __init__(self) -> None:
        self.present: Link | None = Link(7, "pretended0", "tun", 1500, False)
        self.addresses: list[IPInterface] = []
        self.queue_length = 500
        self.error: NetlinkError | None = None

    def link(self, name: str) -> Link | None:
        return self.present if self.present is not None and self.present.name == name else None

    def configure_link(
        self,
        name: str,
        *,
        index: int | None = None,
        mtu: int | None = None,
        up: bool | None = None,
        alias: str | None = None,
        transmit_queue_length: int | None = None,
    ) -> None:
        if self.error is not None:
            raise self.error
        assert self.present is not None
        assert index == self.present.index, "an interface that is not ours"
        self.present = attrs.evolve(
            self.present,
            mtu=self.present.mtu if mtu is None else mtu,
            up=self.present.up if up is None else up,
            alias=self.present.alias if alias is None else alias,
        )
        self.queue_length = transmit_queue_length or self.queue_length

    def set_addresses(self, name: str, addresses: list[IPInterface]) -> bool:
        changed, self.addresses = self.addresses != addresses, addresses
        return changed


class World:
    """The pretended kernel, the far end of the device, and a free port."""

    def __init__(self) -> None:
        self.kernel = PretendedKernel()
        self.device: socket.socket | None = None
        self.devices_made = 0
        self.name_is_taken = False
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind((str(LOOPBACK), 0))
            self.port: int = free.getsockname()[1]
        self.underlay = Underlay("eth0", 1500, ipv4=LOOPBACK)

    def open_queues(self, name: str, count: int, *, offload_header: bool = False, gro: bool = False) -> list[int]:
        """One queue, as from a kernel that gives no more."""
        if self.name_is_taken:
            raise tun.DeviceNameTaken(name)
        self.devices_made += 1
        near, self.device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        return [near.detach()]

    async def netlink(self, function: Callable[[PretendedKernel], T]) -> T:
        await asyncio.sleep(0)
        return function(self.kernel)

    def backend(self) -> UdpBackend:
        return UdpBackend(UdpOptions(name="pretended0", port=self.port), engine="python")

    async def started(self, underlay: Underlay | None = None) -> UdpBackend:
        made = self.backend()
        await made.open(NETWORK, self.underlay if underlay is None else underlay)
        await made.start(LEASE)
        return made

    def port_is_free(self, address: IPAddress = LOOPBACK) -> bool:
        with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as taker:
            try:
                taker.bind((str(address), self.port))
            except OSError:
                return False
        return True

    def device_is_closed(self) -> bool:
        assert self.device is not None
        self.device.setblocking(False)
        return self.device.recv(1) == b""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    monkeypatch.setattr(tun_device, "open_queues", made.open_queues)
    monkeypatch.setattr(tun_device, "are_of", lambda name, descriptors: True)
    monkeypatch.setattr(devices, "netlink", made.netlink)
    yield made
    if made.device is not None:
        made.device.close()


def test_the_options_have_flannels_defaults() -> None:
    read = options.parse(UdpOptions, {}, "Backend udp")
    assert read == UdpOptions(port=8285, name="overlay0", mtu=None)
    assert options.parse(UdpOptions, {"Port": 1, "MTU": None, "Name": "x"}, "") == UdpOptions(port=1, name="x")
    assert options.parse(UdpOptions, {"mtu": 1400}, "").mtu == 1400


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"Port": 0}, "option Port must be between 1 and 65535, not 0"),
        ({"Port": 65536}, "option Port must be between 1 and 65535"),
        ({"Port": "8285"}, "option Port must be a whole number"),
        ({"MTU": 575}, "option MTU must be between 576"),
        ({"MTU": True}, "option MTU must be a whole number"),
        ({"Prot": 8285}, "did you mean 'Port'"),
        *(
            ({"Name": name}, "option Name must be an interface name")
            for name in ("", "a" * 16, "ü" * 8, "ü", "a b", "a/b", "a:b", "tun%d", ".", "..", "all", "default", "a\n")
        ),
    ],
)
def test_wrong_options_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.parse(UdpOptions, values, "Backend udp")
    assert message in str(caught.value)


async def test_a_whole_life(world: World) -> None:
    made = world.backend()
    assert made.status()["peers"] == {}
    assert await made.open(NETWORK, world.underlay) == LeaseData()
    assert world.kernel.present == Link(7, "pretended0", "tun", 1500, False, alias="overlaynet udp")
    assert await made.start(LEASE) == Device("pretended0", 1472)
    assert world.kernel.present == Link(7, "pretended0", "tun", 1472, True, alias="overlaynet udp")
    assert world.kernel.addresses == [ip_interface("10.244.1.0/32")]
    assert world.kernel.queue_length >= 1000
    await made.set_peers([SECOND])
    assert made.routes([]) == made.routes([SECOND]) == [Route(IPv4Network("10.244.0.0/16"), device="pretended0")]
    status = json.loads(json.dumps(made.status()))
    none = {"sent_packets": 0, "sent_bytes": 0, "received_packets": 0, "received_bytes": 0}
    assert status["peers"] == {"10.244.2.0/24": {"address": "127.0.0.2", **none}}
    assert set(status["drops"].values()) == {0}
    assert {"malformed", "no_route", "spoofed_source"} <= set(status["drops"])
    running = asyncio.create_task(made.run())
    await asyncio.sleep(0.05)
    assert not running.done()
    await made.aclose()
    with pytest.raises(BackendError, match="closed"):
        await running
    assert world.device_is_closed()
    assert world.port_is_free()
    await made.aclose()
    assert made.status()["port"] == world.port


async def test_it_can_be_closed_at_any_point(world: World) -> None:
    made = world.backend()
    await made.aclose()
    await made.open(NETWORK, world.underlay)
    await made.aclose()
    await made.aclose()
    assert world.device_is_closed()
    assert world.port_is_free()
    with pytest.raises(BackendError):
        await made.run()


async def test_a_cancelled_close_closes_all_the_same(world: World) -> None:
    made = await world.started()
    closing = asyncio.create_task(made.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(BackendError, match="closed"):
        await made.run()
    assert world.device_is_closed()
    assert world.port_is_free()


def said(caplog: pytest.LogCaptureFixture, *messages: str) -> list[str]:
    """Which of these messages were logged, in their order."""
    return [message for message in caplog.messages if message in messages]


async def test_a_device_that_is_gone_is_made_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = await world.started()
    await made.set_peers([SECOND])
    assert world.device is not None
    world.device.close()
    await asyncio.wait_for(made.changed(), 20)
    await made.set_peers([SECOND, THIRD])
    assert world.devices_made == 2
    assert world.kernel.addresses == [ip_interface("10.244.1.0/32")]
    assert said(caplog, "device lost", "device made again") == ["device lost", "device made again"]
    assert made.routes([]) == [Route(IPv4Network("10.244.0.0/16"), device="pretended0")]
    # The peers are in the new engine's table: what it carries goes to them.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.3", world.port))
        peer.setblocking(False)
        packet = ipv4_packet("10.244.1.9", "10.244.3.9")
        world.device.send(packet)
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(peer, 2000), 20) == packet
    running = asyncio.create_task(made.run())
    await asyncio.sleep(0)
    assert not running.done(), "it is no end"
    await made.aclose()
    assert world.device_is_closed()
    assert world.port_is_free()
    with pytest.raises(BackendError, match="closed"):
        await running


async def test_counters_go_on_with_the_next_engine(world: World) -> None:
    made = await world.started()
    await made.set_peers([SECOND])

    def counts() -> tuple[int, int]:
        status: Any = made.status()
        return status["peers"]["10.244.2.0/24"]["sent_packets"], status["drops"]["malformed"]

    for number in (1, 2):
        assert world.device is not None
        world.device.send(ipv4_packet("10.244.1.9", "10.244.2.9"))
        world.device.send(b"no packet")
        while counts() != (number, number):
            await asyncio.sleep(0.01)
        world.device.close()
        await asyncio.wait_for(made.changed(), 20)
        await made.set_peers([SECOND])
        assert counts() == (number, number)
    await made.aclose()


async def test_a_device_that_cannot_be_made_again_is_an_error_until_it_can(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = await world.started()
    assert world.device is not None
    world.device.close()
    await asyncio.wait_for(made.changed(), 20)
    world.name_is_taken, world.kernel.present = True, Link(9, "pretended0", "dummy", 1500, True)
    for _ in range(3):
        with pytest.raises(BackendError, match=r"the device name pretended0 is taken by another interface \(dummy\)"):
            await made.set_peers([SECOND])
        assert made.routes([SECOND]) == [], "a route would lead to somebody else's interface"
        assert made.status()["engine"] is None
    world.name_is_taken, world.kernel.present = False, Link(10, "pretended0", "tun", 1500, False)
    await made.set_peers([SECOND])
    assert said(caplog, "device lost", "device made again") == ["device lost", "device made again"]
    await made.aclose()
    assert world.port_is_free()


async def test_another_interface_of_the_name_is_not_taken_for_the_device(world: World) -> None:
    """Even while the engine has not noticed yet that its device is gone."""
    made = await world.started()
    stranger = Link(9, "pretended0", "dummy", 900, False)
    world.kernel.present, world.kernel.addresses, world.name_is_taken = stranger, [], True
    with pytest.raises(BackendError, match=r"the device name pretended0 is taken by another interface \(dummy\)"):
        await made.set_peers([])
    assert (world.kernel.present, world.kernel.addresses) == (stranger, [])
    await made.aclose()


async def test_what_others_did_to_the_device_is_mended_and_logged_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    made = await world.started()
    world.kernel.present = Link(7, "pretended0", "tun", 900, False, alias="overlaynet udp")
    world.kernel.addresses = []
    for _ in range(2):
        await made.set_peers([])
    (record,) = [record for record in caplog.records if record.message == "device mended"]
    assert record.__dict__["fields"]["mended"] == "MTU, it was down, addresses"
    assert world.kernel.present == Link(7, "pretended0", "tun", 1472, True, alias="overlaynet udp")
    await made.aclose()


async def test_another_address_of_the_underlay_is_bound_and_the_old_one_given_up(world: World) -> None:
    made = await world.started()
    await made.set_peers([SECOND])
    assert await made.set_underlay(world.underlay) == Device("pretended0", 1472)
    moved = attrs.evolve(world.underlay, ipv4=IPv4Address("127.0.0.4"))
    assert await made.set_underlay(moved) == Device("pretended0", 1472)
    assert world.port_is_free()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.2", world.port))
        packet = ipv4_packet("10.244.2.9", "10.244.1.9")
        peer.sendto(packet, ("127.0.0.4", world.port))
        assert world.device is not None
        world.device.setblocking(False)
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(world.device, 2000), 20) == packet
    assert world.devices_made == 1
    await made.aclose()
    assert world.device_is_closed()


async def test_another_ip_version_of_the_underlay_comes_and_goes(world: World) -> None:
    made = await world.started()
    await made.set_peers([SECOND, SIXTH])

    def reached() -> set[str]:
        peers: Any = made.status()["peers"]
        return {peer["address"] for peer in peers.values()}

    assert reached() == {"127.0.0.2"}
    assert await made.set_underlay(attrs.evolve(world.underlay, ipv6=LOOPBACK6)) == Device("pretended0", 1452)
    assert reached() == {"127.0.0.2", "fd00::6"}
    assert not world.port_is_free(LOOPBACK6)
    assert await made.set_underlay(world.underlay) == Device("pretended0", 1472)
    assert reached() == {"127.0.0.2"}
    assert world.port_is_free(LOOPBACK6)
    await made.aclose()


async def test_an_address_that_cannot_be_bound_leaves_all_as_it_was(world: World) -> None:
    made = await world.started()
    with pytest.raises(BackendError, match="192.0.2.1 is not an address of this host"):
        await made.set_underlay(attrs.evolve(world.underlay, ipv4=IPv4Address("192.0.2.1"), mtu=1400))
    assert made.status()["mtu"] == 1472
    assert not world.port_is_free()
    assert await made.set_underlay(world.underlay) == Device("pretended0", 1472)
    await made.aclose()


async def test_the_device_follows_the_mtu_of_the_underlay(world: World) -> None:
    made = await world.started()
    assert await made.set_underlay(attrs.evolve(world.underlay, mtu=1300)) == Device("pretended0", 1272)
    assert world.kernel.present is not None
    assert world.kernel.present.mtu == 1272
    assert await made.set_underlay(attrs.evolve(world.underlay, mtu=9000)) == Device("pretended0", 8972)
    with pytest.raises(BackendError, match="MTU of 80, too small"):
        await made.set_underlay(attrs.evolve(world.underlay, mtu=80))
    assert world.kernel.present.mtu == 8972
    await made.aclose()


async def test_an_mtu_that_the_document_fixes_stays(world: World, caplog: pytest.LogCaptureFixture) -> None:
    made = UdpBackend(UdpOptions(name="pretended0", port=world.port, mtu=1400), engine="python")
    await made.open(NETWORK, world.underlay)
    await made.start(LEASE)
    assert await made.set_underlay(attrs.evolve(world.underlay, mtu=9000)) == Device("pretended0", 1400)
    assert await made.set_underlay(attrs.evolve(world.underlay, mtu=1300)) == Device("pretended0", 1400)
    assert "the MTU of the network document does not fit any more" in caplog.messages
    assert world.kernel.present is not None
    assert world.kernel.present.mtu == 1400
    await made.aclose()


async def test_what_becomes_of_an_offload_is_logged(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    offloads = {"udp_segment": "on"}
    real = PythonEngine.counters
    monkeypatch.setattr(PythonEngine, "counters", lambda self: attrs.evolve(real(self), offloads=dict(offloads)))
    monkeypatch.setattr(backend, "LOOK_INTERVAL", 0.01)
    made = await world.started()
    running = asyncio.create_task(made.run())
    for state, message in (("failing: EIO (2 times)", "offload failing"), ("on", "offload works again")):
        offloads["udp_segment"] = state
        while message not in caplog.messages:
            await asyncio.sleep(0.01)
    await made.aclose()
    with pytest.raises(BackendError):
        await running


async def test_a_defect_of_the_engine_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(engine: PythonEngine) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(PythonEngine, "run", fail)
    made = await world.started()
    with pytest.raises(BackendError, match="python packet engine failed: RuntimeError.*out of luck.*report it"):
        await made.run()
    assert "packet engine failed" in caplog.messages
    assert world.device_is_closed()
    assert world.port_is_free()
    await made.aclose()


async def test_an_open_that_fails_half_way_leaves_nothing(world: World) -> None:
    world.kernel.error = NetlinkError("configure the interface pretended0", errno.EPERM)
    made = world.backend()
    with pytest.raises(BackendError, match="the kernel refused to configure the interface pretended0"):
        await made.open(NETWORK, world.underlay)
    assert world.device_is_closed()
    assert world.port_is_free()
    await made.aclose()


async def test_an_open_that_is_cancelled_leaves_nothing(world: World) -> None:
    made = world.backend()
    opening = asyncio.create_task(made.open(NETWORK, world.underlay))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert world.device_is_closed()
    assert world.port_is_free()


@pytest.mark.parametrize(
    ("addresses", "reached", "reason"),
    [
        ((LOOPBACK, None), {SECOND.subnets: "127.0.0.2"}, "it has no IPv4 address"),
        ((None, LOOPBACK6), {SECOND.subnets: "::2", SIXTH.subnets: "fd00::6"}, "it has no IPv6 address"),
        ((LOOPBACK, LOOPBACK6), {SECOND.subnets: "127.0.0.2", SIXTH.subnets: "fd00::6"}, None),
    ],
)
async def test_a_peer_is_reached_by_ipv4_if_both_have_it_or_else_by_ipv6_or_is_reported_once(
    world: World,
    caplog: pytest.LogCaptureFixture,
    addresses: tuple[IPv4Address | None, IPv6Address | None],
    reached: dict[Subnets, str],
    reason: str | None,
) -> None:
    made = await world.started(Underlay("eth0", 1500, *addresses))
    fourth = Peer(Subnets(IPv4Network("10.244.4.0/24")), IPv4Address("127.0.0.4"))
    all_peers = [SECOND_SIX, SIXTH, fourth]
    if addresses[0] is not None:
        reached = {**reached, fourth.subnets: "127.0.0.4"}
    for _ in range(3):
        await made.set_peers(all_peers)
    told: Any = made.status()["peers"]
    assert {subnets: each["address"] for subnets, each in told.items()} == {str(k): v for k, v in reached.items()}
    left = [peer for peer in all_peers if peer.subnets not in reached]

    def reported() -> list[tuple[Subnets, str]]:
        records = [record.__dict__["fields"] for record in caplog.records if record.message == "peer not reachable"]
        return [(record["subnet"], record["reason"]) for record in records]

    expected = [(peer.subnets, reason) for peer in left]
    assert reported() == expected
    await made.set_peers([])
    await made.set_peers(left)
    assert reported() == expected * 2
    await made.aclose()


async def test_a_kernel_parameter_that_cannot_be_set_is_one_warning(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    made = await world.started()  # there is no such device here, and so no such parameter
    await made.set_peers([])
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.message for record in records] == ["kernel parameter not set"]
    assert records[0].__dict__["fields"]["parameter"] == Path("/proc/sys/net/ipv4/conf/pretended0/accept_local")
    await made.aclose()


async def test_an_mtu_that_does_not_fit_is_refused(world: World) -> None:
    made = UdpBackend(UdpOptions(name="pretended0", port=world.port, mtu=1473))
    with pytest.raises(BackendError, match="asks for MTU 1473, but at most 1472 fits into the MTU 1500 of eth0"):
        await made.open(NETWORK, world.underlay)
    assert world.device is None


BOTH = (LOOPBACK, LOOPBACK6)


@pytest.mark.parametrize(
    ("underlay", "wanted", "mtu"),
    [
        (Underlay("eth0", 1500, LOOPBACK), None, 1472),
        (Underlay("eth0", 9000, LOOPBACK), None, 8972),
        (Underlay("eth0", 65536, LOOPBACK), None, 65507),
        (Underlay("eth0", 1500, LOOPBACK), 1400, 1400),
        (Underlay("eth0", 1500, ipv6=LOOPBACK6), None, 1452),
        (Underlay("eth0", 1500, *BOTH), None, 1452),
        (Underlay("eth0", 65536, *BOTH), None, 65487),
        (Underlay("eth0", 1328, *BOTH), None, 1280),
    ],
)
@pytest.mark.parametrize("network", [NETWORK, SIX, DUAL], ids=str)
async def test_the_mtu_leaves_room_for_the_largest_headers_that_may_be_needed(
    world: World, network: Network, underlay: Underlay, wanted: int | None, mtu: int
) -> None:
    made = UdpBackend(UdpOptions(name="pretended0", port=world.port, mtu=wanted), engine="python")
    await made.open(network, underlay)
    lease = {str(NETWORK): LEASE, str(SIX): LEASE_SIX, str(DUAL): LEASE_DUAL}[str(network)]
    assert await made.start(lease) == Device("pretended0", mtu)
    await made.aclose()


@pytest.mark.parametrize(
    ("network", "underlay", "wanted", "message"),
    [
        (NETWORK, Underlay("eth7", 1500), None, "eth7 has no address"),
        (
            NETWORK,
            Underlay("eth7", 95, LOOPBACK),
            None,
            "eth7 has an MTU of 95, too small for an overlay; raise it to 96",
        ),
        (NETWORK, Underlay("eth7", 1500, IPv4Address("192.0.2.1")), None, "192.0.2.1 is not an address of this host"),
        (NETWORK, Underlay("eth7", 115, *BOTH), None, "an MTU of 115, too small for an overlay; raise it to 116"),
        (
            DUAL,
            Underlay("eth7", 1327, *BOTH),
            None,
            "1327, too small for an overlay that carries IPv6; raise it to 1328",
        ),
        (
            SIX,
            Underlay("eth7", 1307, LOOPBACK),
            None,
            "1307, too small for an overlay that carries IPv6; raise it to 1308",
        ),
        (SIX, Underlay("eth7", 1500, LOOPBACK), 1279, "asks for MTU 1279, but IPv6 needs 1280 or more"),
        (DUAL, Underlay("eth7", 1500, *BOTH), 1453, "asks for MTU 1453, but at most 1452 fits into the MTU 1500"),
        (SIX, Underlay("eth7", 1500, ipv6=IPv6Address("2001:db8::1")), None, "2001:db8::1 is not an address of this"),
    ],
)
async def test_an_underlay_that_will_not_do_is_refused(
    world: World, network: Network, underlay: Underlay, wanted: int | None, message: str
) -> None:
    made = UdpBackend(UdpOptions(name="pretended0", port=world.port, mtu=wanted), engine="python")
    with pytest.raises(BackendError, match=message):
        await made.open(network, underlay)
    assert world.device is None
    assert world.port_is_free()


@pytest.mark.parametrize(
    ("network", "lease", "addresses"),
    [
        (SIX, LEASE_SIX, ["fd00:10:244:1::/128"]),
        (DUAL, LEASE_DUAL, ["10.244.1.0/32", "fd00:10:244:1::/128"]),
    ],
)
async def test_each_network_has_an_address_and_a_route(
    world: World, network: Network, lease: Lease, addresses: list[str]
) -> None:
    made = world.backend()
    await made.open(network, Underlay("eth0", 1500, *BOTH))
    await made.start(lease)
    assert world.kernel.addresses == [ip_interface(address) for address in addresses]
    assert made.routes([]) == [Route(overlay, device="pretended0") for overlay in network]
    assert not world.port_is_free(LOOPBACK)
    assert not world.port_is_free(LOOPBACK6)
    await made.aclose()
    assert world.port_is_free(LOOPBACK)
    assert world.port_is_free(LOOPBACK6)


async def test_a_port_in_use_is_refused(world: World) -> None:
    first = await world.started()
    with pytest.raises(BackendError, match=f"UDP port {world.port} on 127.0.0.1 is in use by another program"):
        await world.backend().open(NETWORK, world.underlay)
    await first.aclose()


@pytest.mark.parametrize(
    ("at", "number", "message"),
    [
        ("open", errno.EACCES, "/dev/net/tun may not be opened: Permission denied; let this user read and write it"),
        ("open", errno.ENOENT, "/dev/net/tun is missing; load the kernel module"),
        ("open", errno.ENODEV, "/dev/net/tun is missing; load the kernel module"),
        ("open", errno.EMFILE, "/dev/net/tun cannot be opened: Too many open files"),
        ("ioctl", errno.EPERM, "needs root"),
        ("ioctl", errno.EINVAL, "the kernel refuses to make the TUN device overlay0: Invalid argument"),
    ],
)
def test_a_tun_device_that_cannot_be_had_is_explained(
    monkeypatch: pytest.MonkeyPatch, at: str, number: int, message: str
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    real_open = os.open
    if at == "open":
        monkeypatch.setattr(os, "open", fail)
    else:
        monkeypatch.setattr(os, "open", lambda path, flags: real_open("/dev/null", flags))
        monkeypatch.setattr(fcntl, "ioctl", fail)
    with pytest.raises(BackendError) as caught:
        tun.open_tun("overlay0")
    assert message in str(caught.value)
