"""The life of a node: find the network, lease a subnet, bring the device up, keep peers and routes right, stop cleanly.

The daemon is level-triggered: whatever happens (a snapshot from the store, a route deleted by hand, the periodic
audit), it works out the whole desired state and applies it. It knows drivers only by their contracts.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import attrs

from overlaynet import config, joining, options, subnet_file
from overlaynet.drivers import Backend, Router, Store
from overlaynet.errors import BackendError, LeaseLost, OverlaynetError, RouterError, StoreError, StoreUnavailable
from overlaynet.health import Health
from overlaynet.joining import in_time
from overlaynet.logs import fields
from overlaynet.model import JSON, Device, Lease, LeaseRequest, Malformed, Peer, Snapshot, Underlay
from overlaynet.network import Network
from overlaynet.plugins import Plugins
from overlaynet.reconcile import backstops, desired_peers, difference
from overlaynet.retry import Backoff
from overlaynet.settings import Settings

log = logging.getLogger(__name__)

UnderlayFinder = Callable[[Network], Awaitable[tuple[Underlay, str]]]
"""Finds how this node is attached to the network of the hosts, and its default identity."""

AUDIT_INTERVAL = 30.0
"""Seconds after which peers and routes are applied again although nothing is known to have changed."""
RELEASE_TIMEOUT = 5.0


@attrs.define
class _Node:
    """What a node has once it is up."""

    network: Network
    backend: Backend
    router: Router
    device: Device
    lease: Lease
    deadline: float
    """Time of the event loop's clock until which the store has promised the lease."""
    peers: tuple[Peer, ...] = ()
    snapshot: Snapshot | None = None
    rejected: tuple[Malformed, ...] = ()
    ready: bool = False


