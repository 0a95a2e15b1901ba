"""The laws of routers, for the one that needs no kernel."""

import pytest

from overlaynet.routers.memory import MemoryRouter
from overlaynet.testing.routers import CountWrites, Installed, MakeRouter, RouterConformance


class TestMemoryRouter(RouterConformance):
    why_nothing_survives = "a memory router's routes are its own and end with it"
    why_no_strangers = "nobody else has routes in a memory router"

    @pytest.fixture
    def routers(self) -> list[MemoryRouter]:
        """Those that the test has made, the newest last."""
        return []

    @pytest.fixture
    def make_router(self, routers: list[MemoryRouter]) -> MakeRouter:
        def make() -> MemoryRouter:
            routers.append(MemoryRouter())
            return routers[-1]

        return make

    @pytest.fixture
    def installed(self, routers: list[MemoryRouter]) -> Installed:
        return lambda: set(routers[-1].applied)

    @pytest.fixture
    def count_writes(self, routers: list[MemoryRouter]) -> CountWrites:
        seen = 0

        def count() -> int:
            nonlocal seen
            before, seen = seen, len(routers[-1].history)
            return seen - before

        return count
