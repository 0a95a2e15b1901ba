"""What identifies a node, and how it stays the same when the interface that it was made from does not.

The first identity of a node is worked out from the machine's identity and the hardware address of the underlay's
interface. It is kept in the state directory, one file for each node that was met there, with what tells whose it is::

    {"Identity":"a53036156129","Machine":"9b…","Boot":"0f…","Namespace":"5127","Initial":true,"Product":"77…",
     "HardwareAddresses":["52:54:00:12:34:56"]}

A kept identity is this node's if the machine's identity is the same, and one of these holds:

- Nothing but the daemon was started anew: it is the same boot, and the same network namespace.
- An interface is still there that was there before, in the host's own network namespace or in one that is not.
- It is the host's own network namespace, on the same machine by the UUID that its firmware gives it, if that may be read.

So a replaced interface, a random hardware address, or a default route that has moved make no other node. But another network
namespace of this host is one, and so is a copy of this machine's disk, even with the same machine-id: neither the
interfaces nor the UUID are copied.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from overlaynet.logs import fields
from overlaynet.model import Underlay
from overlaynet.netlink import Netlink, netlink

log = logging.getLogger(__name__)

MACHINE_ID = Path("/etc/machine-id")
"""The machine's identity, see machine-id(5): 32 hexadecimal digits, not to be published."""
PRODUCT_UUID = Path("/sys/class/dmi/id/product_uuid")
"""What the firmware or the hypervisor calls the machine; for root only."""
PRODUCT_UUID_COPY = Path("/run/overlaynet.product_uuid")
"""A copy for the daemon's user, which the systemd unit makes at each start. It does not outlast the boot."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_HOSTS_OWN = Path("/proc/sys/net/core/netdev_max_backlog")
"""A parameter that is there in the network namespace of the host only."""
_NAMESPACE = Path("/proc/self/ns/net")
_NETNS_COOKIE = 71
"""The socket option SO_NETNS_COOKIE (Linux 5.14): a number that is given to one network namespace only in each boot."""
_NO_HARDWARE_ADDRESS = re.compile(r"[0:]*")
_IDENTITY = re.compile(r"[0-9a-f]{12}")


@attrs.frozen
class Circumstances:
    """What is known of where a daemon runs. Nothing of it may be published."""

    machine: str
    """A hash of the machine's identity; empty if it has none."""
    boot: str
    namespace: str
    """What no other network namespace of this boot is called."""
    initial: bool
    """It is the network namespace of the host itself."""
    product: str
    """A hash of the UUID that the firmware gives the machine; empty if it is not known."""
    hardware_addresses: frozenset[str]
    """Of the interfaces that are not made by software, and of the underlay's."""


@attrs.frozen
class Kept:
    """An identity, and where the node was when it was last seen."""

    identity: str
    seen: Circumstances

    def is_of(self, now: Circumstances) -> bool:
        """True if a daemon that runs under these circumstances is that node."""
        then = self.seen
        if then.machine != now.machine:
            return False
        if now.boot and then.boot == now.boot and then.namespace == now.namespace:
            return True
        if then.initial != now.initial:
            return False
        if then.hardware_addresses & now.hardware_addresses:
            return True
        return now.initial and now.product != "" and then.product == now.product


class IdentityFiles:
    """The identities that are kept in a directory, and which of them is this node's.

    Where the directory cannot be used, the identity is what can be worked out; one line in the log says so.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._told: set[str] = set()

    async def identity(self, underlay: Underlay) -> str:
        """This node's identity unless the operator gives it another. What is new about the node is written down.

        :raises overlaynet.netlink.NetlinkError: if the kernel does not tell.
        """
        return await netlink(lambda kernel: self.recall(_computed(kernel, underlay), circumstances(kernel, underlay)))

    def recall(self, computed: str, now: Circumstances) -> str:
        """The identity of the node that is under these circumstances: the kept one, or else the computed one; blocking."""
        try:
            kept = self._read()
            own = [each for each in kept if each.is_of(now)]
            if own:
                found = min(own, key=lambda each: (each.identity != computed, each.identity))
            else:
                # Its interface has been another namespace's node before, which lives on with another one.
                taken = any(each.identity == computed for each in kept)
                found = Kept(secrets.token_hex(6) if taken else computed, now)
            if found not in kept or found.seen != now:
                self._write(Kept(found.identity, now))
            self._forget(each for each in kept if each.identity != found.identity and _is_gone(each.seen, now))
        except OSError as error:
            self._tell(
                f"{error.strerror or error}",
                "identity not kept",
                hint="another hardware address makes another node; let --state-directory be writable, or give --node",
            )
            return computed
        if found.identity != computed:
            self._tell(found.identity, "identity kept", hint="the interface is another one than it was made from")
        return found.identity

    def _read(self) -> list[Kept]:
        kept = []
        for path in sorted(self._directory.glob("identity-*.json")):
            try:
                kept.append(_parse(path.read_bytes()))
            except FileNotFoundError:
                continue  # another node's daemon has just removed it
            except (ValueError, RecursionError) as error:
                log.warning("damaged identity file removed", extra=fields(path=path, reason=str(error)))
                path.unlink(missing_ok=True)
        return kept

    def _write(self, kept: Kept) -> None:
        """Replace the file in one step, for its owner only."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._directory, prefix=".identity.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_render(kept))
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, self._path(kept))
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def _forget(self, gone: Iterable[Kept]) -> None:
        for kept in gone:
            self._path(kept).unlink(missing_ok=True)

    def _path(self, kept: Kept) -> Path:
        return self._directory / f"identity-{kept.identity}.json"

    def _tell(self, what: str, event: str, *, hint: str) -> None:
        """Say it, once: the question is asked again and again."""
        if what not in self._told:
            self._told.add(what)
            level = logging.INFO if event == "identity kept" else logging.WARNING
            log.log(level, event, extra=fields(directory=self._directory, reason=what, hint=hint))


