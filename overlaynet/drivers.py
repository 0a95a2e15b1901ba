"""The three axes: what a store, a backend and a router must do, as abstract base classes.

Drivers are level-triggered: they are handed whole desired states, never deltas, and handing them the same state twice
changes nothing. They know neither the daemon nor each other.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, ClassVar

import attrs

from overlaynet.errors import StoreError
from overlaynet.model import (
    JSON,
    Device,
    Lease,
    LeaseData,
    LeaseRequest,
    Malformed,
    Peer,
    Reservation,
    Reserved,
    Route,
    Snapshot,
    Subnets,
    Underlay,
)
from overlaynet.network import Network

API = (1, 0)
"""Version of the contract: all that :mod:`overlaynet.api` offers, and the hooks.

A driver says by its class attribute ``api`` which version it was written for. It fits if its major number is equal, and
its minor number not greater; else it is refused when it is loaded, by a message that names both versions and what to
upgrade. A new minor version only adds: names, hooks, arguments of hooks; and with a default that does what was done before,
methods and class attributes of drivers, fields of values. A new major version may take away what there is, change what it
means, or ask for more.
"""


@attrs.frozen
class NoOptions:
    """The options of a driver that has none."""


class Driver(abc.ABC):
    """What the three axes share.

    The constructor is cheap and does no I/O: it only keeps ``options``, an instance of the class's ``Options``.
    """

    api: ClassVar[tuple[int, int]] = (1, 0)
    """The version of the contract that the driver was written for, as a pair of numbers: the lowest that has all it needs.

    A driver that does not say is taken to be written for 1.0. See :data:`overlaynet.api.API` for what fits.
    """
    Options: ClassVar[type[Any]] = NoOptions
    """An attrs class whose fields, made by :func:`overlaynet.api.option`, are the driver's options.

    They are read and checked before the driver is made, so that ``self.options`` is always an instance of it.
    """

    def __init__(self, options: Any) -> None:
        self.options = options
        """As given; an instance of :attr:`Options`."""

    async def aclose(self) -> None:  # noqa: B027 - nothing to free is a fair default
        """Free everything that the driver holds; idempotent, and safe to call at any point of its life.

        The core calls it at least once for each driver it made, whatever happened before.
        """


class Observer:
    """An observer with options: a class with methods marked by :data:`overlaynet.api.hookimpl`.

    One that needs no options can be a module or any object. A class is named in the entry point itself, and overlaynet makes
    one of it wherever plugins are loaded, by ``overlaynet leases`` as well as by the daemon. So its constructor is cheap, does
    no I/O, and every option has a default.
    """

    api: ClassVar[tuple[int, int]] = (1, 0)
    """The version of the contract that the observer was written for."""
    Options: ClassVar[type[Any]] = NoOptions
    """An attrs class whose fields are its options, given with ``--plugin-option NAME.KEY=VALUE``; see :func:`.option`."""

    def __init__(self, options: Any) -> None:
        self.options = options
        """As given; an instance of :attr:`Options`."""


class Store(Driver):
    """Who owns which subnet, and where is that node?

    Every method may raise :exc:`~overlaynet.errors.StoreUnavailable` (the core tries again, with backoff) and
    :exc:`~overlaynet.errors.StoreError` (the core gives up). Most stores need not implement this class: supplying a
    compare-and-swap table to :class:`overlaynet.api.TableStore` is enough.
    """

    @abc.abstractmethod
    def __str__(self) -> str:
        """Where the store is, for messages, without secrets: ``etcd at http://10.0.0.1:2379, prefix /coreos.com/network``."""

    @abc.abstractmethod
    async def read_network(self) -> str | None:
        """The text of the network document, or ``None`` if the store has none."""

    @abc.abstractmethod
    async def create_network(self, document: str) -> bool:
        """Write the network document if there is none; ``False`` if there is one, with nothing written."""

    @abc.abstractmethod
    async def replace_network(self, document: str) -> None:
        """Write the network document, whether or not there is one. The last of several concurrent calls wins."""

    @abc.abstractmethod
    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        """Claim subnets for a node: those reserved for it, those it holds already, those it held before, or free ones.

        Two calls, from wherever, never return overlapping subnets to two nodes. A node's claim is its own by
        ``request.node``, and what else stands under that name is removed; a lease that names no node (flannel wrote it)
        is its own if it has the same public address, and no other node has that address, too.

        :raises SubnetsExhausted: if every subnet of the network is leased.
        """

    @abc.abstractmethod
    async def renew(self, network: Network, lease: Lease) -> Lease:
        """Write the lease (which this node holds) with its whole lifetime again; also publishes changed addresses or data.

        ``lease`` is what :meth:`acquire` or the last :meth:`renew` returned, evolved at will except for
        ``subnets`` and ``version``. If the record has vanished, it is created again; if it cannot be read any more, it is
        written over, as long as it cannot be another node's: until the end of what was promised last.

        :raises LeaseLost: if another node has written the record, or holds an overlapping subnet, or has it reserved.
        :raises IdentityTaken: if another process with the identity of this node has written the record.
        """

    @abc.abstractmethod
    async def release(self, lease: Lease) -> None:
        """Give the lease back; nothing happens if this process no longer holds it."""

    async def remove(self, claim: Lease | Malformed) -> bool:
        """End a lease that is not this process's, or remove a record that cannot be read, as an operator asks for.

        ``claim`` is what :meth:`leases` returned: if the record has changed since, ``False`` is returned, and nothing is
        written. Subnets that are reserved stay so. The default refuses, for stores that cannot.
        """
        raise StoreError(f"{self} cannot give back the leases of other nodes")

    async def reserve(self, reservation: Reservation) -> None:
        """Keep subnets for one node, which is given them before any others, and nobody else is. Idempotent.

        A reservation stays until :meth:`unreserve`, whatever becomes of leases and nodes. Its node takes the subnets at
        its next :meth:`acquire`, even if it holds others. The default refuses, for stores that cannot.

        :raises ReservationError: if another node holds some of the subnets, or they are reserved already, for another
            node or together with others; then nothing is changed.
        """
        raise StoreError(f"{self} keeps no reservations")

    async def unreserve(self, subnets: Subnets) -> None:
        """Remove a reservation. Whoever holds the subnets keeps them.

        :raises ReservationError: if there is none of exactly these subnets.
        """
        raise StoreError(f"{self} keeps no reservations")

    async def reservations(self) -> Reserved:
        """All reservations. The default has none."""
        return Reserved()

    @abc.abstractmethod
    async def leases(self) -> Snapshot:
        """All leases now, each with its remaining lifetime."""

    @abc.abstractmethod
    def watch(self) -> AsyncGenerator[Snapshot, None]:
        """Yield all leases: at once, and again after each change.

        Changes in quick succession may be yielded as one. Records that cannot be read are listed in the snapshot
        and never empty it. The leases need not tell how long they have left; see :meth:`leases`. The iterator raises instead
        of going silent. Closing it (``aclose``) frees what it holds.
        """


