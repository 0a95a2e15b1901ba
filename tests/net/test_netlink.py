"""The layer over netlink, checked against what ``ip`` says, in namespaces of the test's own."""

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_interface, ip_network
from operator import methodcaller
from types import SimpleNamespace
from typing import TypeVar

import attrs
import pytest

from overlaynet.netlink import (
    ForwardingEntry,
    KernelRoute,
    Link,
    Neighbour,
    Netlink,
    NetlinkError,
    NetlinkWriter,
    Vxlan,
    netlink,
)
from overlaynet.testing.namespaces import NetworkNamespace

T = TypeVar("T")


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    """A namespace with a veth pair: ``eth0`` (10.1.0.1/24, fd00:1::1/64) and ``eth1``."""
    with NetworkNamespace(label="netlink") as made:
        made.ip(
            "link set lo up",
            "link add eth0 type veth peer name eth1",
            "link set eth0 up",
            "link set eth1 up",
            "address add 10.1.0.1/24 dev eth0",
            "address add fd00:1::1/64 dev eth0 nodad",
        )
        yield made


def ask(namespace: NetworkNamespace, function: Callable[[Netlink], T]) -> T:
    def call() -> T:
        with Netlink() as kernel:
            return function(kernel)

    return namespace.run(call)


def shown(namespace: NetworkNamespace, *arguments: str) -> list[str]:
    """What ``ip route show`` prints, without its trailing blanks."""
    return [line.strip() for line in namespace.execute(["ip", *arguments]).stdout.splitlines()]


def test_links_are_read(namespace: NetworkNamespace) -> None:
    namespace.ip("link set eth0 alias our-own mtu 1400", "link set eth1 down")
    links = {link.name: link for link in ask(namespace, lambda kernel: kernel.links())}
    told = {entry["ifname"]: entry for entry in namespace.ip_json("link", "show")}
    assert links["eth0"] == Link(
        index=told["eth0"]["ifindex"],
        name="eth0",
        kind="veth",
        mtu=1400,
        up=True,
        alias="our-own",
        hardware_address=told["eth0"]["address"],
    )
    assert not links["eth1"].up
    assert links["lo"].kind == ""
    assert ask(namespace, lambda kernel: kernel.link("eth0")) == links["eth0"]


@pytest.mark.parametrize("name", ["eth9", "", "a-name-that-is-longer-than-the-kernel-allows"])
def test_a_link_that_does_not_exist_is_none(namespace: NetworkNamespace, name: str) -> None:
    assert ask(namespace, lambda kernel: kernel.link(name)) is None


def test_links_are_configured(namespace: NetworkNamespace) -> None:
    def configure(kernel: Netlink) -> None:
        for _ in range(2):
            kernel.configure_link("eth0", mtu=1300, up=False, alias="overlaynet", transmit_queue_length=77)

    ask(namespace, configure)
    (told,) = namespace.ip_json("link", "show", "eth0")
    assert (told["mtu"], told["ifalias"], told["txqlen"]) == (1300, "overlaynet", 77)
    assert "UP" not in told["flags"]
    ask(namespace, lambda kernel: kernel.configure_link("eth0", up=True))
    (told,) = namespace.ip_json("link", "show", "eth0")
    assert "UP" in told["flags"]
    assert told["mtu"] == 1300


def test_a_link_is_deleted_once(namespace: NetworkNamespace) -> None:
    ask(namespace, lambda kernel: kernel.delete_link("eth0"))
    ask(namespace, lambda kernel: kernel.delete_link("eth0"))
    assert [entry["ifname"] for entry in namespace.ip_json("link", "show")] == ["lo"]


def test_addresses_are_read(namespace: NetworkNamespace) -> None:
    namespace.ip(
        "address add 10.1.0.2/24 dev eth0",
        "address add 10.1.1.1/24 dev eth0 valid_lft 1000 preferred_lft 1000",
        "address add 10.1.2.1/24 dev eth0 valid_lft 1000 preferred_lft 0",
        "address add 10.1.3.1/24 dev eth0 scope link",
        "address add 10.1.4.1 peer 10.1.4.2/32 dev eth0",
    )
    found = ask(namespace, lambda kernel: kernel.addresses("eth0"))
    by_address = {str(address.address): address for address in found}
    assert {address.interface for address in found} == {"eth0"}
    first = by_address["10.1.0.1/24"]
    assert first.permanent
    assert not any([first.temporary, first.deprecated, first.tentative])
    assert first.scope == 0
    assert by_address["10.1.0.2/24"].temporary  # the kernel's flag for secondary IPv4 addresses is the same
    assert not by_address["10.1.1.1/24"].permanent
    assert not by_address["10.1.1.1/24"].deprecated
    assert by_address["10.1.2.1/24"].deprecated
    assert by_address["10.1.3.1/24"].scope == 253
    assert by_address["10.1.4.1/32"].peer == ip_address("10.1.4.2")
    assert by_address["fd00:1::1/64"].permanent
    assert any(address.address.is_link_local for address in found)
    everything = ask(namespace, lambda kernel: kernel.addresses())
    assert {address.interface for address in everything} == {"lo", "eth0", "eth1"}
    assert [address for address in everything if address.interface == "eth0"] == found


