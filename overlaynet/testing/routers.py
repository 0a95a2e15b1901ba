"""What every router has to do, as a suite of tests to derive from::

    class TestMyRouter(RouterConformance):
        @pytest.fixture
        def make_router(self):
            return lambda: MyRouter(MyRouter.Options())
        ...

The tests are async, run by the anyio plugin of pytest.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from ipaddress import IPv4Network, ip_network
from typing import TypeAlias

import pytest

from overlaynet.drivers import Router
from overlaynet.model import IPNetwork, Route

MakeRouter: TypeAlias = Callable[[], Router]
Installed: TypeAlias = Callable[[], set[Route]]
AddForeign: TypeAlias = Callable[[IPNetwork], None]
CountWrites: TypeAlias = Callable[[], int]

INSTANCE = "overlay0"
"""The instance that the routers of the suite are opened for, and the name of its device."""


@pytest.mark.anyio
class RouterConformance:
    """The laws of routers. A subclass overrides :meth:`make_router` and :meth:`installed`, and what else it can."""

    why_nothing_survives: str | None = None
    """Set to a reason if what a router applied cannot be seen by another: the laws on earlier runs are skipped."""
    why_no_strangers: str | None = None
    """Set to a reason if nobody else can have routes where this router has its own."""

    @pytest.fixture
    def make_router(self) -> MakeRouter:
        """Makes a new router, not open yet, each time it is called; the device ``overlay0`` exists and is up."""
        raise NotImplementedError

    @pytest.fixture
    def installed(self) -> Installed:
        """Tells which routes of ``overlay0``'s instance are in force, found out without the router's help if possible."""
        raise NotImplementedError

    @pytest.fixture
    def add_foreign(self) -> AddForeign:
        """Adds a route to a destination as somebody else would; it is among those that :meth:`foreign` lists."""
        pytest.skip(self.why_no_strangers or "add_foreign is not overridden")

    @pytest.fixture
    def foreign(self) -> Callable[[], list[str]]:
        """Tells which routes of others are in force."""
        pytest.skip(self.why_no_strangers or "foreign is not overridden")

    @pytest.fixture
    def count_writes(self) -> CountWrites:
        """Tells how many changes were made to the routes since it was called last."""
        raise NotImplementedError

    @pytest.fixture
    def earlier_runs(self) -> None:
        """Asked for by the tests that need routes to outlive the router that applied them."""
        if self.why_nothing_survives is not None:
            pytest.skip(self.why_nothing_survives)

    @pytest.fixture
    async def router(self, make_router: MakeRouter) -> AsyncIterator[Router]:
        """A router that is open."""
        router = make_router()
        await router.open(INSTANCE)
        yield router
        await router.aclose()

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

    async def test_a_router_that_was_never_opened_can_be_closed(self, make_router: MakeRouter) -> None:
        router = make_router()
        await router.aclose()
        await router.aclose()

    @pytest.mark.usefixtures("earlier_runs")
    async def test_a_router_that_was_never_opened_removes_nothing(
        self, router: Router, make_router: MakeRouter, installed: Installed, backstop: Route, leading: Route
    ) -> None:
        await router.apply([backstop, leading])
        await make_router().aclose()
        assert installed() == {backstop, leading}

    async def test_a_router_may_end_without_having_applied_anything(
        self, make_router: MakeRouter, installed: Installed
    ) -> None:
        router = make_router()
        await router.open(INSTANCE)
        await router.aclose()
        assert installed() == set()

    @pytest.mark.usefixtures("earlier_runs")
    async def test_a_restart_adopts_what_a_crash_left(
        self,
        router: Router,
        make_router: MakeRouter,
        installed: Installed,
        count_writes: CountWrites,
        wanted: list[Route],
    ) -> None:
        await router.apply(wanted)
        count_writes()
        second = make_router()
        await second.open(INSTANCE)
        try:
            await second.apply(wanted)
            assert count_writes() == 0
            assert installed() == set(wanted)
        finally:
            await second.aclose()

    @pytest.mark.usefixtures("earlier_runs")
    async def test_a_restart_removes_what_a_crash_left(
        self, router: Router, make_router: MakeRouter, installed: Installed, backstop: Route, to_subnets: list[Route]
    ) -> None:
        await router.apply([backstop, *to_subnets])
        second = make_router()
        await second.open(INSTANCE)
        try:
            await second.apply([backstop, to_subnets[0]])
            assert installed() == {backstop, to_subnets[0]}
            await second.apply([])
            assert installed() == set()
        finally:
            await second.aclose()

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

    async def test_waiting_for_a_change_can_be_cancelled(self, router: Router, backstop: Route) -> None:
        await router.apply([backstop])
        task = asyncio.create_task(_follow(router))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def _follow(router: Router) -> None:
    while True:
        await router.changed()


def _subnets(overlay: IPNetwork) -> Sequence[IPNetwork]:
    """Three subnets of the overlay, as peers would lease them."""
    if isinstance(overlay, IPv4Network):
        return list(itertools.islice(overlay.subnets(new_prefix=24), 1, 4))
    return list(itertools.islice(overlay.subnets(new_prefix=64), 1, 4))