class Backend(Driver):
    """How does a packet get there?

    The core calls :meth:`open`, :meth:`start`, then :meth:`set_peers` and :meth:`set_underlay` any number of times, one
    call at a time, beside one :meth:`run` and :meth:`changed`, and last :meth:`aclose`, which it may call at any point.
    """

    node_settings: ClassVar[frozenset[str]] = frozenset()
    """Names of keyword arguments that the constructor takes beside the options: what each node's settings decide.

    The core gives those that it has a setting for, for the backend of that name, and no others.
    """

    backstop: ClassVar[bool] = True
    """Whether the core keeps ``unreachable`` routes for the overlay, so that no packet for it leaves by the default route.

    False only for a backend whose packets are carried by others, and may have to follow the default route to get there.
    """

    @abc.abstractmethod
    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        """Take what can be refused (ports, device names) before a lease is claimed; return what to publish with it.

        :raises BackendError: naming what is taken and by what; then nothing has been changed.
        """

    @abc.abstractmethod
    async def start(self, lease: Lease) -> Device:
        """Configure the device for the lease and begin to carry packets (to no peer yet)."""

    @abc.abstractmethod
    async def set_peers(self, peers: Sequence[Peer]) -> None:
        """Make ``peers`` the whole peer table, and mend what the backend has in the kernel, if it is not as it should be.

        Idempotent; packets of unaffected peers keep flowing meanwhile. The core calls it when the peers change, after
        :meth:`changed`, and at every audit.

        :raises BackendError: if something cannot be mended now, such as a device that is gone and whose name is taken.
            The peers are in force as far as possible; the core says so and tries again, with backoff.
        """

    async def set_underlay(self, underlay: Underlay) -> Device | None:
        """This node is attached to the network of the hosts as ``underlay`` says from now on. Idempotent.

        Another interface, MTU or address: sockets are bound again, and so on. Peers and lease stay as they are; the core
        publishes the new address. The default does nothing, for backends that hold nothing of the underlay's.

        :return: the device as it is then, with the MTU that fits; ``None`` if it has nothing to do with the underlay.
        :raises BackendError: if that cannot be done now; the core says so and tries again, with backoff.
        """
        return None

    @abc.abstractmethod
    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        """The routes that lead packets for these peers to where they are carried. No I/O.

        What they depend on beside the peers and the device, the last :meth:`set_peers` has found out: the core asks after
        it, for the same peers. What cannot be reached, such as a peer on another link or all behind a device that is gone,
        has no route.
        """

    async def run(self) -> None:
        """Never return; raise :exc:`~overlaynet.errors.BackendError` when packets cannot be carried and never will be.

        What :meth:`set_peers` can mend, and be it after many tries, is no reason to raise: the error ends the node. The
        default waits for ever, for backends that leave packets to the kernel.
        """
        await asyncio.Event().wait()

    async def changed(self) -> None:
        """Return when what the backend has in the kernel may no longer be what it made; the core then calls :meth:`set_peers`.

        May return too often, must not return too rarely; nothing is lost between two calls, nor by cancellation. The
        default never returns: the periodic audit finds changes.
        """
        await asyncio.Event().wait()

    def status(self) -> Mapping[str, JSON]:
        """What an operator wants to see: device, counters by peer, drops by reason. Cheap; callable while open."""
        return {}