def test_addresses_are_set_as_a_whole(namespace: NetworkNamespace) -> None:
    namespace.ip(
        "address add 10.1.4.1 peer 10.1.4.2/32 dev eth0",
        "address add 10.244.1.0 peer 10.244.1.9/32 dev eth0",
        "address add 10.9.0.1/24 dev eth1",
    )
    wanted = [ip_interface("10.244.1.0/32"), ip_interface("10.1.0.1/24"), ip_interface("fd00:244::1/128")]

    def set_and_read(kernel: Netlink) -> set[str]:
        kernel.set_addresses("eth0", wanted)
        return {str(a.address) for a in kernel.addresses("eth0") if not a.tentative}

    link_local = {
        f"{a['local']}/{a['prefixlen']}"
        for a in namespace.ip_json("address", "show", "dev", "eth0")[0]["addr_info"]
        if a["local"].startswith("fe80")
    }
    assert link_local
    for _ in range(2):
        found = ask(namespace, set_and_read)
        assert {text for text in found if not text.startswith("fe80")} == {str(address) for address in wanted}
    present = ask(namespace, lambda kernel: kernel.addresses("eth0"))
    assert {str(address.address) for address in present} >= link_local
    assert all(address.peer is None for address in present)
    assert "10.9.0.1" in namespace.execute(["ip", "address", "show", "dev", "eth1"]).stdout
    ask(namespace, lambda kernel: kernel.set_addresses("eth0", []))
    assert all(a.address.is_link_local for a in ask(namespace, lambda kernel: kernel.addresses("eth0")))


def test_an_address_stays_although_its_primary_goes(namespace: NetworkNamespace) -> None:
    namespace.ip("address add 10.1.0.2/24 dev eth0")  # secondary: the kernel deletes it along with 10.1.0.1/24
    wanted = ip_interface("10.1.0.2/24")
    ask(namespace, lambda kernel: kernel.set_addresses("eth0", [wanted]))
    present = ask(namespace, lambda kernel: kernel.addresses("eth0"))
    assert [address.address for address in present if address.address.version == 4] == [wanted]


ROUTES = [
    (
        KernelRoute(ip_network("10.244.0.0/16"), device="eth0", protocol=82, scope=253),
        "10.244.0.0/16 dev eth0 proto 82 scope link",
    ),
    (
        KernelRoute(ip_network("10.244.0.0/16"), kind="unreachable", metric=0xF0000001, protocol=82),
        "unreachable 10.244.0.0/16 proto 82 metric 4026531841",
    ),
    (
        KernelRoute(ip_network("10.244.2.0/24"), device="eth0", gateway=ip_address("10.1.0.7"), protocol=82, metric=5),
        "10.244.2.0/24 via 10.1.0.7 dev eth0 proto 82 metric 5",
    ),
    (
        KernelRoute(
            ip_network("10.244.3.0/24"), device="eth0", gateway=ip_address("10.244.3.0"), onlink=True, protocol=82
        ),
        "10.244.3.0/24 via 10.244.3.0 dev eth0 proto 82 onlink",
    ),
    (
        KernelRoute(
            ip_network("10.244.4.0/24"), device="eth0", protocol=82, scope=253, preferred_source=ip_address("10.1.0.1")
        ),
        "10.244.4.0/24 dev eth0 proto 82 scope link src 10.1.0.1",
    ),
    (
        KernelRoute(ip_network("0.0.0.0/0"), device="eth0", gateway=ip_address("10.1.0.254"), protocol=4),
        "default via 10.1.0.254 dev eth0 proto static",
    ),
    (
        KernelRoute(ip_network("fd00:244::/48"), device="eth0", metric=1024, protocol=82),
        "fd00:244::/48 dev eth0 proto 82 metric 1024 pref medium",
    ),
    (
        KernelRoute(ip_network("fd00:244::/48"), kind="unreachable", metric=0xF0000001, protocol=82),
        "unreachable fd00:244::/48 dev lo proto 82 metric 4026531841 pref medium",
    ),
    (
        KernelRoute(
            ip_network("fd00:245::/64"),
            device="eth0",
            gateway=ip_address("fd00:245::1"),
            onlink=True,
            metric=1024,
            protocol=82,
        ),
        "fd00:245::/64 via fd00:245::1 dev eth0 proto 82 metric 1024 onlink pref medium",
    ),
    (
        KernelRoute(ip_network("::/0"), device="eth0", gateway=ip_address("fd00:1::fe"), protocol=4, metric=1024),
        "default via fd00:1::fe dev eth0 proto static metric 1024 pref medium",
    ),
]


