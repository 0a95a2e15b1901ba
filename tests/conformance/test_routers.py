"""The laws of routers, for the one that needs no kernel."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest

from overlaynet.routers.memory import MemoryRouter
from overlaynet.testing.routers import CountWrites, Installed, MakeRouter, RouterConformance


class TestMemoryRouter(RouterConformance):
    lacks: ClassVar[Mapping[str, str]] = {
        "earlier runs": "a memory router's routes are its own and end with it",
        "refusal": "a memory router takes any route",
        "foreign routes": "nobody else has routes in a memory router",
    }

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

    @pytest.fixture
    def disturb(self, routers: list[MemoryRouter]) -> Callable[[], None]:
        def disturb() -> None:
            routers[-1].disturb()

        return disturb