class Daemon:
    """One node, from start to stop. Runs once."""

    def __init__(self, settings: Settings, store: Store, plugins: Plugins, find_underlay: UnderlayFinder) -> None:
        """Take the parts; the daemon closes ``store``."""
        self._settings = settings
        self._store = store
        self._plugins = plugins
        self._find_underlay = find_underlay
        self._health = Health(plugins)
        self._node: _Node | None = None
        self._lease: Lease | None = None
        self._stopping = asyncio.Event()
        self._dirty = asyncio.Event()
        self._renewal_due = asyncio.Event()

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
        if node is not None:
            remaining = node.deadline - asyncio.get_running_loop().time()
            status |= {
                "network": str(node.network),
                "backend": node.network.backend_type,
                "node": node.lease.node,
                "subnets": [str(subnet) for subnet in node.lease.subnets],
                "public_ipv4": _text(node.lease.public_ipv4),
                "public_ipv6": _text(node.lease.public_ipv6),
                "lease_seconds_left": max(0, round(remaining)),
                "device": node.device.name,
                "mtu": node.device.mtu,
                "peers": len(node.peers),
                "packets": node.backend.status(),
            }
        return status

    async def _live(self) -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._store.aclose)
            node = await self._start(stack)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_store(node), name="follow the store")
                tasks.create_task(self._keep_lease(node), name="keep the lease")
                tasks.create_task(self._reconcile_forever(node), name="reconcile")
                tasks.create_task(self._watch_router(node), name="watch the router")
                tasks.create_task(node.backend.run(), name="run the backend")

    # Start: everything that can be refused is asked before anything is claimed or changed.

    async def _start(self, stack: AsyncExitStack) -> _Node:
        settings, plugins, store = self._settings, self._plugins, self._store
        router_class = plugins.driver("router", settings.router)
        router_options = options.parse(
            router_class.Options,
            {},
            f"router {settings.router}",
            texts=config.key_values(settings.router_option, "--router-option"),
        )
        path = Path(settings.subnet_file)
        # Torn down in reverse: the subnet is given back only when nothing carries its packets any more.
        stack.push_async_callback(self._release)
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
        request = LeaseRequest(
            node=settings.node or identity,
            run=secrets.token_hex(8),
            public_ipv4=underlay.public_ipv4,
            public_ipv6=underlay.public_ipv6,
            data=data,
            previous=subnet_file.read_previous(path),
        )
        lease, deadline = await joining.acquire(store, network, request, self._health)
        self._lease = lease
        plugins.notify("overlaynet_lease_acquired", lease=lease)
        device = await backend.start(lease)
        log.info("device up", extra=fields(device=device.name, mtu=device.mtu))
        router = router_class(router_options)
        stack.push_async_callback(router.aclose)
        await router.open(device.instance)
        self._node = node = _Node(network, backend, router, device, lease, deadline)
        await self._apply_routes(node)
        subnet_file.write(path, subnet_file.render(network, lease, device.mtu))
        log.info("subnet file written", extra=fields(path=path))
        return node

    # The rounds: each is one task, and ends only by cancellation or by a failure that ends the node.

    async def _follow_store(self, node: _Node) -> None:
        backoff = Backoff()
        while True:
            try:
                async with aclosing(self._store.watch()) as snapshots:
                    async for snapshot in snapshots:
                        backoff.reset()
                        self._health.recovered("store")
                        node.snapshot = snapshot
                        if not any(_same_holder(lease, node.lease) for lease in snapshot.leases):
                            self._renewal_due.set()
                        self._dirty.set()
            except (StoreUnavailable, StoreError) as error:
                # Once the node is up, even a refusal is no reason to cut its traffic: an operator may mend it.
                self._health.degraded("store", str(error), hint="traffic goes on with the peers that are known")
            await asyncio.sleep(backoff.next())

    async def _keep_lease(self, node: _Node) -> None:
        loop = asyncio.get_running_loop()
        backoff = Backoff(first=1.0, most=60.0)
        while True:
            await self._until_renewal(node)
            asked_at = loop.time()
            missing = self._renewal_due.is_set()
            self._renewal_due.clear()
            try:
                # Beyond the deadline the subnet may be another node's: renewing then proves that it is not.
                node.lease = await in_time(self._store.renew(node.network, node.lease))
            except LeaseLost as error:
                self._plugins.notify("overlaynet_lease_lost", lease=node.lease, reason=str(error))
                raise
            except (StoreUnavailable, StoreError) as error:
                self._health.degraded("lease", f"it cannot be renewed: {error}")
                delay = backoff.next()
                if loop.time() < node.deadline < loop.time() + delay:
                    delay = node.deadline - loop.time()
                await asyncio.sleep(delay)
                self._renewal_due.set()
                self._dirty.set()  # past the deadline, no peer may be served any more
                continue
            backoff.reset()
            node.deadline = asked_at + node.network.lease_ttl
            self._health.recovered("lease")
            self._dirty.set()
            log.info(
                "lease taken back" if missing else "lease renewed",
                extra=fields(subnet=node.lease.subnets, ttl=node.network.lease_ttl),
            )
            self._plugins.notify("overlaynet_lease_renewed", lease=node.lease)

    async def _until_renewal(self, node: _Node) -> None:
        """Return when the lease should be renewed: at its margin, or as soon as the store shows it missing."""
        ttl, margin = node.network.lease_ttl, self._settings.subnet_lease_renew_margin * 60.0
        # A margin that does not fit into a short lifetime gives way to two chances to renew.
        due = node.deadline - (margin if margin < ttl else ttl * 2 / 3)
        try:
            async with asyncio.timeout_at(due):
                await self._renewal_due.wait()
        except TimeoutError:
            return

    async def _watch_router(self, node: _Node) -> None:
        while True:
            await node.router.changed()
            self._dirty.set()

    async def _reconcile_forever(self, node: _Node) -> None:
        backoff = Backoff(first=1.0, most=AUDIT_INTERVAL)
        delay = AUDIT_INTERVAL
        loop = asyncio.get_running_loop()
        while True:
            until = loop.time() + delay
            if loop.time() < node.deadline:
                until = min(until, node.deadline)
            try:
                async with asyncio.timeout_at(until):
                    await self._dirty.wait()
            except TimeoutError:
                pass  # time for an audit, for another try, or for the end of the lease
            self._dirty.clear()
            try:
                await self._reconcile(node)
            except (RouterError, BackendError) as error:
                self._health.degraded("routes", str(error), hint="trying again")
                delay = backoff.next()
            else:
                self._health.recovered("routes")
                backoff.reset()
                delay = AUDIT_INTERVAL

    async def _reconcile(self, node: _Node) -> None:
        if node.snapshot is None:
            await self._apply_routes(node)
            return
        desired = desired_peers(node.network, node.lease, node.snapshot, node.network.backend_type)
        self._report(node, desired.rejected)
        peers = desired.peers
        if asyncio.get_running_loop().time() >= node.deadline:
            # The store may have given the subnet to another node by now: carry nothing until the lease is back.
            self._health.degraded("lease", "it has expired and could not be renewed; no packets are carried")
            peers = ()
        changes = difference(node.peers, peers)
        await node.backend.set_peers(peers)
        node.peers = peers
        for peer in changes.removed:
            log.info("peer removed", extra=fields(subnet=peer.subnets))
            self._plugins.notify("overlaynet_peer_removed", peer=peer)
        for old, new in changes.changed:
            log.info("peer changed", extra=fields(subnet=new.subnets, **_address(new)))
            self._plugins.notify("overlaynet_peer_changed", old=old, new=new)
        for peer in changes.added:
            log.info("peer added", extra=fields(subnet=peer.subnets, **_address(peer)))
            self._plugins.notify("overlaynet_peer_added", peer=peer)
        await self._apply_routes(node)
        if not node.ready:
            node.ready = True
            log.info("ready", extra=fields(subnet=node.lease.subnets, device=node.device.name, peers=len(node.peers)))
            self._plugins.notify("overlaynet_ready", lease=node.lease)

    async def _apply_routes(self, node: _Node) -> None:
        await node.router.apply([*backstops(node.network), *node.backend.routes(node.peers)])

    def _report(self, node: _Node, rejected: tuple[Malformed, ...]) -> None:
        for problem in rejected:
            if problem not in node.rejected:
                log.warning("lease record skipped", extra=fields(key=problem.key, reason=problem.reason))
        node.rejected = rejected

    async def _release(self) -> None:
        """On a clean stop, give the lease back if that is wanted. The store may be down: that is no reason to hang."""
        lease = self._lease
        if lease is None or not (self._settings.release_on_stop and self._stopping.is_set()):
            return
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT):
                await self._store.release(lease)
        except (StoreUnavailable, StoreError, TimeoutError) as error:
            log.warning(
                "lease not released", extra=fields(subnet=lease.subnets, reason=str(error) or "no answer in time")
            )
        else:
            log.info("lease released", extra=fields(subnet=lease.subnets))


def _same_holder(found: Lease, own: Lease) -> bool:
    return found.subnets == own.subnets and found.node == own.node and found.run == own.run


def _address(peer: Peer) -> Mapping[str, object]:
    addresses = [str(address) for address in (peer.public_ipv4, peer.public_ipv6) if address is not None]
    return {"address": ", ".join(addresses), "node": peer.node}


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _plain(error: BaseException) -> BaseException:
    """The error that ended the node, out of the group that its task died in."""
    while isinstance(error, BaseExceptionGroup):
        known = [inner for inner in error.exceptions if isinstance(inner, (OverlaynetError, BaseExceptionGroup))]
        error = (known or list(error.exceptions))[0]
    return error