@pytest.mark.parametrize(("route", "text"), ROUTES, ids=[text.split(" proto")[0] for _, text in ROUTES])
def test_routes_are_added_read_and_deleted(namespace: NetworkNamespace, route: KernelRoute, text: str) -> None:
    show = ["route", "show"] if route.destination.version == 4 else ["-6", "route", "show"]
    before = shown(namespace, *show)
    ask(namespace, lambda kernel: kernel.add_route(route))
    assert [line for line in shown(namespace, *show) if line not in before] == [text]
    assert route in ask(namespace, lambda kernel: kernel.routes())
    assert ask(namespace, lambda kernel: kernel.routes(protocol=route.protocol)) == [route]
    with pytest.raises(NetlinkError) as refused:
        ask(namespace, lambda kernel: kernel.add_route(route))
    assert refused.value.errno == errno.EEXIST
    ask(namespace, lambda kernel: kernel.delete_route(route))
    assert shown(namespace, *show) == before
    with pytest.raises(NetlinkError) as refused:
        ask(namespace, lambda kernel: kernel.delete_route(route))
    assert refused.value.errno == errno.ESRCH


def test_only_exactly_that_route_is_deleted(namespace: NetworkNamespace) -> None:
    ours = KernelRoute(ip_network("10.244.0.0/16"), device="eth0", protocol=82, scope=253)
    namespace.ip("route add 10.244.0.0/16 dev eth0 proto 90 metric 7")
    for other in (attrs.evolve(ours, metric=7), ours):
        with pytest.raises(NetlinkError):
            ask(namespace, methodcaller("delete_route", other))
    assert len(ask(namespace, lambda kernel: kernel.routes(protocol=90))) == 1


def test_a_route_is_replaced(namespace: NetworkNamespace) -> None:
    old = KernelRoute(ip_network("10.244.2.0/24"), device="eth0", gateway=ip_address("10.1.0.7"), protocol=82)
    new = attrs.evolve(old, gateway=ip_address("10.1.0.8"))

    def replace(kernel: Netlink) -> list[KernelRoute]:
        kernel.add_route(old)
        kernel.replace_route(new)
        return kernel.routes(protocol=82)

    assert ask(namespace, replace) == [new]


def test_routes_of_other_tables_are_not_listed(namespace: NetworkNamespace) -> None:
    namespace.ip("route add 10.99.0.0/16 dev eth0 table 100")
    found = ask(namespace, lambda kernel: kernel.routes())
    assert {str(route.destination) for route in found if route.destination.version == 4} == {"10.1.0.0/24"}


def test_routes_with_several_next_hops_are_read(namespace: NetworkNamespace) -> None:
    namespace.ip(
        "route add 10.5.0.0/16 proto 82 nexthop via 10.1.0.5 dev eth0 nexthop via 10.1.0.6 dev eth0",
        "route add 10.6.0.0/16 proto 82 via inet6 fd00:1::5 dev eth0",
    )
    several, crossed = ask(namespace, lambda kernel: kernel.routes(protocol=82))
    assert several == KernelRoute(
        ip_network("10.5.0.0/16"), device="eth0", gateway=ip_address("10.1.0.5"), protocol=82, multipath=True
    )
    assert crossed.gateway == ip_address("fd00:1::5")


def test_a_thousand_routes_are_listed_whole(namespace: NetworkNamespace) -> None:
    wanted = [f"10.{64 + i // 256}.{i % 256}.0/24" for i in range(1000)]
    namespace.ip(*[f"route add {destination} dev eth0 proto 82" for destination in wanted])
    found = ask(namespace, lambda kernel: kernel.routes(protocol=82))
    assert [str(route.destination) for route in found] == wanted


