"""What backends share that make, or use, a network device by name."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from overlaynet.errors import BackendError
from overlaynet.logs import fields
from overlaynet.model import IPAddress, Peer
from overlaynet.netlink import Link, Netlink, NetlinkError, netlink

T = TypeVar("T")
log = logging.getLogger(__name__)

LONGEST_NAME = 15
"""Bytes in the name of an interface (Linux, ``IFNAMSIZ``)."""
IPV6_SUFFIX = "-v6"
"""What the name of a device ends in that an overlay has for IPv6, beside that for IPv4."""
ALIAS = "overlaynet {}"
"""The alias of every device of ours, with the backend's name: it says whose the device is."""


def check_name(name: str, longest: int = LONGEST_NAME) -> str | None:
    """A name that a network interface can have (Linux, ``dev_valid_name``)."""
    if not 1 <= len(name.encode()) <= longest:
        return f"must be an interface name of 1 to {longest} bytes, not {name!r}"
    # The kernel reads % as a pattern, and has sysctl directories of its own called "all" and "default".
    if not name.isascii() or not name.isprintable() or set(name) & set("/: %") or name in (".", "..", "all", "default"):
        return f"must be an interface name, such as 'overlay0', not {name!r}"
    return None


class Claim:
    """This process's hold on the name of an overlay in its network namespace, for devices that no process holds by itself.

    It is a Unix socket of that name, which is in nobody's file system: the kernel gives it up when the process ends,
    however it ends.
    """

    def __init__(self, name: str) -> None:
        """Take it. :raises BackendError: if another process, or another backend of this one, has it."""
        self.name = name
        """What is claimed."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(_address(name))
        except OSError as error:
            self._socket.close()
            if error.errno != errno.EADDRINUSE:
                raise BackendError(f"the name {name} cannot be claimed: {error.strerror}") from error
            raise BackendError(
                f"{name} belongs to another overlaynet that is running; stop it, "
                f"or choose another Name in the network document's Backend"
            ) from error

    @property
    def closed(self) -> bool:
        """Whether it was given up."""
        return self._socket.fileno() == -1

    def close(self) -> None:
        """Give it up. Idempotent."""
        self._socket.close()


async def claim_name(name: str) -> Claim:
    """Take the name of an overlay that has no device of its own: what :attr:`.Device.instance` says.

    :raises BackendError: if another overlay has it, or a network interface: routes through that would pass for the overlay's.
    """
    claim = Claim(name)
    try:
        await check_no_device(name)
    except BaseException:
        claim.close()
        raise
    return claim


async def check_no_device(name: str) -> None:
    """For the name of an overlay that has no device of its own.

    :raises BackendError: if a network interface has it: routes through that, whosever they are, would pass for the overlay's.
    """
    if await ask(lambda kernel: kernel.link(name)) is not None:
        raise BackendError(
            f"there is a network interface {name}, whose routes could not be told from this overlay's; "
            f"choose another Name in the network document's Backend"
        )


def is_claimed(name: str) -> bool:
    """True if a process in this network namespace has a :class:`Claim` to the name now."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(_address(name))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise
    return False


def find_leftovers(kernel: Netlink, name: str) -> list[Link]:
    """The devices of the overlay ``name`` that outlive the process that made them, whether or not that still runs."""
    found = [link for link in (kernel.link(name), kernel.link(name + IPV6_SUFFIX)) if link is not None]
    return [link for link in found if link.kind == "vxlan" and link.alias == ALIAS.format("vxlan")]


def name_is_taken(name: str, kind: str) -> str:
    """What to say when a device cannot have its name, as an interface of this kind (as far as is known) has it."""
    what = f"another interface ({kind})" if kind else "another interface"
    return (
        f"the device name {name} is taken by {what}; delete that with `ip link delete {name}`, "
        f"or choose another Name in the network document's Backend"
    )


def find_on_link(kernel: Netlink, peers: Sequence[Peer], interface: str) -> frozenset[IPAddress]:
    """The addresses of the peers' hosts that are on the same link as this host, by the interface."""
    hosts = {host for peer in peers for host in (peer.public_ipv4, peer.public_ipv6) if host is not None}
    return frozenset(host for host in hosts if kernel.is_on_link(host, interface))


def is_in_use(kernel: Netlink, name: str) -> bool:
    """True if the overlay ``name`` seems to have a daemon that runs, or its device's name is somebody else's."""
    return is_claimed(name) or (kernel.link(name) is not None and not find_leftovers(kernel, name))


async def ask(function: Callable[[Netlink], T]) -> T:
    """Call ``function`` in a thread, with netlink. :raises BackendError: if the kernel refuses."""
    try:
        return await netlink(function)
    except NetlinkError as error:
        raise BackendError(str(error)) from error


class Parameters:
    """Kernel parameters of devices, below ``/proc/sys/net``. One that cannot be set is reported once."""

    def __init__(self, directory: Path = Path("/proc/sys/net")) -> None:
        self._directory = directory
        self._unwritable: set[Path] = set()

    def set(self, version: int, device: str, name: str, value: str) -> bool:
        """Set a parameter of a device for an IP version; True if it had another value. Idempotent.

        A parameter for IPv6 that does not exist is left out: kernels, and MTUs, without IPv6 have none.
        """
        path = self._directory / f"ipv{version}" / "conf" / device / name
        if version == 6 and not path.exists():
            return False
        try:
            if path.read_text().strip() == value:
                return False
            path.write_text(value)
        except OSError as error:
            if path not in self._unwritable:
                self._unwritable.add(path)
                log.warning(
                    "kernel parameter not set", extra=fields(parameter=path, wanted=value, reason=error.strerror)
                )
            return False
        return True


def _address(name: str) -> str:
    return f"\0overlaynet/{name}"
