"""The network of whole daemons in one process, as plugin authors use it."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from overlaynet.errors import BackendError
from overlaynet.hookspecs import hookimpl
from overlaynet.model import Peer
from overlaynet.stores.file import FileStore
from overlaynet.stores.memory import MemoryStore, MemoryTable
from overlaynet.testing import Network, Node
from overlaynet.testing.fakes import FakeBackend
from overlaynet.testing.flow import Kind, Packet, Step

pytestmark = pytest.mark.anyio

DAY = 86400.0


def fake(node: Node) -> FakeBackend:
    """The node's backend, which is a fake."""
    assert isinstance(node.backend, FakeBackend)
    return node.backend


def kinds(packet: Packet) -> list[Kind | None]:
    return [step.kind for step in packet.steps]


async def test_a_packet_goes_step_by_step() -> None:
    async with Network(2) as network:
        a, b = network.nodes
        packet = network.send(a, b, b"hello")
        assert packet.steps == []
        steps = []
        while (step := await network.step()) is not None:
            steps.append(step)
        assert packet.steps == steps
        assert kinds(packet) == [Kind.ROUTED, Kind.ENCAPSULATED, Kind.ON_THE_LINK, Kind.DELIVERED]
        assert [(step.node, step.to) for step in steps] == [("a", None), ("a", None), ("a", "b"), ("b", None)]
        assert steps[1].detail == f"[172.16.0.1 > 172.16.0.2 [{a.address} > {b.address}]]"
        assert steps[3].detail == f"{b.address}, 5 bytes"
        assert packet.delivered
        assert packet.dropped is None
        assert await network.step() is None


async def test_steps_of_several_packets_take_turns() -> None:
    async with Network(3) as network:
        a, b, c = network.nodes
        first, second = network.send(a, b), network.send(c, a)
        seen = []
        while (step := await network.step()) is not None:
            seen.append(step.packet)
        assert seen == [first.number, second.number] * 4


@pytest.mark.parametrize(
    ("to", "source", "size", "reason"),
    [
        ("192.0.2.1", None, 0, "leaked: a has no route for 192.0.2.1"),
        ("10.255.255.9", None, 0, "no_route: no peer has 10.255.255.9"),
        (None, "10.9.8.7", 0, "unknown_peer"),
        (None, None, 1472 - 27, "too_big: 1473 bytes do not fit into the MTU of 1472"),
    ],
)
async def test_what_cannot_be_carried_is_dropped_with_the_reason(
    to: str | None, source: str | None, size: int, reason: str
) -> None:
    document = {"Network": "10.0.0.0/8", "SubnetMax": "10.99.0.0"}
    async with Network(2, document=document) as network:
        a, b = network.nodes
        packet = network.send(a, b if to is None else to, bytes(size), source=source)
        await network.deliver()
        assert packet.dropped is not None
        if source is None:
            assert packet.dropped.startswith(reason)
            assert packet.steps[-1].node == "a"
        else:
            assert packet.dropped == f"spoofed_source: {source} is not in the subnet of the peer at 172.16.0.1"
            assert packet.steps[-1].node == "b"
            assert b.backend.status()["drops"] == {"spoofed_source": 1}


async def test_the_largest_packet_is_delivered() -> None:
    async with Network(2) as network:
        a, b = network.nodes
        packet = network.send(a, b, bytes(1472 - 28))
        await network.deliver()
        assert packet.delivered


async def test_links_lose_and_delay_what_they_are_told_to() -> None:
    loop = asyncio.get_running_loop()
    async with Network(2) as network:
        a, b = network.nodes
        network.drop(a, b, 1)
        lost, carried, back = network.send(a, b), network.send(a, b), network.send(b, a)
        await network.deliver()
        assert lost.dropped == "drop: lost on the link"
        assert (lost.steps[-1].node, lost.steps[-1].to) == ("a", "b")
        assert carried.delivered
        assert back.delivered
        network.delay(a, b, 2.5)
        before = loop.time()
        late, early = network.send(a, b), network.send(b, a)
        await network.deliver()
        assert early.steps[-1].time == before
        assert late.steps[-1].time == before + 2.5
        network.heal()
        again = network.send(a, b)
        await network.deliver()
        assert again.steps[-1].time == before + 2.5


async def test_a_partition_keeps_its_sides_apart() -> None:
    async with Network(4) as network:
        a, b, c, d = network.nodes
        network.partition([a, b], [c])
        packets = [network.send(a, b), network.send(b, c), network.send(c, a), network.send(d, a)]
        await network.deliver()
        assert [packet.delivered for packet in packets] == [True, False, False, False]
        assert packets[1].dropped == "partition: they are on two sides"
        network.heal()
        packet = network.send(b, c)
        await network.deliver()
        assert packet.delivered


