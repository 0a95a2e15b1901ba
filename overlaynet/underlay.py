"""Which interface and address peers reach this node by.

The rules are flannel's: the interfaces that are named, then those that match a pattern, then the one that leads to a
given address; without any of these, the owner of the public address, or the interface of the default route.

A node uses the underlay's addresses of those IP versions that the overlay has, and of those that it was given a public
address for. Unlike with flannel, one of them is enough, since either can carry both: where no interface has all, one with
an IPv4 address will do, or else one with an IPv6 address.

Of several addresses of an interface and a version, the first of the best is taken: global before local to the link,
permanent before one with a lifetime, lasting before temporary (RFC 8981), and a deprecated one only where there is no other.
None that is being checked for duplicates or has failed the check is ever taken, and no link-local one of IPv6.

What was chosen stays as long as it is there, and is not deprecated while there is another that lasts; one that is checked
again, as after its interface was down, stays, too. An address that is gone is replaced by another of the same interface; while
that is being checked and there is none but temporary ones beside it, it is waited for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address

import attrs

from overlaynet.errors import UnderlayError
from overlaynet.model import IPAddress, Underlay
from overlaynet.netlink import SCOPE_LINK, Address, Link, Netlink, NetlinkError, netlink

_MOST_SHOWN = 10


@attrs.frozen
class HostNetwork:
    """What the kernel says about this host's interfaces, as far as the choice depends on it."""

    links: Sequence[Link] = ()
    addresses: Sequence[Address] = ()
    default_interfaces: Mapping[int, str] = attrs.field(factory=dict)
    """The interface of the default route, by IP version."""
    reached: tuple[str, IPAddress | None] | None = None
    """By which interface, and from which address, packets to the address to be reached leave; ``None``: by none."""


@attrs.frozen
class Wishes:
    """What the operator asked for."""

    interfaces: Sequence[str] = ()
    interface_patterns: Sequence[str] = ()
    can_reach: IPAddress | None = None
    public_ip: IPv4Address | None = None
    public_ipv6: IPv6Address | None = None
    versions: Sequence[int] = (4,)
    """The IP versions that the underlay should have an address of. It must have one of each version of a public address."""


async def find_underlay(
    *,
    interfaces: Sequence[str] = (),
    interface_patterns: Sequence[str] = (),
    can_reach: IPAddress | None = None,
    public_ip: IPv4Address | None = None,
    public_ipv6: IPv6Address | None = None,
    ipv4: bool = True,
    ipv6: bool = False,
    current: Underlay | None = None,
) -> Underlay:
    """Choose among the interfaces of this host, as they are now.

    :param interfaces: names or addresses of interfaces, in order of preference.
    :param interface_patterns: regular expressions for addresses or names of interfaces, to be tried after ``interfaces``.
    :param can_reach: an address that the interface must lead to, to be tried last.
    :param public_ip: what to publish instead of the interface's address.
    :param public_ipv6: likewise.
    :param ipv4: an IPv4 address is wanted.
    :param ipv6: an IPv6 address is wanted, on the same interface.
    :param current: what was chosen before. It is chosen again as long as its interface is up and still has its
        addresses, whatever else would be chosen now: an address that is added is no reason to move. What of it is gone
        is replaced.
    :raises UnderlayError: naming what was asked for and why none of it can be used.
    :raises overlaynet.netlink.NetlinkError: if the kernel does not tell.
    """
    versions = [version for version, needed in ((4, ipv4), (6, ipv6)) if needed]
    wishes = Wishes(interfaces, interface_patterns, can_reach, public_ip, public_ipv6, versions)
    return choose_underlay(await netlink(lambda kernel: read_host_network(kernel, can_reach)), wishes, current)


