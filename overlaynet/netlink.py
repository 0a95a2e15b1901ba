"""The kernel's links, addresses and routes, as values: a thin, strict layer over pyroute2.

pyroute2 ignores keyword arguments that it does not know, so every signature here is explicit, and no other module
imports it. It is imported where it is first needed, because that takes a fifth of a second. Routes are those of the
main table. Everything happens in the network namespace of the calling thread.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Interface, IPv6Interface
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

import attrs

from overlaynet._threads import call_in_thread
from overlaynet.errors import OverlaynetError
from overlaynet.model import IPAddress, IPNetwork

T = TypeVar("T")
IPInterface: TypeAlias = IPv4Interface | IPv6Interface
"""An address together with the length of its prefix: ``10.244.1.0/32``."""

MAIN_TABLE = 254
SCOPE_GLOBAL, SCOPE_LINK, SCOPE_HOST = 0, 253, 254
DEFAULT_METRIC = {4: 0, 6: 1024}
"""The metric that a route gets if none is asked for, by IP version."""

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_KINDS = {
    1: "unicast",
    2: "local",
    3: "broadcast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
    9: "throw",
}
_KIND_NUMBERS = {name: number for number, name in _KINDS.items()}
_LONGEST_NAME = 15
_INTERRUPTED_DUMP = 0x10
_DUMP_ATTEMPTS = 20
_INTERFACE_UP = 0x1
_ON_LINK = 0x4
_ADDRESS_TEMPORARY, _ADDRESS_NODAD, _ADDRESS_DEPRECATED, _ADDRESS_TENTATIVE, _ADDRESS_PERMANENT = (
    0x01,
    0x02,
    0x20,
    0x40,
    0x80,
)


class NetlinkError(OverlaynetError):
    """The kernel refused a request; the message says which, and why in the kernel's own words."""

    def __init__(self, request: str, code: int, reason: str | None = None) -> None:
        self.errno = code
        """The error number, as in :mod:`errno`."""
        self.reason = reason or os.strerror(code)
        """The kernel's text."""
        hint = "; run as root or with CAP_NET_ADMIN" if code == errno.EPERM else ""
        super().__init__(f"the kernel refused to {request}: {self.reason}{hint}")


@attrs.frozen
class Link:
    """A network interface."""

    index: int
    name: str
    kind: str
    """``tun``, ``bridge``, ``veth``, …; empty for a physical one and for the loopback."""
    mtu: int
    up: bool
    """Switched on by the administrator; says nothing about the cable."""
    alias: str = ""
    hardware_address: str = ""
    """``52:54:00:12:34:56``; empty if the link has none."""


@attrs.frozen
class Address:
    """An address of an interface."""

    index: int
    interface: str
    address: IPInterface
    peer: IPAddress | None = None
    """The other end's address, on a point-to-point link that names it."""
    scope: int = SCOPE_GLOBAL
    permanent: bool = True
    """Set by hand; false for one with a lifetime, such as from DHCP or a router advertisement."""
    temporary: bool = False
    """A privacy address (RFC 8981); also set for the second and later IPv4 addresses of one prefix."""
    deprecated: bool = False
    tentative: bool = False
    """Not usable yet: duplicate address detection runs."""


@attrs.frozen
class KernelRoute:
    """A route as the kernel has it."""

    destination: IPNetwork
    kind: str = "unicast"
    """``unicast``, ``unreachable``, ``blackhole``, …; a type without a name is its number."""
    device: str | None = None
    """The output interface, of the first next hop if there are several; ``None`` for kinds that lead nowhere."""
    gateway: IPAddress | None = None
    onlink: bool = False
    metric: int = 0
    protocol: int = 4
    """Who made it: 2 the kernel, 3 boot, 4 static, … (``/etc/iproute2/rt_protos``)."""
    scope: int = SCOPE_GLOBAL
    preferred_source: IPAddress | None = None
    multipath: bool = False
    """There are more next hops than the one that is shown."""

    def __str__(self) -> str:
        """As ``ip route`` takes it."""
        words = [] if self.kind == "unicast" else [self.kind]
        words.append(str(self.destination))
        words += [f"via {self.gateway}"] if self.gateway is not None else []
        words += [f"dev {self.device}"] if self.device is not None else []
        words.append(f"proto {self.protocol}")
        words += [f"metric {self.metric}"] if self.metric != DEFAULT_METRIC[self.destination.version] else []
        return " ".join(words)