async def test_a_crashed_node_keeps_its_lease_and_finds_it_again() -> None:
    async with Network(3) as network:
        a, b, _ = network.nodes
        lease = b.lease
        await b.crash()
        assert not b.running
        to_it, from_it = network.send(a, b), network.send(b, a)
        await network.deliver()
        assert to_it.dropped == "no_daemon: nobody listens on b"
        assert from_it.dropped is not None
        assert from_it.dropped.startswith("unreachable: b answers for")
        b.start()
        await network.converge()
        assert b.lease.subnets == lease.subnets
        packet = network.send(a, b)
        await network.deliver()
        assert packet.delivered


async def test_a_crashed_node_is_no_peer_once_its_lease_has_expired() -> None:
    async with Network(2) as network:
        a, b = network.nodes
        await b.crash()
        await asyncio.sleep(DAY + 1)
        packet = network.send(a, b)
        await network.deliver()
        assert packet.dropped == f"no_route: no peer has {b.address}"


async def test_a_node_that_stops_gives_its_lease_back_if_it_is_told_to() -> None:
    async with Network(3, release_on_stop=True) as network:
        a, b, c = network.nodes
        await b.stop()
        await asyncio.sleep(1)
        assert [peer.node for peer in a.peers] == ["c"]
        assert [peer.node for peer in c.peers] == ["a"]
        with pytest.raises(RuntimeError, match="a runs already"):
            a.start()


async def test_without_the_store_traffic_goes_on_and_news_waits() -> None:
    async with Network(3) as network:
        a, b, c = network.nodes
        network.store_down(a)
        assert b.daemon is not None
        assert a.daemon is not None
        await c.crash()
        await asyncio.sleep(DAY / 2)
        packet = network.send(a, b)
        await network.deliver()
        assert packet.delivered
        assert "store" in str(a.daemon.status()["problems"])
        assert b.daemon.status()["problems"] == {}
        await asyncio.sleep(DAY / 2 + 60)
        assert "c" not in {peer.node for peer in b.peers}
        network.heal()
        await asyncio.sleep(120)  # its lease has run out meanwhile, and is asked for again within a minute
        assert [peer.node for peer in a.peers] == ["b"]
        assert a.daemon.status()["problems"] == {}


async def test_a_node_that_starts_without_the_store_waits_for_it() -> None:
    async with Network(2) as network:
        _, b = network.nodes
        await b.crash()
        network.store_down()
        b.start()
        with pytest.raises(AssertionError, match="after 30 seconds, b is not ready"):
            await network.converge(30)
        network.heal()
        await network.converge()


async def test_converging_says_which_daemon_has_failed() -> None:
    with pytest.raises(AssertionError, match="the daemon of [ab] has failed: all 1 subnets of") as caught:
        async with Network(2, document={"Network": "10.244.0.0/16", "SubnetMax": "10.244.1.0"}):
            pass
    assert "has failed" in "".join(caught.value.__notes__)


async def test_a_daemon_that_fails_meanwhile_fails_the_test() -> None:
    async def fail() -> None:
        async with Network(2) as network:
            fake(network.nodes[1]).fail("its device is no more")
            await asyncio.sleep(60)

    with pytest.raises(AssertionError, match="the daemon of b has failed: its device is no more") as caught:
        await fail()
    assert "has failed" in "".join(caught.value.__notes__)


async def test_a_failure_that_is_expected_fails_nothing() -> None:
    async with Network(2) as network:
        a, b = network.nodes
        fake(b).fail("its device is no more")
        assert str(await b.failed()) == "its device is no more"
        b.start()
        await network.converge()
        fake(a).fail("no more, either")
        with pytest.raises(BackendError, match="no more, either"):
            await a.stop()
        await b.stop()
        with pytest.raises(RuntimeError, match="the daemon of b has not failed"):
            await b.failed()


async def test_a_failure_is_not_forgotten_by_a_restart() -> None:
    async def fail() -> None:
        async with Network(1) as network:
            (a,) = network.nodes
            fake(a).fail("its device is no more")
            await asyncio.sleep(1)
            a.start()
            await network.converge()

    with pytest.raises(AssertionError, match="its device is no more"):
        await fail()


async def test_an_observer_that_raises_fails_the_test() -> None:
    class Broken:
        @hookimpl
        def overlaynet_recovered(self) -> None:
            raise ZeroDivisionError("in the observer")

    async def fail() -> None:
        async with Network(1, observers=[Broken()]) as network:
            network.store_down()
            await asyncio.sleep(60)
            network.heal()
            await asyncio.sleep(60)

    with pytest.raises(AssertionError, match=r"failed in overlaynet_recovered: ZeroDivisionError\('in the observer'\)"):
        await fail()


async def test_a_crash_closes_no_driver_but_what_the_kernel_closes() -> None:
    class Closing(MemoryStore):
        closed = 0

        async def aclose(self) -> None:
            Closing.closed += 1
            await super().aclose()

    table = MemoryTable()
    async with Network(2, make_store=lambda: Closing(table=table), release_on_stop=True) as network:
        a, b = network.nodes
        Closing.closed = 0
        await b.crash()
        assert not fake(b).closed
        assert Closing.closed == 0
        assert [route.kind for route in b.routes] == ["unreachable"]
        assert [peer.node for peer in a.peers] == ["b"]
        await a.stop()
        assert fake(a).closed
        assert Closing.closed == 1
    assert Closing.closed == 2  # what nobody closed is freed with the network


