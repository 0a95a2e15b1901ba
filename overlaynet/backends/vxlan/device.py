"""A VXLAN device in the kernel: made or adopted, repaired, and its entries kept. Blocking calls, with netlink."""

from __future__ import annotations

import errno
import logging
from collections.abc import Collection

import attrs

from overlaynet.backends.vxlan.tunnels import Tunnel
from overlaynet.devices import ALIAS, Parameters, name_is_taken
from overlaynet.errors import BackendError
from overlaynet.logs import fields
from overlaynet.model import IPNetwork
from overlaynet.netlink import IPInterface, Link, Netlink, NetlinkError, Vxlan

log = logging.getLogger(__name__)

_ALIAS = ALIAS.format("vxlan")


@attrs.frozen
class Ensured:
    """What had to be done to make a device what it should be."""

    made: bool = False
    """It was made, as there was none, or none that could be adopted."""
    replaced: bool = False
    """One that led elsewhere was deleted for it."""
    mended: tuple[str, ...] = ()
    """What of an existing one had to be changed."""


@attrs.frozen
class VxlanDevice:
    """A device as it is to be. It carries one IP version, in outer packets of the same version."""

    name: str
    version: int
    vxlan: Vxlan
    mtu: int
    hardware_address: str
    address: IPInterface | None = None
    """``None`` until there is a lease."""

    def is_ours(self, link: Link) -> bool:
        """True if an overlaynet made the interface, as this device or what this was before."""
        # The hardware address is derived from the node: a crash may have come before the alias was set.
        return link.alias == _ALIAS or link.hardware_address == self.hardware_address

    def ensure(self, kernel: Netlink, parameters: Parameters) -> Ensured:
        """Make the device what it should be: adopt what fits, replace what does not. Idempotent.

        :raises BackendError: if the name, the VNI or the port is taken.
        :raises NetlinkError: if the kernel refuses otherwise.
        """
        link = kernel.link(self.name)
        if link is not None and not self.is_ours(link):
            raise BackendError(name_is_taken(self.name, link.kind))
        replaced = link is not None and link.vxlan != self.vxlan
        if replaced:
            log.info("device replaced", extra=fields(device=self.name, reason="it leads elsewhere than it should"))
            kernel.delete_link(self.name)
            link = None
        made = link is None
        if made:
            self._create(kernel)
        try:
            mended = self._configure(kernel, parameters)
        except (BackendError, NetlinkError):
            if made:
                kernel.delete_link(self.name)
            raise
        return Ensured(made, replaced, () if made else tuple(mended))

    def _create(self, kernel: Netlink) -> None:
        try:
            kernel.create_vxlan(self.name, self.vxlan, mtu=self.mtu, hardware_address=self.hardware_address)
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
            raise BackendError(self._who_has_the_identifier(kernel)) from error

    def _configure(self, kernel: Netlink, parameters: Parameters) -> list[str]:
        """Change what is not as it should be; what that was."""
        name = self.name
        link = kernel.link(name)
        if link is None:
            raise BackendError(f"the device {name} is gone: someone deleted or renamed it")
        mended = []
        if link.alias != _ALIAS:
            kernel.configure_link(name, alias=_ALIAS)
            mended.append("alias")
        if link.hardware_address != self.hardware_address:
            kernel.configure_link(name, hardware_address=self.hardware_address)
            mended.append("hardware address")
        if link.mtu != self.mtu:
            kernel.configure_link(name, mtu=self.mtu)
            mended.append("MTU")
        # No router solicitations, and no address of its own choice: nobody would answer.
        if parameters.set(6, name, "accept_ra", "0"):
            mended.append("accept_ra")
        parameters.set(6, name, "addr_gen_mode", "1")  # which the kernel itself resets, when an MTU passes 1280
        if self.version == 6 and parameters.set(6, name, "disable_ipv6", "0"):
            mended.append("disable_ipv6")
        if not link.up:
            self._switch_on(kernel)
            mended.append("it was down")
        if self.address is not None and kernel.set_addresses(name, [self.address]):
            mended.append("addresses")
        return mended

    def _switch_on(self, kernel: Netlink) -> None:
        try:
            kernel.configure_link(self.name, up=True)
        except NetlinkError as error:
            port = self.vxlan.port
            if error.errno == errno.EADDRINUSE:
                raise BackendError(
                    f"UDP port {port} is in use by another program; stop it, "
                    f"or choose another Port in the network document's Backend"
                ) from error
            if error.errno == errno.EEXIST:
                raise BackendError(self._who_has_the_identifier(kernel)) from error
            raise

    def _who_has_the_identifier(self, kernel: Netlink) -> str:
        wanted = self.vxlan
        taken = f"VNI {wanted.identifier} on UDP port {wanted.port}"
        for link in kernel.links():
            other = link.vxlan
            if other is not None and link.name != self.name and other.identifier == wanted.identifier:
                return (
                    f"{taken} is taken by the VXLAN device {link.name}; stop what made it (flanneld, or another "
                    f"overlaynet?) and delete it with `ip link delete {link.name}`, or choose another VNI in the network "
                    f"document's Backend"
                )
        return f"{taken} is taken by another VXLAN device; choose another VNI in the network document's Backend"

    def set_tunnels(self, kernel: Netlink, tunnels: Collection[Tunnel]) -> dict[IPNetwork, str]:
        """Make ``tunnels`` all that the device has permanent entries for. Idempotent: what is right is not written again.

        :return: the subnets whose tunnels the kernel refused, and why.
        """
        refused: dict[IPNetwork, str] = {}
        neighbours = {n.address: n for n in kernel.neighbours(self.name) if n.permanent}
        entries = {e for e in kernel.forwarding_entries(self.name) if e.permanent}
        stale_neighbours = neighbours.keys() - {tunnel.gateway for tunnel in tunnels}
        stale_entries = entries - {tunnel.forwarding_entry for tunnel in tunnels}
        written = 0
        for tunnel in tunnels:
            try:
                if tunnel.forwarding_entry not in entries:
                    kernel.set_forwarding_entry(self.name, tunnel.forwarding_entry)
                    entries.add(tunnel.forwarding_entry)  # it may serve several subnets
                    written += 1
                if neighbours.get(tunnel.gateway) != tunnel.neighbour:
                    kernel.set_neighbour(self.name, tunnel.neighbour)
                    written += 1
            except NetlinkError as error:
                refused[tunnel.subnet] = str(error)
        for address in stale_neighbours:
            kernel.delete_neighbour(self.name, address)
        # Those that were replaced are gone already. Others for a peer's hardware address would take some of its frames.
        for entry in stale_entries:
            kernel.delete_forwarding_entry(self.name, entry)
        if written or stale_neighbours or stale_entries:
            log.info(
                "tunnels changed",
                extra=fields(device=self.name, written=written, removed=len(stale_neighbours) + len(stale_entries)),
            )
        return refused
