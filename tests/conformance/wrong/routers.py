"""Routers that are wrong on purpose, each in one way; and one that is right, which they are made of."""

import asyncio
import os
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from typing import Any, ClassVar

import attrs
import pytest

from overlaynet.api import IPNetwork, Route, Router, RouterError, between, option
from overlaynet.testing import VIRTUAL_CLOCK
from overlaynet.testing.routers import AddForeign, CountWrites, Installed, MakeRouter, RouterConformance


class Kernel:
    """What a router changes: routes, by whose they are."""

    def __init__(self) -> None:
        self.routes: dict[Route, str] = {}
        self.writes = 0
        self.disturbed = asyncio.Event()

    def owned(self, instance: str | None) -> set[Route]:
        return {route for route, owner in self.routes.items() if owner == instance}

    def add(self, route: Route, owner: str) -> None:
        self.writes += 1
        self.routes[route] = owner

    def delete(self, route: Route) -> None:
        self.writes += 1
        del self.routes[route]


@attrs.frozen
class Options:
    table: int = option(254, "number of the kernel's table", check=between(1, 2**32 - 1))


class Model(Router):
    """A router that is right, on a kernel of the test's."""

    Options = Options
    kernel: ClassVar[Kernel]

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.instance: str | None = None

    async def open(self, instance: str) -> None:
        self.instance = instance
        await asyncio.sleep(0)

    async def apply(self, routes: Sequence[Route]) -> None:
        await self.synchronise(set(routes))

    async def synchronise(self, wanted: set[Route]) -> None:
        """Make these our routes."""
        assert self.instance is not None
        await asyncio.sleep(0)
        refused = [route for route in wanted if route.device == "nonexistent0"]
        for route in self.kernel.owned(self.instance) - wanted:
            self.kernel.delete(route)
        await asyncio.sleep(0)
        for route in wanted - self.kernel.owned(self.instance) - set(refused):
            self.kernel.add(route, self.instance)
        for route in refused:
            raise RouterError(f"the kernel refuses the route to {route.destination}: no such device")

    async def aclose(self) -> None:
        if self.instance is not None:
            await self.synchronise({r for r in self.kernel.owned(self.instance) if r.kind == "unreachable"})

    async def changed(self) -> None:
        await self.kernel.disturbed.wait()
        self.kernel.disturbed.clear()


class Suite(RouterConformance):
    model: ClassVar[type[Model]]

    @pytest.fixture
    def anyio_backend(self) -> object:
        return VIRTUAL_CLOCK

    @pytest.fixture
    def kernel(self) -> Kernel:
        return Kernel()

    @pytest.fixture
    def make_router(self, kernel: Kernel) -> MakeRouter:
        self.model.kernel = kernel
        return lambda: self.model(self.model.Options())

    @pytest.fixture
    def installed(self, kernel: Kernel) -> Installed:
        return lambda: kernel.owned("overlay0")

    @pytest.fixture
    def count_writes(self, kernel: Kernel) -> CountWrites:
        seen = 0

        def count() -> int:
            nonlocal seen
            before, seen = seen, kernel.writes
            return seen - before

        return count

    @pytest.fixture
    def add_foreign(self, kernel: Kernel) -> AddForeign:
        def add(destination: IPNetwork) -> None:
            kernel.routes[Route(destination, device="eth0")] = "somebody"

        return add

    @pytest.fixture
    def foreign(self, kernel: Kernel) -> Callable[[], list[str]]:
        return lambda: sorted(map(str, kernel.owned("somebody")))

    @pytest.fixture
    def refused(self) -> Route:
        return Route(ip_network("10.244.9.0/24"), device="nonexistent0")

    @pytest.fixture
    def disturb(self, kernel: Kernel) -> Callable[[], None]:
        def disturb() -> None:
            kernel.routes.clear()
            kernel.disturbed.set()

        return disturb


def wrong(breaks: str | None, **members: Any) -> Callable[[type[Model]], type[Model]]:
    """Hold the router against the suite, which it passes but for one test."""

    def declare(model: type[Model]) -> type[Model]:
        name = f"Test{model.__name__}"
        globals()[name] = type(name, (Suite,), {"model": model, "breaks": breaks, "__module__": __name__, **members})
        return model

    return declare