@pytest.mark.parametrize(("underlay", "outer"), [((6,), "fd00:16::"), ((4, 6), "172.16.0."), ((4,), "172.16.0.")])
async def test_underlay_and_overlay_are_of_any_ip_version(underlay: tuple[int, ...], outer: str) -> None:
    document = {"Network": "10.244.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00:244::/48"}
    async with Network(3, document=document, underlay=underlay) as network:
        a, b, c = network.nodes
        assert [address.version for address in b.addresses] == [4, 6]
        packets = [network.send(a, address, b"hello") for address in b.addresses]
        await network.deliver()
        assert all(packet.delivered for packet in packets)
        assert packets[1].source == a.addresses[1]
        assert packets[1].steps[1].detail.startswith(f"[{outer}1 > {outer}2 [")
        most = 1500 - (28 if underlay == (4,) else 48)
        fitting, too_big = network.send(c, a, bytes(most - 28)), network.send(c, a, bytes(most - 27))
        await network.deliver()
        assert fitting.delivered
        assert too_big.dropped == f"too_big: {most + 1} bytes do not fit into the MTU of {most}"


async def test_an_overlay_of_ipv6_alone_is_carried() -> None:
    document = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00:244::/48"}
    async with Network(2, document=document, underlay=(6,)) as network:
        a, b = network.nodes
        packet = network.send(a, b)
        await network.deliver()
        assert packet.delivered


@pytest.mark.parametrize("underlay", [(), (4, 5)])
def test_an_ip_version_that_does_not_exist_is_refused(underlay: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="name the IP versions"):
        Network(2, underlay=underlay)


async def test_observers_see_every_daemon() -> None:
    class Observer:
        def __init__(self) -> None:
            self.added: list[str] = []

        @hookimpl
        def overlaynet_peer_added(self, peer: Peer) -> None:
            self.added.append(peer.node)

    observer = Observer()
    async with Network(3, observers=[observer]):
        assert sorted(observer.added) == ["a", "a", "b", "b", "c", "c"]


async def test_a_failure_shows_what_happened_as_a_diagram() -> None:
    addresses = {}

    async def fail() -> None:
        async with Network(3) as network:
            a, b, _ = network.nodes
            addresses.update({str(a.address): "10.1.0.2", str(b.address): "10.2.0.2"})
            network.steps.clear()
            network.drop(a, b, 1)
            network.send(a, b, b"lost")
            await network.deliver()
            network.send(b, a, b"hello")
            await network.deliver()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        await fail()
    (note,) = caught.value.__notes__
    for address, shown in addresses.items():
        note = note.replace(address, shown)
    lines = [line[16:] for line in note.splitlines()[2:]]
    assert lines == [
        "a                       b",
        "== the link from a to b loses 1 packets ==",
        "* #1 routed into the device: 10.1.0.2 > 10.2.0.2 by 10.0.0.0/8",
        "* #1 encapsulated: [172.16.0.1 > 172.16.0.2 [10.1.0.2 > 10.2.0.2]]",
        "|--------- #1 --------X |  drop: lost on the link",
        "|                       * #2 routed into the device: 10.2.0.2 > 10.1.0.2 by 10.0.0.0/8",
        "|                       * #2 encapsulated: [172.16.0.2 > 172.16.0.1 [10.2.0.2 > 10.1.0.2]]",
        "|<--------- #2 -------- |  172.16.0.2 > 172.16.0.1",
        "* #2 delivered: 10.1.0.2, 5 bytes",
    ]


async def test_any_number_of_nodes_can_be_made_and_their_diagram_stays_readable() -> None:
    async with Network(30) as network:
        assert network.nodes[0].name == "node-1"
        assert len({node.lease.subnets for node in network.nodes}) == 30
        listed = network.diagram().splitlines()
        assert listed[0].endswith("earlier steps)") or len(listed) == 60
        packets = [network.send(network.nodes[0], node) for node in network.nodes[1:]]
        await network.deliver()
        assert all(packet.delivered for packet in packets)
        assert len(network.diagram().splitlines()) <= 82


class TestOnTheRealClock:
    @pytest.fixture
    def anyio_backend(self) -> object:
        return "asyncio"

    async def test_nodes_can_share_any_store(self, tmp_path: Path) -> None:
        make: Callable[[], FileStore] = lambda: FileStore(FileStore.Options(path=str(tmp_path / "store")))  # noqa: E731
        async with Network(2, make_store=make) as network:
            a, b = network.nodes
            packet = network.send(a, b)
            await network.deliver()
            assert packet.delivered


def test_a_step_in_words() -> None:
    assert str(Step(1.5, "a", "one > two", Kind.ON_THE_LINK, 7, "b")) == "1.500 s #7 a to b: on the link: one > two"
    assert str(Step(0.0, None, "all is healed")) == "0.000 s: all is healed"