async def default_identity(underlay: Underlay, machine_id: Path = MACHINE_ID) -> str:
    """The identity that is worked out from what this host has now: see :func:`node_identity`."""
    return await netlink(lambda kernel: _computed(kernel, underlay, machine_id))


def node_identity(hardware_address: str, machine_id: str, hostname: str) -> str:
    """12 hexadecimal digits that stay the same over restarts and changes of address, and differ from node to node.

    They are made from the machine's identity and the hardware address of the underlay's interface, so two daemons in
    two network namespaces of one machine are two nodes, and so are two clones of one machine's image. What is missing
    of the two is left out; without both, it is the host's name. The machine's identity itself is not to be
    published: as machine-id(5) advises, it only serves as the key of a hash.
    """
    machine = _machine(machine_id)
    hardware = "" if _NO_HARDWARE_ADDRESS.fullmatch(hardware_address) else hardware_address.lower()
    what = hardware if machine or hardware else hostname
    return _hash(machine, f"overlaynet node {what}")[:12]


def circumstances(kernel: Netlink, underlay: Underlay) -> Circumstances:
    """What is to be known of where this process runs; blocking."""
    machine = _machine(_text(MACHINE_ID))
    product = _text(PRODUCT_UUID) or _text(PRODUCT_UUID_COPY)
    addresses = {
        link.hardware_address.lower()
        for link in kernel.links()
        if (not link.kind or link.name == underlay.interface)
        and not _NO_HARDWARE_ADDRESS.fullmatch(link.hardware_address)
    }
    return Circumstances(
        machine=_hash(machine, "overlaynet machine") if machine else "",
        boot=_text(_BOOT_ID),
        namespace=_network_namespace(),
        initial=_HOSTS_OWN.exists(),
        product=_hash(machine, f"overlaynet product {product.lower()}") if product.strip("0-fF") else "",
        hardware_addresses=frozenset(addresses),
    )


def _is_gone(then: Circumstances, now: Circumstances) -> bool:
    """True if a node that is not this one will never be seen again."""
    return then.machine == now.machine and then.boot != now.boot and then.initial == now.initial


def _computed(kernel: Netlink, underlay: Underlay, machine_id: Path = MACHINE_ID) -> str:
    link = kernel.link(underlay.interface)
    return node_identity("" if link is None else link.hardware_address, _text(machine_id), socket.gethostname())


def _machine(text: str) -> str:
    machine = text.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{32}", machine) or not machine.strip("0"):
        return ""  # as on a machine whose first boot is not over: "uninitialized"
    return machine


def _hash(machine: str, text: str) -> str:
    return hmac.digest(machine.encode(), text.encode(), hashlib.sha256).hex()


def _text(path: Path) -> str:
    """What a file of the system says; empty if it is not there, as in many containers, or not for this user."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _network_namespace() -> str:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
            return str(int.from_bytes(any_socket.getsockopt(socket.SOL_SOCKET, _NETNS_COOKIE, 8), "little"))
    except OSError:  # an older kernel: numbers that are given again
        return f"inode {_NAMESPACE.stat().st_ino}"


def _render(kept: Kept) -> bytes:
    seen = kept.seen
    content = {
        "Identity": kept.identity,
        "Machine": seen.machine,
        "Boot": seen.boot,
        "Namespace": seen.namespace,
        "Initial": seen.initial,
        "Product": seen.product,
        "HardwareAddresses": sorted(seen.hardware_addresses),
    }
    return (json.dumps(content, separators=(",", ":")) + "\n").encode()


def _parse(text: bytes) -> Kept:
    """:raises ValueError: saying what is wrong with it."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")

    def member(name: str, kind: type) -> Any:
        value = content.get(name)
        if not isinstance(value, kind):
            raise ValueError(f"its {name} is missing, or of the wrong kind")
        return value

    identity = member("Identity", str)
    if not _IDENTITY.fullmatch(identity):
        raise ValueError("its Identity is not 12 hexadecimal digits")
    addresses = member("HardwareAddresses", list)
    if not all(isinstance(address, str) for address in addresses):
        raise ValueError("its HardwareAddresses are not all text")
    return Kept(
        identity,
        Circumstances(
            machine=member("Machine", str),
            boot=member("Boot", str),
            namespace=member("Namespace", str),
            initial=member("Initial", bool),
            product=member("Product", str),
            hardware_addresses=frozenset(addresses),
        ),
    )
