"""Leases as the store holds them: flannel's keys and JSON values.

A lease is one record. Its key names the subnets (``subnets/10.5.52.0-24``, with an IPv6 subnet
``subnets/10.5.52.0-24&fd00:10:244:3::-64``), its value says where the node is reached::

    {"PublicIP":"192.168.64.3","PublicIPv6":null,"Overlaynet":{"Node":"host-a","Run":"5f0c","RenewalMargin":3600}}

Member names, their order and which are left out are flannel's; ``Overlaynet`` is ours, and flannel ignores it.
``RenewalMargin`` says how many seconds before its end the node renews the lease: only the node knows, and who is to tell
a lease that is overdue from one that is not has to know.

A reservation is a record of its own, ``overlaynet/reservations/10.5.52.0-24``, where flannel does not look: it would take
anything else below ``subnets`` for a change to an empty list of peers. While nobody holds the reserved subnets, a
placeholder keeps the key of their lease taken, so that flannel does not give them away either::

    {"PublicIP":"127.0.0.1","PublicIPv6":null,"Overlaynet":{"Reserved":true}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any
from weakref import WeakValueDictionary

from overlaynet.errors import RecordError
from overlaynet.model import JSON, Lease, LeaseData, Reservation, Subnets, printable

NETWORK_KEY = "config"
LEASE_PREFIX = "subnets/"
RESERVATION_PREFIX = "overlaynet/reservations/"

_DEEPEST = 32
"""Levels of nesting in a value; far more than any backend needs, and far less than Python can bear."""
_LONGEST = 10**9
"""Seconds that a record may speak of: 32 years."""
_NOBODY = IPv4Address("127.0.0.1")
"""The address of placeholders. A flannel node of the backend udp sends there what is meant for the subnet: to a port of
its own host where nothing listens. (What it sends to 0.0.0.0 comes back to itself.)"""
_LARGEST = 65536
"""Bytes that a value may have; far more than any backend needs."""
_LONGEST_KEY = 1024
"""Characters that a key may have."""
_KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([a-f\d:]+)-(\d+))?", re.ASCII)
_NO_IPV4 = IPv4Network("0.0.0.0/0")
# What somebody still holds of what was read need not be read again when it is met again, as nearly all is in each listing.
# A record that is gone leaves nothing here, however many come and go.
_held_subnets: WeakValueDictionary[str, Subnets] = WeakValueDictionary()
"""By their key."""
_held_leases: WeakValueDictionary[tuple[str, bytes], Lease] = WeakValueDictionary()
"""By their record's key and value."""


def lease_key(subnets: Subnets) -> str:
    """The key of the lease on these subnets; an IPv6-only lease has the zero network in the place of IPv4."""
    return LEASE_PREFIX + _subnets_key(subnets)


def reservation_key(subnets: Subnets) -> str:
    """The key of the reservation of these subnets."""
    return RESERVATION_PREFIX + _subnets_key(subnets)


def _subnets_key(subnets: Subnets) -> str:
    ipv4 = _NO_IPV4 if subnets.ipv4 is None else subnets.ipv4
    key = f"{ipv4.network_address}-{ipv4.prefixlen}"
    if subnets.ipv6 is not None:
        key += f"&{subnets.ipv6.network_address}-{subnets.ipv6.prefixlen}"
    return key


def parse_lease_key(key: str) -> Subnets:
    """The subnets that a lease's key names. :raises RecordError: if it names none."""
    return _parse_key(_checked_key(key), LEASE_PREFIX, "lease")


def parse_reservation_key(key: str) -> Subnets:
    """The subnets that a reservation's key names. :raises RecordError: if it names none."""
    return _parse_key(_checked_key(key), RESERVATION_PREFIX, "reservation")


def _checked_key(key: str) -> str:
    if len(key) > _LONGEST_KEY:
        raise RecordError(f"the key {printable(key, 80)!r} has more than {_LONGEST_KEY} characters")
    return key


