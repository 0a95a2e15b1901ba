"""The subnet file: how the container runtime learns this node's subnet, in flannel's format.

    FLANNEL_NETWORK=10.244.0.0/16
    FLANNEL_SUBNET=10.244.1.1/24
    FLANNEL_MTU=1472
    FLANNEL_IPMASQ=false

flannel's CNI plugin and its Docker scripts read it unchanged.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path

from overlaynet.errors import ConfigError
from overlaynet.model import IPNetwork, Lease, Subnets
from overlaynet.network import Network


def render(network: Network, lease: Lease, mtu: int) -> str:
    """The file's text. The subnet is written as its first host address, which is the bridge's."""
    lines = []
    for family, subnet, prefix in (
        (network.ipv4, lease.subnets.ipv4, ""),
        (network.ipv6, lease.subnets.ipv6, "IPV6_"),
    ):
        if family is not None and subnet is not None:
            lines.append(f"FLANNEL_{prefix}NETWORK={family.network}")
            lines.append(f"FLANNEL_{prefix}SUBNET={first_host(subnet)}/{subnet.prefixlen}")
    # Network address translation is left to the container runtime, as with flannel's --ip-masq=false.
    lines += [f"FLANNEL_MTU={mtu}", "FLANNEL_IPMASQ=false"]
    return "\n".join(lines) + "\n"


def first_host(subnet: IPNetwork) -> str:
    """The first address of a subnet that a host can have."""
    return str(subnet.network_address + 1)


def check_writable(path: Path) -> None:
    """:raises ConfigError: if the file cannot be written. Leaves nothing behind but its directory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a directory")
        descriptor, probe = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        os.unlink(probe)
    except OSError as error:
        raise _unwritable(path, error) from error


def write(path: Path, text: str) -> None:
    """Replace the file in one step, so that no reader ever sees half of it. :raises ConfigError: if it cannot."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fchmod(descriptor, 0o644)
            os.fsync(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise _unwritable(path, error) from error


def read_previous(path: Path) -> Subnets | None:
    """The subnets that an earlier run wrote; ``None`` if there is no such file, or it names none that can be read.

    What it says is a wish only (the store decides), so a damaged file is no error.
    """
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    ipv4 = ipv6 = None
    with contextlib.suppress(KeyError, ValueError):
        ipv4 = IPv4Interface(values["FLANNEL_SUBNET"].strip()).network
    with contextlib.suppress(KeyError, ValueError):
        ipv6 = IPv6Interface(values["FLANNEL_IPV6_SUBNET"].strip()).network
    return None if ipv4 is None and ipv6 is None else Subnets(ipv4, ipv6)


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"the subnet file {path} cannot be written: {error.strerror}; choose another with --subnet-file")
