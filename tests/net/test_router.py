"""The netlink router against a real kernel, in namespaces of the test's own."""

import asyncio
import contextlib
import errno
import socket
import struct
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from overlaynet.errors import RouterError
from overlaynet.model import IPNetwork, Route
from overlaynet.netlink import Netlink, NetlinkError
from overlaynet.netlink_events import ChangeSignal
from overlaynet.routers.netlink import NetlinkRouter, NetlinkRouterOptions
from overlaynet.testing.namespaces import NetworkNamespace
from overlaynet.testing.routers import AddForeign, CountWrites, Installed, MakeRouter, RouterConformance

pytestmark = pytest.mark.anyio

PROTOCOL = 82
NUMBER = zlib.crc32(b"overlay0") & 0x0FFFFFFF
BACKSTOP = Route(ip_network("10.244.0.0/16"), kind="unreachable")
LEADING = Route(ip_network("10.244.0.0/16"), device="overlay0")
BACKSTOP_TEXT = f"unreachable 10.244.0.0/16 proto 82 metric {0xF0000000 + NUMBER}"
LEADING_TEXT = "10.244.0.0/16 dev overlay0 proto 82 scope link"
WAIT = 20.0
"""Seconds that a test is ready to wait for what should come within two."""


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    """A host with an underlay, ``eth0``, and a device ``overlay0``; the test runs on it."""
    with NetworkNamespace(label="router") as made:
        # No link-local addresses: they, and their routes, would come by themselves in the middle of a test.
        made.set_sysctl("net.ipv6.conf.default.addr_gen_mode", 1)
        made.ip(
            "link set lo up",
            "link add overlay0 type veth peer name far0",
            "link add eth0 type veth peer name far1",
            *[f"link set {name} up" for name in ("overlay0", "far0", "eth0", "far1")],
            "address add 172.16.130.140/24 dev eth0",
            "address add fd00:16::140/64 dev eth0 nodad",
            "route add default via 172.16.130.1",
        )
        with made.entered():
            yield made


@pytest.fixture
async def make_router(namespace: NetworkNamespace) -> AsyncIterator[MakeRouter]:
    """Makes routers; they are closed after the test."""
    made: list[NetlinkRouter] = []

    def make(protocol: int = PROTOCOL) -> NetlinkRouter:
        made.append(NetlinkRouter(NetlinkRouterOptions(protocol=protocol)))
        return made[-1]

    yield make
    for router in made:
        await router.aclose()


@pytest.fixture
async def router(make_router: MakeRouter) -> NetlinkRouter:
    """A router that is open for ``overlay0``."""
    router = make_router()
    await router.open("overlay0")
    assert isinstance(router, NetlinkRouter)
    return router


def shown(namespace: NetworkNamespace, *arguments: str) -> list[str]:
    """What ``ip route show`` prints of the overlay's routes."""
    lines = namespace.execute(["ip", *arguments, "route", "show"]).stdout.splitlines()
    return [line.strip() for line in lines if "10.244." in line or "fd00:10:244:" in line]


