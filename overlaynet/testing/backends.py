"""What every backend has to do, as a suite of tests to derive from::

    class TestMyBackend(BackendConformance):
        lacks = {"conflicts": "any number of them can live on one host"}

        @pytest.fixture
        def make_backend(self):
            return lambda: MyBackend(MyBackend.Options())

Without root, the backend's device has to be a stand-in. With root, the tests run in a namespace, with real ones: see
:mod:`overlaynet.testing.hosts`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from ipaddress import ip_address
from typing import Any, ClassVar, TypeAlias

import attrs

from overlaynet.drivers import Backend, Driver
from overlaynet.errors import BackendError
from overlaynet.model import Device, Lease, LeaseData, Peer, Underlay
from overlaynet.network import Network
from overlaynet.testing._requirements import pytest
from overlaynet.testing.conformance import PATIENCE, DriverConformance, Resources, interrupt, interruptions, promptly
from overlaynet.testing.far_hosts import FarHost, numbered_peer, overlay, subnet_of, subnets_of, underlay_at
from overlaynet.testing.pretended import datagram

MakeBackend: TypeAlias = Callable[[], Backend]
MakePeer: TypeAlias = Callable[[int], Peer]
Observe: TypeAlias = Callable[[], object]
CountWrites: TypeAlias = Callable[[], int]

LIFE = ("made", "opened", "started", "given peers", "running")
"""The points of a backend's life at which it may be closed."""

SILENCE = 0.3
"""Seconds in which a packet would have come that must not come."""
_HEADERS = {4: 28, 6: 48}
"""Bytes that IP and UDP add to a payload, by IP version."""
_VERSIONS = pytest.mark.parametrize("ip_version", [4, 6], ids=["ipv4", "ipv6"])
_LIES = ("unknown sender", "spoofed source", "foreign destination")


@attrs.define
class Alive:
    """A backend at some point of its life, and what it has told so far."""

    backend: Backend
    data: LeaseData = attrs.field(factory=LeaseData)
    device: Device = attrs.field(factory=lambda: Device("", 0))
    ended: bool = False
    _running: asyncio.Task[None] | None = None

    @property
    def running(self) -> asyncio.Task[None]:
        """The task in which it runs."""
        assert self._running is not None, "it was not brought to the point where it runs"
        return self._running

    def run(self) -> None:
        """Have it run in a task of its own."""
        self._running = asyncio.create_task(self.backend.run(), name="run the backend")

    async def end(self) -> None:
        """Close it, as the daemon would; once, however often this is called."""
        if self.ended:
            return
        self.ended = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
            if not self._running.cancelled():
                self._running.exception()  # it may have noticed that it was closed
        await promptly(self.backend.aclose())


Bring: TypeAlias = Callable[[str], Awaitable[Alive]]


