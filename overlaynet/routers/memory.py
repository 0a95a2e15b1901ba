"""The memory router: records what the kernel would be told, for tests and for hosts whose routes somebody else keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from overlaynet.drivers import NoOptions, Router
from overlaynet.errors import RouterError
from overlaynet.model import Route


class MemoryRouter(Router):
    """A router that only remembers."""

    def __init__(self, options: NoOptions | None = None) -> None:
        super().__init__(NoOptions() if options is None else options)
        self.applied: tuple[Route, ...] = ()
        """The routes as they are now."""
        self.history: list[tuple[Route, ...]] = []
        """Every set of routes that was applied and differed from the one before."""
        self.refuse: RouterError | None = None
        """Raised by :meth:`apply` while it is set, as by a kernel that refuses a route."""
        self._disturbed = asyncio.Event()

    async def apply(self, routes: Sequence[Route]) -> None:
        if self.refuse is not None:
            raise self.refuse
        wanted = tuple(dict.fromkeys(routes))
        if set(wanted) != set(self.applied):
            self.history.append(wanted)
        self.applied = wanted

    async def changed(self) -> None:
        await self._disturbed.wait()
        self._disturbed.clear()

    def disturb(self) -> None:
        """Drop all routes but the unreachable ones, as somebody could by hand."""
        self.applied = tuple(route for route in self.applied if route.kind == "unreachable")
        self._disturbed.set()

    async def aclose(self) -> None:
        self.applied = tuple(route for route in self.applied if route.kind == "unreachable")
