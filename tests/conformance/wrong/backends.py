"""Backends that are wrong on purpose, each in one way; and one that is right, which they are made of."""

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Network
from typing import Any, ClassVar

import attrs
import pytest

from overlaynet.api import (
    Backend,
    BackendError,
    Delivery,
    Device,
    Dropped,
    IPAddress,
    Lease,
    LeaseData,
    Network,
    Peer,
    Route,
    Subnets,
    Underlay,
    between,
    option,
)
from overlaynet.model import JSON
from overlaynet.testing import VIRTUAL_CLOCK
from overlaynet.testing.backends import BackendConformance, CountWrites, MakeBackend, Observe
from overlaynet.testing.far_hosts import FarHost, host_at, numbered_peer, underlay_at
from overlaynet.testing.packets import parse_ip


class Host:
    """What a backend changes."""

    def __init__(self) -> None:
        self.device: Backend | None = None
        self.left: str | None = None
        self.peers: frozenset[Peer] = frozenset()
        self.writes = 0
        self.closed_too_early = False
        self.disturbed = asyncio.Event()
        self.taken = False
        """Somebody has taken the device away, and its name."""
        self.arrived: asyncio.Queue[bytes] = asyncio.Queue()
        self.delivered: asyncio.Queue[bytes] = asyncio.Queue()
        self.near: Peer | None = None
        """What the far host knows of this one."""


@attrs.frozen
class Options:
    name: str = option("model0", "name of the device")
    port: int = option(8285, "UDP port", check=between(1, 65535))


class Model(Backend):
    """A backend that is right, on a host of the test's."""

    Options = Options
    host: ClassVar[Host]

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.network: Network | None = None
        self.underlay: Underlay | None = None
        self.own: Subnets | None = None
        self.mtu = 0
        self.broken = asyncio.Event()

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        if self.host.device is not None:
            raise BackendError(f"the device {self.options.name} belongs to another backend")
        self.host.device = self
        self.network, self.underlay, self.mtu = network, underlay, underlay.mtu - 28
        await asyncio.sleep(0)
        return LeaseData("model", {"port": self.options.port})

    async def start(self, lease: Lease) -> Device:
        await asyncio.sleep(0)
        self.own = lease.subnets
        return Device(self.options.name, self.mtu)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        await asyncio.sleep(0)
        wanted = frozenset(peers)
        if self.host.peers != wanted:
            self.host.writes += 1
        self.host.peers = wanted
        if self.host.taken:
            raise BackendError(f"the device {self.options.name} is gone, and its name is taken")

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        assert self.network is not None
        if self.host.taken:
            return []
        return [Route(overlay, device=self.options.name) for overlay in self.network]

    async def set_underlay(self, underlay: Underlay) -> Device | None:
        self.underlay, self.mtu = underlay, underlay.mtu - 28
        await asyncio.sleep(0)
        return Device(self.options.name, self.mtu)

    async def run(self) -> None:
        await self.broken.wait()
        raise BackendError("the device has gone")

    async def changed(self) -> None:
        await self.host.disturbed.wait()
        self.host.disturbed.clear()

    def status(self) -> Mapping[str, JSON]:
        return {"peers": {str(peer.subnets): str(peer.public_ipv4) for peer in self.host.peers}}

    async def aclose(self) -> None:
        if self.host.device is self:
            self.host.peers = frozenset()
            await asyncio.sleep(0)
            self.host.device = None

    def carry(self, payload: bytes) -> None:
        """Send a packet to the far host, if that is a peer."""
        if any(peer.node == "far" for peer in self.host.peers) and self.fits(payload):
            self.send(payload)

    def fits(self, payload: bytes) -> bool:
        assert self.network is not None
        return len(payload) + (28 if self.network.ipv4 is not None else 48) <= self.mtu

    def send(self, payload: bytes) -> None:
        """Send it; the far host takes it if it comes from a peer."""
        assert self.underlay is not None
        near = self.host.near
        if near is not None and (near.public_ipv4 or near.public_ipv6) in self.underlay.addresses:
            self.host.arrived.put_nowait(payload)

    def take(self, packet: bytes, outer: IPAddress) -> None:
        """Deliver a packet from a host, if it may come from there."""
        assert self.own is not None
        with contextlib.suppress(Dropped):
            self.check(Delivery(self.own, self.host.peers), packet, outer)
            self.host.delivered.put_nowait(parse_ip(packet).payload)

    def check(self, delivery: Delivery, packet: bytes, outer: IPAddress) -> None:
        delivery.sender(packet, outer)