def test_routes_are_looked_up(namespace: NetworkNamespace) -> None:
    def lookup(address: str) -> tuple[str, str]:
        device, source = ask(namespace, lambda kernel: kernel.lookup_route(ip_address(address)))
        return device, str(source)

    namespace.ip("route add default via 10.1.0.254")
    assert lookup("10.1.0.9") == ("eth0", "10.1.0.1")
    assert lookup("192.0.2.1") == ("eth0", "10.1.0.1")
    assert lookup("fd00:1::9") == ("eth0", "fd00:1::1")
    assert lookup("10.1.0.1")[0] == "lo"
    with pytest.raises(NetlinkError, match="the kernel refused to route packets to fd00:2::1: Network is unreachable"):
        lookup("fd00:2::1")
    namespace.ip("route add unreachable 10.7.0.0/16")
    with pytest.raises(NetlinkError, match="No route to host"):
        lookup("10.7.0.1")


def test_the_default_route_with_the_lowest_metric_wins(namespace: NetworkNamespace) -> None:
    assert ask(namespace, lambda kernel: kernel.default_route(4)) is None
    namespace.ip(
        "route add default via 10.1.0.254 metric 200",
        "route add default via 10.1.0.253 metric 100",
        "route add unreachable default metric 50",
        "route add default via fd00:1::fe",
    )
    found = ask(namespace, lambda kernel: kernel.default_route(4))
    assert found is not None
    assert (found.device, found.gateway, found.metric) == ("eth0", ip_address("10.1.0.253"), 100)
    found = ask(namespace, lambda kernel: kernel.default_route(6))
    assert found is not None
    assert found.gateway == ip_address("fd00:1::fe")


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (
            lambda kernel: kernel.configure_link("eth0", mtu=99_999_999),
            errno.EINVAL,
            "the kernel refused to configure the interface eth0: mtu greater than device maximum",
        ),
        (
            lambda kernel: kernel.configure_link("eth9", mtu=1400),
            errno.ENODEV,
            "the kernel refused to find the interface eth9: No such device",
        ),
        (
            lambda kernel: kernel.add_route(
                KernelRoute(ip_network("10.2.0.0/16"), device="eth0", gateway=ip_address("192.0.2.1"), protocol=82)
            ),
            errno.ENETUNREACH,
            "the kernel refused to add the route 10.2.0.0/16 via 192.0.2.1 dev eth0 proto 82: Nexthop has invalid gateway",
        ),
        (
            lambda kernel: kernel.set_addresses("eth9", []),
            errno.ENODEV,
            "the kernel refused to find the interface eth9: No such device",
        ),
    ],
)
def test_errors_carry_the_kernels_words(
    namespace: NetworkNamespace, request_: Callable[[Netlink], object], code: int, message: str
) -> None:
    with pytest.raises(NetlinkError) as refused:
        ask(namespace, request_)
    assert (str(refused.value), refused.value.errno) == (message, code)


@pytest.mark.parametrize(("interrupted", "attempts"), [(1, 2), (1000, 20)])
def test_an_interrupted_dump_is_tried_again(interrupted: int, attempts: int) -> None:
    dumps = []

    class Interrupted:
        """A kernel whose interfaces change while it lists them, the first few times."""

        def link(self, command: str) -> list[dict[str, dict[str, int]]]:
            dumps.append(command)
            if len(dumps) > interrupted:
                return []
            return [{"header": {"flags": 0x2}}, {"header": {"flags": 0x12}}]

    kernel = Netlink()
    kernel._opened = Interrupted()
    if interrupted < attempts:
        assert kernel.links() == []
    else:
        with pytest.raises(
            NetlinkError, match="refused to list the interfaces: they changed during each of 20 attempts"
        ):
            kernel.links()
    assert len(dumps) == attempts


def test_a_kernel_without_ipv6_tells_no_route_twice(namespace: NetworkNamespace) -> None:
    def routes(kernel: Netlink) -> list[KernelRoute]:
        real = kernel._opened.route

        def without_ipv6(command: str, *, family: int, **arguments: object) -> object:
            return [*real(command, family=2, **arguments)]

        kernel._opened = SimpleNamespace(route=without_ipv6, close=kernel._opened.close)
        return kernel.routes()

    assert [str(route.destination) for route in ask(namespace, routes)] == ["10.1.0.0/24"]