def _parse_key(key: str, prefix: str, kind: str) -> Subnets:
    subnets = _held_subnets.get(key)
    if subnets is None or not key.startswith(prefix):
        subnets = _held_subnets[key] = _parse_new_key(key, prefix, kind)
    return subnets


def _parse_new_key(key: str, prefix: str, kind: str) -> Subnets:
    match = _KEY.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
    if match is None:
        raise RecordError(f"{key!r} is not the key of a {kind}, such as '{prefix}10.244.1.0-24'")
    address, length, address6, length6 = match.groups()
    try:
        ipv4 = IPv4Network(f"{address}/{length}")
        ipv6 = IPv6Network(f"{address6}/{length6}") if address6 is not None else None
    except ValueError as error:
        raise RecordError(f"the key {key!r} names no subnet: {error}") from error
    if (ipv4.prefixlen == 0 and ipv6 is None) or (ipv6 is not None and ipv6.prefixlen == 0):
        raise RecordError(f"the key {key!r} claims the whole address space")
    return Subnets(None if ipv4 == _NO_IPV4 else ipv4, ipv6)


def encode_lease(lease: Lease) -> bytes:
    """The value of the lease's record. :raises RecordError: if it is more than a record may hold, or cannot be said in JSON."""
    content: dict[str, JSON] = {
        # flannel ignores a lease whose PublicIP is null, and forgets all its peers when it sees one change to that.
        "PublicIP": str(lease.public_ipv4 or IPv4Address(0)),
        "PublicIPv6": None if lease.public_ipv6 is None else str(lease.public_ipv6),
    }
    if lease.data.backend_type:
        content["BackendType"] = lease.data.backend_type
    if lease.data.ipv4 is not None:
        content["BackendData"] = lease.data.ipv4
    if lease.data.ipv6 is not None:
        content["BackendV6Data"] = lease.data.ipv6
    # Rounded down: an overdue lease then is one indeed.
    margin = 0 if lease.renewal_margin is None else int(lease.renewal_margin)
    own: dict[str, JSON] = {"Node": lease.node, "Run": lease.run, "RenewalMargin": margin, "Reserved": lease.reserved}
    if any(own.values()):
        content["Overlaynet"] = {name: value for name, value in own.items() if value}
    try:
        value = _encode(content)
    except (TypeError, ValueError) as error:
        raise RecordError(f"the data of the lease on {lease.subnets} cannot be written as JSON: {error}") from error
    if len(value) > _LARGEST:
        raise RecordError(
            f"the record of the lease on {lease.subnets} would have {len(value)} bytes, more than {_LARGEST}"
        )
    return value


def decode_lease(key: str, value: bytes) -> Lease:
    """Read a lease's record. Unknown members are ignored.

    :raises RecordError: if it cannot be read, saying why; so cannot one of more than 65,536 bytes.
    """
    lease = _held_leases.get((key, value))
    if lease is None:
        lease = _held_leases[key, value] = _decode_lease(key, value)
    return lease


def _decode_lease(key: str, value: bytes) -> Lease:
    subnets = parse_lease_key(key)
    members = _decode(value)
    public_ipv4 = _address(members.get("publicip", "0.0.0.0"), IPv4Address, "PublicIP")
    public_ipv6 = _address(members.get("publicipv6"), IPv6Address, "PublicIPv6")
    own = members.get("overlaynet")
    if not isinstance(own, Mapping):
        own = {}
    return Lease(
        subnets,
        public_ipv4=None if public_ipv4 is None or int(public_ipv4) == 0 else public_ipv4,
        public_ipv6=public_ipv6,
        data=LeaseData(
            _text(members.get("backendtype"), "BackendType"), members.get("backenddata"), members.get("backendv6data")
        ),
        node=_text(own.get("Node"), "Overlaynet.Node"),
        run=_text(own.get("Run"), "Overlaynet.Run"),
        renewal_margin=_seconds(own.get("RenewalMargin")),
        reserved=own.get("Reserved") is True,
    )