async def netlink(function: Callable[[Netlink], T]) -> T:
    """Open a :class:`Netlink` in a thread of its own, call ``function`` with it there, and close it.

    :raises NetlinkError: as the methods that ``function`` calls do.
    """

    def call() -> T:
        with Netlink() as kernel:
            return function(kernel)

    return await call_in_thread(call)


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
        return sorted((_read_link(message) for message in found), key=lambda link: link.index)

    def link(self, name: str) -> Link | None:
        """The interface of that name, or ``None`` if there is none."""
        if not 0 < len(name.encode()) <= _LONGEST_NAME:
            return None
        try:
            with _asking(f"look up the interface {name}"):
                return _read_link(self._opened.link("get", ifname=name)[0])
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return None
            raise

    def configure_link(
        self,
        name: str,
        *,
        mtu: int | None = None,
        up: bool | None = None,
        alias: str | None = None,
        transmit_queue_length: int | None = None,
    ) -> None:
        """Change what is given; the rest stays as it is. Idempotent."""
        values = {"mtu": mtu, "ifalias": alias, "txqlen": transmit_queue_length}
        if up is not None:
            values["state"] = "up" if up else "down"
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            with _asking(f"configure the interface {name}"):
                self._opened.link("set", index=self._index(name), **given)

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
        names = _InterfaceNames()
        return [_read_address(message, names) for message in found]

    def set_addresses(self, name: str, addresses: Sequence[IPInterface]) -> None:
        """Make ``addresses`` all that the interface has, but for link-local IPv6, which is left alone. Idempotent.

        IPv6 addresses are usable at once: duplicates are not looked for.
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
                self._opened.addr("del", index=index, **_address_arguments(address.address, address.peer))
        # To delete an IPv4 address may delete others of its prefix with it, so look again.
        has = {a.address for a in (present() if unwanted else before)}
        for new in dict.fromkeys(addresses):
            if new not in has:
                flags = {"flags": _ADDRESS_NODAD} if new.version == 6 else {}
                with _asking(f"add the address {new} to {name}"):
                    self._opened.addr("add", index=index, **_address_arguments(new, None), **flags)

    # -- routes

    def routes(self, *, protocol: int | None = None) -> list[KernelRoute]:
        """The routes of the main table, IPv4 before IPv6; of all protocols, or of one (the kernel picks them out)."""
        names = _InterfaceNames()
        found = []
        for family in _FAMILIES.values():
            only: dict[str, int] = {"family": family, "table": MAIN_TABLE}
            if protocol is not None:
                only["proto"] = protocol
            dump = functools.partial(self._opened.route, "dump", dump_filter=_all, **only)
            found += self._dump("list the routes", dump)
        return [_read_route(message, names) for message in found]

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
        with _asking(f"route packets to {address}"):
            (message, *_) = self._opened.route("get", dst=str(address))
        route = _read_route(message, _InterfaceNames())
        if route.device is None:
            raise NetlinkError(f"route packets to {address}", errno.ENETUNREACH)
        return route.device, route.preferred_source

    def add_route(self, route: KernelRoute) -> None:
        """Add a route with a single next hop, or none.

        :raises NetlinkError: with ``EEXIST`` if there is a route with the same destination and metric, whosever it is.
        """
        with _asking(f"add the route {route}"):
            self._opened.route("add", **self._route_arguments(route))

    def replace_route(self, route: KernelRoute) -> None:
        """Put a route in place of the one with the same destination and metric, whosever that is; or add it."""
        with _asking(f"replace the route {route}"):
            self._opened.route("replace", **self._route_arguments(route))

    def delete_route(self, route: KernelRoute) -> None:
        """Delete exactly this route.

        :raises NetlinkError: with ``ESRCH`` if there is no such route.
        """
        with _asking(f"delete the route {route}"):
            self._opened.route("del", **self._route_arguments(route))

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

    def _route_arguments(self, route: KernelRoute) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "family": _FAMILIES[route.destination.version],
            "dst": str(route.destination),
            "table": MAIN_TABLE,
            "type": _KIND_NUMBERS.get(route.kind) or int(route.kind),
            "proto": route.protocol,
            "scope": route.scope,
            "priority": route.metric,
        }
        if route.device is not None:
            arguments["oif"] = self._index(route.device)
        if route.gateway is not None:
            arguments["gateway"] = str(route.gateway)
        if route.onlink:
            arguments["flags"] = _ON_LINK
        if route.preferred_source is not None:
            arguments["prefsrc"] = str(route.preferred_source)
        return arguments


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


class _InterfaceNames:
    """The names of interfaces by index, each looked up once."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def __getitem__(self, index: int) -> str:
        if index not in self._known:
            try:
                self._known[index] = socket.if_indextoname(index)
            except OSError:  # deleted since the dump
                self._known[index] = f"#{index}"
        return self._known[index]