class WriteMonitor:
    """Hears of every change of a route with overlaynet's protocol number."""

    def __init__(self, namespace: NetworkNamespace) -> None:
        self._socket = namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUFFORCE if hasattr(socket, "SO_RCVBUFFORCE") else 33, 8 << 20
        )
        self._socket.bind((0, 1 << 6 | 1 << 10))
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()

    def events(self) -> list[str]:
        """What happened since the last call: ``new unicast``, ``replaced unicast``, ``deleted unreachable``."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                message = self._socket.recv(65536)
                _, kind, flags = struct.unpack_from("=IHH", message)
                protocol, _, route_type = struct.unpack_from("BBB", message, 16 + 5)
                if protocol == PROTOCOL:
                    verb = "deleted" if kind == 25 else "replaced" if flags & 0x100 else "new"
                    found.append(f"{verb} {({1: 'unicast', 7: 'unreachable'})[route_type]}")
        return found


@pytest.fixture
def monitor(namespace: NetworkNamespace) -> Iterator[WriteMonitor]:
    with contextlib.closing(WriteMonitor(namespace)) as monitor:
        yield monitor


class TestConformance(RouterConformance):
    @pytest.fixture
    def make_router(self, namespace: NetworkNamespace) -> MakeRouter:
        return lambda: NetlinkRouter(NetlinkRouterOptions())

    @pytest.fixture
    def installed(self, namespace: NetworkNamespace) -> Installed:
        def read() -> set[Route]:
            entries = namespace.ip_json("route", "show", "proto", str(PROTOCOL))
            entries += namespace.ip_json("-6", "route", "show", "proto", str(PROTOCOL))
            return {as_route(entry) for entry in entries}

        return read

    @pytest.fixture
    def count_writes(self, monitor: WriteMonitor) -> CountWrites:
        return lambda: len(monitor.events())

    @pytest.fixture
    def refused(self) -> Route:
        return Route(ip_network("10.244.9.0/24"), device="nonexistent0")

    @pytest.fixture
    def disturb(self, namespace: NetworkNamespace, overlay: IPNetwork) -> Callable[[], None]:
        return lambda: namespace.ip(f"route delete {overlay} dev overlay0")

    @pytest.fixture
    def add_foreign(self, namespace: NetworkNamespace) -> AddForeign:
        def add(destination: IPNetwork) -> None:
            # A plain one, one with overlaynet's number but of another instance, and one of another table.
            version = f"-{destination.version}"
            namespace.execute(["ip", version, "route", "add", str(destination), "dev", "eth0"])
            marks = ["proto", str(PROTOCOL), "metric", str(0xF0000000 + (NUMBER ^ 1))]
            namespace.execute(["ip", version, "route", "add", "unreachable", str(destination), *marks])
            namespace.execute(
                ["ip", version, "route", "add", str(destination), "dev", "overlay0", "proto", "82", "table", "100"]
            )

        return add

    @pytest.fixture
    def foreign(self, namespace: NetworkNamespace) -> Callable[[], list[str]]:
        def read() -> list[str]:
            lines = namespace.execute(["ip", "route", "show", "table", "all"]).stdout.splitlines()
            lines += namespace.execute(["ip", "-6", "route", "show", "table", "all"]).stdout.splitlines()
            ours = ("proto 82 scope link", f"metric {0xF0000000 + NUMBER}", "dev overlay0 proto 82 metric 1024")
            # Link-local ones come by themselves, when the kernel has found the addresses to be unique.
            return [
                line
                for line in lines
                if "table 100" in line or not any(text in line for text in (*ours, "fe80", "ff00"))
            ]

        return read


def as_route(entry: dict[str, Any]) -> Route:
    """A route as ``ip -json`` tells it."""
    unreachable = entry["type"] == "unreachable"
    return Route(
        ip_network(entry["dst"]),
        kind="unreachable" if unreachable else "unicast",
        device=None if unreachable else entry["dev"],
        gateway=ip_address(entry["gateway"]) if "gateway" in entry else None,
        onlink="onlink" in entry["flags"],
    )


# -- what operators see


async def test_the_routes_look_as_documented(namespace: NetworkNamespace, router: NetlinkRouter) -> None:
    overlay6 = ip_network("fd00:10:244::/48")
    await router.apply([BACKSTOP, LEADING, Route(overlay6, kind="unreachable"), Route(overlay6, device="overlay0")])
    assert shown(namespace) == [LEADING_TEXT, BACKSTOP_TEXT]
    assert shown(namespace, "-6") == [
        "fd00:10:244::/48 dev overlay0 proto 82 metric 1024 pref medium",
        f"unreachable fd00:10:244::/48 dev lo proto 82 metric {0xF0000000 + NUMBER} pref medium",
    ]


async def test_routes_through_a_shared_device_carry_a_metric(
    namespace: NetworkNamespace, router: NetlinkRouter
) -> None:
    direct = Route(ip_network("10.244.2.0/24"), device="eth0", gateway=ip_address("172.16.130.164"))
    onlink = Route(ip_network("10.244.3.0/24"), device="overlay0", gateway=ip_address("10.244.3.0"), onlink=True)
    await router.apply([BACKSTOP, direct, onlink])
    assert shown(namespace) == [
        BACKSTOP_TEXT,
        f"10.244.2.0/24 via 172.16.130.164 dev eth0 proto 82 metric {0xE0000000 + NUMBER}",
        "10.244.3.0/24 via 10.244.3.0 dev overlay0 proto 82 onlink",
    ]
    await router.aclose()
    assert shown(namespace) == [BACKSTOP_TEXT]


async def test_packets_do_not_leak_while_the_device_is_gone(namespace: NetworkNamespace, router: NetlinkRouter) -> None:
    def lookup() -> str:
        return namespace.execute(["ip", "route", "get", "10.244.2.194"], check=False).stdout.partition(" src")[0]

    await router.apply([BACKSTOP, LEADING])
    assert lookup() == "10.244.2.194 dev overlay0"
    namespace.ip("link delete overlay0")
    assert lookup() == ""  # unreachable
    await router.aclose()
    assert lookup() == ""
    namespace.ip("route delete unreachable 10.244.0.0/16")
    assert lookup() == "10.244.2.194 via 172.16.130.1 dev eth0"  # what the backstop is there for


async def test_backstops_come_first_and_go_last(monitor: WriteMonitor, router: NetlinkRouter) -> None:
    other = Route(ip_network("10.244.2.0/24"), device="overlay0")
    await router.apply([LEADING, other, BACKSTOP])
    assert monitor.events() == ["new unreachable", "new unicast", "new unicast"]
    await router.apply([])
    assert monitor.events() == ["deleted unicast", "deleted unicast", "deleted unreachable"]


async def test_a_changed_gateway_leaves_no_gap(
    namespace: NetworkNamespace, monitor: WriteMonitor, router: NetlinkRouter
) -> None:
    def via(gateway: str) -> Route:
        return Route(ip_network("10.244.2.0/24"), device="eth0", gateway=ip_address(gateway))

    await router.apply([via("172.16.130.164")])
    monitor.events()
    await router.apply([via("172.16.130.165")])
    assert monitor.events() == ["replaced unicast"]
    assert "via 172.16.130.165" in shown(namespace)[0]


# -- routes of others


async def test_two_instances_do_not_touch_each_other(namespace: NetworkNamespace, make_router: MakeRouter) -> None:
    namespace.ip("link add overlay1 type veth peer name far2", "link set overlay1 up")
    first, second = make_router(), make_router()
    await first.open("overlay0")
    await second.open("overlay1")
    network = ip_network("10.245.0.0/16")
    shared = Route(ip_network("10.245.2.0/24"), device="eth0", gateway=ip_address("172.16.130.164"))

    async def of_the_second() -> list[str]:
        lines = namespace.execute(["ip", "route", "show"]).stdout.splitlines()
        return [line for line in lines if "10.245." in line]

    await second.apply([Route(network, kind="unreachable"), Route(network, device="overlay1"), shared])
    before = await of_the_second()
    assert len(before) == 3
    await first.apply([BACKSTOP, LEADING])
    await first.apply([])
    await first.apply([BACKSTOP, LEADING])
    await first.aclose()
    assert await of_the_second() == before
    await second.apply([])
    assert await of_the_second() == []
    assert shown(namespace) == [BACKSTOP_TEXT]


@pytest.mark.parametrize(
    ("foreign", "named"),
    [
        ("10.244.0.0/16 dev eth0 proto static", "10.244.0.0/16 dev eth0 proto 4"),
        ("10.244.0.0/16 dev overlay0 proto static", "10.244.0.0/16 dev overlay0 proto 4"),
        ("blackhole 10.244.0.0/16 proto 99", "blackhole 10.244.0.0/16 proto 99"),
        ("10.244.0.0/16 via 172.16.130.9 dev eth0 proto 82", "10.244.0.0/16 via 172.16.130.9 dev eth0 proto 82"),
    ],
)
async def test_a_foreign_route_in_the_way_is_named_and_left_alone(
    namespace: NetworkNamespace, router: NetlinkRouter, foreign: str, named: str
) -> None:
    namespace.ip(f"route add {foreign}")
    other = Route(ip_network("10.244.9.0/24"), device="overlay0")
    with pytest.raises(RouterError) as refused:
        await router.apply([LEADING, BACKSTOP, other])
    assert str(refused.value) == (
        f"the route 10.244.0.0/16 dev overlay0 proto 82 cannot be set, because there is {named}, which is not this "
        f"overlay's; remove it with `ip route del {named}`, or give the overlay another network"
    )
    # The others are set all the same.
    assert BACKSTOP_TEXT in shown(namespace)
    assert any("10.244.9.0/24" in line for line in shown(namespace))
    # The way out works.
    namespace.ip(f"route del {named}")
    await router.apply([LEADING, BACKSTOP])
    assert shown(namespace) == [LEADING_TEXT, BACKSTOP_TEXT]


@pytest.mark.parametrize("way", ["via 172.16.130.9 dev eth0", "via 10.244.2.9 dev overlay0"])
async def test_a_foreign_route_beside_ours_is_not_replaced(
    namespace: NetworkNamespace, router: NetlinkRouter, way: str
) -> None:
    def via(gateway: str) -> Route:
        return Route(ip_network("10.244.2.0/24"), device="overlay0", gateway=ip_address(gateway), onlink=True)

    await router.apply([via("10.244.2.1")])
    # The kernel allows it if it is told to; replacing would then take the first of the two.
    namespace.ip(f"route prepend 10.244.2.0/24 {way} onlink proto static")
    with pytest.raises(RouterError, match=f"because there is 10.244.2.0/24 {way} .*proto 4"):
        await router.apply([via("10.244.2.2")])
    assert shown(namespace) == [f"10.244.2.0/24 {way} proto static onlink"]


async def test_other_protocol_numbers_are_not_ours(namespace: NetworkNamespace, make_router: MakeRouter) -> None:
    namespace.ip("route add 10.244.7.0/24 dev overlay0 proto 82")
    router = NetlinkRouter(NetlinkRouterOptions(protocol=90))
    await router.open("overlay0")
    try:
        await router.apply([LEADING])
        assert shown(namespace) == [
            "10.244.0.0/16 dev overlay0 proto 90 scope link",
            "10.244.7.0/24 dev overlay0 proto 82 scope link",
        ]
    finally:
        await router.aclose()
    assert shown(namespace) == ["10.244.7.0/24 dev overlay0 proto 82 scope link"]


# -- refusals


async def test_a_missing_device_is_named_and_the_backstop_set(
    namespace: NetworkNamespace, router: NetlinkRouter
) -> None:
    namespace.ip("link delete overlay0")
    with pytest.raises(RouterError) as refused:
        await router.apply([LEADING, BACKSTOP])
    assert str(refused.value) == (
        "the route 10.244.0.0/16 dev overlay0 proto 82 cannot be set: there is no device overlay0"
    )
    assert shown(namespace) == [BACKSTOP_TEXT]


async def test_several_refusals_are_counted(namespace: NetworkNamespace, router: NetlinkRouter) -> None:
    namespace.ip("link set overlay0 down")
    routes = [Route(ip_network(f"10.244.{i}.0/24"), device="overlay0") for i in range(3)]
    with pytest.raises(
        RouterError, match=r"cannot be set: Device for nexthop is not up \(2 more routes were refused\)$"
    ):
        await router.apply(routes)


async def test_a_route_without_a_device_is_refused(router: NetlinkRouter) -> None:
    with pytest.raises(RouterError, match="the route to 10.244.0.0/16 names no device"):
        await router.apply([Route(ip_network("10.244.0.0/16"), gateway=ip_address("172.16.130.1"))])


async def test_a_kernel_that_says_nothing_does_not_keep_it_from_closing(
    router: NetlinkRouter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await router.apply([LEADING])

    def refuse(kernel: Netlink) -> Netlink:
        raise NetlinkError("open a netlink socket", errno.EPERM)

    monkeypatch.setattr(Netlink, "__enter__", refuse)
    text = "the kernel refused to open a netlink socket: Operation not permitted; run as root or with CAP_NET_ADMIN"
    with pytest.raises(RouterError) as refused:
        await router.apply([LEADING])
    assert str(refused.value) == text
    await router.aclose()
    (record,) = [record for record in caplog.records if record.message == "routes left behind"]
    assert record.__dict__["fields"] == {"reason": text}


# -- size, cancellation, changes


async def test_a_thousand_routes(namespace: NetworkNamespace, monitor: WriteMonitor, router: NetlinkRouter) -> None:
    routes = [Route(ip_network(f"10.{244 + i // 256}.{i % 256}.0/24"), device="overlay0") for i in range(1000)]
    await router.apply(routes)
    assert monitor.events() == ["new unicast"] * 1000
    await router.apply(routes)
    assert monitor.events() == []
    await router.apply(routes[:10])
    assert monitor.events() == ["deleted unicast"] * 990


async def test_a_cancelled_apply_writes_nothing_after_a_later_one(
    namespace: NetworkNamespace, router: NetlinkRouter
) -> None:
    many = [Route(ip_network(f"10.244.{i}.0/24"), device="overlay0") for i in range(200)]
    for delay in (0, 0.005, 0.02, 0.05):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await router.apply(many)
        await router.apply([BACKSTOP])
        await asyncio.sleep(0.1)
        assert shown(namespace) == [BACKSTOP_TEXT]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are told as often as they come."""
    monkeypatch.setattr(ChangeSignal, "_INTERVAL", 0.0)