def read_host_network(kernel: Netlink, can_reach: IPAddress | None) -> HostNetwork:
    """Ask the kernel; blocking."""
    # The addresses before the interfaces: of one that is deleted meanwhile, it is the interface that is missed.
    addresses = kernel.addresses()
    links = kernel.links()
    defaults = {4: kernel.default_route(4), 6: kernel.default_route(6)}
    reached = None
    if can_reach is not None:
        try:
            reached = kernel.lookup_route(can_reach)
        except NetlinkError:
            reached = None  # there is no route; the choice says so if it comes to it
    return HostNetwork(
        links=links,
        addresses=addresses,
        default_interfaces={v: route.device for v, route in defaults.items() if route is not None and route.device},
        reached=reached,
    )


def choose_underlay(host: HostNetwork, wishes: Wishes, current: Underlay | None = None) -> Underlay:
    """Choose; pure. See :func:`find_underlay`."""
    needed = {address.version for address in (wishes.public_ip, wishes.public_ipv6) if address is not None}
    best = tuple(sorted({*wishes.versions, *needed}))
    choices = dict.fromkeys((best, tuple(sorted(needed))) if needed else (best, (4,), (6,)))
    problems: list[str] = []
    if current is not None:
        _check_settled(host, current, best)
        for versions in choices:
            kept = _keep(host, attrs.evolve(wishes, versions=versions), current)
            if isinstance(kept, Underlay):
                return kept
            problems = problems or [kept]
    errors = []
    for versions in choices:
        try:
            return _choose(host, attrs.evolve(wishes, versions=versions), problems)
        except UnderlayError as error:
            errors.append(error)
    raise errors[0]


def _choose(host: HostNetwork, wishes: Wishes, known_problems: Sequence[str]) -> Underlay:
    """An underlay with an address of every version of ``wishes.versions``."""
    problems = list(known_problems)
    for candidate in _candidates(host, wishes):
        result = candidate if isinstance(candidate, str) else _use(host, wishes, candidate)
        if isinstance(result, Underlay):
            return result
        problems.append(result)
    raise UnderlayError("; ".join(dict.fromkeys(problems)))


@attrs.frozen
class _Candidate:
    """An interface, and which of its addresses to use, by IP version, where that matters."""

    interface: str
    addresses: Mapping[int, IPAddress] = attrs.field(factory=dict)


def _candidates(host: HostNetwork, wishes: Wishes) -> Iterator[_Candidate | str]:
    """What comes into question, the best first; a string says why a wish leads to nothing."""
    patterns = [_compile(pattern) for pattern in wishes.interface_patterns]
    if not (wishes.interfaces or patterns or wishes.can_reach):
        yield from _by_default(host, wishes)
        return
    for wanted in wishes.interfaces:
        yield _by_name_or_address(host, wanted)
    for pattern in patterns:
        yield from _by_pattern(host, wishes, pattern)
    if wishes.can_reach is not None:
        yield _by_reach(host, wishes.can_reach)


def _keep(host: HostNetwork, wishes: Wishes, current: Underlay) -> Underlay | str:
    """The same interface with those of its addresses that may stay, and others for the rest; or why it cannot be."""
    had = {version: address for version, address in _by_version(current).items() if version in wishes.versions}
    staying = {version: address for version, address in had.items() if _may_stay(host, current.interface, address)}
    kept = _use(host, wishes, _Candidate(current.interface, staying))
    if isinstance(kept, Underlay) and not staying:
        lost = next(iter(had.values()), current.ipv4 or current.ipv6)
        return f"the interface {current.interface} no longer has the address {lost}"
    return kept


def _by_version(underlay: Underlay) -> dict[int, IPAddress]:
    found: dict[int, IPAddress] = {}
    for address in (underlay.ipv4, underlay.ipv6):
        if address is not None:
            found[address.version] = address
    return found


def _may_stay(host: HostNetwork, interface: str, address: IPAddress) -> bool:
    """True if an address that was chosen can go on to be used."""
    found = next((a for a in _addresses(host, interface, address.version) if a.address.ip == address), None)
    if found is None or found.duplicate:
        return False
    others = _usable(host, interface, address.version)
    return not found.deprecated or all(other.deprecated or other.temporary for other in others)


