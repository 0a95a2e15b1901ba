"""The drivers of one daemon, from its start to its end, for whoever looks at it from outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from overlaynet.drivers import Backend, Driver, Store
from overlaynet.errors import BackendError
from overlaynet.hookspecs import hookimpl
from overlaynet.model import Lease, LeaseData, Peer, Route, Underlay
from overlaynet.network import Network
from overlaynet.routers.memory import MemoryRouter
from overlaynet.testing.fakes import FakeBackend, UnreliableStore


class _Store(UnreliableStore):
    def __init__(self, store: Store, run: Run) -> None:
        super().__init__(store)
        self._run = run

    async def aclose(self) -> None:
        if not self._run.crashed:
            await super().aclose()

    async def free(self) -> None:
        await super().aclose()


class Run:
    """A plugin that answers for every backend with one class, and for every router with one that only records."""

    def __init__(self, store: Store, backend_class: type[Backend]) -> None:
        self.store = _Store(store, self)
        self.backend: Backend | None = None
        """The last that was made, as the daemon may make several before it has a lease."""
        self.lease: Lease | None = None
        """What the backend was started with."""
        self.peers: tuple[Peer, ...] = ()
        """What the backend was given last."""
        self._backend_class = backend_class
        self._router: MemoryRouter | None = None
        self.crashed = False
        """Whether the process has been killed."""

    @property
    def routes(self) -> Sequence[Route]:
        """The routes that the kernel would have now."""
        if self._router is None:
            return ()
        routes = self._router.applied
        return [route for route in routes if route.kind == "unreachable"] if self.crashed else routes

    def crash(self) -> None:
        """From now on, closing a driver does nothing, and the store hears nothing: there is no process any more.

        Only a real backend is closed all the same, for the sake of its tasks.
        """
        self.crashed = True
        self.store.fail()

    async def free(self) -> None:
        """Close what was not closed, because of a crash."""
        if self.crashed:
            await self.store.free()

    @hookimpl
    def overlaynet_driver(self, axis: str, name: str) -> type[Driver] | None:
        """Answer for backends and routers; leave stores to others."""
        if axis == "backend":
            return self._watched_backend(name)
        return self._watched_router() if axis == "router" else None

    def _watched_backend(self, name: str) -> type[Backend]:
        run = self
        base: Any = self._backend_class

        class Watched(base):  # type: ignore[misc]
            def __init__(self, options: Any, **settings: Any) -> None:
                super().__init__(options, **settings)
                run.backend = self

            async def open(self, network: Network, underlay: Underlay) -> LeaseData:
                data: LeaseData = await super().open(network, underlay)
                if data.backend_type not in ("", name):
                    raise BackendError(
                        f"{base.__name__} publishes the type {data.backend_type!r}, and the network document says {name!r}, so "
                        f"its peers would not know it; give the network backend_options={{'Type': {data.backend_type!r}}}"
                    )
                return data

            async def start(self, lease: Lease) -> Any:
                run.lease = lease
                return await super().start(lease)

            async def set_peers(self, peers: Sequence[Peer]) -> None:
                run.peers = tuple(peers)
                await super().set_peers(peers)

            async def aclose(self) -> None:
                if not (run.crashed and isinstance(self, FakeBackend)):
                    await super().aclose()

        Watched.__name__ = Watched.__qualname__ = base.__name__
        return Watched

    def _watched_router(self) -> type[MemoryRouter]:
        run = self

        class Watched(MemoryRouter):
            def __init__(self, options: Any = None) -> None:
                super().__init__(options)
                run._router = self

            async def aclose(self) -> None:
                if not run.crashed:
                    await super().aclose()

        return Watched
