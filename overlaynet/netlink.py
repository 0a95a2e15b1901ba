"""The kernel's links, addresses, routes and neighbours, as values: a thin, strict layer over pyroute2.

pyroute2 ignores keyword arguments that it does not know, so every signature here is explicit, and no other module
imports it. It is imported where it is first needed, because that takes a fifth of a second. Routes are those of the
main table. Everything happens in the network namespace of the calling thread.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

from overlaynet._netlink_messages import (
    ADDRESS_NODAD,
    BRIDGE_FAMILY,
    DEFAULT_METRIC,
    FAMILIES,
    MAIN_TABLE,
    NEIGHBOUR_PERMANENT,
    SCOPE_GLOBAL,
    SCOPE_HOST,
    SCOPE_LINK,
    Address,
    ForwardingEntry,
    InterfaceNames,
    IPInterface,
    KernelRoute,
    Link,
    Neighbour,
    Vxlan,
    address_arguments,
    forwarding_arguments,
    read_address,
    read_forwarding_entry,
    read_link,
    read_neighbour,
    read_route,
    route_arguments,
    vxlan_arguments,
)
from overlaynet._threads import call_in_thread
from overlaynet.errors import OverlaynetError
from overlaynet.model import IPAddress

__all__ = [
    "DEFAULT_METRIC",
    "SCOPE_GLOBAL",
    "SCOPE_HOST",
    "SCOPE_LINK",
    "Address",
    "ForwardingEntry",
    "IPInterface",
    "KernelRoute",
    "Link",
    "Neighbour",
    "Netlink",
    "NetlinkError",
    "NetlinkWriter",
    "Vxlan",
    "netlink",
]

T = TypeVar("T")

_LONGEST_NAME = 15
_INTERRUPTED_DUMP = 0x10
_DUMP_ATTEMPTS = 20


class NetlinkError(OverlaynetError):
    """The kernel refused a request; the message says which, and why in the kernel's own words."""

    def __init__(self, request: str, code: int, reason: str | None = None) -> None:
        self.errno = code
        """The error number, as in :mod:`errno`."""
        self.reason = reason or os.strerror(code)
        """The kernel's text."""
        hint = "; run as root or with CAP_NET_ADMIN" if code == errno.EPERM else ""
        super().__init__(f"the kernel refused to {request}: {self.reason}{hint}")


async def netlink(function: Callable[[Netlink], T]) -> T:
    """Open a :class:`Netlink` in a thread of its own, call ``function`` with it there, and close it.

    :raises NetlinkError: as the methods that ``function`` calls do.
    """

    def call() -> T:
        with Netlink() as kernel:
            return function(kernel)

    return await call_in_thread(call)


class NetlinkWriter:
    """Calls that change the kernel, for one owner: never two at once, and none after a later one.

    A call whose waiter was cancelled goes on in its thread. It must write neither beside a later call nor after it.
    """

    def __init__(self) -> None:
        self._writing = threading.Lock()
        self._turn = 0

    async def write(self, function: Callable[[Netlink], T]) -> T | None:
        """Like :func:`netlink`; but if a later call has overtaken this one, nothing is done, and ``None`` returned."""
        self._turn += 1
        turn = self._turn

        def call(kernel: Netlink) -> T | None:
            with self._writing:
                return function(kernel) if turn == self._turn else None

        return await netlink(call)