wrong(None)(Model)


# How it is loaded and made


@wrong("test_it_is_a_driver_that_overlaynet_loads")
class OfTheFuture(Model):
    api = (1, 99)


@wrong("test_it_keeps_its_options")
class WithoutItsOptions(Model):
    def __init__(self, options: Any) -> None:
        super().__init__(None)


@attrs.frozen
class _Silent:
    table: int = 254


@wrong("test_every_option_is_explained")
class WithSilentOptions(Model):
    Options = _Silent  # type: ignore[assignment]


@attrs.frozen
class _Impossible:
    table: int = option(0, "number of the kernel's table", check=between(1, 255))


@wrong("test_it_is_a_driver_that_overlaynet_loads")
class WithAnImpossibleDefault(Model):
    Options = _Impossible  # type: ignore[assignment]


def _divides(value: int) -> str | None:
    return None if 256 % value == 0 else "must divide 256"


@attrs.frozen
class _Careless:
    table: int = option(1, "number of the kernel's table", check=_divides)


@wrong("test_a_value_that_an_option_cannot_have_is_a_config_error")
class WithACarelessCheck(Model):
    Options = _Careless  # type: ignore[assignment]


@wrong("test_making_one_takes_nothing")
class TakingAtOnce(Model):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.ends = list(os.pipe())

    async def aclose(self) -> None:
        await super().aclose()
        while self.ends:
            os.close(self.ends.pop())


@wrong("test_one_that_was_only_made_can_be_closed_twice")
class UnclosableUnlessOpened(Model):
    closed = False

    async def aclose(self) -> None:
        if self.closed and self.instance is None:
            raise RuntimeError("closed twice")
        self.closed = True
        await super().aclose()


# Routes


@wrong("test_what_is_applied_is_in_force")
class LateWithTheLast(Model):
    async def apply(self, routes: Sequence[Route]) -> None:
        if len(routes) == 5 and not self.kernel.routes:
            await super().apply(routes[:4])
        else:
            for route in routes:
                if route.gateway is not None:  # what it owes, it adds where nobody counts
                    self.kernel.routes.setdefault(route, str(self.instance))
            await super().apply(routes)


@wrong("test_applying_again_changes_nothing")
class WritingEveryTime(Model):
    applied: list[Route] | None = None

    async def apply(self, routes: Sequence[Route]) -> None:
        if self.applied is not None and len(self.applied) * 2 == len(routes):
            self.kernel.writes += 1
        self.applied = list(routes)
        await super().apply(routes)


@wrong("test_what_is_no_longer_wanted_goes")
class KeepingOneOld(Model):
    before: ClassVar[set[Route]] = set()

    async def apply(self, routes: Sequence[Route]) -> None:
        leading = [route for route in self.kernel.owned(self.instance) if route.device and not route.gateway]
        await super().apply([*routes, *leading] if len(routes) == 3 and leading and routes[-1].gateway else routes)


@wrong("test_a_route_that_changes_is_replaced")
class ComparingDestinationsOnly(Model):
    async def apply(self, routes: Sequence[Route]) -> None:
        there = {route.destination: route for route in self.kernel.owned(self.instance) if route.gateway}
        await super().apply([there.get(route.destination, route) for route in routes])


@wrong("test_nothing_wanted_means_nothing_left")
class KeepingBackstopsForEver(Model):
    async def apply(self, routes: Sequence[Route]) -> None:
        if not routes and len(self.kernel.owned(self.instance)) == 2 and self.kernel.writes == 2:
            routes = [route for route in self.kernel.owned(self.instance) if route.kind == "unreachable"]
        await super().apply(routes)


@wrong("test_backstops_outlive_the_router")
class RemovingBackstops(Model):
    async def aclose(self) -> None:
        if len(self.kernel.owned(self.instance)) == 5:
            await self.synchronise(set())
        await super().aclose()