class Far(FarHost):
    def __init__(self, host: Host) -> None:
        self.host = host

    async def join(self, network: Network, near: Peer) -> Peer:
        await self.meet(near)
        return attrs.evolve(numbered_peer(100, 4 if network.ipv4 is not None else 6), node="far")

    async def meet(self, near: Peer) -> None:
        self.host.near = near

    def move(self) -> Underlay:
        near = self.host.near
        assert near is not None
        return underlay_at(host_at(7, 4 if near.public_ipv4 is not None else 6))

    async def inject(self, packet: bytes) -> None:
        assert isinstance(self.host.device, Model)
        self.host.device.take(packet, host_at(100, parse_ip(packet).header.source.version))

    async def delivered(self) -> bytes:
        return await self.host.delivered.get()

    async def use(self, backend: Backend, peers: Sequence[Peer]) -> None: ...

    async def send(self, payload: bytes) -> None:
        assert isinstance(self.host.device, Model)
        self.host.device.carry(payload)

    async def receive(self) -> bytes:
        return await self.host.arrived.get()


class Suite(BackendConformance):
    model: ClassVar[type[Model]]
    breaks: ClassVar[str | None]
    lacks: ClassVar[Mapping[str, str]] = {"earlier runs": "the host forgets it with the process"}

    @pytest.fixture
    def anyio_backend(self) -> object:
        return VIRTUAL_CLOCK

    @pytest.fixture
    def host(self) -> Host:
        return Host()

    @pytest.fixture
    def make_backend(self, host: Host) -> MakeBackend:
        self.model.host = host
        return lambda: self.model(self.model.Options())

    @pytest.fixture
    def observe(self, host: Host) -> Observe:
        return lambda: (None if host.device is None else type(host.device).__name__, host.left, host.peers)

    @pytest.fixture
    def count_writes(self, host: Host) -> CountWrites:
        seen = 0

        def count() -> int:
            nonlocal seen
            before, seen = seen, host.writes
            return seen - before

        return count

    @pytest.fixture
    def disturb(self, host: Host) -> Callable[[], None]:
        def disturb() -> None:
            host.peers = frozenset()
            host.disturbed.set()

        return disturb

    @pytest.fixture
    def take_device(self, host: Host) -> Callable[[], None]:
        def take_device() -> None:
            host.taken = True

        return take_device

    @pytest.fixture
    def break_it(self) -> Callable[[Backend], None]:
        def break_it(backend: Backend) -> None:
            assert isinstance(backend, Model)
            backend.broken.set()

        return break_it

    @pytest.fixture
    def far_host(self, host: Host) -> FarHost:
        return Far(host)


def wrong(breaks: str | None, **members: Any) -> Callable[[type[Model]], type[Model]]:
    """Hold the backend against the suite, which it passes but for one test."""

    def declare(model: type[Model]) -> type[Model]:
        name = f"Test{model.__name__}"
        globals()[name] = type(name, (Suite,), {"model": model, "breaks": breaks, "__module__": __name__, **members})
        return model

    return declare


wrong(None)(Model)


@wrong(None, lacks={"conflicts": "a second one takes over from the first"})
class Adopting(Model):
    """Right, too: it takes over what it finds."""

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        self.host.device = None
        data = await super().open(network, underlay)
        self.host.peers = frozenset()
        return data


# How it is loaded and made


@wrong("test_it_is_a_driver_that_overlaynet_loads")
class OfTheFuture(Model):
    api = (1, 99)


@wrong("test_it_keeps_its_options")
class WithoutItsOptions(Model):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.options = attrs.make_class("Copy", ["name", "port"])(options.name, options.port)


@attrs.frozen
class _Silent:
    name: str = option("model0", "name of the device")
    port: int = 8285


@wrong("test_every_option_is_explained")
class WithSilentOptions(Model):
    Options = _Silent  # type: ignore[assignment]


@attrs.frozen
class _Impossible:
    name: str = option("model0", "name of the device")
    port: int = option(0, "UDP port", check=between(1, 65535))


@wrong("test_it_is_a_driver_that_overlaynet_loads")
class WithAnImpossibleDefault(Model):
    Options = _Impossible  # type: ignore[assignment]


def _first_is_a_letter(value: str) -> str | None:
    return None if value[0].isalpha() else "must begin with a letter"


@attrs.frozen
class _Careless:
    name: str = option("model0", "name of the device", check=_first_is_a_letter)
    port: int = option(8285, "UDP port")


