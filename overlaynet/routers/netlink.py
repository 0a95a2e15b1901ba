"""The netlink router: programs the kernel's main routing table.

Which routes are this router's own, so that a restart adopts or removes what an earlier run left, while the routes of
others, and of other overlays on the same host, are never touched: those that carry its protocol number (option
``Protocol``, 82) **and** either

- lead to the device that the instance is named after: ``10.244.0.0/16 dev overlay0 proto 82 scope link``. They carry
  no metric of ours, since nobody else routes to this device. Or
- carry one of the instance's two metrics: ``0xF0000000 + n`` for backstops, such as
  ``unreachable 10.244.0.0/16 proto 82 metric 4173053590``, which thus give way to everything else; ``0xE0000000 + n``
  for routes through a device that is shared with others. ``n`` is the CRC-32 of the instance's name, modulo 2**28.
"""

from __future__ import annotations

import errno
import functools
import logging
import zlib
from collections.abc import Collection, Sequence
from typing import TypeAlias

import attrs

from overlaynet.drivers import Router
from overlaynet.errors import RouterError
from overlaynet.logs import fields
from overlaynet.model import IPNetwork, Route
from overlaynet.netlink import (
    DEFAULT_METRIC,
    SCOPE_GLOBAL,
    SCOPE_LINK,
    KernelRoute,
    Netlink,
    NetlinkError,
    NetlinkWriter,
)
from overlaynet.netlink_events import ChangeSignal
from overlaynet.options import between, option

log = logging.getLogger(__name__)

_BACKSTOP_METRICS = 0xF0000000
_SHARED_DEVICE_METRICS = 0xE0000000


@attrs.frozen
class NetlinkRouterOptions:
    """The options of the netlink router."""

    # Numbers below 5 are those that the kernel and `ip route` use themselves.
    protocol: int = option(82, "route protocol number that marks routes as overlaynet's", check=between(5, 255))


class NetlinkRouter(Router):
    """Keeps the routes of one instance in the kernel's main table, and tells when they may have changed."""

    Options = NetlinkRouterOptions

    def __init__(self, options: NetlinkRouterOptions) -> None:
        super().__init__(options)
        self._ownership: Ownership | None = None
        self._signal: ChangeSignal | None = None
        self._writer = NetlinkWriter()

    async def open(self, instance: str) -> None:
        """Begin for the instance with the device ``instance``, which need not exist yet.

        :raises RouterError: if the kernel does not let this process follow its changes.
        """
        self._ownership = Ownership(instance, self.options.protocol)
        try:
            self._signal = ChangeSignal()
        except NetlinkError as error:
            raise RouterError(str(error)) from error

    async def apply(self, routes: Sequence[Route]) -> None:
        """Make ``routes`` the whole set of this instance's routes; see :meth:`overlaynet.api.Router.apply`.

        A route that is refused keeps none of the others from being set.
        """
        if self._ownership is None:
            raise RuntimeError("apply() needs open() first")
        await self._synchronise(self._ownership, {self._ownership.kernel_route(route) for route in routes})

    async def changed(self) -> None:
        """Return when interfaces, addresses or routes have changed since the last call returned, or since :meth:`open`.

        Returns about once a second at most, however much changes. One call at a time.
        """
        if self._signal is None:
            raise RuntimeError("changed() needs open() first")
        await self._signal.wait()

    async def aclose(self) -> None:
        if self._signal is not None:
            self._signal.close()
        ownership, self._ownership = self._ownership, None
        if ownership is not None:
            try:
                await self._synchronise(ownership, None)
            except RouterError as error:
                log.warning("routes left behind", extra=fields(reason=str(error)))

    async def _synchronise(self, ownership: Ownership, wanted: Collection[KernelRoute] | None) -> None:
        try:
            await self._writer.write(lambda kernel: synchronise(kernel, ownership, wanted))
        except NetlinkError as error:
            raise RouterError(str(error)) from error