def test_it_is_closed_and_opened_in_a_thread_of_its_own(namespace: NetworkNamespace) -> None:
    threads = []

    def names(kernel: Netlink) -> list[str]:
        threads.append(threading.current_thread())
        return [link.name for link in kernel.links()]

    async def use() -> list[str]:
        first = await netlink(names)
        assert await netlink(names) == first
        with pytest.raises(NetlinkError, match="No such device"):
            await netlink(lambda kernel: kernel.configure_link("eth9", mtu=1400))
        return first

    # In the namespace of the thread that asks, which its threads inherit.
    assert sorted(namespace.run_async(use)) == ["eth0", "eth1", "lo"]
    assert len(set(threads)) == 2


VXLANS = [
    Vxlan(7, 8473, ip_address("10.1.0.1"), "eth0"),
    Vxlan(7, 8472, ip_address("fd00:1::1"), "eth0", learning=True, group_policy=True),
    Vxlan(16777215, 4789),
]


@pytest.mark.parametrize("vxlan", VXLANS, ids=["IPv4", "IPv6", "no underlay"])
def test_vxlan_devices_are_made_and_read(namespace: NetworkNamespace, vxlan: Vxlan) -> None:
    def make(kernel: Netlink) -> Link | None:
        kernel.create_vxlan("vxlan7", vxlan, mtu=1400, hardware_address="02:00:00:00:00:07")
        return kernel.link("vxlan7")

    link = ask(namespace, make)
    assert link is not None
    assert (link.kind, link.mtu, link.hardware_address, link.up) == ("vxlan", 1400, "02:00:00:00:00:07", False)
    assert link.vxlan == vxlan
    (told,) = namespace.ip_json("link", "show", "vxlan7")
    details = told["linkinfo"]["info_data"]
    assert (details["id"], details["port"]) == (vxlan.identifier, vxlan.port)
    assert details.get("local", details.get("local6")) == (None if vxlan.local is None else str(vxlan.local))
    assert details.get("link") == vxlan.interface
    assert (details["learning"], details.get("gbp", False)) == (vxlan.learning, vxlan.group_policy)
    assert {link.vxlan for link in ask(namespace, lambda kernel: kernel.links()) if link.kind != "vxlan"} == {None}
    with pytest.raises(NetlinkError, match="refused to make the VXLAN device vxlan7: File exists") as refused:
        ask(namespace, make)
    assert refused.value.errno == errno.EEXIST


def test_a_hardware_address_is_set_while_the_device_is_up(namespace: NetworkNamespace) -> None:
    namespace.ip("link add vxlan7 type vxlan id 7 dstport 8472 local 10.1.0.1", "link set vxlan7 up")
    for _ in range(2):
        ask(namespace, lambda kernel: kernel.configure_link("vxlan7", hardware_address="02:00:00:00:00:77"))
    (told,) = namespace.ip_json("link", "show", "vxlan7")
    assert told["address"] == "02:00:00:00:00:77"


@pytest.mark.parametrize("address", ["10.1.0.9", "fd00:1::9"])
def test_neighbours_are_set_read_and_deleted(namespace: NetworkNamespace, address: str) -> None:
    other = "10.1.0.8" if ":" in address else "fd00:1::8"
    namespace.ip(
        f"neighbour add {other} dev eth0 lladdr 02:00:00:00:00:08 nud reachable",
        f"neighbour add {address} dev eth1 lladdr 02:00:00:00:00:01 nud permanent",
        f"neighbour add {address} dev eth0 lladdr 02:00:00:00:00:02 nud stale",
    )
    wanted = Neighbour(ip_address(address), "02:00:00:00:00:03")

    def read() -> set[Neighbour]:
        found = ask(namespace, lambda kernel: kernel.neighbours("eth0"))
        return {
            neighbour for neighbour in found if not (neighbour.address.is_multicast or neighbour.address.is_link_local)
        }

    learnt = Neighbour(ip_address(other), "02:00:00:00:00:08", permanent=False)
    assert read() == {learnt, attrs.evolve(wanted, hardware_address="02:00:00:00:00:02", permanent=False)}
    for _ in range(2):
        ask(namespace, lambda kernel: kernel.set_neighbour("eth0", wanted))
        assert read() == {learnt, wanted}
    assert shown(namespace, "neighbour", "show", address, "dev", "eth0") == [
        f"{address} lladdr 02:00:00:00:00:03 PERMANENT"
    ]
    for _ in range(2):
        ask(namespace, lambda kernel: kernel.delete_neighbour("eth0", wanted.address))
        assert read() == {learnt}
    assert shown(namespace, "neighbour", "show", "dev", "eth1", "nud", "permanent") != []


