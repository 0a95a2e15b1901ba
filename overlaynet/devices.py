"""What backends share that make, or use, a network device by name."""

from __future__ import annotations

import errno
import logging
import socket
from pathlib import Path

from overlaynet.errors import BackendError
from overlaynet.logs import fields
from overlaynet.netlink import Link, Netlink

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


def is_in_use(kernel: Netlink, name: str) -> bool:
    """True if the overlay ``name`` seems to have a daemon that runs, or its device's name is somebody else's."""
    return is_claimed(name) or (kernel.link(name) is not None and not find_leftovers(kernel, name))


class Parameters:
    """Kernel parameters of devices, below ``/proc/sys/net``. One that cannot be set is reported once."""

    def __init__(self, directory: Path = Path("/proc/sys/net")) -> None:
        self._directory = directory
        self._unwritable: set[Path] = set()

    def set(self, version: int, device: str, name: str, value: str) -> None:
        """Set a parameter of a device for an IP version. Idempotent; one that the kernel does not have is left out."""
        path = self._directory / f"ipv{version}" / "conf" / device / name
        if not path.exists():  # a kernel, or an MTU, without IPv6
            return
        try:
            if path.read_text().strip() != value:
                path.write_text(value)
        except OSError as error:
            if path not in self._unwritable:
                self._unwritable.add(path)
                log.warning(
                    "kernel parameter not set", extra=fields(parameter=path, wanted=value, reason=error.strerror)
                )


def _address(name: str) -> str:
    return f"\0overlaynet/{name}"