class Netlink:
    """Blocking requests to the kernel; a context manager. To be used in one thread, in which no event loop runs.

    Every method raises :exc:`NetlinkError` if the kernel refuses.
    """

    def __init__(self) -> None:
        self._opened: Any = None

    def __enter__(self) -> Netlink:
        import pyroute2  # noqa: PLC0415 - takes 200 ms, and most commands do without it

        with _asking("open a netlink socket"):
            # ext_ack: errors come with the kernel's text. strict_check: the kernel filters dumps, not Python.
            self._opened = pyroute2.IPRoute(ext_ack=True, strict_check=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()

    # -- links

    def links(self) -> list[Link]:
        """All interfaces, in the order of their indices."""
        found = self._dump("list the interfaces", lambda: self._opened.link("dump"))
        return sorted((read_link(message) for message in found), key=lambda link: link.index)

    def link(self, name: str) -> Link | None:
        """The interface of that name, or ``None`` if there is none."""
        if not 0 < len(name.encode()) <= _LONGEST_NAME:
            return None
        try:
            with _asking(f"look up the interface {name}"):
                return read_link(self._opened.link("get", ifname=name)[0])
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return None
            raise

    def configure_link(
        self,
        name: str,
        *,
        index: int | None = None,
        mtu: int | None = None,
        up: bool | None = None,
        alias: str | None = None,
        transmit_queue_length: int | None = None,
        hardware_address: str | None = None,
    ) -> None:
        """Change what is given; the rest stays as it is. Idempotent.

        :param index: which interface is meant, as its name may have come to be another's, which is left alone.
        """
        values = {"mtu": mtu, "ifalias": alias, "txqlen": transmit_queue_length, "address": hardware_address}
        if up is not None:
            values["state"] = "up" if up else "down"
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            with _asking(f"configure the interface {name}"):
                self._opened.link("set", index=self._index(name) if index is None else index, **given)

    def create_vxlan(self, name: str, vxlan: Vxlan, *, mtu: int, hardware_address: str) -> None:
        """Make a VXLAN device, which is down.

        :raises NetlinkError: with ``EEXIST`` if there is an interface of that name, or a VXLAN device that would receive
            the same packets.
        """
        interface = None if vxlan.interface is None else self._index(vxlan.interface)
        with _asking(f"make the VXLAN device {name}"):
            self._opened.link(
                "add", ifname=name, mtu=mtu, address=hardware_address, **vxlan_arguments(vxlan, interface)
            )

    def delete_link(self, name: str) -> None:
        """Delete the interface; nothing happens if there is none of that name."""
        link = self.link(name)
        if link is None:
            return
        try:
            with _asking(f"delete the interface {name}"):
                self._opened.link("del", index=link.index)
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise

    # -- addresses

    def addresses(self, name: str | None = None) -> list[Address]:
        """The addresses of one interface, or of all, in the kernel's order: primary ones before secondary ones."""
        only = {} if name is None else {"index": self._index(name)}
        return self._addresses(only)

    def _addresses(self, only: dict[str, int]) -> list[Address]:
        found = self._dump("list the addresses", lambda: self._opened.addr("dump", dump_filter=_all, **only))
        names = InterfaceNames()
        return [read_address(message, names) for message in found]

    def set_addresses(self, name: str, addresses: Sequence[IPInterface]) -> bool:
        """Make ``addresses`` all that the interface has, but for link-local IPv6, which is left alone. Idempotent.

        IPv6 addresses are usable at once: duplicates are not looked for.

        :return: whether anything had to be changed.
        """
        index = self._index(name)

        def present() -> list[Address]:
            return [
                a for a in self._addresses({"index": index}) if a.address.version == 4 or not a.address.is_link_local
            ]

        wanted = set(addresses)
        before = present()
        unwanted = [a for a in before if a.address not in wanted or a.peer is not None]
        for address in unwanted:
            with _asking(f"remove the address {address.address} from {name}"):
                self._opened.addr("del", index=index, **address_arguments(address.address, address.peer))
        # To delete an IPv4 address may delete others of its prefix with it, so look again.
        has = {a.address for a in (present() if unwanted else before)}
        missing = [address for address in dict.fromkeys(addresses) if address not in has]
        for new in missing:
            flags = {"flags": ADDRESS_NODAD} if new.version == 6 else {}
            with _asking(f"add the address {new} to {name}"):
                self._opened.addr("add", index=index, **address_arguments(new, None), **flags)
        return bool(unwanted or missing)

    # -- routes

    def routes(self, *, protocol: int | None = None) -> list[KernelRoute]:
        """The routes of the main table, IPv4 before IPv6; of all protocols, or of one (the kernel picks them out)."""
        names = InterfaceNames()
        found = []
        for family in FAMILIES.values():
            only: dict[str, int] = {"family": family, "table": MAIN_TABLE}
            if protocol is not None:
                only["proto"] = protocol
            dump = functools.partial(self._opened.route, "dump", dump_filter=_all, **only)
            # A kernel without IPv6 answers a request for its routes with those of all other families.
            found += [message for message in self._dump("list the routes", dump) if message["family"] == family]
        return [read_route(message, names) for message in found]

    def default_route(self, version: Literal[4, 6]) -> KernelRoute | None:
        """The default route with the lowest metric, or ``None`` if there is none."""
        found = [
            route
            for route in self.routes()
            if route.destination.version == version and route.destination.prefixlen == 0 and route.device is not None
        ]
        return min(found, key=lambda route: route.metric, default=None)

    def lookup_route(self, address: IPAddress) -> tuple[str, IPAddress | None]:
        """The interface by which packets to ``address`` leave, and the source address that the kernel prefers for them."""
        route = self._route_to(address)
        if route.device is None:
            raise NetlinkError(f"route packets to {address}", errno.ENETUNREACH)
        return route.device, route.preferred_source

    def is_on_link(self, address: IPAddress, interface: str) -> bool:
        """True if packets to ``address`` leave by ``interface`` straight to it; false if by a gateway, or not at all."""
        try:
            route = self._route_to(address)
        except NetlinkError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                return False  # no route, or one that leads nowhere: unreachable, prohibit, blackhole
            raise
        return route.device == interface and route.gateway is None and not route.multipath

    def _route_to(self, address: IPAddress) -> KernelRoute:
        with _asking(f"route packets to {address}"):
            (message, *_) = self._opened.route("get", dst=str(address))
        return read_route(message, InterfaceNames())

    def add_route(self, route: KernelRoute) -> None:
        """Add a route with a single next hop, or none.

        :raises NetlinkError: with ``EEXIST`` if there is a route with the same destination and metric, whosever it is.
        """
        with _asking(f"add the route {route}"):
            self._opened.route("add", **self._arguments(route))

    def replace_route(self, route: KernelRoute) -> None:
        """Put a route in place of the one with the same destination and metric, whosever that is; or add it."""
        with _asking(f"replace the route {route}"):
            self._opened.route("replace", **self._arguments(route))

    def delete_route(self, route: KernelRoute) -> None:
        """Delete exactly this route.

        :raises NetlinkError: with ``ESRCH`` if there is no such route.
        """
        with _asking(f"delete the route {route}"):
            self._opened.route("del", **self._arguments(route))

    # -- neighbours

    def neighbours(self, name: str) -> list[Neighbour]:
        """The neighbours of an interface, IPv4 before IPv6."""
        index = self._index(name)
        found = []
        for family in FAMILIES.values():
            # Strict requests may not name the interface in their header, where pyroute2 would put it.
            dump = functools.partial(self._opened.neigh, "dump", dump_filter=_all, family=family)
            found += [
                read_neighbour(message)
                for message in self._dump("list the neighbours", dump)
                if message["ifindex"] == index and message["family"] == family
            ]
        return found

    def set_neighbour(self, name: str, neighbour: Neighbour) -> None:
        """Make a permanent entry, in the place of any other for the same address. Idempotent."""
        with _asking(f"set the neighbour {neighbour.address} on {name}"):
            self._opened.neigh(
                "replace",
                family=FAMILIES[neighbour.address.version],
                ifindex=self._index(name),
                dst=str(neighbour.address),
                lladdr=neighbour.hardware_address,
                state=NEIGHBOUR_PERMANENT,
            )

    def delete_neighbour(self, name: str, address: IPAddress) -> None:
        """Delete the entry for an address; nothing happens if there is none."""
        arguments = {"family": FAMILIES[address.version], "ifindex": self._index(name), "dst": str(address)}
        with _unless_missing(), _asking(f"delete the neighbour {address} on {name}"):
            self._opened.neigh("del", **arguments)

    # -- forwarding databases of VXLAN devices

    def forwarding_entries(self, name: str) -> list[ForwardingEntry]:
        """The entries of a VXLAN device's forwarding database that lead to a host."""
        index = self._index(name)
        dump = functools.partial(self._opened.neigh, "dump", dump_filter=_all, family=BRIDGE_FAMILY, ifindex=index)
        messages = self._dump(f"list the forwarding entries of {name}", dump)
        entries = [read_forwarding_entry(message) for message in messages if message["ifindex"] == index]
        return [entry for entry in entries if entry is not None]

    def set_forwarding_entry(self, name: str, entry: ForwardingEntry) -> None:
        """Make a permanent entry, in the place of any other for the same hardware address. Idempotent.

        Of several entries for one hardware address, the kernel replaces the first one.
        """
        with _asking(f"set the forwarding entry {entry.hardware_address} to {entry.destination} on {name}"):
            arguments = forwarding_arguments(entry, self._index(name))
            self._opened.neigh("replace", **arguments, state=NEIGHBOUR_PERMANENT)

    def delete_forwarding_entry(self, name: str, entry: ForwardingEntry) -> None:
        """Delete exactly this entry; nothing happens if there is none like it."""
        request = f"delete the forwarding entry {entry.hardware_address} to {entry.destination} on {name}"
        with _unless_missing(), _asking(request):
            self._opened.neigh("del", **forwarding_arguments(entry, self._index(name)))

    # -- what they share

    def _dump(self, request: str, dump: Callable[[], Any]) -> list[Any]:
        """All messages of a dump that no change interrupted."""
        for _ in range(_DUMP_ATTEMPTS):
            with _asking(request):
                messages = list(dump())
            # pyroute2 does not look at the kernel's mark of an inconsistent dump.
            if not any(message["header"]["flags"] & _INTERRUPTED_DUMP for message in messages):
                return messages
        raise NetlinkError(request, errno.EINTR, f"they changed during each of {_DUMP_ATTEMPTS} attempts")

    def _index(self, name: str) -> int:
        with _asking(f"find the interface {name}"):
            try:
                return socket.if_nametoindex(name)
            except (OSError, ValueError) as error:  # its OSError carries no number; ValueError is for a NUL in the name
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from error

    def _arguments(self, route: KernelRoute) -> dict[str, Any]:
        return route_arguments(route, None if route.device is None else self._index(route.device))


@contextlib.contextmanager
def _asking(request: str) -> Iterator[None]:
    """Turn what pyroute2 raises into our own error, which says what was asked for."""
    from pyroute2.netlink.exceptions import NetlinkError as Refused  # noqa: PLC0415 - as above

    try:
        yield
    except Refused as error:
        text = error.args[1] if len(error.args) > 1 else None
        raise NetlinkError(request, error.code, text) from error
    except OSError as error:
        raise NetlinkError(request, error.errno or errno.EIO, error.strerror) from error


@contextlib.contextmanager
def _unless_missing() -> Iterator[None]:
    """Take it for done if what is to be deleted is not there."""
    try:
        yield
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise


def _all(message: object) -> bool:
    """Given as pyroute2's filter, it makes pyroute2 send the other arguments to the kernel, which filters by them."""
    return True