def _check_settled(host: HostNetwork, current: Underlay, versions: Sequence[int]) -> None:
    """:raises UnderlayError: if an address is gone, and the one to take its place is still being checked."""
    interface = current.interface
    if not any(link.name == interface and link.up for link in host.links):
        return
    for version, address in _by_version(current).items():
        if version not in versions or _may_stay(host, interface, address):
            continue
        usable = _usable(host, interface, version)
        if all(other.temporary for other in usable):
            for other in _addresses(host, interface, version):
                if other.tentative and not _is_of_one_link(other.address) and not (usable and other.temporary):
                    raise UnderlayError(
                        f"the interface {interface} no longer has the address {address}, "
                        f"and {other.address.ip} is still being checked for duplicates"
                    )


def _by_default(host: HostNetwork, wishes: Wishes) -> Iterator[_Candidate | str]:
    public = [address for address in (wishes.public_ip, wishes.public_ipv6) if address is not None]
    owners = {address: owner for address in public if (owner := _owner(host, address)) is not None}
    if len(set(owners.values())) > 1:
        owned = " but ".join(f"{address} belongs to {interface}" for address, interface in owners.items())
        yield f"the public address {owned}; name one interface with --iface"
    elif owners:
        (interface,) = set(owners.values())
        yield _Candidate(interface, {address.version: address for address in owners})
    else:
        leading = {version: host.default_interfaces.get(version) for version in wishes.versions}
        missing = [f"IPv{version}" for version, interface in leading.items() if interface is None]
        if missing:
            yield f"there is no {' and no '.join(missing)} default route; name the interface with --iface"
        elif len(set(leading.values())) > 1:
            yield (
                f"the IPv4 default route leads to {leading[4]} but the IPv6 one to {leading[6]}; "
                f"name one interface with --iface"
            )
        else:
            yield from (_Candidate(interface) for interface in set(leading.values()) if interface is not None)


def _by_name_or_address(host: HostNetwork, wanted: str) -> _Candidate | str:
    try:
        address = ipaddress.ip_address(wanted)
    except ValueError:
        return _Candidate(wanted)
    owner = _owner(host, address)
    if owner is None:
        return f"no interface has the address {address}; {_shown(host)}"
    return _Candidate(owner, {address.version: address})


def _by_pattern(host: HostNetwork, wishes: Wishes, pattern: re.Pattern[str]) -> Iterator[_Candidate | str]:
    """All interfaces whose addresses match, then all whose names match."""
    found: list[_Candidate] = []
    for link in host.links:
        matching = {
            version: [a for a in _usable_addresses(host, link.name, version) if pattern.search(str(a))]
            for version in wishes.versions
        }
        if all(matching.values()):
            found.append(_Candidate(link.name, {version: addresses[0] for version, addresses in matching.items()}))
    found += [_Candidate(link.name) for link in host.links if pattern.search(link.name)]
    if found:
        yield from found
    else:
        yield f"the pattern {pattern.pattern!r} matches no interface's name or address; {_shown(host)}"


def _by_reach(host: HostNetwork, wanted: IPAddress) -> _Candidate | str:
    if _owner(host, wanted) is not None:
        return f"{wanted} is an address of this host itself; name one of another host with --iface-can-reach"
    if host.reached is None:
        return f"no route leads to {wanted}; name an address that this host can reach with --iface-can-reach"
    interface, source = host.reached
    return _Candidate(interface, {} if source is None else {source.version: source})


