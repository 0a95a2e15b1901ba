"""The network document: flannel's JSON, read strictly, with its defaults and rules.

    {"Network": "10.244.0.0/16", "SubnetLen": 24, "Backend": {"Type": "udp", "Port": 8285}}

Names are matched without regard to case, as flannel does; names that are not known are kept in the store and
ignored here. ``LeaseTTL`` (seconds) is overlaynet's own; flannel ignores it.
"""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Generic, TypeVar, cast

import attrs

from overlaynet.errors import ConfigError
from overlaynet.model import JSON, IPNetwork, Subnets

N = TypeVar("N", IPv4Network, IPv6Network)

DEFAULT_LEASE_TTL = 24 * 3600.0
MINIMUM_LEASE_TTL = 5.0


@attrs.frozen
class SubnetRange(Generic[N]):
    """The subnets of one address family that nodes may lease: ``prefix_length`` long, from ``first`` to ``last``."""

    network: N
    """The overlay's network, of which the subnets are parts."""
    prefix_length: int
    """Of each subnet."""
    first: N
    """The first subnet that is leased."""
    last: N
    """The last one."""

    @property
    def size(self) -> int:
        """How many subnets there are. Unlike ``len()``, which it answers too, it can count those of a large IPv6 network."""
        return self._index(self.last) + 1

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> N:
        """The subnet number ``index``, counted from ``first``."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        address = self.first.network_address + (index << self._shift)
        return type(self.network)((int(address), self.prefix_length))

    def __contains__(self, subnet: object) -> bool:
        """True if a node could be given exactly this subnet."""
        return (
            isinstance(subnet, type(self.network))
            and subnet.prefixlen == self.prefix_length
            and self.first.network_address <= subnet.network_address <= self.last.network_address
        )

    @property
    def _shift(self) -> int:
        return self.network.max_prefixlen - self.prefix_length

    def _index(self, subnet: N) -> int:
        return (int(subnet.network_address) - int(self.first.network_address)) >> self._shift


@attrs.frozen
class Network:
    """The overlay: which addresses it spans, how they are cut into subnets, and which backend carries its packets.

    These are its parameters, out of the network document; a network of daemons to test with is an
    :class:`overlaynet.testing.Network`.
    """

    ipv4: SubnetRange[IPv4Network] | None = None
    """The overlay's IPv4 subnets, if it has IPv4."""
    ipv6: SubnetRange[IPv6Network] | None = None
    """The overlay's IPv6 subnets, if it has IPv6."""
    backend_type: str = "udp"
    """Name of the backend of all nodes, in small letters."""
    backend_options: Mapping[str, JSON] = attrs.field(factory=dict, repr=False)
    """The members of ``Backend`` but for ``Type``, as written; the backend's ``Options`` class checks them.

    Some may be secret.
    """
    lease_ttl: float = DEFAULT_LEASE_TTL
    """Seconds that a lease lives without being renewed."""

    def __iter__(self) -> Iterator[IPNetwork]:
        """The overlay's networks: IPv4, IPv6, or both."""
        return iter([family.network for family in (self.ipv4, self.ipv6) if family is not None])

    def __str__(self) -> str:
        return " and ".join(str(network) for network in self)

    def contains(self, subnets: Subnets) -> bool:
        """True if every subnet lies within the overlay's network of its family."""
        for subnet, family in ((subnets.ipv4, self.ipv4), (subnets.ipv6, self.ipv6)):
            if subnet is not None and (family is None or not subnet.subnet_of(cast(Any, family.network))):
                return False
        return True

    def grants(self, subnets: Subnets) -> bool:
        """True if a node could be given exactly these subnets."""
        for subnet, family in ((subnets.ipv4, self.ipv4), (subnets.ipv6, self.ipv6)):
            if (subnet is None) != (family is None) or (family is not None and subnet not in family):
                return False
        return True


def parse(document: str) -> Network:
    """Read a network document.

    :raises ConfigError: naming the member that is wrong and what it should be.
    """
    try:
        content = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the network document is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"the network document must be a JSON object, not {_kind(content)}")
    members = _Members(content)
    ipv4_enabled = members.boolean("EnableIPv4", default=True)
    ipv6_enabled = members.boolean("EnableIPv6", default=False)
    if not ipv4_enabled and not ipv6_enabled:
        raise ConfigError("the network document enables neither IPv4 nor IPv6; set EnableIPv4 or EnableIPv6 to true")
    backend_type, backend_options = _parse_backend(members.get("Backend"))
    lease_ttl = members.number("LeaseTTL", default=DEFAULT_LEASE_TTL)
    if not MINIMUM_LEASE_TTL <= lease_ttl <= 10 * 365 * 86400:
        raise ConfigError(f"LeaseTTL is {lease_ttl:g}; it must be between {MINIMUM_LEASE_TTL:g} seconds and ten years")
    return Network(
        ipv4=_parse_range(members, IPv4Network, "") if ipv4_enabled else None,
        ipv6=_parse_range(members, IPv6Network, "IPv6") if ipv6_enabled else None,
        backend_type=backend_type,
        backend_options=backend_options,
        lease_ttl=lease_ttl,
    )