@pytest.mark.usefixtures("impatient")
async def test_a_change_made_by_hand_is_noticed_and_repaired(
    namespace: NetworkNamespace, router: NetlinkRouter
) -> None:
    await settle(router)
    await router.apply([BACKSTOP, LEADING])
    await settle(router)
    namespace.ip("route delete 10.244.0.0/16 dev overlay0")
    await within(router.changed())
    await router.apply([BACKSTOP, LEADING])
    assert shown(namespace) == [LEADING_TEXT, BACKSTOP_TEXT]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "change",
    [
        "route add 10.9.0.0/16 dev eth0",
        "route add fd00:9::/64 dev eth0",
        "address add 10.9.0.1/24 dev eth0",
        "address add fd00:9::1/64 dev eth0 nodad",
        "link set overlay0 down",
    ],
)
async def test_every_kind_of_change_is_noticed(namespace: NetworkNamespace, router: NetlinkRouter, change: str) -> None:
    await settle(router)
    namespace.ip(change)
    await within(router.changed())


@pytest.mark.usefixtures("impatient")
async def test_a_change_while_nobody_waits_is_not_lost(namespace: NetworkNamespace, router: NetlinkRouter) -> None:
    await settle(router)
    namespace.ip("route add 10.9.0.0/16 dev eth0")
    await asyncio.sleep(0.05)
    await within(router.changed())