@pytest.mark.parametrize("version", [4, 6])
def test_forwarding_entries_are_set_read_and_deleted(namespace: NetworkNamespace, version: int) -> None:
    local, far, farther = (
        ("10.1.0.1", "10.1.0.2", "10.1.0.3") if version == 4 else ("fd00:1::1", "fd00:1::2", "fd00:1::3")
    )
    namespace.ip(
        f"link add vxlan7 type vxlan id 7 dstport 8472 local {local} dev eth0",
        f"link add vxlan8 type vxlan id 8 dstport 8472 local {local} dev eth0",
    )
    for device, state in (("vxlan8", "permanent"), ("vxlan7", "dynamic")):
        namespace.execute(["bridge", "fdb", "add", "02:00:00:00:00:09", "dev", device, "dst", far, "self", state])
    learnt = ForwardingEntry("02:00:00:00:00:09", ip_address(far), permanent=False)
    wanted = ForwardingEntry("02:00:00:00:00:02", ip_address(far))
    moved = attrs.evolve(wanted, destination=ip_address(farther))

    def read() -> set[ForwardingEntry]:
        return set(ask(namespace, lambda kernel: kernel.forwarding_entries("vxlan7")))

    assert read() == {learnt}
    for entry in (wanted, wanted, moved):
        ask(namespace, lambda kernel, entry=entry: kernel.set_forwarding_entry("vxlan7", entry))  # type: ignore[misc]
        assert read() == {learnt, entry}
    told = namespace.execute(["bridge", "fdb", "show", "dev", "vxlan7"]).stdout
    assert f"02:00:00:00:00:02 dst {farther} self permanent" in told
    for _ in range(2):
        ask(namespace, lambda kernel: kernel.delete_forwarding_entry("vxlan7", moved))
        assert read() == {learnt}
    assert ask(namespace, lambda kernel: kernel.forwarding_entries("eth0")) == []
    assert len(ask(namespace, lambda kernel: kernel.forwarding_entries("vxlan8"))) == 1


def test_what_is_on_the_link_is_told_from_what_is_behind_a_gateway(namespace: NetworkNamespace) -> None:
    namespace.ip(
        "route add default via 10.1.0.254",
        "route add 10.1.0.66/32 via 10.1.0.254",
        "route add 192.0.2.0/24 dev eth0",
        "route add unreachable 10.1.0.77/32",
        "route add blackhole 10.1.0.78/32",
        "route add prohibit 10.1.0.79/32",
        "route add 10.9.0.0/16 dev eth1",
        "address add 10.3.0.1/24 dev eth1",
    )

    def on_link(address: str) -> bool:
        return ask(namespace, lambda kernel: kernel.is_on_link(ip_address(address), "eth0"))

    assert [address for address in ("10.1.0.2", "192.0.2.7", "fd00:1::7") if not on_link(address)] == []
    gateways = ["10.1.0.66", "198.51.100.1"]
    nowhere = ["10.1.0.77", "10.1.0.78", "10.1.0.79", "fd00:9::1"]
    elsewhere = ["10.9.0.1", "10.3.0.2", "10.1.0.1", "127.0.0.1"]
    assert [address for address in [*gateways, *nowhere, *elsewhere] if on_link(address)] == []


def test_of_calls_that_overlap_the_last_one_writes_last(namespace: NetworkNamespace) -> None:
    began, may_end = threading.Event(), threading.Event()
    order: list[str] = []

    def first(kernel: Netlink) -> None:
        began.set()
        may_end.wait(20)
        note("first")

    def note(name: str) -> str:
        order.append(name)
        return name

    async def use() -> list[str | None]:
        writer = NetlinkWriter()
        slow = asyncio.create_task(writer.write(first))
        await asyncio.to_thread(began.wait, 20)
        slow.cancel()
        overtaken = asyncio.create_task(writer.write(lambda kernel: note("overtaken")))
        await asyncio.sleep(0)
        last = asyncio.create_task(writer.write(lambda kernel: note("last")))
        await asyncio.sleep(0)
        may_end.set()
        return [await overtaken, await last]

    assert namespace.run_async(use) == [None, "last"]
    assert order == ["first", "last"]