class _Members:
    """A JSON object whose names are matched without regard to case; the last of several spellings wins, as in Go."""

    def __init__(self, content: Mapping[str, JSON]) -> None:
        self._content = {name.lower(): value for name, value in content.items()}

    def get(self, name: str) -> JSON:
        return self._content.get(name.lower())

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, not {value!r}")
        return value

    def integer(self, name: str) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name} must be a whole number, not {value!r}")
        return value

    def number(self, name: str, *, default: float) -> float:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigError(f"{name} must be a number, not {value!r}")
        try:
            return float(value)
        except OverflowError:
            return math.inf

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise ConfigError(f"{name} must be a string, not {value!r}")
        return value


def _parse_backend(content: JSON) -> tuple[str, Mapping[str, JSON]]:
    if content is None:
        return "udp", {}
    if not isinstance(content, Mapping):
        raise ConfigError(f'Backend must be an object such as {{"Type": "udp"}}, not {_kind(content)}')
    options = {name: value for name, value in content.items() if name.lower() != "type"}
    types = [value for name, value in content.items() if name.lower() == "type"]
    if not types or not isinstance(types[-1], str) or not types[-1]:
        raise ConfigError('Backend has no Type; name the backend, as in {"Type": "udp"}')
    return types[-1].lower(), options


def _parse_range(members: _Members, family: type[N], prefix: str) -> SubnetRange[N]:
    """Apply flannel's rules for one address family; ``prefix`` is what the family's names begin with."""
    name = f"{prefix}Network"
    text = members.text(name)
    example = "10.244.0.0/16" if family is IPv4Network else "fd00:10:244::/48"
    if text is None:
        raise ConfigError(f'the network document has no {name}; add one, as in "{name}": "{example}"')
    try:
        network = family(text, strict=False)
        if "%" in text or "." in text.partition("/")[2]:
            raise ValueError("neither a scope nor a netmask can stand there")  # Python reads them, flannel does not
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}, which is not a network such as {example}: {error}") from error
    if network.prefixlen == 0:
        raise ConfigError(
            f"{name} is {text}, the whole address space; name the overlay's own network, such as {example}"
        )
    length = _parse_prefix_length(members, network, prefix)
    subnets = _bounds(network, length)
    given = {bound: members.text(f"{prefix}Subnet{bound}") for bound in ("Min", "Max")}
    first = _parse_bound(given["Min"], network, length, f"{prefix}SubnetMin") or subnets[0]
    last = _parse_bound(given["Max"], network, length, f"{prefix}SubnetMax") or subnets[1]
    if first.network_address > last.network_address:
        raise ConfigError(
            f"{prefix}SubnetMin {first.network_address} is above {prefix}SubnetMax {last.network_address}; swap them"
        )
    return SubnetRange(network, length, first, last)


def _parse_prefix_length(members: _Members, network: N, prefix: str) -> int:
    name = f"{prefix}SubnetLen"
    longest = network.max_prefixlen - 2
    usual = 24 if network.version == 4 else 64
    length = members.integer(name)
    if length is None:
        if network.prefixlen + 2 > longest:
            raise ConfigError(
                f"{prefix}Network {network} is too small to share out among hosts; "
                f"it needs a prefix length of at most {longest - 2}"
            )
        return usual if network.prefixlen <= usual - 2 else network.prefixlen + 2
    if length > longest:
        raise ConfigError(f"{name} is {length}; a subnet needs room for containers: at most {longest}")
    if length < network.prefixlen + 2:
        raise ConfigError(
            f"{prefix}Network {network} is too small for {name} {length}; "
            f"choose {name} {network.prefixlen + 2} or longer, or a larger network"
        )
    return length


def _bounds(network: N, length: int) -> tuple[N, N]:
    """The first and last subnet that are leased by default; flannel leaves the very first one out."""
    size = 1 << (network.max_prefixlen - length)
    family = type(network)
    first = family((int(network.network_address) + size, length))
    last = family((int(network.broadcast_address) + 1 - size, length))
    return first, last


def _parse_bound(text: str | None, network: N, length: int, name: str) -> N | None:
    if text is None:
        return None
    try:
        address = ipaddress.ip_address(text)
        if "%" in text:
            raise ValueError("a scope cannot stand there")
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}, which is not an address") from error
    if address.version != network.version or address not in network:
        raise ConfigError(f"{name} {text} lies outside {network}")
    family = type(network)
    subnet = family((int(address), length), strict=False)
    if subnet.network_address != address:
        raise ConfigError(
            f"{name} {text} is not the start of a /{length} subnet; the nearest below is {subnet.network_address}"
        )
    return subnet


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
