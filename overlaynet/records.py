"""Leases as the store holds them: flannel's keys and JSON values.

A lease is one record. Its key names the subnets (``subnets/10.5.52.0-24``, with an IPv6 subnet
``subnets/10.5.52.0-24&fd00:10:244:3::-64``), its value says where the node is reached::

    {"PublicIP":"192.168.64.3","PublicIPv6":null,"Overlaynet":{"Node":"host-a","Run":"5f0c"}}

Member names, their order and which are left out are flannel's; ``Overlaynet`` is ours, and flannel ignores it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from overlaynet.errors import RecordError
from overlaynet.model import JSON, Lease, LeaseData, Subnets

NETWORK_KEY = "config"
LEASE_PREFIX = "subnets/"

_KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([a-f\d:]+)-(\d+))?", re.ASCII)
_NO_IPV4 = IPv4Network("0.0.0.0/0")


def lease_key(subnets: Subnets) -> str:
    """The key of the lease on these subnets; an IPv6-only lease has the zero network in the place of IPv4."""
    ipv4 = _NO_IPV4 if subnets.ipv4 is None else subnets.ipv4
    key = f"{LEASE_PREFIX}{ipv4.network_address}-{ipv4.prefixlen}"
    if subnets.ipv6 is not None:
        key += f"&{subnets.ipv6.network_address}-{subnets.ipv6.prefixlen}"
    return key


def parse_lease_key(key: str) -> Subnets:
    """The subnets that a lease's key names. :raises RecordError: if it names none."""
    match = _KEY.fullmatch(key.removeprefix(LEASE_PREFIX)) if key.startswith(LEASE_PREFIX) else None
    if match is None:
        raise RecordError(f"{key!r} is not the key of a lease, such as '{LEASE_PREFIX}10.244.1.0-24'")
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
    """The value of the lease's record."""
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
    own = {"Node": lease.node, "Run": lease.run}
    if any(own.values()):
        content["Overlaynet"] = {name: value for name, value in own.items() if value}
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def decode_lease(key: str, value: bytes) -> Lease:
    """Read a lease's record. Unknown members are ignored. :raises RecordError: if it cannot be read, saying why."""
    subnets = parse_lease_key(key)
    try:
        content = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"its value is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RecordError("its value is not a JSON object")
    members = {name.lower(): member for name, member in content.items()}
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
    )


def _address(value: Any, family: Any, name: str) -> Any:
    if value is None and family is IPv6Address:
        return None
    try:
        if not isinstance(value, str) or "%" in value:  # an address with a scope means something on one host only
            raise ValueError
        return family(value)
    except ValueError:
        raise RecordError(f"{name} is {value!r}, not an IPv{family(0).version} address") from None


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > 1024 or not value.isprintable():
        raise RecordError(f"{name} is not a printable string of at most 1024 characters")
    return value