def as_read(lease: Lease) -> Lease:
    """The lease as it comes out of its record: with lists for tuples, for instance.

    :raises RecordError: as :func:`encode_lease` does.
    """
    return decode_lease(lease_key(lease.subnets), encode_lease(lease))


def readable_lease(key: str, value: bytes) -> Lease | None:
    """What :func:`decode_lease` returns; ``None`` if the record cannot be read."""
    try:
        return decode_lease(key, value)
    except RecordError:
        return None


def placeholder(reservation: Reservation) -> bytes:
    """The value that keeps the lease's key of reserved subnets taken while nobody holds them.

    It bears the address that the subnets are reserved for, if they are for an address: by that, a flannel node takes
    it for its own lease, and claims it.
    """
    address = _NOBODY if reservation.public_ipv4 is None else reservation.public_ipv4
    return encode_lease(Lease(reservation.subnets, address, reservation.public_ipv6, reserved=True))


def is_placeholder(lease: Lease) -> bool:
    """True if nobody holds the lease: its record only keeps reserved subnets from being given away."""
    return lease.reserved and not lease.node


def encode_reservation(reservation: Reservation) -> bytes:
    """The value of the reservation's record."""
    content = {
        "Node": reservation.node or None,
        "PublicIP": None if reservation.public_ipv4 is None else str(reservation.public_ipv4),
        "PublicIPv6": None if reservation.public_ipv6 is None else str(reservation.public_ipv6),
    }
    return _encode({name: value for name, value in content.items() if value is not None})


def decode_reservation(key: str, value: bytes) -> Reservation:
    """Read a reservation's record. :raises RecordError: if it cannot be read, saying why."""
    subnets = parse_reservation_key(key)
    members = _decode(value)
    ipv4 = members.get("publicip")
    reservation = Reservation(
        subnets,
        _text(members.get("node"), "Node"),
        None if ipv4 is None else _address(ipv4, IPv4Address, "PublicIP"),
        _address(members.get("publicipv6"), IPv6Address, "PublicIPv6"),
    )
    if not reservation.node and reservation.public_ipv4 is None and reservation.public_ipv6 is None:
        raise RecordError("it names no node: neither Node nor PublicIP nor PublicIPv6")
    return reservation


def _encode(content: Mapping[str, JSON]) -> bytes:
    # What is not JSON (a number that is none) would make every flannel node forget all its peers.
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _decode(value: bytes) -> dict[str, Any]:
    """The members of a record's value, by their names in lower case."""
    if len(value) > _LARGEST:
        raise RecordError(f"its value has {len(value)} bytes, more than {_LARGEST}")
    try:
        content = json.loads(value.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"its value is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RecordError("its value is not a JSON object")
    if _deeper_than(content, _DEEPEST):
        raise RecordError(f"its value is nested more than {_DEEPEST} levels deep")
    try:
        _encode(content)
    except ValueError as error:
        # Half a character ("\ud800"), or a number that is beyond all (1e999): whoever passes it on would fail.
        raise RecordError(f"its value holds what cannot be written again: {printable(str(error), 120)}") from None
    return {name.lower(): member for name, member in content.items()}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")  # and equals not even itself


def _deeper_than(content: Any, levels: int) -> bool:
    """True if containers are nested deeper: comparing or printing them would end in a RecursionError."""
    layer = [content]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not layer:
            return False
    return True


def _address(value: Any, family: Any, name: str) -> Any:
    if value is None and family is IPv6Address:
        return None
    try:
        if not isinstance(value, str) or "%" in value:  # an address with a scope means something on one host only
            raise ValueError
        return family(value)
    except ValueError:
        shown = printable(repr(value), 80)
        raise RecordError(f"{name} is {shown}, not an IPv{family(0).version} address") from None


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > 1024 or not value.isprintable():
        raise RecordError(f"{name} is not a printable string of at most 1024 characters")
    return value


def _seconds(value: Any) -> float | None:
    """What a record says of a time; what is none is as good as nothing."""
    return float(value) if type(value) is int and 0 < value < _LONGEST else None