def _all(message: object) -> bool:
    """Given as pyroute2's filter, it makes pyroute2 send the other arguments to the kernel, which filters by them."""
    return True


def _read_link(message: Any) -> Link:
    information = message.get_attr("IFLA_LINKINFO")
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=(information.get_attr("IFLA_INFO_KIND") or "") if information is not None else "",
        mtu=message.get_attr("IFLA_MTU") or 0,
        up=bool(message["flags"] & _INTERFACE_UP),
        alias=message.get_attr("IFLA_IFALIAS") or "",
        hardware_address=message.get_attr("IFLA_ADDRESS") or "",
    )


def _read_address(message: Any, names: _InterfaceNames) -> Address:
    far = message.get_attr("IFA_ADDRESS")
    own = message.get_attr("IFA_LOCAL") or far
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    return Address(
        index=message["index"],
        interface=names[message["index"]],
        address=ipaddress.ip_interface(f"{own}/{message['prefixlen']}"),
        peer=ipaddress.ip_address(far) if far != own else None,
        scope=message["scope"],
        permanent=bool(flags & _ADDRESS_PERMANENT),
        temporary=bool(flags & _ADDRESS_TEMPORARY),
        deprecated=bool(flags & _ADDRESS_DEPRECATED),
        tentative=bool(flags & _ADDRESS_TENTATIVE),
    )


def _address_arguments(address: IPInterface, peer: IPAddress | None) -> dict[str, Any]:
    own = str(address.ip)
    return {
        "family": _FAMILIES[address.version],
        "local": own,
        "address": own if peer is None else str(peer),
        "prefixlen": address.network.prefixlen,
    }


def _read_route(message: Any, names: _InterfaceNames) -> KernelRoute:
    version = 4 if message["family"] == socket.AF_INET else 6
    everything = "0.0.0.0" if version == 4 else "::"
    hops = message.get_attr("RTA_MULTIPATH") or []
    hop = hops[0] if hops else message
    device = hop["oif"] if hops else message.get_attr("RTA_OIF")
    via = hop.get_attr("RTA_VIA")
    gateway = via["addr"] if via is not None else hop.get_attr("RTA_GATEWAY")
    source = message.get_attr("RTA_PREFSRC")
    kind = _KINDS.get(message["type"], str(message["type"]))
    return KernelRoute(
        destination=ipaddress.ip_network(f"{message.get_attr('RTA_DST') or everything}/{message['dst_len']}"),
        kind=kind,
        # IPv6 shows the loopback as the device of routes that lead nowhere.
        device=names[device] if device and kind not in ("unreachable", "blackhole", "prohibit", "throw") else None,
        gateway=ipaddress.ip_address(gateway) if gateway is not None else None,
        onlink=bool(hop["flags"] & _ON_LINK),
        metric=message.get_attr("RTA_PRIORITY") or 0,
        protocol=message["proto"],
        scope=message["scope"],
        preferred_source=ipaddress.ip_address(source) if source is not None else None,
        multipath=len(hops) > 1,
    )