@pytest.mark.usefixtures("impatient")
async def test_a_change_is_not_lost_by_cancelling(namespace: NetworkNamespace, router: NetlinkRouter) -> None:
    await settle(router)
    waiting = asyncio.create_task(router.changed())
    await asyncio.sleep(0.01)
    namespace.ip("route add 10.9.0.0/16 dev eth0")
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await within(router.changed())


async def test_a_flood_of_changes_is_one_change(namespace: NetworkNamespace, router: NetlinkRouter) -> None:
    """More messages than any buffer takes, from somebody whose routes never rest."""
    await settle(router, silence=1.5)
    started = time.monotonic()
    returned = 0

    async def follow() -> None:
        nonlocal returned
        while True:
            await router.changed()
            returned += 1

    following = asyncio.create_task(follow())
    batch = [f"route {verb} 10.9.{i}.0/24 dev eth0" for verb in ("add", "delete") for i in range(250)]
    for _ in range(10):
        await asyncio.to_thread(namespace.ip, *batch)
    elapsed = time.monotonic() - started
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    assert returned <= elapsed + 1
    # And it still listens.
    await settle(router, silence=1.5)
    namespace.ip("route add 10.9.0.0/16 dev eth0")
    await within(router.changed())


async def test_nothing_stays_open(namespace: NetworkNamespace) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        router = NetlinkRouter(NetlinkRouterOptions())
        await router.open("overlay0")
        await router.apply([BACKSTOP, LEADING])
        waiting = asyncio.create_task(router.changed())
        await asyncio.sleep(0.01)
        await router.aclose()
        assert not waiting.done()
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
    assert len(list(Path("/proc/self/fd").iterdir())) == before


async def within(coroutine: Awaitable[None]) -> None:
    async with asyncio.timeout(WAIT):
        await coroutine


async def settle(router: NetlinkRouter, silence: float = 0.3) -> None:
    """Wait until what has changed so far, the kernel's own afterthoughts included, has been told."""
    for _ in range(30):
        try:
            async with asyncio.timeout(silence):
                await router.changed()
        except TimeoutError:
            return
    raise AssertionError("it never rests")
