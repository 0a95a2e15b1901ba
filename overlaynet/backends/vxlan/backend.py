"""The life of the tunnels: a VXLAN device for each IP version, and the peers that the kernel carries packets to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Interface, IPv6Interface
from typing import ClassVar, Literal, TypeVar

import attrs

from overlaynet.backends.vxlan.device import VxlanDevice
from overlaynet.backends.vxlan.tunnels import Plan, derive_hardware_address, make_plan, publish
from overlaynet.devices import IPV6_SUFFIX, LONGEST_NAME, Claim, Parameters, check_name, find_on_link
from overlaynet.drivers import Backend
from overlaynet.encapsulation import SMALLEST_MTU
from overlaynet.errors import BackendError
from overlaynet.identity import default_identity
from overlaynet.logs import fields
from overlaynet.model import JSON, Device, IPAddress, IPNetwork, Lease, LeaseData, Peer, Route, Underlay
from overlaynet.netlink import Netlink, NetlinkError, NetlinkWriter, Vxlan
from overlaynet.netlink_events import ChangeSignal, Group, permanent_entry_of
from overlaynet.network import Network
from overlaynet.options import between, option

T = TypeVar("T")
log = logging.getLogger(__name__)

HEADERS = {4: 50, 6: 70}
"""Bytes that a tunnel adds to each packet, by the version of its outer IP header: Ethernet, VXLAN, UDP, IP."""
KERNEL_PORT = 8472
"""The port that Linux, and so flannel, uses by default; IANA has assigned 4789."""


def _check_name(name: str) -> str | None:
    return check_name(name, LONGEST_NAME - len(IPV6_SUFFIX))


@attrs.frozen
class VxlanOptions:
    """The members of ``Backend`` in the network document: flannel's, and ``Name``."""

    identifier: int = option(
        1, "VXLAN network identifier, which tells overlays on one port apart", name="VNI", check=between(1, 2**24 - 1)
    )
    port: int = option(
        0, "UDP port on which every node sends and receives; 0 for the kernel's own, 8472", check=between(0, 65535)
    )
    name: str = option("overlay0", "Name of the VXLAN device; that for IPv6 has `-v6` behind it", check=_check_name)
    mtu: int | None = option(
        None,
        "Bytes in the largest packet of the underlay, of which the tunnel's headers take 50 (IPv4) or 70 (IPv6); "
        "by default the MTU of the underlay's interface",
        name="MTU",
        check=between(576, 65535),
    )
    direct_routing: bool = option(
        False, "Route packets without a tunnel to hosts that are reached without a gateway in between"
    )
    learning: bool = option(False, "Have the device learn which host has which hardware address")
    group_policy: bool = option(False, "Carry group policy identifiers (the GBP extension)", name="GBP")


@attrs.frozen
class _Written:
    """What came of the peers in the kernel."""

    on_link: frozenset[IPAddress] = frozenset()
    refused: Mapping[IPNetwork, str] = attrs.field(factory=dict)
    """Why a subnet has no tunnel although it was planned."""
    troubles: Mapping[int, str] = attrs.field(factory=dict)
    """Why a device is not as it should be, by the IP version that it carries."""

    def check(self) -> None:
        """:raises BackendError: if a device could not be mended."""
        if self.troubles:
            raise BackendError("; ".join(dict.fromkeys(self.troubles.values())))