@wrong("test_a_value_that_an_option_cannot_have_is_a_config_error")
class WithACarelessCheck(Model):
    Options = _Careless  # type: ignore[assignment]


@wrong("test_making_one_takes_nothing")
class TakingAtOnce(Model):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._ends = os.pipe()

    async def aclose(self) -> None:
        await super().aclose()
        for end in self._ends:
            os.close(end)
        self._ends = ()  # type: ignore[assignment]


@wrong("test_one_that_was_only_made_can_be_closed_twice")
class UnclosableUnlessOpened(Model):
    async def aclose(self) -> None:
        if self.network is None and getattr(self, "closed", False):
            raise RuntimeError("closed twice")
        self.closed = True
        await super().aclose()


# Its life


@wrong("test_what_it_publishes_is_json")
class PublishingNoJSON(Model):
    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        await super().open(network, underlay)
        return LeaseData("model", {"subnet": IPv4Network("10.0.0.0/8")})  # type: ignore[dict-item]


@wrong("test_it_names_a_device_whose_packets_fit_into_the_underlay")
class TooNarrow(Model):
    async def start(self, lease: Lease) -> Device:
        self.mtu = 60
        return await super().start(lease)

    async def set_underlay(self, underlay: Underlay) -> Device | None:
        await super().set_underlay(underlay)
        return None


@wrong("test_it_can_be_closed_at_any_point_and_twice")
class RaisingWhenClosedAgain(Model):
    closed = 0

    async def aclose(self) -> None:
        await super().aclose()
        self.closed += self.network is not None
        if self.closed == 2:
            raise RuntimeError("it is closed already")


@wrong("test_closing_it_frees_everything")
class LeakingADescriptor(Model):
    kept: tuple[int, ...] = ()

    async def start(self, lease: Lease) -> Device:
        self.kept = os.pipe()
        return await super().start(lease)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        while self.kept:
            os.close(self.kept[0])
            self.kept = self.kept[1:]
        await super().set_peers(peers)


@wrong("test_closing_it_leaves_the_host_as_it_was")
class LeavingSomething(Model):
    async def start(self, lease: Lease) -> Device:
        self.host.left = "an address"
        return await super().start(lease)


@wrong("test_when_it_is_closed_another_can_be_opened")
class NotGivingItsNameBack(Model):
    started = False

    async def start(self, lease: Lease) -> Device:
        self.started = True
        return await super().start(lease)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        if self.host.closed_too_early:
            raise BackendError(f"the device {self.options.name} is not ours")
        await super().set_peers(peers)

    async def aclose(self) -> None:
        if self.host.device is self and not self.started:
            self.host.closed_too_early = True
        await super().aclose()


@wrong("test_after_a_restart_it_is_the_same_instance")
class WithARandomInstance(Model):
    async def start(self, lease: Lease) -> Device:
        return attrs.evolve(await super().start(lease), instance=f"model-{id(self)}")

    async def set_underlay(self, underlay: Underlay) -> Device | None:
        await super().set_underlay(underlay)
        return Device(self.options.name, self.mtu, f"model-{id(self)}")


@wrong("test_a_second_one_is_refused_and_changes_nothing")
class RefusingWithoutAName(Model):
    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        if self.host.device is not None:
            raise BackendError("there is one already")
        return await super().open(network, underlay)


@wrong("test_refusing_a_second_one_leaves_the_first_alone")
class TroublingTheFirst(Model):
    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        if self.host.device is not None:
            self.host.peers = frozenset()
        return await super().open(network, underlay)


@wrong("test_what_an_earlier_run_left_is_taken_over", lacks={"conflicts": "a second one takes over from the first"})
class LeavingWhatItFinds(Adopting):
    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        found = self.host.peers
        data = await super().open(network, underlay)
        self.host.left = f"{len(found)} old peers" if found else None
        return data


@wrong("test_it_runs_until_it_is_cancelled")
class RunningOnlyForAWhile(Model):
    async def run(self) -> None:
        while len(self.host.peers) != 1:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    await super().run()


@wrong("test_running_it_raises_a_backend_error_when_it_cannot_go_on")
class FailingWithAnythingElse(Model):
    async def run(self) -> None:
        await self.broken.wait()
        raise OSError(77, "file descriptor in bad state")


# Cancellation


@wrong("test_opening_can_be_cancelled_anywhere")
class LosingWhatItOpened(Model):
    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        try:
            return await super().open(network, underlay)
        except asyncio.CancelledError:
            self.host.device = Model(self.options)
            raise


