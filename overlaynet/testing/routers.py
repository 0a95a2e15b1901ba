"""What every router has to do, as a suite of tests to derive from::

class TestMyRouter(RouterConformance):
    @pytest.fixture
    def make_router(self):
        return lambda: MyRouter(MyRouter.Options())

    @pytest.fixture
    def installed(self): ...  # without it, little can be tested
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Network, ip_network
from typing import ClassVar, TypeAlias

from overlaynet.drivers import Driver, Router
from overlaynet.errors import RouterError
from overlaynet.model import IPNetwork, Route
from overlaynet.testing._requirements import pytest
from overlaynet.testing.conformance import DriverConformance, Resources, eventually, interrupt, interruptions, promptly

MakeRouter: TypeAlias = Callable[[], Router]
Installed: TypeAlias = Callable[[], set[Route]]
AddForeign: TypeAlias = Callable[[IPNetwork], None]
CountWrites: TypeAlias = Callable[[], int]

INSTANCE = "overlay0"
"""The instance that the routers of the suite are opened for, and the name of its device."""


class RouterConformance(DriverConformance):
    """The laws of routers. A subclass overrides :meth:`make_router`, and what else it can, :meth:`installed` above all."""

    axis = "router"
    capabilities: ClassVar[Mapping[str, str]] = {
        "observation": "the routes in force can be found out; needs the fixture `installed`",
        "write counts": "changes of routes can be counted; needs the fixture `count_writes`",
        "earlier runs": "what it applied outlives it, and can be seen by another",
        "foreign routes": "others can have routes where it has its own; needs `add_foreign` and `foreign`",
        "refusal": "there is a route that is refused; needs the fixture `refused`",
        "changes": "it notices changes by others; needs the fixture `disturb`",
    }
    optional_fixtures: ClassVar[Mapping[str, str]] = {
        "installed": "observation",
        "add_foreign": "foreign routes",
        "foreign": "foreign routes",
        "count_writes": "write counts",
        "refused": "refusal",
        "disturb": "changes",
    }

    @pytest.fixture
    def make_router(self) -> MakeRouter:
        """Makes a router each time it is called, not open yet; the device ``overlay0`` exists and is up. To be overridden."""
        raise NotImplementedError("override the fixture 'make_router'")

    @pytest.fixture
    def installed(self) -> Installed:
        """Tells which routes of ``overlay0``'s instance are in force, found out without the router's help if possible."""
        self.not_overridden("installed")

    @pytest.fixture
    def add_foreign(self) -> AddForeign:
        """Adds a route to a destination as somebody else would; it is among those that :meth:`foreign` lists."""
        self.not_overridden("add_foreign")

    @pytest.fixture
    def foreign(self) -> Callable[[], list[str]]:
        """Tells which routes of others are in force."""
        self.not_overridden("foreign")

    @pytest.fixture
    def count_writes(self) -> CountWrites:
        """Tells how many changes were made to the routes since it was called last."""
        self.not_overridden("count_writes")

    @pytest.fixture
    def refused(self) -> Route:
        """A route that cannot be applied."""
        self.not_overridden("refused")

    @pytest.fixture
    def disturb(self) -> Callable[[], None]:
        """Deletes a route of the router's by hand."""
        self.not_overridden("disturb")

    @pytest.fixture
    def make_driver(self, make_router: MakeRouter) -> Callable[[], Driver]:
        return make_router

    @pytest.fixture
    async def router(self, make: MakeRouter) -> Router:
        """A router that is open."""
        router = make()
        await router.open(INSTANCE)
        return router

    @pytest.fixture(params=["10.244.0.0/16", "fd00:10:244::/48"], ids=["ipv4", "ipv6"])
    def overlay(self, request: pytest.FixtureRequest) -> IPNetwork:
        """The overlay's network."""
        return ip_network(request.param)

    @pytest.fixture
    def backstop(self, overlay: IPNetwork) -> Route:
        """What answers for the overlay when nothing else does."""
        return Route(overlay, kind="unreachable")

    @pytest.fixture
    def leading(self, overlay: IPNetwork) -> Route:
        """The route of a backend whose device takes the whole overlay."""
        return Route(overlay, device=INSTANCE)

    @pytest.fixture
    def to_subnets(self, overlay: IPNetwork) -> list[Route]:
        """Routes of a backend that needs one for each peer: by way of a gateway that only the device can reach."""
        return [Route(subnet, device=INSTANCE, gateway=subnet[0], onlink=True) for subnet in _subnets(overlay)]

    @pytest.fixture
    def wanted(self, backstop: Route, leading: Route, to_subnets: list[Route]) -> list[Route]:
        """All of these."""
        return [backstop, leading, *to_subnets]

    async def test_what_is_applied_is_in_force(self, router: Router, installed: Installed, wanted: list[Route]) -> None:
        await router.apply(wanted)
        assert installed() == set(wanted)

    async def test_applying_again_changes_nothing(
        self, router: Router, count_writes: CountWrites, wanted: list[Route]
    ) -> None:
        await router.apply(wanted)
        assert count_writes() > 0
        await router.apply(wanted)
        await router.apply(wanted[::-1])
        await router.apply(wanted + wanted)
        assert count_writes() == 0

    async def test_what_is_no_longer_wanted_goes(
        self, router: Router, installed: Installed, backstop: Route, leading: Route, to_subnets: list[Route]
    ) -> None:
        await router.apply([backstop, leading, *to_subnets[:2]])
        await router.apply([backstop, *to_subnets[1:]])
        assert installed() == {backstop, *to_subnets[1:]}

    async def test_a_route_that_changes_is_replaced(
        self, router: Router, installed: Installed, backstop: Route, to_subnets: list[Route]
    ) -> None:
        (first, second, *_) = to_subnets
        changed = Route(first.destination, device=INSTANCE, gateway=second.gateway, onlink=True)
        await router.apply([backstop, first])
        await router.apply([backstop, changed])
        assert installed() == {backstop, changed}

    async def test_nothing_wanted_means_nothing_left(
        self, router: Router, installed: Installed, backstop: Route, leading: Route
    ) -> None:
        await router.apply([backstop, leading])
        await router.apply([])
        assert installed() == set()

    async def test_backstops_outlive_the_router(
        self, router: Router, installed: Installed, backstop: Route, wanted: list[Route]
    ) -> None:
        await router.apply(wanted)
        await router.aclose()
        assert installed() == {backstop}

    async def test_closing_twice_is_closing_once(
        self, router: Router, installed: Installed, count_writes: CountWrites, backstop: Route, leading: Route
    ) -> None:
        await router.apply([backstop, leading])
        await router.aclose()
        count_writes()
        await router.aclose()
        assert count_writes() == 0
        assert installed() == {backstop}

    async def test_a_router_that_was_never_opened_removes_nothing(
        self, router: Router, make_router: MakeRouter, installed: Installed, backstop: Route, leading: Route
    ) -> None:
        self.needs("earlier runs")
        await router.apply([backstop, leading])
        await make_router().aclose()
        assert installed() == {backstop, leading}

    async def test_a_router_may_end_without_having_applied_anything(
        self, make: MakeRouter, installed: Installed
    ) -> None:
        router = make()
        await router.open(INSTANCE)
        await router.aclose()
        assert installed() == set()

    async def test_a_restart_adopts_what_a_crash_left(
        self,
        router: Router,
        make: MakeRouter,
        installed: Installed,
        count_writes: CountWrites,
        wanted: list[Route],
    ) -> None:
        self.needs("earlier runs")
        await router.apply(wanted)
        count_writes()
        second = make()
        await second.open(INSTANCE)
        await second.apply(wanted)
        assert count_writes() == 0
        assert installed() == set(wanted)

    async def test_a_restart_removes_what_a_crash_left(
        self, router: Router, make: MakeRouter, installed: Installed, backstop: Route, to_subnets: list[Route]
    ) -> None:
        self.needs("earlier runs")
        await router.apply([backstop, *to_subnets])
        second = make()
        await second.open(INSTANCE)
        await second.apply([backstop, to_subnets[0]])
        assert installed() == {backstop, to_subnets[0]}
        await second.apply([])
        assert installed() == set()

    async def test_routes_of_others_are_never_touched(
        self,
        router: Router,
        add_foreign: AddForeign,
        foreign: Callable[[], list[str]],
        backstop: Route,
        leading: Route,
    ) -> None:
        for subnet in _subnets(leading.destination):
            add_foreign(subnet)
        before = foreign()
        assert len(before) >= 3
        await router.apply([backstop, leading])
        await router.apply([backstop])
        await router.apply([])
        await router.apply([backstop, leading])
        await router.aclose()
        assert foreign() == before

    async def test_what_is_refused_is_named_and_the_rest_is_tried_again(
        self, router: Router, installed: Installed, backstop: Route, leading: Route, refused: Route
    ) -> None:
        with pytest.raises(RouterError) as caught:
            await router.apply([backstop, leading, refused])
        assert str(refused.destination) in str(caught.value)
        await router.apply([backstop, leading])
        assert installed() == {backstop, leading}

    async def test_a_change_by_others_is_noticed_and_repaired(
        self, router: Router, installed: Installed, backstop: Route, leading: Route, disturb: Callable[[], None]
    ) -> None:
        await router.apply([backstop, leading])
        noticing = asyncio.create_task(router.changed())
        await asyncio.sleep(0)
        disturb()
        await promptly(noticing)
        assert installed() != {backstop, leading}
        await router.apply([backstop, leading])
        assert installed() == {backstop, leading}

    async def test_waiting_for_a_change_can_be_cancelled(self, router: Router, backstop: Route) -> None:
        await router.apply([backstop])
        for turns in range(5):
            assert await interrupt(_follow(router), turns)

    async def test_opening_can_be_cancelled_anywhere(self, make_router: MakeRouter) -> None:
        for turns in interruptions():
            router = make_router()
            cancelled = await interrupt(router.open(INSTANCE), turns)
            await promptly(router.aclose())
            if not cancelled:
                break

    async def test_applying_can_be_cancelled_anywhere_and_done_again(
        self, router: Router, installed: Installed, backstop: Route, wanted: list[Route]
    ) -> None:
        for turns in interruptions():
            await promptly(router.apply([backstop]))
            cancelled = await interrupt(router.apply(wanted), turns)
            await promptly(router.apply(wanted))
            assert installed() == set(wanted)
            if not cancelled:
                break

    async def test_closing_can_be_cancelled_anywhere_and_done_again(
        self, make: MakeRouter, installed: Installed, backstop: Route, leading: Route
    ) -> None:
        for turns in interruptions():
            router = make()
            await router.open(INSTANCE)
            await router.apply([backstop, leading])
            cancelled = await interrupt(router.aclose(), turns)
            await promptly(router.aclose())
            await eventually(lambda: installed() == {backstop})
            if not cancelled:
                break

    async def test_closing_it_frees_everything(self, make: MakeRouter, backstop: Route, leading: Route) -> None:
        async def use_once() -> None:
            router = make()
            await router.open(INSTANCE)
            await router.apply([backstop, leading])
            noticing = asyncio.create_task(router.changed())
            await asyncio.sleep(0)
            await promptly(router.aclose())
            noticing.cancel()
            await asyncio.wait({noticing})

        await use_once()
        before = Resources()
        await use_once()
        await before.return_to_this()

    async def test_a_list_of_routes_is_not_changed_nor_kept(
        self, router: Router, installed: Installed, backstop: Route, leading: Route
    ) -> None:
        routes = [backstop, leading]
        await router.apply(routes)
        assert routes == [backstop, leading]
        routes.clear()
        assert installed() == {backstop, leading}


async def _follow(router: Router) -> None:
    while True:
        await router.changed()


def _subnets(overlay: IPNetwork) -> Sequence[IPNetwork]:
    """Three subnets of the overlay, as peers would lease them."""
    if isinstance(overlay, IPv4Network):
        return list(itertools.islice(overlay.subnets(new_prefix=24), 1, 4))
    return list(itertools.islice(overlay.subnets(new_prefix=64), 1, 4))
