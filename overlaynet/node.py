"""A node that is up: it follows its store and its host, and keeps peers, routes and lease what they should be.

It is level-triggered: whatever happens (a snapshot from the store, a route deleted by hand, the periodic audit), it works
out the whole desired state and applies it. It knows drivers only by their contracts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import attrs

from overlaynet import boot_clock, subnet_file
from overlaynet.drivers import Backend, Router, Store
from overlaynet.errors import (
    BackendError,
    ConfigError,
    NoThread,
    RouterError,
    StoreError,
    StoreUnavailable,
    UnderlayError,
)
from overlaynet.health import Health
from overlaynet.lease_keeping import LeaseKeeper, where
from overlaynet.logs import fields
from overlaynet.model import JSON, Device, Lease, Malformed, Peer, Snapshot, Underlay
from overlaynet.netlink import NetlinkError
from overlaynet.network import Network
from overlaynet.plugins import Plugins
from overlaynet.reconcile import backstops, desired_peers, difference
from overlaynet.retry import Backoff

log = logging.getLogger(__name__)

UnderlayFinder = Callable[[Network], Awaitable[tuple[Underlay, str]]]
"""Finds how this node is attached to the network of the hosts, and its default identity; asked again at run time."""
AUDIT_INTERVAL = 30.0
"""Seconds after which peers and routes are applied again although nothing is known to have changed."""
CHANGE_INTERVAL = 1.0
"""Least seconds between two changes that one source tells of, so that none that never rests keeps the daemon busy."""
MOST_SHOWN = 100
"""Records in the store which cannot be used that the status lists; the log names all."""
_PARTS = ("backend", "underlay", "subnet file", "routes")
"""What is made right in each round, in this order."""


@attrs.define(kw_only=True, eq=False)
class Node:
    """One lease, with all that belongs to it. Who makes it opens the drivers before, and closes them after :meth:`run`."""

    network: Network
    backend: Backend
    """Open, and started."""
    router: Router
    """Open."""
    device: Device
    underlay: Underlay
    """What the backend has followed last."""
    keeper: LeaseKeeper
    peers: tuple[Peer, ...] = ()
    ready: bool = False
    """All has been what it should be once."""
    _store: Store
    _plugins: Plugins
    _health: Health
    _subnet_file: Path
    _find_underlay: UnderlayFinder
    _host_changed: Callable[[], Awaitable[None]]
    """Returns when the underlay may be another."""
    _dirty: asyncio.Event
    """Set when something may not be as it should be."""
    _snapshot: Snapshot | None = None
    _rejected: tuple[Malformed, ...] = ()
    _written: str = ""
    """The text of the subnet file that was written last."""
    _underlay_due: bool = False
    _underlay_refused: bool = False
    """The backend could not follow the underlay: it is told of the next one, even of the one that it had."""
    _watch: asyncio.Timeout | None = None
    """While the store is watched: what ends that, so that it is begun anew."""

    @property
    def lease(self) -> Lease:
        """The lease as the store has it, as far as is known."""
        return self.keeper.lease

    def status(self) -> dict[str, JSON]:
        """What ``overlaynet status`` shows of it."""
        lease, remaining = self.lease, self.keeper.deadline - boot_clock.now()
        return {
            "network": str(self.network),
            "backend": self.network.backend_type,
            "node": lease.node,
            "subnets": [str(subnet) for subnet in lease.subnets],
            "public_ipv4": _text(lease.public_ipv4),
            "public_ipv6": _text(lease.public_ipv6),
            "lease_seconds_left": max(0, round(remaining)),
            "device": self.device.name,
            "mtu": self.device.mtu,
            "peers": len(self.peers),
            "skipped_records": [f"{problem.key}: {problem.reason}" for problem in self._rejected[:MOST_SHOWN]],
            "packets": self.backend.status(),
        }

    async def begin(self) -> None:
        """Set what needs no peers: the backstop, and the subnet file. To be called before :meth:`run`."""
        await self._apply_routes()
        await self._write_subnet_file()

    async def run(self) -> None:
        """Hold the lease, and keep all right, until cancelled, or until the lease or the backend is lost.

        :raises BaseExceptionGroup: with what ended it.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_store(), name="follow the store")
            tasks.create_task(self.keeper.run(), name="keep the lease")
            tasks.create_task(self._reconcile_forever(), name="reconcile")
            tasks.create_task(self._follow(self.router.changed), name="watch the router")
            tasks.create_task(self._follow(self.backend.changed), name="watch the backend")
            tasks.create_task(self._follow(self._host_changed, underlay=True), name="watch the host")
            tasks.create_task(self.backend.run(), name="run the backend")

    # The rounds: each is one task, and ends only by cancellation or by a failure that ends the node.

    async def _follow_store(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async with asyncio.timeout(None) as self._watch, aclosing(self._store.watch()) as snapshots:
                    begun = False
                    async for snapshot in snapshots:
                        backoff.reset()
                        self._health.recovered("store")
                        self._snapshot = snapshot
                        self.keeper.look(snapshot)
                        if not begun:
                            begun = True
                            self.keeper.try_again()
                        self._dirty.set()
            except TimeoutError:
                if self._watch is None or not self._watch.expired():
                    raise  # it is the driver's own
                continue
            except (StoreUnavailable, StoreError, NoThread) as error:
                # Once the node is up, even a refusal is no reason to cut its traffic: an operator may mend it.
                self._health.degraded("store", str(error), hint="traffic goes on with the peers that are known")
            self._watch = None
            await asyncio.sleep(backoff.next())

    async def _follow(self, changed: Callable[[], Awaitable[None]], *, underlay: bool = False) -> None:
        while True:
            await changed()
            self._underlay_due |= underlay
            self._dirty.set()
            await asyncio.sleep(CHANGE_INTERVAL)

    async def _reconcile_forever(self) -> None:
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
            if await self._reconcile():
                backoff.reset()
                delay = AUDIT_INTERVAL
            else:
                delay = backoff.next()

    # What a round does.

    async def _reconcile(self) -> bool:
        """Make all what it should be; False if a part could not be: it is reported, and no reason to leave out the others."""
        troubles = await self._go_round()
        if troubles.keys() - self._health.problems.keys():
            # The kernel may have changed in the middle of the round: what is well in the next one is no trouble.
            troubles = await self._go_round()
        for part in _PARTS:
            if part in troubles:
                self._health.degraded(part, troubles[part], hint="trying again")
            else:
                self._health.recovered(part)
        well = not troubles
        if well and self._snapshot is not None and not self.ready:
            self.ready = True
            log.info("ready", extra=fields(subnet=self.lease.subnets, device=self.device.name, peers=len(self.peers)))
            self._plugins.notify("overlaynet_ready", lease=self.lease)
        return well

    async def _go_round(self) -> dict[str, str]:
        """Apply the whole desired state, part by part; the reasons of those that could not be applied."""
        troubles = {}
        for part, step in zip(
            _PARTS,
            (self._set_peers, self._follow_underlay, self._write_subnet_file, self._apply_routes),
            strict=True,
        ):
            try:
                await step()
            except (BackendError, RouterError, UnderlayError, NetlinkError, ConfigError, NoThread) as error:
                troubles[part] = str(error)
        return troubles

    async def _set_peers(self) -> None:
        if self._snapshot is None:
            await self.backend.set_peers(self.peers)
            return
        desired = desired_peers(
            self.network, self.lease, self._snapshot, self.network.backend_type, local=self.underlay.addresses
        )
        self._report(desired.rejected)
        peers = desired.peers
        if self.keeper.expired:
            # The store may have given the subnet to another node by now: carry nothing until the lease is back.
            peers = ()
        changes = difference(self.peers, peers)
        trouble = None
        try:
            await self.backend.set_peers(peers)
        except BackendError as error:
            # The peers are in force as far as possible all the same, and so are to be their routes.
            trouble = error
        self.peers = peers
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

    def _report(self, rejected: tuple[Malformed, ...]) -> None:
        for problem in rejected:
            if problem not in self._rejected:
                log.warning("lease record skipped", extra=fields(key=problem.key, reason=problem.reason))
        self._rejected = rejected

    async def _follow_underlay(self) -> None:
        """See how this node is attached to the network of the hosts now. While it is not, all stays as it was."""
        if not self._underlay_due:
            return
        underlay, _ = await self._find_underlay(self.network)
        if underlay != self.underlay or self._underlay_refused:
            self._underlay_refused = True  # how far the backend came, if it raises, only it knows
            device = await self.backend.set_underlay(underlay)
            self._underlay_refused = False
            log.warning(
                "underlay changed",
                extra=fields(
                    interface=underlay.interface,
                    mtu=underlay.mtu,
                    address=[str(address) for address in (underlay.ipv4, underlay.ipv6) if address is not None],
                ),
            )
            self._dirty.set()  # which peers are reached, and how, may depend on it
            self.underlay = underlay
            self.device = self.device if device is None else device
            self.keeper.publish(underlay)
            if self._watch is not None and not self._watch.expired():
                # Its connection may be one from an address that is gone, and hear of nothing any more without knowing it.
                self._watch.reschedule(0)
        self._underlay_due = False

    async def _write_subnet_file(self) -> None:
        text = subnet_file.render(self.network, self.lease, self.device.mtu)
        if text != self._written:
            subnet_file.write(self._subnet_file, text)
            self._written = text
            log.info("subnet file written", extra=fields(path=self._subnet_file, mtu=self.device.mtu))

    async def _apply_routes(self) -> None:
        guards = backstops(self.network) if self.backend.backstop else ()
        await self.router.apply([*guards, *self.backend.routes(self.peers)])


def _text(value: object) -> str | None:
    return None if value is None else str(value)