@wrong("test_starting_can_be_cancelled_anywhere")
class SwallowingTheCancellation(Model):
    async def start(self, lease: Lease) -> Device:
        try:
            return await super().start(lease)
        except asyncio.CancelledError:
            return Device(self.options.name, self.mtu)


@wrong("test_setting_peers_can_be_cancelled_anywhere")
class DeafToCancellation(Model):
    async def set_peers(self, peers: Sequence[Peer]) -> None:
        try:
            await super().set_peers(peers)
        except asyncio.CancelledError:
            if self.host.device is self and any(peer.node == "peer-4" for peer in peers) and self._runs:
                raise BackendError("interrupted") from None
            raise

    _runs = False

    async def run(self) -> None:
        self._runs = True
        await super().run()


@wrong("test_peers_are_right_again_after_setting_them_was_cancelled")
class NotUndoingTheHalfDone(Model):
    done: frozenset[Peer] | None = None

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        self.host.peers |= frozenset(peers)
        if frozenset(peers) == self.done:
            return
        await super().set_peers(peers)
        self.done = frozenset(peers)


@wrong("test_closing_can_be_cancelled_anywhere_and_done_again")
class ForgettingWhatItHadToClose(Model):
    closing = False

    async def aclose(self) -> None:
        if self.closing:
            return
        ends = os.pipe() if self.host.device is self else ()
        self.closing = True
        await super().aclose()
        for end in ends:
            os.close(end)


# Peers


@wrong("test_the_same_peers_again_change_nothing")
class KeepingOneOrder(Model):
    async def set_peers(self, peers: Sequence[Peer]) -> None:
        await super().set_peers(peers)
        self.host.left = "turned" if [p.node for p in peers] == ["peer-3", "peer-2"] else None


@wrong("test_the_same_peers_again_write_nothing")
class WritingEveryTime(Model):
    async def set_peers(self, peers: Sequence[Peer]) -> None:
        self.host.writes += 1
        await super().set_peers(peers)


@wrong("test_peers_are_replaced_as_a_whole")
class KeepingTheLastPeers(Model):
    async def set_peers(self, peers: Sequence[Peer]) -> None:
        # It cleans up only when there is somebody new: with the last peer, its entry stays.
        if peers or not any(peer.node == "peer-2" for peer in self.host.peers):
            await super().set_peers(peers)


@wrong("test_a_peer_that_moves_is_reached_where_it_is_now")
class ComparingSubnetsOnly(Model):
    async def set_peers(self, peers: Sequence[Peer]) -> None:
        if {peer.subnets for peer in peers} != {peer.subnets for peer in self.host.peers}:
            await super().set_peers(peers)


@wrong("test_a_table_is_not_changed_by_what_becomes_of_the_list")
class SortingTheCallersList(Model):
    async def set_peers(self, peers: Sequence[Peer]) -> None:
        await super().set_peers(peers)
        if isinstance(peers, list) and self.host.device is self and len(peers) == 2:
            peers.sort(key=lambda peer: peer.node, reverse=True)


@wrong("test_what_was_disturbed_is_repaired_by_the_same_peers")
class TrustingItsMemory(Model):
    known: frozenset[Peer] | None = None

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        if frozenset(peers) == self.known:
            return
        await super().set_peers(peers)
        self.known = frozenset(peers)


@wrong("test_a_disturbance_is_noticed")
class DeafToChanges(Model):
    async def changed(self) -> None:
        await asyncio.Event().wait()


@wrong("test_waiting_for_a_change_can_be_cancelled")
class RaisingWhenCancelled(Model):
    async def changed(self) -> None:
        try:
            await super().changed()
        except asyncio.CancelledError:
            raise BackendError("it does not want to end") from None


# The underlay


@wrong("test_the_same_underlay_again_changes_nothing")
class BindingAgain(Model):
    async def set_underlay(self, underlay: Underlay) -> Device | None:
        self.host.left = "another socket"
        return await super().set_underlay(underlay)


@wrong("test_packets_fit_into_an_underlay_that_has_changed")
class KeepingItsMTU(Model):
    async def set_underlay(self, underlay: Underlay) -> Device | None:
        return await super().set_underlay(attrs.evolve(underlay, mtu=1500))


@wrong("test_packets_fit_into_an_underlay_that_has_changed")
class BeingTheUnderlay(Model):
    """Its device is the underlay's own interface, and it says that it has nothing to do with the underlay."""

    async def start(self, lease: Lease) -> Device:
        assert self.underlay is not None
        await super().start(lease)
        return Device(self.options.name, self.underlay.mtu)

    async def set_underlay(self, underlay: Underlay) -> Device | None:
        self.underlay = underlay
        await asyncio.sleep(0)
        return None

    def fits(self, payload: bytes) -> bool:
        self.mtu = 1500
        return super().fits(payload)


