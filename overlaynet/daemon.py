"""The life of a node: find the network, lease a subnet, bring the device up, keep peers and routes right, stop cleanly.

The daemon is level-triggered: whatever happens (a snapshot from the store, a route deleted by hand, the periodic
audit), it works out the whole desired state and applies it. It knows drivers only by their contracts.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import attrs

from overlaynet import boot_clock, joining, lease_keeping, subnet_file
from overlaynet.drivers import Backend, Router, Store
from overlaynet.errors import (
    BackendError,
    ConfigError,
    IdentityTaken,
    LeaseLost,
    NoThread,
    OverlaynetError,
    RouterError,
    StoreError,
    StoreUnavailable,
    UnderlayError,
)
from overlaynet.health import Health
from overlaynet.joining import Promised
from overlaynet.lease_keeping import LeaseKeeper, where
from overlaynet.logs import fields
from overlaynet.model import JSON, Device, Lease, LeaseRequest, Malformed, Peer, Snapshot, Underlay
from overlaynet.netlink import NetlinkError
from overlaynet.network import Network
from overlaynet.plugins import Plugins
from overlaynet.reconcile import backstops, desired_peers, difference
from overlaynet.retry import Backoff
from overlaynet.settings import Settings

log = logging.getLogger(__name__)

UnderlayFinder = Callable[[Network], Awaitable[tuple[Underlay, str]]]
"""Finds how this node is attached to the network of the hosts, and its default identity; asked again at run time."""


async def never() -> None:
    """Never return."""
    await asyncio.Event().wait()


AUDIT_INTERVAL = 30.0
"""Seconds after which peers and routes are applied again although nothing is known to have changed."""
CHANGE_INTERVAL = 1.0
"""Least seconds between two changes that one source tells of, so that none that never rests keeps the daemon busy."""
MOST_SHOWN = 100
"""Records in the store which cannot be used that the status lists; the log names all."""
LASTING = 60.0
"""Seconds after which the loss of a lease is a new trouble, and not the last one going on."""


@attrs.define
class _Node:
    """What a node has once it is up."""

    network: Network
    backend: Backend
    router: Router
    device: Device
    underlay: Underlay
    """What the backend has followed last."""
    keeper: LeaseKeeper
    peers: tuple[Peer, ...] = ()
    snapshot: Snapshot | None = None
    rejected: tuple[Malformed, ...] = ()
    subnet_file: str = ""
    """The text that was written last."""
    ready: bool = False
    underlay_refused: bool = False
    """The backend could not follow the underlay: it is told of the next one, even of the one that it had."""
    watch: asyncio.Timeout | None = None
    """While the store is watched: what ends that, so that it is begun anew."""

    @property
    def lease(self) -> Lease:
        """The lease as the store has it, as far as is known."""
        return self.keeper.lease


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
        self._node: _Node | None = None
        self._claim: asyncio.Task[Promised] | None = None
        """The lease, from when the store is asked for it."""
        self._stopping = asyncio.Event()
        self._ending = False
        """The life of the node is being cancelled; nothing begins anew."""
        self._dirty = asyncio.Event()
        self._underlay_due = False

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
        if node is not None:
            remaining = node.keeper.deadline - boot_clock.now()
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
                "skipped_records": [f"{problem.key}: {problem.reason}" for problem in node.rejected[:MOST_SHOWN]],
                "packets": node.backend.status(),
            }
        return status

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
            node = await self._start(stack)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_store(node), name="follow the store")
                tasks.create_task(node.keeper.run(), name="keep the lease")
                tasks.create_task(self._reconcile_forever(node), name="reconcile")
                tasks.create_task(self._watch(node.router.changed), name="watch the router")
                tasks.create_task(self._watch(node.backend.changed), name="watch the backend")
                tasks.create_task(self._watch(self._host_changed, underlay=True), name="watch the host")
                tasks.create_task(node.backend.run(), name="run the backend")

    # Start: everything that can be refused is asked before anything is claimed or changed.

    async def _start(self, stack: AsyncExitStack) -> _Node:
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
        keeper = LeaseKeeper(
            store,
            network,
            lease,
            deadline=promised.until,
            margin=margin,
            health=self._health,
            plugins=plugins,
            changed=self._dirty.set,
        )
        plugins.notify("overlaynet_lease_acquired", lease=lease)
        device = await backend.start(lease)
        log.info("device up", extra=fields(device=device.name, mtu=device.mtu))
        router = make_router()
        stack.push_async_callback(router.aclose)
        await router.open(device.instance)
        self._node = node = _Node(network, backend, router, device, underlay, keeper)
        await self._apply_routes(node)
        await self._write_subnet_file(node)
        return node

    async def _write_subnet_file(self, node: _Node) -> None:
        text = subnet_file.render(node.network, node.lease, node.device.mtu)
        if text != node.subnet_file:
            path = Path(self._settings.subnet_file)
            subnet_file.write(path, text)
            node.subnet_file = text
            log.info("subnet file written", extra=fields(path=path, mtu=node.device.mtu))

    # The rounds: each is one task, and ends only by cancellation or by a failure that ends the node.

    async def _follow_store(self, node: _Node) -> None:
        backoff = Backoff()
        while True:
            try:
                async with asyncio.timeout(None) as node.watch, aclosing(self._store.watch()) as snapshots:
                    begun = False
                    async for snapshot in snapshots:
                        backoff.reset()
                        self._health.recovered("store")
                        node.snapshot = snapshot
                        node.keeper.look(snapshot)
                        if not begun:
                            begun = True
                            node.keeper.try_again()
                        self._dirty.set()
            except TimeoutError:
                if node.watch is None or not node.watch.expired():
                    raise  # it is the driver's own
                continue
            except (StoreUnavailable, StoreError, NoThread) as error:
                # Once the node is up, even a refusal is no reason to cut its traffic: an operator may mend it.
                self._health.degraded("store", str(error), hint="traffic goes on with the peers that are known")
            node.watch = None
            await asyncio.sleep(backoff.next())

    async def _watch(self, changed: Callable[[], Awaitable[None]], *, underlay: bool = False) -> None:
        while True:
            await changed()
            self._underlay_due |= underlay
            self._dirty.set()
            await asyncio.sleep(CHANGE_INTERVAL)

    async def _reconcile_forever(self, node: _Node) -> None:
        backoff = Backoff(first=1.0, most=AUDIT_INTERVAL)
        delay = AUDIT_INTERVAL
        while True:
            try:
                async with asyncio.timeout(delay):
                    await self._dirty.wait()
            except TimeoutError:
                # Time for an audit, or for another try.
                self._underlay_due = True
            self._dirty.clear()
            if await self._reconcile(node):
                backoff.reset()
                delay = AUDIT_INTERVAL
            else:
                delay = backoff.next()

    async def _reconcile(self, node: _Node) -> bool:
        """Make all what it should be; False if a part could not be: it is reported, and no reason to leave out the others."""
        well = True
        for part, step in (
            ("backend", self._set_peers),
            ("underlay", self._follow_underlay),
            ("subnet file", self._write_subnet_file),
            ("routes", self._apply_routes),
        ):
            try:
                await step(node)
            except (BackendError, RouterError, UnderlayError, NetlinkError, ConfigError, NoThread) as error:
                self._health.degraded(part, str(error), hint="trying again")
                well = False
            else:
                self._health.recovered(part)
        if well and node.snapshot is not None and not node.ready:
            node.ready = True
            log.info("ready", extra=fields(subnet=node.lease.subnets, device=node.device.name, peers=len(node.peers)))
            self._plugins.notify("overlaynet_ready", lease=node.lease)
        return well

    async def _follow_underlay(self, node: _Node) -> None:
        """See how this node is attached to the network of the hosts now. While it is not, all stays as it was."""
        if not self._underlay_due:
            return
        underlay, _ = await self._find_underlay(node.network)
        if underlay != node.underlay or node.underlay_refused:
            node.underlay_refused = True  # how far the backend came, if it raises, only it knows
            device = await node.backend.set_underlay(underlay)
            node.underlay_refused = False
            log.warning(
                "underlay changed",
                extra=fields(
                    interface=underlay.interface,
                    mtu=underlay.mtu,
                    address=[str(address) for address in (underlay.ipv4, underlay.ipv6) if address is not None],
                ),
            )
            self._dirty.set()  # which peers are reached, and how, may depend on it
            node.underlay = underlay
            node.device = node.device if device is None else device
            node.keeper.publish(underlay)
            if node.watch is not None and not node.watch.expired():
                # Its connection may be one from an address that is gone, and hear of nothing any more without knowing it.
                node.watch.reschedule(0)
        self._underlay_due = False

    async def _set_peers(self, node: _Node) -> None:
        if node.snapshot is None:
            await node.backend.set_peers(node.peers)
            return
        desired = desired_peers(
            node.network, node.lease, node.snapshot, node.network.backend_type, local=node.underlay.addresses
        )
        self._report(node, desired.rejected)
        peers = desired.peers
        if node.keeper.expired:
            # The store may have given the subnet to another node by now: carry nothing until the lease is back.
            peers = ()
        changes = difference(node.peers, peers)
        trouble = None
        try:
            await node.backend.set_peers(peers)
        except BackendError as error:
            # The peers are in force as far as possible all the same, and so are to be their routes.
            trouble = error
        node.peers = peers
        for peer in changes.removed:
            log.info("peer removed", extra=fields(subnet=peer.subnets))
            self._plugins.notify("overlaynet_peer_removed", peer=peer)
        for old, new in changes.changed:
            log.info("peer changed", extra=fields(subnet=new.subnets, **where(new)))
            self._plugins.notify("overlaynet_peer_changed", old=old, new=new)
        for peer in changes.added:
            log.info("peer added", extra=fields(subnet=peer.subnets, **where(peer)))
            self._plugins.notify("overlaynet_peer_added", peer=peer)
        if trouble is not None:
            raise trouble

    async def _apply_routes(self, node: _Node) -> None:
        guards = backstops(node.network) if node.backend.backstop else ()
        await node.router.apply([*guards, *node.backend.routes(node.peers)])

    def _report(self, node: _Node, rejected: tuple[Malformed, ...]) -> None:
        for problem in rejected:
            if problem not in node.rejected:
                log.warning("lease record skipped", extra=fields(key=problem.key, reason=problem.reason))
        node.rejected = rejected

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


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _plain(error: BaseException) -> BaseException:
    """The error that ended the node, out of the group that its task died in."""
    while isinstance(error, BaseExceptionGroup):
        known = [inner for inner in error.exceptions if isinstance(inner, (OverlaynetError, BaseExceptionGroup))]
        error = (known or list(error.exceptions))[0]
    return error