class Router(Driver):
    """What is the kernel told?

    The core calls :meth:`open` once, then :meth:`apply` any number of times beside :meth:`changed`, and last
    :meth:`aclose`, which it may call at any point.
    """

    async def open(self, instance: str) -> None:
        """Begin: ``instance`` tells this router's routes from those of another on this host (see :class:`.Device`).

        It is the same after a restart, so that routes an earlier run left are recognised.
        """

    @abc.abstractmethod
    async def apply(self, routes: Sequence[Route]) -> None:
        """Make ``routes`` the whole set of routes that this router owns.

        Missing ones are added, others of ours removed, routes of anyone else never touched. Idempotent: a second call
        changes nothing in the kernel. Routes that an earlier, crashed run left behind count as ours.

        :raises RouterError: naming the route that was refused.
        """

    async def aclose(self) -> None:
        """Remove the routes that lead to a device or gateway; free everything; idempotent.

        ``unreachable`` routes stay: while no daemon runs, they keep packets for the overlay from following the
        default route. Applying no routes at all (``apply([])``) removes them too.
        """

    async def changed(self) -> None:
        """Return when the routes may no longer be what :meth:`apply` made them; the core then applies them again.

        May return too often, must not return too rarely. The default never returns: the periodic audit finds changes.
        """
        await asyncio.Event().wait()