@wrong("test_setting_the_underlay_can_be_cancelled_anywhere")
class HoldingOnToTheUnderlay(Model):
    async def set_underlay(self, underlay: Underlay) -> Device | None:
        try:
            return await super().set_underlay(underlay)
        except asyncio.CancelledError:
            return None


# Routes and status


@wrong("test_routes_lead_to_every_peer_and_nowhere_else")
class RoutingItsOwnSubnet(Model):
    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        routes = super().routes(peers)
        return [*routes, Route(IPv4Network("10.244.1.0/24"), device=self.options.name)] if routes else []


@wrong("test_what_cannot_be_reached_has_no_route")
class RoutingIntoADeviceThatIsGone(Model):
    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        return [Route(subnet, device=self.options.name) for peer in peers for subnet in peer.subnets]


@wrong("test_what_cannot_be_reached_has_no_route")
class KeepingItToItself(Model):
    """It has no device, and does not say so."""

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        with contextlib.suppress(BackendError):
            await super().set_peers(peers)


@wrong("test_routes_for_the_same_peers_are_the_same")
class RoutingByMood(Model):
    asked = 0

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        self.asked += 1
        return list(super().routes(peers)) * self.asked


@wrong("test_asking_for_routes_changes_nothing")
class RoutingBySideEffect(Model):
    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        self.host.left = "a route"
        return super().routes(peers)


@wrong("test_its_status_is_json")
class ShowingObjects(Model):
    def status(self) -> Mapping[str, JSON]:
        return {"options": self.options}


# Packets


@wrong("test_packets_arrive_as_they_were_sent")
class CuttingTheLastByte(Model):
    def send(self, payload: bytes) -> None:
        super().send(payload[:1000])


@wrong("test_packets_arrive_as_they_were_sent")
class CarryingIPv4Only(Model):
    def carry(self, payload: bytes) -> None:
        super().carry(payload if self.network is None or self.network.ipv4 is not None else payload[:20])


@wrong("test_a_packet_larger_than_the_device_takes_does_not_arrive")
class CarryingWhatDoesNotFit(Model):
    def fits(self, payload: bytes) -> bool:
        return True


@wrong("test_packets_arrive_after_the_underlay_has_got_another_address")
class SendingFromWhereItWas(Model):
    async def set_underlay(self, underlay: Underlay) -> Device | None:
        before = self.underlay
        device = await super().set_underlay(underlay)
        self.underlay = before
        return device


@wrong("test_only_what_a_peer_may_send_is_delivered")
class LettingStrangersIn(Model):
    def check(self, delivery: Delivery, packet: bytes, outer: IPAddress) -> None:
        with contextlib.suppress(Dropped):
            super().check(delivery, packet, outer)
            return
        if outer in delivery.hosts:
            raise Dropped("something", "is wrong with what a peer sends")


@wrong("test_only_what_a_peer_may_send_is_delivered")
class LettingAnySourceIn(Model):
    def check(self, delivery: Delivery, packet: bytes, outer: IPAddress) -> None:
        try:
            super().check(delivery, packet, outer)
        except Dropped as dropped:
            if dropped.reason != "spoofed_source":
                raise


@wrong("test_only_what_a_peer_may_send_is_delivered")
class LettingAnyDestinationIn(Model):
    def check(self, delivery: Delivery, packet: bytes, outer: IPAddress) -> None:
        try:
            super().check(delivery, packet, outer)
        except Dropped as dropped:
            if dropped.reason != "foreign_destination":
                raise


@wrong("test_only_what_a_peer_may_send_is_delivered")
class LettingNobodyIn(Model):
    def check(self, delivery: Delivery, packet: bytes, outer: IPAddress) -> None:
        raise Dropped("anything", "is refused")


@wrong("test_a_peer_that_was_removed_is_sent_nothing")
class SendingToTheGone(Model):
    ever = False

    def carry(self, payload: bytes) -> None:
        self.ever |= any(peer.node == "far" for peer in self.host.peers)
        if self.ever and self.fits(payload):
            self.send(payload)


@wrong("test_packets_to_others_flow_on_while_peers_change")
class PausingWhilePeersChange(Model):
    async def set_peers(self, peers: Sequence[Peer]) -> None:
        if len(peers) > 5:
            self.host.peers = frozenset()
        await super().set_peers(peers)