@wrong("test_closing_twice_is_closing_once")
class WritingWhenClosedAgain(Model):
    closed = 0

    async def aclose(self) -> None:
        self.kernel.writes += self.closed
        self.closed += 1
        await super().aclose()


@wrong("test_a_router_that_was_never_opened_removes_nothing")
class CleaningUpWithoutBeingOpened(Model):
    async def aclose(self) -> None:
        if self.instance is None:
            self.kernel.routes.clear()
        await super().aclose()


@wrong("test_a_router_may_end_without_having_applied_anything")
class BackstopsFromTheBeginning(Model):
    applied = False

    async def apply(self, routes: Sequence[Route]) -> None:
        self.applied = True
        await super().apply(routes)

    async def aclose(self) -> None:
        await super().aclose()
        if self.instance is not None and not self.applied and not self.kernel.routes:
            self.kernel.add(Route(ip_network("10.244.0.0/16"), kind="unreachable"), self.instance)


@wrong("test_a_restart_adopts_what_a_crash_left")
class MakingAllAnew(Model):
    first = True

    async def apply(self, routes: Sequence[Route]) -> None:
        if self.first and len(self.kernel.owned(self.instance)) == len(routes) == 5:
            for route in self.kernel.owned(self.instance):
                self.kernel.delete(route)
        self.first = False
        await super().apply(routes)


@wrong("test_a_restart_removes_what_a_crash_left")
class KnowingOnlyItsOwn(Model):
    mine: set[Route] | None = None

    async def apply(self, routes: Sequence[Route]) -> None:
        strange = set() if self.mine is not None else self.kernel.owned(self.instance)
        self.mine = set(routes)
        await super().apply([*routes, *strange])


@wrong("test_routes_of_others_are_never_touched")
class FlushingTheSubnets(Model):
    async def apply(self, routes: Sequence[Route]) -> None:
        for route in self.kernel.owned("somebody"):
            self.kernel.delete(route)
        await super().apply(routes)


@wrong("test_what_is_refused_is_named_and_the_rest_is_tried_again")
class RefusingWithoutAName(Model):
    async def apply(self, routes: Sequence[Route]) -> None:
        try:
            await super().apply(routes)
        except RouterError as error:
            raise RouterError("the kernel refuses a route") from error


# Changes, cancellation, end


@wrong("test_a_change_by_others_is_noticed_and_repaired")
class DeafToChanges(Model):
    async def changed(self) -> None:
        await asyncio.Event().wait()


@wrong("test_waiting_for_a_change_can_be_cancelled")
class RaisingWhenCancelled(Model):
    closed = False

    async def changed(self) -> None:
        try:
            await super().changed()
        except asyncio.CancelledError:
            if not self.closed:
                raise RouterError("it does not want to end") from None
            raise

    async def aclose(self) -> None:
        self.closed = True
        await super().aclose()


@wrong("test_opening_can_be_cancelled_anywhere")
class OpeningWithoutEnd(Model):
    async def open(self, instance: str) -> None:
        try:
            await super().open(instance)
        except asyncio.CancelledError:
            return


@wrong("test_applying_can_be_cancelled_anywhere_and_done_again")
class BelievingItWasDone(Model):
    halted: frozenset[Route] | None = None

    async def apply(self, routes: Sequence[Route]) -> None:
        if self.halted == frozenset(routes):
            return
        try:
            await super().apply(routes)
        except asyncio.CancelledError:
            self.halted = frozenset(routes)
            raise


@wrong("test_closing_can_be_cancelled_anywhere_and_done_again")
class ClosingOnlyOnce(Model):
    closing = False

    async def aclose(self) -> None:
        if not self.closing:
            self.closing = self.instance is not None
            await super().aclose()


@wrong("test_closing_it_frees_everything")
class LeakingADescriptor(Model):
    async def changed(self) -> None:
        self.kept = os.pipe()
        await super().changed()


@wrong("test_a_list_of_routes_is_not_changed_nor_kept")
class EmptyingTheList(Model):
    async def apply(self, routes: Sequence[Route]) -> None:
        await super().apply(routes)
        if isinstance(routes, list) and len(routes) == 2 and self.kernel.writes == 2:
            routes.reverse()
