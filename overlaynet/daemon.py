"""The life of a daemon: find the network, lease a subnet, bring the device up, be a node (see :mod:`overlaynet.node`), stop."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from overlaynet import joining, lease_keeping, subnet_file
from overlaynet.drivers import Store
from overlaynet.errors import IdentityTaken, LeaseLost, OverlaynetError
from overlaynet.health import Health
from overlaynet.joining import Promised
from overlaynet.lease_keeping import LeaseKeeper
from overlaynet.logs import fields
from overlaynet.model import JSON, Lease, LeaseRequest
from overlaynet.node import Node, UnderlayFinder
from overlaynet.plugins import Plugins
from overlaynet.retry import Backoff
from overlaynet.settings import Settings

log = logging.getLogger(__name__)


async def never() -> None:
    """Never return."""
    await asyncio.Event().wait()


LASTING = 60.0
"""Seconds after which the loss of a lease is a new trouble, and not the last one going on."""


class Daemon:
    """One node, from start to stop. Runs once."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        plugins: Plugins,
        find_underlay: UnderlayFinder,
        host_changed: Callable[[], Awaitable[None]] = never,
    ) -> None:
        """Take the parts; the daemon closes ``store``.

        :param host_changed: returns when ``find_underlay`` may have another answer; without it, the audit finds out.
        """
        self._settings = settings
        self._store = store
        self._plugins = plugins
        self._find_underlay = find_underlay
        self._host_changed = host_changed
        self._health = Health(plugins)
        self._node: Node | None = None
        self._claim: asyncio.Task[Promised] | None = None
        """The lease, from when the store is asked for it."""
        self._stopping = asyncio.Event()
        self._ending = False
        """The life of the node is being cancelled; nothing begins anew."""

    def stop(self) -> None:
        """Ask the daemon to stop cleanly; returns at once, and may be called more than once."""
        self._stopping.set()

    async def run(self) -> None:
        """Live until :meth:`stop`; then return, with everything torn down.

        :raises OverlaynetError: if the node cannot start, or cannot go on; everything is torn down then, too.
        """
        life = asyncio.create_task(self._live(), name="node")
        stop = asyncio.create_task(self._stopping.wait(), name="stop")
        try:
            await asyncio.wait({life, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not life.done():
                log.info("stopping")
                self._plugins.notify("overlaynet_stopping")
        finally:
            self._ending = True
            stop.cancel()
            life.cancel()
            await asyncio.wait({life, stop})
        if not life.cancelled() and (error := life.exception()) is not None:
            raise _plain(error)
        log.info("stopped")

    def status(self) -> dict[str, JSON]:
        """What ``overlaynet status`` shows."""
        node = self._node
        status: dict[str, JSON] = {
            "ready": node is not None and node.ready,
            "store": str(self._store),
            "problems": self._health.problems,
        }
        return status if node is None else status | node.status()

    async def _live(self) -> None:
        backoff = Backoff(first=0.1)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._store.aclose)
            # The subnet is given back only when nothing carries its packets any more.
            stack.push_async_callback(self._release)
            while True:
                started_at = asyncio.get_running_loop().time()
                try:
                    await self._be_node()
                except BaseExceptionGroup as errors:
                    # A group that was being cancelled when one of its tasks failed does not say that it was.
                    self._give_up(_plain(errors))
                if asyncio.get_running_loop().time() - started_at > LASTING:
                    backoff.reset()
                await asyncio.sleep(backoff.next())

    def _give_up(self, error: BaseException) -> None:
        """Forget a lease that was lost, if another is to be taken; raise whatever else ends the node."""
        other_node = isinstance(error, LeaseLost) and not isinstance(error, IdentityTaken)
        if not other_node or self._ending or self._settings.on_lease_lost != "reacquire":
            raise error
        task = asyncio.current_task()
        while task is not None and task.cancelling():
            task.uncancel()  # Python 3.11's task groups leave the request behind by which they ended their body
        node, self._node, self._claim = self._node, None, None
        log.warning("lease lost", extra=fields(reason=error, hint="another one is acquired"))
        self._health.degraded("lease", str(error))
        for peer in () if node is None else node.peers:
            self._plugins.notify("overlaynet_peer_removed", peer=peer)

    async def _be_node(self) -> None:
        """Hold one lease, with all that belongs to it, as long as it lasts."""
        async with AsyncExitStack() as stack:
            await (await self._start(stack)).run()

    # Start: everything that can be refused is asked before anything is claimed or changed.

    async def _start(self, stack: AsyncExitStack) -> Node:
        settings, plugins, store = self._settings, self._plugins, self._store
        make_router = joining.find_router(plugins, settings)
        path = Path(settings.subnet_file)
        while True:
            found = await joining.find_network(store, settings, plugins, self._health)
            network = found.network
            backend = joining.make_backend(plugins, network, settings)
            underlay, identity = await self._find_underlay(network)
            subnet_file.check_writable(path)
            stack.push_async_callback(backend.aclose)
            data = await backend.open(network, underlay)
            if await joining.write_network(store, found, self._health):
                break
            await backend.aclose()
        log.info("network found", extra=fields(network=network, backend=network.backend_type, store=store))
        log.info(
            "underlay chosen",
            extra=fields(
                interface=underlay.interface,
                mtu=underlay.mtu,
                public_ip=underlay.public_ipv4,
                public_ipv6=underlay.public_ipv6,
            ),
        )
        margin = lease_keeping.renewal_margin(network.lease_ttl, settings.subnet_lease_renew_margin)
        request = LeaseRequest(
            node=settings.node or identity,
            run=secrets.token_hex(8),
            public_ipv4=underlay.public_ipv4,
            public_ipv6=underlay.public_ipv6,
            data=data,
            previous=subnet_file.read_previous(path),
            renewal_margin=margin,
        )
        self._claim = asyncio.create_task(joining.acquire(store, network, request, self._health), name="claim")
        # What has been asked for may take effect at any moment: it is not forgotten when the node is told to stop.
        promised = await asyncio.shield(self._claim)
        lease = promised.lease
        self._health.recovered("lease")
        dirty = asyncio.Event()
        keeper = LeaseKeeper(
            store,
            network,
            lease,
            deadline=promised.until,
            margin=margin,
            health=self._health,
            plugins=plugins,
            changed=dirty.set,
        )
        plugins.notify("overlaynet_lease_acquired", lease=lease)
        device = await backend.start(lease)
        log.info("device up", extra=fields(device=device.name, mtu=device.mtu))
        router = make_router()
        stack.push_async_callback(router.aclose)
        await router.open(device.instance)
        self._node = node = Node(
            network=network,
            backend=backend,
            router=router,
            device=device,
            underlay=underlay,
            keeper=keeper,
            store=store,
            plugins=plugins,
            health=self._health,
            subnet_file=path,
            find_underlay=self._find_underlay,
            host_changed=self._host_changed,
            dirty=dirty,
        )
        await node.begin()
        return node

    async def _release(self) -> None:
        claim = self._claim
        if claim is None:
            return

        async def lease() -> Lease:
            return (await claim).lease

        if self._settings.release_on_stop and self._stopping.is_set():
            await lease_keeping.release(self._store, lease())
        claim.cancel()
        await asyncio.wait({claim})


def _plain(error: BaseException) -> BaseException:
    """The error that ended the node, out of the group that its task died in."""
    while isinstance(error, BaseExceptionGroup):
        known = [inner for inner in error.exceptions if isinstance(inner, (OverlaynetError, BaseExceptionGroup))]
        error = (known or list(error.exceptions))[0]
    return error