@attrs.frozen
class Ownership:
    """Which of the kernel's routes are an instance's, and how the instance marks its routes."""

    instance: str
    protocol: int

    @property
    def backstop_metric(self) -> int:
        """The metric of routes that lead nowhere."""
        return _BACKSTOP_METRICS + self._number

    @property
    def shared_device_metric(self) -> int:
        """The metric of routes through another device than the instance's own."""
        return _SHARED_DEVICE_METRICS + self._number

    @property
    def _number(self) -> int:
        return zlib.crc32(self.instance.encode()) & 0x0FFFFFFF

    def owns(self, route: KernelRoute) -> bool:
        """True if this instance, and no other, made the route."""
        if route.protocol != self.protocol:
            return False
        return route.device == self.instance or route.metric in (self.backstop_metric, self.shared_device_metric)

    def kernel_route(self, route: Route) -> KernelRoute:
        """The route with the marks of this instance."""
        if route.kind == "unreachable":
            return KernelRoute(
                route.destination, kind="unreachable", metric=self.backstop_metric, protocol=self.protocol
            )
        if route.device is None:
            raise RouterError(f"the route to {route.destination} names no device")
        version = route.destination.version
        own_device = route.device == self.instance
        return KernelRoute(
            destination=route.destination,
            device=route.device,
            gateway=route.gateway,
            onlink=route.onlink,
            metric=DEFAULT_METRIC[version] if own_device else self.shared_device_metric,
            protocol=self.protocol,
            scope=SCOPE_LINK if version == 4 and route.gateway is None else SCOPE_GLOBAL,
        )


Key: TypeAlias = tuple[IPNetwork, int]
"""Destination and metric: what the kernel tells routes apart by."""


def _key(route: KernelRoute) -> Key:
    return route.destination, route.metric


def synchronise(kernel: Netlink, ownership: Ownership, wanted: Collection[KernelRoute] | None) -> None:
    """Make ``wanted`` all that the instance has in the kernel; ``None`` stands for the backstops that are there.

    Backstops are the first to come and the last to go, so that no packet leaks in between.

    :raises RouterError: naming the first route that was refused; all others are set all the same.
    """
    present = {route for route in kernel.routes(protocol=ownership.protocol) if ownership.owns(route)}
    if wanted is None:
        wanted = {route for route in present if route.kind != "unicast"}
    missing = sorted((route for route in wanted if route not in present), key=lambda route: route.kind == "unicast")
    stale = {_key(route): route for route in present if route not in wanted}
    refused: list[str] = []

    @functools.cache
    def foreign() -> dict[Key, KernelRoute]:
        return {_key(route): route for route in kernel.routes() if not ownership.owns(route)}

    added = replaced = removed = 0
    for route in missing:
        try:
            # The kernel replaces whatever it finds first, which must not be a route of somebody else.
            if _key(route) in stale and _key(route) not in foreign():
                kernel.replace_route(route)
                del stale[_key(route)]
                replaced += 1
            else:
                kernel.add_route(route)
                added += 1
        except NetlinkError as error:
            refused.append(_refusal(route, error, foreign() if error.errno == errno.EEXIST else {}))
    for route in sorted(stale.values(), key=lambda route: route.kind != "unicast"):
        try:
            kernel.delete_route(route)
            removed += 1
        except NetlinkError as error:
            if error.errno not in (errno.ESRCH, errno.ENODEV):  # gone meanwhile, alone or with its device
                refused.append(str(error))
    if added or replaced or removed:
        log.info("routes changed", extra=fields(added=added, replaced=replaced, removed=removed))
    if refused:
        more = f" ({len(refused) - 1} more routes were refused)" if len(refused) > 1 else ""
        raise RouterError(refused[0] + more)


def _refusal(route: KernelRoute, error: NetlinkError, foreign: dict[Key, KernelRoute]) -> str:
    other = foreign.get(_key(route))
    if other is not None:
        return (
            f"the route {route} cannot be set, because there is {other}, which is not this overlay's; "
            f"remove it with `ip route del {other}`, or give the overlay another network"
        )
    reason = f"there is no device {route.device}" if error.errno == errno.ENODEV else error.reason
    return f"the route {route} cannot be set: {reason}"