class VxlanBackend(Backend):
    """Has the kernel carry each packet in a VXLAN datagram; nodes that run flannel's vxlan are peers like others.

    IPv4 is carried over IPv4, IPv6 over IPv6, each by a device of its own; trouble with one leaves the other alone. No packet
    comes by this process, so a crash stops none; :meth:`aclose` removes the devices.
    """

    Options: ClassVar[type[VxlanOptions]] = VxlanOptions
    options: VxlanOptions

    def __init__(self, options: VxlanOptions) -> None:
        super().__init__(options)
        self._network: Network | None = None
        self._interface = ""
        self._claim: Claim | None = None
        self._devices: tuple[VxlanDevice, ...] = ()
        self._ensured: dict[str, VxlanDevice] = {}
        """What each was made to be last, by name."""
        self._writer = NetlinkWriter()
        self._signal: ChangeSignal | None = None
        self._parameters = Parameters()
        self._written = _Written()
        self._plan = Plan()

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        """Make the devices, or adopt those of an earlier run, and switch them on: that takes VNI and port."""
        devices = self._wanted(network, underlay, await _identity(underlay))
        claim = Claim(self.options.name)

        def take(kernel: Netlink) -> None:
            made = []
            try:
                for device in devices:
                    if device.ensure(kernel, self._parameters).made:
                        made.append(device.name)
            except (BackendError, NetlinkError):
                for name in made:
                    kernel.delete_link(name)
                raise

        self._network = network
        self._claim, self._devices, self._interface = claim, devices, underlay.interface
        try:
            self._signal = ChangeSignal(
                [Group.NEIGHBOURS], permanent_entry_of(lambda: [device.name for device in self._devices])
            )
            await self._write(take)
        except (BackendError, NetlinkError) as error:
            self._claim = None
            claim.close()
            self._close_signal()
            raise BackendError(str(error)) from error
        published = {device.version: publish(self.options.identifier, device.hardware_address) for device in devices}
        return LeaseData("vxlan", published.get(4), published.get(6))

    async def start(self, lease: Lease) -> Device:
        """Give the devices their addresses."""
        self._check_open()
        subnets: dict[int, IPNetwork] = {subnet.version: subnet for subnet in lease.subnets}
        self._devices = tuple(
            attrs.evolve(device, address=_address(subnets.get(device.version))) for device in self._devices
        )
        (await self._write(self._ensure) or _Written()).check()
        return self._device()

    async def set_underlay(self, underlay: Underlay) -> Device:
        """Make the devices again where they lead by another interface or from another address, or change their MTU.

        They keep their hardware addresses, which the peers know; what they had entries for, :meth:`set_peers` sets again.
        Where one follows and the other cannot, it is also for :meth:`set_peers` to mend that, and to say so.
        """
        self._check_open()
        if self._network is None:
            raise BackendError("the vxlan backend was not opened; this is a defect of its caller")
        wanted = {device.name: device for device in self._wanted(self._network, underlay, "")}
        self._devices = tuple(
            attrs.evolve(device, vxlan=wanted[device.name].vxlan, mtu=wanted[device.name].mtu)
            for device in self._devices
        )
        self._interface = underlay.interface
        ensured = await self._write(self._ensure)
        if ensured is not None:
            self._written = attrs.evolve(self._written, troubles=ensured.troubles)
            if len(ensured.troubles) == len(self._devices):
                ensured.check()
        return self._device()

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        """Repair the devices, then make the peers all that they have neighbour and forwarding entries for.

        A peer that cannot be reached, or that the kernel refuses, is reported, and keeps no other from being set.

        :raises BackendError: if a device cannot be mended; what the other carries is in force.
        """
        self._check_open()
        written = await self._write(lambda kernel: self._set_peers(kernel, peers))
        if written is None:
            return
        before = self._plan
        self._written = written
        self._plan = self._make_plan(peers, written)
        for subnet, reason in self._plan.skipped.items():
            if before.skipped.get(subnet) != reason:
                log.warning("peer not reachable", extra=fields(subnet=subnet, reason=reason))
        written.check()

    async def changed(self) -> None:
        """Return when a neighbour or forwarding entry that somebody has set, or removed, may be one of a peer's.

        Also after those that :meth:`set_peers` itself has written; it finds nothing to write then. What becomes of the devices
        and routes, the router tells.
        """
        if self._signal is None:
            raise BackendError("the vxlan backend was not opened; this is a defect of its caller")
        await self._signal.wait()

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        """For each subnet of each peer, a route through its tunnel, or to its host where that is on the same link.

        There are none through a device that cannot be mended, nor for a tunnel that the kernel refuses.
        """
        plan = self._make_plan(peers, self._written)
        usable = {
            device.version: device.name
            for device in self._devices
            if device.address is not None and device.version not in self._written.troubles
        }
        return [
            *(
                Route(tunnel.subnet, device=usable[tunnel.subnet.version], gateway=tunnel.gateway, onlink=True)
                for tunnel in plan.tunnels
                if tunnel.subnet.version in usable
            ),
            *(Route(subnet, device=self._interface, gateway=host) for subnet, host in plan.direct.items()),
        ]

    def status(self) -> Mapping[str, JSON]:
        """Devices, VNI and port; how each peer is reached; which peers cannot be, and why."""
        peers: dict[str, JSON] = {
            str(tunnel.subnet): {
                "address": str(tunnel.host),
                "hardware_address": tunnel.hardware_address,
                "path": "tunnel",
            }
            for tunnel in self._plan.tunnels
        }
        peers |= {
            str(subnet): {"address": str(host), "hardware_address": None, "path": "direct"}
            for subnet, host in self._plan.direct.items()
        }
        return {
            "devices": {
                device.name: {"mtu": device.mtu, "hardware_address": device.hardware_address}
                for device in self._devices
            },
            "vni": self.options.identifier,
            "port": self.options.port or KERNEL_PORT,
            "peers": peers,
            "skipped": {str(subnet): reason for subnet, reason in self._plan.skipped.items()},
        }

    async def aclose(self) -> None:
        """Remove the devices; if it is cancelled, they are removed all the same, a moment later."""
        claim, devices = self._claim, self._devices
        self._close_signal()
        if claim is None:
            return

        def remove(kernel: Netlink) -> None:
            if claim.closed:
                return  # by a call before this one that was cancelled: the devices may be another's by now
            try:
                for device in devices:
                    link = kernel.link(device.name)
                    if link is not None and device.is_ours(link):
                        kernel.delete_link(device.name)
            finally:
                claim.close()

        try:
            await self._writer.write(remove)
        except NetlinkError as error:
            claim.close()
            log.warning("devices left behind", extra=fields(reason=error))
        self._claim = None

    def _close_signal(self) -> None:
        if self._signal is not None:
            self._signal.close()

    def _device(self) -> Device:
        return Device(self._devices[0].name, min(device.mtu for device in self._devices), self.options.name)

    def _wanted(self, network: Network, underlay: Underlay, identity: str) -> tuple[VxlanDevice, ...]:
        options = self.options
        versions: list[Literal[4, 6]] = []
        if network.ipv4 is not None:
            versions.append(4)
        if network.ipv6 is not None:
            versions.append(6)
        devices = []
        for version in versions:
            local = underlay.ipv4 if version == 4 else underlay.ipv6
            if local is None:
                raise BackendError(
                    f"the interface {underlay.interface} has no IPv{version} address, over which the vxlan backend "
                    f"carries IPv{version}; give it one, or choose another with --iface"
                )
            devices.append(
                VxlanDevice(
                    options.name if version == 4 else options.name + IPV6_SUFFIX,
                    version,
                    Vxlan(
                        options.identifier,
                        options.port or KERNEL_PORT,
                        local,
                        underlay.interface,
                        options.learning,
                        options.group_policy,
                    ),
                    self._fitting_mtu(underlay, version),
                    derive_hardware_address(identity, options.identifier, version),
                )
            )
        return tuple(devices)

    def _fitting_mtu(self, underlay: Underlay, version: Literal[4, 6]) -> int:
        """Bytes in the largest packet that a tunnel of this IP version carries."""
        wanted = self.options.mtu
        if wanted is not None and wanted > underlay.mtu:
            raise BackendError(
                f"the network document's Backend says that the underlay has MTU {wanted}, but {underlay.interface} has "
                f"{underlay.mtu}; lower the one or raise the other (it is the underlay's MTU, not that of the containers)"
            )
        outer = underlay.mtu if wanted is None else wanted
        least = SMALLEST_MTU[version] + HEADERS[version]
        if outer < least:
            where = "MTU in the network document's Backend" if wanted is not None else f"MTU of {underlay.interface}"
            raise BackendError(
                f"the {where} is {outer}, too small for a tunnel that carries IPv{version}; raise it to {least} or more"
            )
        return outer - HEADERS[version]

    def _make_plan(self, peers: Sequence[Peer], written: _Written) -> Plan:
        own = {device.version: device.hardware_address for device in self._devices}
        return make_plan(peers, self.options.identifier, own, written.on_link).without(written.refused)

    def _check_open(self) -> None:
        if self._claim is None:
            raise BackendError("the vxlan backend is not open; this is a defect of its caller")

    # In a thread, with netlink.

    def _ensure(self, kernel: Netlink) -> _Written:
        return self._set_each(kernel, lambda device: {})

    def _set_peers(self, kernel: Netlink, peers: Sequence[Peer]) -> _Written:
        on_link = self._find_on_link(kernel, peers)
        plan = self._make_plan(peers, _Written(on_link))
        written = self._set_each(
            kernel, lambda device: device.set_tunnels(kernel, list(plan.of_version(device.version)))
        )
        return attrs.evolve(written, on_link=on_link)

    def _set_each(self, kernel: Netlink, set_entries: Callable[[VxlanDevice], Mapping[IPNetwork, str]]) -> _Written:
        """Mend each device, and set its entries, which says which subnets were refused."""
        refused: dict[IPNetwork, str] = {}
        troubles: dict[int, str] = {}
        for device in self._devices:
            try:
                done = device.ensure(kernel, self._parameters)
                if done.made and not done.replaced:
                    log.warning("device was gone", extra=fields(device=device.name, hint="it is made again"))
                elif done.mended and self._ensured.get(device.name) == device:  # and so by somebody else
                    log.warning("device mended", extra=fields(device=device.name, mended=", ".join(done.mended)))
                self._ensured[device.name] = device
                refused |= set_entries(device)
            except (BackendError, NetlinkError) as error:
                troubles[device.version] = str(error)
        return _Written(refused=refused, troubles=troubles)

    def _find_on_link(self, kernel: Netlink, peers: Sequence[Peer]) -> frozenset[IPAddress]:
        if not self.options.direct_routing:
            return frozenset()
        return find_on_link(kernel, peers, self._interface)

    async def _write(self, function: Callable[[Netlink], T]) -> T | None:
        try:
            return await self._writer.write(function)
        except NetlinkError as error:
            raise BackendError(str(error)) from error


async def _identity(underlay: Underlay) -> str:
    try:
        return await default_identity(underlay)
    except NetlinkError as error:
        raise BackendError(str(error)) from error


def _address(subnet: IPNetwork | None) -> IPv4Interface | IPv6Interface | None:
    """The subnet's first address, which peers use as their next hop."""
    if subnet is None:
        return None
    family = IPv4Interface if subnet.version == 4 else IPv6Interface
    return family((int(subnet.network_address), subnet.max_prefixlen))