def _use(host: HostNetwork, wishes: Wishes, candidate: _Candidate) -> Underlay | str:
    """The underlay that the candidate makes, or why it makes none."""
    name = candidate.interface
    link = next((link for link in host.links if link.name == name), None)
    if link is None:
        return f"there is no interface {name}; {_shown(host)}"
    if not link.up:
        return f"the interface {name} is down; bring it up with `ip link set {name} up`"
    if link.mtu == 0:
        return f"the interface {name} has MTU 0; set one with `ip link set {name} mtu 1500`"
    chosen = {version: address for version, address in candidate.addresses.items() if not _is_of_one_link(address)}
    for version in wishes.versions:
        if version not in chosen:
            usable = _usable_addresses(host, name, version)
            if not usable:
                return _none_usable(host, name, version)
            chosen[version] = usable[0]
    ipv4 = next((a for a in chosen.values() if isinstance(a, IPv4Address)), None) if 4 in wishes.versions else None
    ipv6 = next((a for a in chosen.values() if isinstance(a, IPv6Address)), None) if 6 in wishes.versions else None
    return Underlay(
        interface=name,
        mtu=link.mtu,
        ipv4=ipv4,
        ipv6=ipv6,
        public_ipv4=ipv4 and (wishes.public_ip or ipv4),
        public_ipv6=ipv6 and (wishes.public_ipv6 or ipv6),
    )


def _usable_addresses(host: HostNetwork, interface: str, version: int) -> list[IPAddress]:
    return [address.address.ip for address in _usable(host, interface, version)]


def _usable(host: HostNetwork, interface: str, version: int) -> list[Address]:
    """The addresses that peers may be told, the best first: not deprecated, global, permanent, not a privacy address."""
    usable = [
        address
        for address in _addresses(host, interface, version)
        if not (address.tentative or address.duplicate or _is_of_one_link(address.address))
        and not (address.address.is_loopback or address.address.is_multicast or address.address.is_unspecified)
    ]
    usable.sort(
        key=lambda a: (
            a.deprecated,
            a.address.is_link_local or a.scope == SCOPE_LINK,
            not a.permanent,
            a.temporary,
        )
    )
    return usable


def _is_of_one_link(address: IPAddress) -> bool:
    """True if other hosts cannot use the address without saying which of their interfaces leads to it (RFC 4007)."""
    return address.version == 6 and address.is_link_local


def _addresses(host: HostNetwork, interface: str, version: int) -> list[Address]:
    return [a for a in host.addresses if a.interface == interface and a.address.version == version]


def _none_usable(host: HostNetwork, interface: str, version: int) -> str:
    """That an interface has no address to use, and why."""
    what = f"the interface {interface} has no usable IPv{version} address"
    for address in _addresses(host, interface, version):
        ip = address.address.ip
        if address.duplicate:
            return f"{what}; another host has {ip}, too, so remove it and add another"
        if address.tentative and not _is_of_one_link(address.address):
            return f"{what}; {ip} is still being checked for duplicates, so try again in a few seconds"
    for address in _addresses(host, interface, version):
        if _is_of_one_link(address.address):
            ip = address.address.ip
            return f"{what}; {ip} is valid on one link only, so add another, or name another interface with --iface"
    return f"{what}; add one, or name another interface with --iface"


def _owner(host: HostNetwork, address: IPAddress) -> str | None:
    return next((a.interface for a in host.addresses if a.address.ip == address), None)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UnderlayError(
            f"the interface pattern {pattern!r} is not a regular expression: {error}; correct --iface-regex"
        ) from error


def _shown(host: HostNetwork) -> str:
    """The interfaces that have addresses: ``this host has eth0 (172.16.130.140, fd00::1) and eth1 (10.0.0.1)``."""
    texts = []
    for link in host.links:
        addresses = [*_usable_addresses(host, link.name, 4), *_usable_addresses(host, link.name, 6)]
        if addresses:
            texts.append(f"{link.name} ({', '.join(map(str, addresses))})")
    hidden = len(texts) - _MOST_SHOWN
    if hidden > 0:
        texts[_MOST_SHOWN:] = [f"{hidden} more"]
    if not texts:
        return "this host has no interface with an address"
    return "this host has " + " and ".join([*([", ".join(texts[:-1])] if texts[1:] else []), texts[-1]])