class BackendConformance(DriverConformance):
    """The laws of backends. A subclass overrides :meth:`make_backend`, and what else it can."""

    axis = "backend"
    capabilities: ClassVar[Mapping[str, str]] = {
        "ipv4": "it carries packets of IPv4",
        "ipv6": "it carries packets of IPv6",
        "conflicts": "a second one on the same host, with the same options, is refused",
        "routes": "packets reach its device by routes",
        "earlier runs": "what it makes outlives a process that crashes, and is found by the next",
        "observation": "what it makes of its host can be seen from outside; needs the fixture `observe`",
        "write counts": "its changes to the host can be counted; needs the fixture `count_writes`",
        "repair": "what it made can be disturbed by hand; needs the fixture `disturb`",
        "changes": "it notices by itself when what it made is disturbed",
        "lost devices": "its device can be taken away, with its name; needs the fixture `take_device`",
        "failure": "it can be made unable to carry packets for good; needs the fixture `break_it`",
        "delivery": "it carries packets; needs the fixture `far_host`",
        "sender checks": "it delivers only what a peer may send; needs the fixture `far_host`",
    }
    optional_fixtures: ClassVar[Mapping[str, str]] = {
        "observe": "observation",
        "count_writes": "write counts",
        "disturb": "repair",
        "take_device": "lost devices",
        "break_it": "failure",
        "far_host": "delivery",
    }

    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        """Makes a backend each time it is called, not open yet, always with the same options. To be overridden."""
        raise NotImplementedError("override the fixture 'make_backend'")

    @pytest.fixture
    def ip_version(self) -> int:
        """The IP version of overlay and underlay in tests that are not about it, which know others by their parameters."""
        return 6 if "ipv4" in self.lacks else 4

    @pytest.fixture(autouse=True)
    def _skip_other_ip_versions(self, ip_version: int) -> None:
        self.needs(f"ipv{ip_version}")

    @pytest.fixture
    def network(self, ip_version: int) -> Network:
        """The overlay."""
        return overlay(ip_version)

    @pytest.fixture
    def underlay(self, ip_version: int) -> Underlay:
        """How this host is attached to the others; an interface that the backend may ask the kernel for has to exist."""
        return underlay_at(ip_address("127.0.0.1" if ip_version == 4 else "::1"))

    @pytest.fixture
    def lease(self, underlay: Underlay, ip_version: int) -> Lease:
        """What this host has leased, but for the data that the backend publishes."""
        return Lease(
            subnets_of(1, ip_version),
            underlay.public_ipv4,
            underlay.public_ipv6,
            node="near",
            run="0123456789abcdef",
        )

    @pytest.fixture
    def make_peer(self, ip_version: int) -> MakePeer:
        """The peer with a number between 2 and 99. Override it if the backend publishes data that its peers need.

        :func:`overlaynet.testing.far_hosts.numbered_peer` is such a peer without data.
        """
        return lambda number: numbered_peer(number, ip_version)

    @pytest.fixture
    def observe(self) -> Observe:
        """Tells what a backend has made of this host: devices, addresses, neighbours, …, as a value that can be compared.

        It is found out without the backend's help if possible, and leaves out what changes by itself.
        """
        self.not_overridden("observe")

    @pytest.fixture
    def count_writes(self) -> CountWrites:
        """Tells how many changes were made to this host since it was called last."""
        self.not_overridden("count_writes")

    @pytest.fixture
    def disturb(self) -> Callable[[], None]:
        """Changes by hand what a backend with peers 2 and 3 has made, in a way that :meth:`observe` sees."""
        self.not_overridden("disturb")

    @pytest.fixture
    def take_device(self) -> Callable[[], None]:
        """Deletes the backend's device by hand, and gives its name to another that is not the backend's."""
        self.not_overridden("take_device")

    @pytest.fixture
    def break_it(self) -> Callable[[Backend], None]:
        """Makes a backend that runs unable to carry packets for good: what it can mend is no failure."""
        self.not_overridden("break_it")

    @pytest.fixture
    def crash(self) -> Callable[[Backend], None]:
        """Frees what the kernel would free of a backend whose process is killed; by default, that is nothing."""
        return lambda backend: None

    @pytest.fixture
    def far_host(self) -> FarHost:
        """Another host. The fixture closes it after the test."""
        self.not_overridden("far_host")

    @pytest.fixture
    def make_driver(self, make_backend: MakeBackend) -> Callable[[], Driver]:
        return make_backend

    @pytest.fixture
    def brought(self) -> list[Alive]:
        """The backends that the test has brought up, in their order; not to be overridden."""
        return []

    @pytest.fixture
    async def bring(
        self,
        make_backend: MakeBackend,
        network: Network,
        underlay: Underlay,
        lease: Lease,
        make_peer: MakePeer,
        *,
        brought: list[Alive],
    ) -> AsyncIterator[Bring]:
        """Makes a backend and brings it to a point of its life (see :data:`LIFE`)."""

        async def bring(point: str) -> Alive:
            alive = Alive(make_backend())
            brought.append(alive)
            if point == "made":
                return alive
            alive.data = await promptly(alive.backend.open(network, underlay))
            if point == "opened":
                return alive
            alive.device = await promptly(alive.backend.start(attrs.evolve(lease, data=alive.data)))
            if point == "started":
                return alive
            if point == "running":
                alive.run()
            await promptly(alive.backend.set_peers([make_peer(2), make_peer(3)]))
            return alive

        yield bring
        for alive in reversed(brought):
            await alive.end()

    # Its life

    async def test_what_it_publishes_is_json(self, bring: Bring) -> None:
        data = (await bring("opened")).data
        assert isinstance(data, LeaseData)
        assert isinstance(data.backend_type, str)
        for value in (data.ipv4, data.ipv6):
            assert json.loads(json.dumps(value, allow_nan=False)) == value

    @_VERSIONS
    async def test_it_names_a_device_whose_packets_fit_into_the_underlay(
        self, bring: Bring, underlay: Underlay, ip_version: int
    ) -> None:
        device = (await bring("started")).device
        assert isinstance(device, Device)
        assert device.name
        assert (68 if ip_version == 4 else 1280) <= device.mtu <= underlay.mtu

    @pytest.mark.parametrize("point", LIFE[1:])
    async def test_it_can_be_closed_at_any_point_and_twice(self, bring: Bring, point: str) -> None:
        alive = await bring(point)
        await promptly(alive.backend.aclose())
        await alive.end()

    @pytest.mark.parametrize("point", LIFE)
    async def test_closing_it_frees_everything(self, bring: Bring, point: str) -> None:
        await (await bring(point)).end()  # what is made once for all, such as a library's cache, is made now
        before = Resources()
        await (await bring(point)).end()
        await before.return_to_this()

    @pytest.mark.parametrize("point", LIFE)
    async def test_closing_it_leaves_the_host_as_it_was(self, bring: Bring, observe: Observe, point: str) -> None:
        before = observe()
        await (await bring(point)).end()
        assert observe() == before

    @pytest.mark.parametrize("point", LIFE)
    async def test_when_it_is_closed_another_can_be_opened(self, bring: Bring, point: str) -> None:
        await (await bring(point)).end()
        second = await bring("given peers")
        assert second.device is not None

    async def test_after_a_restart_it_is_the_same_instance(self, bring: Bring) -> None:
        first = await bring("started")
        assert first.device.instance
        await first.end()
        assert (await bring("started")).device.instance == first.device.instance

    async def test_a_second_one_is_refused_and_changes_nothing(
        self, bring: Bring, network: Network, underlay: Underlay
    ) -> None:
        self.needs("conflicts")
        first, second = await bring("running"), await bring("made")
        before = Resources()
        try:
            await promptly(second.backend.open(network, underlay))
        except BackendError as error:
            message = str(error)
        else:
            pytest.fail("a second one was opened; if any number can live on one host, say so in `lacks`: 'conflicts'")
        named = [str(value) for value in attrs.asdict(second.backend.options).values()]
        assert any(value in message for value in named), f"it does not name what is taken: {message!r}"
        await before.return_to_this()
        await second.end()
        assert not first.running.done()
        await first.end()
        await bring("started")

    async def test_refusing_a_second_one_leaves_the_first_alone(
        self, bring: Bring, network: Network, underlay: Underlay, observe: Observe
    ) -> None:
        self.needs("conflicts")
        await bring("running")
        before = observe()
        second = await bring("made")
        with pytest.raises(BackendError):
            await promptly(second.backend.open(network, underlay))
        assert observe() == before
        await second.end()
        assert observe() == before

    async def test_what_an_earlier_run_left_is_taken_over(
        self, bring: Bring, make_peer: MakePeer, observe: Observe, crash: Callable[[Backend], None]
    ) -> None:
        self.needs("earlier runs")
        clean = await bring("given peers")
        await clean.backend.set_peers([make_peer(4)])
        wanted = observe()
        await clean.end()
        crash((await bring("given peers")).backend)
        second = await bring("started")
        await second.backend.set_peers([make_peer(4)])
        assert observe() == wanted

    async def test_it_runs_until_it_is_cancelled(self, bring: Bring, make_peer: MakePeer) -> None:
        alive = await bring("running")
        for _ in range(3):
            await alive.backend.set_peers([make_peer(2)])
            await asyncio.sleep(0.01)
            assert not alive.running.done(), "run() returned although packets can be carried"
        alive.running.cancel()
        await asyncio.wait({alive.running}, timeout=PATIENCE)
        assert alive.running.cancelled()
        await alive.backend.set_peers([make_peer(3)])

    async def test_running_it_raises_a_backend_error_when_it_cannot_go_on(
        self, bring: Bring, break_it: Callable[[Backend], None]
    ) -> None:
        alive = await bring("running")
        await asyncio.sleep(0)
        break_it(alive.backend)
        with pytest.raises(BackendError) as caught:
            await promptly(alive.running)
        assert str(caught.value)
        await alive.end()

    # Cancellation

    async def test_opening_can_be_cancelled_anywhere(self, bring: Bring, network: Network, underlay: Underlay) -> None:
        for turns in interruptions():
            alive = await bring("made")
            cancelled = await interrupt(alive.backend.open(network, underlay), turns)
            await alive.end()
            await (await bring("opened")).end()
            if not cancelled:
                break

    async def test_starting_can_be_cancelled_anywhere(self, bring: Bring, lease: Lease) -> None:
        for turns in interruptions():
            alive = await bring("opened")
            cancelled = await interrupt(alive.backend.start(attrs.evolve(lease, data=alive.data)), turns)
            await alive.end()
            await (await bring("started")).end()
            if not cancelled:
                break

    async def test_setting_peers_can_be_cancelled_anywhere(self, bring: Bring, make_peer: MakePeer) -> None:
        alive = await bring("running")
        for turns in interruptions():
            cancelled = await interrupt(alive.backend.set_peers([make_peer(4), make_peer(5)]), turns)
            await promptly(alive.backend.set_peers([make_peer(2), make_peer(3)]))
            assert not alive.running.done()
            if not cancelled:
                break

    async def test_peers_are_right_again_after_setting_them_was_cancelled(
        self, bring: Bring, make_peer: MakePeer, observe: Observe
    ) -> None:
        alive = await bring("given peers")
        wanted = observe()
        for turns in interruptions():
            cancelled = await interrupt(alive.backend.set_peers([make_peer(4), make_peer(5)]), turns)
            await promptly(alive.backend.set_peers([make_peer(2), make_peer(3)]))
            assert observe() == wanted
            if not cancelled:
                break

    async def test_closing_can_be_cancelled_anywhere_and_done_again(self, bring: Bring) -> None:
        await (await bring("running")).end()
        before = Resources()
        for turns in interruptions():
            alive = await bring("running")
            if not await interrupt(alive.backend.aclose(), turns):
                alive.ended = True
                break
            await alive.end()
            await before.return_to_this()

    # Peers

    async def test_the_same_peers_again_change_nothing(
        self, bring: Bring, make_peer: MakePeer, observe: Observe
    ) -> None:
        alive = await bring("given peers")
        before = observe()
        await alive.backend.set_peers([make_peer(2), make_peer(3)])
        await alive.backend.set_peers([make_peer(3), make_peer(2)])
        assert observe() == before

    async def test_the_same_peers_again_write_nothing(
        self, bring: Bring, make_peer: MakePeer, count_writes: CountWrites
    ) -> None:
        alive = await bring("given peers")
        count_writes()
        await alive.backend.set_peers([make_peer(2), make_peer(3)])
        await alive.backend.set_peers([make_peer(3), make_peer(2)])
        assert count_writes() == 0

    @_VERSIONS
    async def test_peers_are_replaced_as_a_whole(
        self, bring: Bring, make_peer: MakePeer, observe: Observe, ip_version: int
    ) -> None:
        alive = await bring("started")
        none = observe()
        await alive.backend.set_peers([make_peer(2), make_peer(3)])
        wanted = observe()
        assert wanted != none, "the observation does not show peers"
        await alive.backend.set_peers([make_peer(3), make_peer(4)])
        assert observe() != wanted
        await alive.backend.set_peers([make_peer(2), make_peer(3)])
        assert observe() == wanted
        await alive.backend.set_peers([])
        assert observe() == none

    @_VERSIONS
    async def test_a_peer_that_moves_is_reached_where_it_is_now(
        self, bring: Bring, make_peer: MakePeer, observe: Observe, ip_version: int
    ) -> None:
        alive = await bring("given peers")
        before = observe()
        moved = attrs.evolve(make_peer(93), subnets=make_peer(3).subnets, node=make_peer(3).node)
        await alive.backend.set_peers([make_peer(2), moved])
        assert observe() != before
        await alive.backend.set_peers([make_peer(2), make_peer(3)])
        assert observe() == before

    async def test_a_table_is_not_changed_by_what_becomes_of_the_list(
        self, bring: Bring, make_peer: MakePeer, observe: Observe
    ) -> None:
        alive = await bring("started")
        peers = [make_peer(2), make_peer(3)]
        await alive.backend.set_peers(peers)
        before = observe()
        assert peers == [make_peer(2), make_peer(3)]
        peers.clear()
        assert observe() == before

    async def test_what_was_disturbed_is_repaired_by_the_same_peers(
        self,
        bring: Bring,
        make_peer: MakePeer,
        observe: Observe,
        disturb: Callable[[], None],
    ) -> None:
        alive = await bring("given peers")
        before = observe()
        disturb()
        assert observe() != before, "the observation does not show the disturbance"
        await alive.backend.set_peers([make_peer(2), make_peer(3)])
        assert observe() == before

    async def test_a_disturbance_is_noticed(self, bring: Bring, disturb: Callable[[], None]) -> None:
        self.needs("changes")
        alive = await bring("given peers")
        noticing = asyncio.create_task(alive.backend.changed())
        await asyncio.sleep(0)
        disturb()
        await promptly(noticing)

    async def test_waiting_for_a_change_can_be_cancelled(self, bring: Bring) -> None:
        alive = await bring("running")
        for turns in range(5):
            assert await interrupt(_follow(alive.backend), turns)

    # The underlay

    async def test_the_same_underlay_again_changes_nothing(
        self, bring: Bring, underlay: Underlay, observe: Observe
    ) -> None:
        alive = await bring("given peers")
        before = observe()
        for _ in range(2):
            device = await promptly(alive.backend.set_underlay(underlay))
            assert device is None or device == alive.device
            assert observe() == before

    async def test_packets_fit_into_an_underlay_that_has_changed(self, bring: Bring, underlay: Underlay) -> None:
        alive = await bring("running")
        narrower = attrs.evolve(underlay, mtu=underlay.mtu - 100)
        device = await promptly(alive.backend.set_underlay(narrower))
        if device is None:
            # What has nothing to do with the underlay may stay as it is, if it fits all the same.
            assert alive.device.mtu <= narrower.mtu
        else:
            assert 68 <= device.mtu <= narrower.mtu - (underlay.mtu - alive.device.mtu)
        assert await promptly(alive.backend.set_underlay(underlay)) in (None, alive.device)
        assert not alive.running.done()

    async def test_setting_the_underlay_can_be_cancelled_anywhere(self, bring: Bring, underlay: Underlay) -> None:
        alive = await bring("running")
        narrower = attrs.evolve(underlay, mtu=underlay.mtu - 100)
        for turns in interruptions():
            cancelled = await interrupt(alive.backend.set_underlay(narrower), turns)
            assert await promptly(alive.backend.set_underlay(underlay)) in (None, alive.device)
            assert not alive.running.done()
            if not cancelled:
                break

    # Routes and status

    @_VERSIONS
    async def test_routes_lead_to_every_peer_and_nowhere_else(
        self, bring: Bring, make_peer: MakePeer, network: Network, lease: Lease, *, ip_version: int
    ) -> None:
        self.needs("routes")
        alive = await bring("given peers")
        peers = [make_peer(2), make_peer(3)]
        routes = alive.backend.routes(peers)
        destinations = [route.destination for route in routes]
        for destination in destinations:
            assert any(_within(destination, overlay) for overlay in network), f"{destination} is outside the overlay"
            assert not any(_within(destination, own) for own in lease.subnets), f"{destination} is this node's own"
        for peer in peers:
            for subnet in peer.subnets:
                assert any(_within(subnet, destination) for destination in destinations), f"no route to {subnet}"
        assert all(route.kind == "unicast" and route.device for route in routes)

    async def test_what_cannot_be_reached_has_no_route(
        self, bring: Bring, make_peer: MakePeer, take_device: Callable[[], None]
    ) -> None:
        alive = await bring("given peers")
        peers = [make_peer(2), make_peer(4)]
        take_device()
        with pytest.raises(BackendError) as caught:
            await promptly(alive.backend.set_peers(peers))
        assert alive.device.name in str(caught.value)
        assert list(alive.backend.routes(peers)) == []

    async def test_routes_for_the_same_peers_are_the_same(self, bring: Bring, make_peer: MakePeer) -> None:
        alive = await bring("given peers")
        peers = [make_peer(2), make_peer(3)]
        routes = list(alive.backend.routes(peers))
        assert peers == [make_peer(2), make_peer(3)]
        for _ in range(2):
            assert list(alive.backend.routes(peers)) == routes
            assert list(alive.backend.routes(tuple(peers))) == routes
            await alive.backend.set_peers([make_peer(4)])
            await alive.backend.set_peers(peers)

    async def test_asking_for_routes_changes_nothing(self, bring: Bring, make_peer: MakePeer, observe: Observe) -> None:
        alive = await bring("given peers")
        before = observe()
        alive.backend.routes([make_peer(2), make_peer(3)])
        assert observe() == before

    @pytest.mark.parametrize("point", LIFE[1:])
    async def test_its_status_is_json(self, bring: Bring, point: str) -> None:
        status = (await bring(point)).backend.status()
        json.dumps(status, default=dict, allow_nan=False)
        assert all(isinstance(name, str) for name in status)

    # Packets

    @_VERSIONS
    async def test_packets_arrive_as_they_were_sent(
        self, bring: Bring, network: Network, lease: Lease, far_host: FarHost, *, ip_version: int
    ) -> None:
        alive = await bring("started")
        far = await far_host.join(network, _as_peer(lease, alive.data))
        await alive.backend.set_peers([far])
        await far_host.use(alive.backend, [far])
        largest = alive.device.mtu - _HEADERS[ip_version]
        for length in (0, 1, largest - 1, largest):
            payload = bytes(index % 251 for index in range(length))
            await far_host.send(payload)
            assert await promptly(far_host.receive()) == payload

    async def test_a_packet_larger_than_the_device_takes_does_not_arrive(
        self, bring: Bring, network: Network, lease: Lease, far_host: FarHost, ip_version: int
    ) -> None:
        alive = await bring("started")
        far = await far_host.join(network, _as_peer(lease, alive.data))
        await alive.backend.set_peers([far])
        await far_host.use(alive.backend, [far])
        await far_host.send(bytes(alive.device.mtu - _HEADERS[ip_version] + 1))
        await far_host.send(b"the next one")
        assert await promptly(far_host.receive()) == b"the next one"

    @_VERSIONS
    async def test_packets_arrive_after_the_underlay_has_got_another_address(
        self, bring: Bring, network: Network, lease: Lease, far_host: FarHost, *, ip_version: int
    ) -> None:
        alive = await bring("started")
        far = await far_host.join(network, _as_peer(lease, alive.data))
        await alive.backend.set_peers([far])
        await far_host.use(alive.backend, [far])
        await far_host.send(b"before")
        assert await promptly(far_host.receive()) == b"before"
        underlay = far_host.move()
        await promptly(alive.backend.set_underlay(underlay))
        moved = attrs.evolve(lease, public_ipv4=underlay.public_ipv4, public_ipv6=underlay.public_ipv6)
        await far_host.meet(_as_peer(moved, alive.data))
        await alive.backend.set_peers([far])
        await far_host.use(alive.backend, [far])
        await _until(far_host.send, b"after", far_host.receive)

    @pytest.mark.parametrize("lie", _LIES)
    @_VERSIONS
    async def test_only_what_a_peer_may_send_is_delivered(
        self,
        bring: Bring,
        network: Network,
        lease: Lease,
        make_peer: MakePeer,
        *,
        far_host: FarHost,
        lie: str,
        ip_version: int,
    ) -> None:
        self.needs("sender checks")
        alive = await bring("started")
        near = _as_peer(lease, alive.data)
        far = await far_host.join(network, near)
        await alive.backend.set_peers([make_peer(3)] if lie == "unknown sender" else [far, make_peer(3)])
        source, destination = next(iter(far.subnets))[1], next(iter(near.subnets))[1]
        lied_source = subnet_of(3, ip_version)[1] if lie == "spoofed source" else source
        lied_destination = subnet_of(77, ip_version)[1] if lie == "foreign destination" else destination
        if lie == "foreign destination":
            await far_host.meet(attrs.evolve(near, subnets=subnets_of(77, ip_version)))
        await far_host.inject(datagram(lied_source, lied_destination, b"a lie"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE):
                payload = await far_host.delivered()
                pytest.fail(f"delivered in spite of its {lie}: {payload!r}")
        await alive.backend.set_peers([far, make_peer(3)])
        await far_host.meet(near)
        honest = datagram(source, destination, b"the truth")
        await _until(far_host.inject, honest, far_host.delivered, b"the truth")

    @pytest.mark.parametrize("others", [False, True], ids=["no peer stays", "another comes"])
    async def test_a_peer_that_was_removed_is_sent_nothing(
        self, bring: Bring, network: Network, lease: Lease, make_peer: MakePeer, *, far_host: FarHost, others: bool
    ) -> None:
        alive = await bring("started")
        far = await far_host.join(network, _as_peer(lease, alive.data))
        for peers in ([far], [make_peer(9)] if others else []):
            await alive.backend.set_peers(peers)
            await far_host.use(alive.backend, peers)
            await far_host.send(b"one packet")
            if far in peers:
                assert await promptly(far_host.receive()) == b"one packet"
        # It may still wait in a device for its turn, so the peer does not come back here.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE):
                await far_host.receive()

    async def test_packets_to_others_flow_on_while_peers_change(
        self, bring: Bring, network: Network, lease: Lease, make_peer: MakePeer, far_host: FarHost
    ) -> None:
        alive = await bring("started")
        far = await far_host.join(network, _as_peer(lease, alive.data))
        others = [make_peer(number) for number in range(10, 20)]
        await alive.backend.set_peers([far])
        await far_host.use(alive.backend, [far])
        for count in (1, 5, 0, 10, 2):
            changing = asyncio.create_task(alive.backend.set_peers([*others[:count], far]))
            while not changing.done():
                await far_host.send(b"%d" % count)
                assert await promptly(far_host.receive()) == b"%d" % count
                await asyncio.sleep(0)  # a far host that never waits must not keep the change from going on
            await changing
            await far_host.send(b"%d at last" % count)
            assert await promptly(far_host.receive()) == b"%d at last" % count


async def _until(
    send: Callable[[bytes], Awaitable[None]],
    what: bytes,
    receive: Callable[[], Awaitable[bytes]],
    payload: bytes | None = None,
) -> None:
    """Send it until it arrives, for a connection may have to be made first; nothing else may come."""

    async def arrival() -> bytes:
        return await receive()

    arriving = asyncio.create_task(arrival(), name="what arrives")
    try:
        async with asyncio.timeout(PATIENCE):
            while not arriving.done():
                await send(what)
                await asyncio.wait({arriving}, timeout=0.1)
    finally:
        arriving.cancel()
        await asyncio.wait({arriving})
    assert arriving.result() == (what if payload is None else payload)


async def _follow(backend: Backend) -> None:
    while True:
        await backend.changed()


def _within(inner: Any, outer: Any) -> bool:
    return bool(inner.version == outer.version and inner.subnet_of(outer))


def _as_peer(lease: Lease, data: LeaseData) -> Peer:
    """How others are told of the node that holds the lease."""
    return Peer(lease.subnets, lease.public_ipv4, lease.public_ipv6, lease.node, data)
