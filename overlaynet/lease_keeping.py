"""How a node keeps its lease: renewed in time, taken back when it vanishes, given up when another node holds it.

A record that is still this node's, and no longer what it has written, is written again.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping

import attrs

from overlaynet import boot_clock
from overlaynet.drivers import Store
from overlaynet.errors import LeaseLost, NoThread, OverlaynetError, StoreError, StoreUnavailable
from overlaynet.health import Health
from overlaynet.joining import in_time
from overlaynet.logs import fields
from overlaynet.model import Lease, Peer, Snapshot, Underlay
from overlaynet.network import Network
from overlaynet.plugins import Plugins
from overlaynet.records import as_read
from overlaynet.retry import Backoff

log = logging.getLogger(__name__)

RELEASE_TIMEOUT = 25.0
"""Seconds that a stop waits for the store to take a lease back.

Enough for two hung members of an etcd, which cost a request 10 seconds each, and the answer of the next; and less than
service managers wait for the end of a stop (the systemd unit 40 seconds, Kubernetes 30).
"""
LEAST_PAUSE = 1.0
"""Least seconds between two renewals, whatever asks for them."""
_HAIR = 0.001
"""Seconds that an alarm may ring early."""


def renewal_margin(ttl: float, minutes: int) -> float:
    """Seconds before its end at which a lease that lives ``ttl`` seconds is renewed.

    That is what the setting says, but never more than two thirds of the lifetime: so a short lifetime has two more
    chances to be renewed, and no lifetime is renewed all the time.
    """
    return min(minutes * 60.0, ttl * 2 / 3)


class LeaseKeeper:
    """Keeps one lease, from when the store has granted it until :meth:`run` ends.

    While it runs, it alone tells ``health`` how the lease is.

    :param deadline: time of the boot clock until which the store has promised the lease.
    :param margin: seconds before its end at which it is renewed (see :func:`renewal_margin`).
    :param changed: called whenever the lease, or the time until which it is promised, has changed, and when that is over.
    """

    def __init__(
        self,
        store: Store,
        network: Network,
        lease: Lease,
        *,
        deadline: float,
        margin: float,
        health: Health,
        plugins: Plugins,
        changed: Callable[[], None],
    ) -> None:
        self.lease = lease
        self.deadline = deadline
        self._store = store
        self._network = network
        self._margin = margin
        self._health = health
        self._plugins = plugins
        self._changed = changed
        self._wanted = lease
        self._asked: Lease | None = None
        """What the store is being asked to write, or was, and nobody knows yet whether it has."""
        self._former = ""
        """The version of the record before the last renewal."""
        self._due = asyncio.Event()
        self._missing = False
        self._altered = False
        """Somebody else has changed the record, and it has not been written again since."""
        self._failure: str | None = None
        """Why the last renewal has failed."""

    @property
    def expired(self) -> bool:
        """True once the store may have given the subnet to another node: then no packets are to be carried."""
        return boot_clock.now() > self.deadline - _HAIR

    def look(self, snapshot: Snapshot) -> None:
        """See if the store still has the lease as this process wrote it.

        If not, it is renewed at once: that writes it again, or shows who has it now.
        """
        found = next((lease for lease in snapshot.leases if _same_holder(lease, self.lease)), None)
        if found is None:
            self._missing = True
        elif self._is_own_writing(found):
            return
        elif not self._altered:
            self._altered = True
            log.warning(
                "lease record altered",
                extra=fields(
                    subnet=found.subnets,
                    altered=_differences(found, self.lease),
                    **where(found),
                    hint="it is written again as it was",
                ),
            )
        self._due.set()

    def try_again(self) -> None:
        """The store seems to be back: a renewal that has failed is tried again at once. Nothing happens if none has."""
        if self._failure is not None:
            self._due.set()

    def publish(self, underlay: Underlay) -> None:
        """Tell the peers, by a renewal at once, that this node is reached at other addresses. Idempotent."""
        self._wanted = attrs.evolve(self._wanted, public_ipv4=underlay.public_ipv4, public_ipv6=underlay.public_ipv6)
        if self._wanted != self.lease:
            self._due.set()

    async def run(self) -> None:
        """Keep the lease until cancelled.

        :raises LeaseLost: if another node, or another process of this node, holds it now.
        """
        backoff = Backoff(first=LEAST_PAUSE, most=60.0)
        end = boot_clock.call_at(self.deadline, self._end)
        renew_at = self.deadline - self._margin
        try:
            while True:
                await boot_clock.wait(self._due, renew_at)
                asked_at = boot_clock.now()
                event = "lease taken back" if self._missing or self.expired else "lease renewed"
                self._due.clear()
                self._asked = wanted = attrs.evolve(self._wanted, version=self.lease.version)
                if wanted != self.lease:
                    event = "address published"
                try:
                    # Beyond the deadline the subnet may be another node's: renewing then proves that it is not.
                    self.lease = await in_time(self._store.renew(self._network, wanted))
                except LeaseLost as error:
                    self._plugins.notify("overlaynet_lease_lost", lease=self.lease, reason=str(error))
                    raise
                except (StoreUnavailable, StoreError, NoThread) as error:
                    self._failure = str(error)
                    self._report()
                    renew_at = boot_clock.now() + backoff.next()
                else:
                    backoff.reset()
                    self._former, self._asked = wanted.version, None
                    self.deadline = asked_at + self._network.lease_ttl
                    renew_at = self.deadline - self._margin
                    end.cancel()
                    end = boot_clock.call_at(self.deadline, self._end)
                    self._renewed(event)
                await asyncio.sleep(LEAST_PAUSE)
        finally:
            end.cancel()

    def _is_own_writing(self, found: Lease) -> bool:
        """True if this process wrote what was found: last, just now, or before, if the snapshot is older than that."""
        if found.ttl == math.inf and self._asked is None and found.version not in (self.lease.version, self._former):
            return False  # a hand wrote it, without a lifetime: it would outlive this node
        own = [self.lease]
        if self._asked is not None:
            own.append(attrs.evolve(self._asked, reserved=found.reserved))  # that is the store's to say
        same = any(found in (lease, as_read(lease)) for lease in own)
        return same or (found.version != "" and found.version == self._former)

    def _renewed(self, event: str) -> None:
        self._missing, self._altered, self._failure = False, False, None
        self._wanted = attrs.evolve(self._wanted, reserved=self.lease.reserved)
        if self._wanted != self.lease:
            self._due.set()  # it has changed once more meanwhile
        self._health.recovered("lease")
        self._changed()
        log.info(event, extra=fields(subnet=self.lease.subnets, ttl=self._network.lease_ttl, **where(self.lease)))
        self._plugins.notify("overlaynet_lease_renewed", lease=self.lease)

    def _end(self) -> None:
        """What was promised is over, be it that the host has slept for too long: nothing is carried until it is renewed."""
        self._report()
        self._due.set()
        self._changed()

    def _report(self) -> None:
        reasons = []
        if self.expired:
            reasons.append("it has expired, and no packets are carried")
        if self._failure is not None:
            reasons.append(f"it cannot be renewed: {self._failure}")
        self._health.degraded("lease", "; ".join(reasons))


async def release(store: Store, claim: Awaitable[Lease]) -> None:
    """Give a lease back as the node stops, again until the store has answered; but no longer than :data:`RELEASE_TIMEOUT`.

    The store may be down: that is no reason to hang, and only logged.

    :param claim: the lease; if it is still being claimed, that is waited for, as it may take effect at any moment. A
        claim that fails leaves nothing to give back.
    """
    subnet: object = "not known yet"
    reason = "no answer in time"
    backoff = Backoff()
    try:
        async with asyncio.timeout(RELEASE_TIMEOUT):
            lease = await claim
            subnet = lease.subnets
            while True:
                try:
                    await store.release(lease)
                except (StoreUnavailable, NoThread) as error:
                    reason = str(error)
                    await asyncio.sleep(backoff.next())
                else:
                    log.info("lease released", extra=fields(subnet=subnet))
                    return
    except TimeoutError:
        pass
    except OverlaynetError as error:
        reason = str(error)
    log.warning("lease not released", extra=fields(subnet=subnet, reason=reason))


def where(holder: Lease | Peer) -> Mapping[str, object]:
    """Fields of a log record that say which node it is about, and where that is reached."""
    addresses = [str(address) for address in (holder.public_ipv4, holder.public_ipv6) if address is not None]
    return {"address": ", ".join(addresses), "node": holder.node}


def _same_holder(found: Lease, own: Lease) -> bool:
    return found.subnets == own.subnets and found.node == own.node and found.run == own.run


def _differences(found: Lease, own: Lease) -> list[str]:
    """The names of what is not as it was written."""
    own = as_read(own)
    names = [field.name for field in attrs.fields(Lease) if field.eq]
    changed = [name for name in names if getattr(found, name) != getattr(own, name)]
    return [*changed, "ttl"] if found.ttl == math.inf else changed
