"""Links between real backends: sockets on loopback addresses, and devices whose packets the test has in its hands.

What runs is the backend's own code, with the event loop's real clock. A packet is put into the pretended device of one node
and watched for at the devices of all. Faults are real, too: the kernel drops what the two sides of a partition send each other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, TypeAlias
from unittest import mock

import attrs

from overlaynet import reconcile
from overlaynet.delivery import Dropped
from overlaynet.model import IPAddress, Route, Underlay
from overlaynet.testing import sockets
from overlaynet.testing.clock import VirtualClockLoop
from overlaynet.testing.flow import Kind, Packet
from overlaynet.testing.links import Life, Links, chosen_route, delivered, step
from overlaynet.testing.pretended import PretendedHosts, PretendedTun, datagram

if TYPE_CHECKING:
    from overlaynet.testing.network import Node

_FIRST_ADDRESS = IPv4Address("127.0.0.1")
_MTU = 1500
_LOOK_INTERVAL = 0.002
"""Seconds between two looks at the devices while a packet is on its way."""
_AFTER_A_DROP = 0.2
"""Seconds that a packet is still waited for when a backend has counted one as dropped: it may have been another."""


_Counts: TypeAlias = dict[tuple[str, str], int]
"""By node and reason."""


@attrs.define
class _Seen:
    """What has come out of a device."""

    node: Node
    data: bytes


class RealLinks(Links):
    """See the module.

    :param patience: seconds after which a packet that has come out of no device is lost.
    """

    patience = 30.0

    def __init__(self, nodes: Callable[[], Iterable[Node]], patience: float) -> None:
        super().__init__(nodes)
        self._hosts = PretendedHosts()
        self._patience = patience

    def begin(self, stack: ExitStack) -> None:
        if isinstance(asyncio.get_running_loop(), VirtualClockLoop):
            raise RuntimeError(
                "a real backend's sockets and threads take real time, which a virtual clock jumps over; "
                "leave VIRTUAL_CLOCK out, or leave out backend="
            )
        stack.enter_context(self._hosts)
        # The daemon refuses peers at loopback addresses, and rightly so; here, they are the network of the hosts.
        stack.enter_context(mock.patch.object(reconcile, "_reachable", return_value=True))

    def underlay(self, number: int) -> Underlay:
        address = _FIRST_ADDRESS + number
        return Underlay("lo", _MTU, ipv4=address, public_ipv4=address)

    def start_on(self, node: Node, start: Callable[[], asyncio.Task[None]]) -> asyncio.Task[None]:
        with self._hosts.on(node.name):
            return start()

    def crash(self, node: Node) -> None:
        sockets.take_away(_address(node))
        for device in list(self._hosts.devices(node.name).values()):
            device.delete()

    def changed(self) -> None:
        """Tell the kernel who is not to hear from whom; also sockets that have come since."""
        for receiver in self.nodes():
            silent = [_address(sender) for sender in self.nodes() if self.cut(sender, receiver) is not None]
            sockets.block(_address(receiver), silent)

    async def life(self, packet: Packet, sender: Node) -> Life:
        inner = f"{packet.source} > {packet.destination}"
        try:
            route = chosen_route(sender, packet.destination)
            receiver = self.node_at(route.gateway) or self._owner(packet.destination)
            delay = 0.0 if receiver is None else self.link(sender, receiver).delay
            yield step(packet, Kind.ROUTED, sender, f"{inner} by {route.destination} dev {route.device}", delay=delay)
            forwarded = route.device == sender.underlay.interface
            cut = None if receiver is None else self.cut(sender, receiver)
            # Where nothing at all gets through, a backend that carries packets itself is left to find that out.
            if receiver is not None and (forwarded or not cut) and (why := self.loss(sender, receiver)) is not None:
                yield step(packet, Kind.DROPPED, sender, why, to=receiver)
                return
            at = self._forward(packet, receiver, route) if forwarded else await self._carry(packet, sender, route)
            if at is not None:
                yield delivered(packet, at)
            else:
                why = cut or f"lost: it has come out of no device within {self._patience:g} seconds"
                yield step(packet, Kind.DROPPED, sender, why, to=receiver if cut else None)
        except _DroppedAt as dropped:
            if cut and dropped.node is receiver:
                # A partition is a filter of the receiver's socket: a backend may count what that has kept from it.
                yield step(packet, Kind.DROPPED, sender, cut, to=receiver)
            else:
                yield step(packet, Kind.DROPPED, dropped.node, dropped)
        except Dropped as dropped:
            yield step(packet, Kind.DROPPED, sender, dropped)

    def _forward(self, packet: Packet, receiver: Node | None, route: Route) -> Node:
        """Where the kernel brings what goes, unchanged, to another host. :raises Dropped: if it does not arrive."""
        if receiver is None:
            raise Dropped("no_host", f"no host has the address {route.gateway}")
        if packet.size > _MTU:
            raise Dropped("too_big", f"{packet.size} bytes do not fit into the MTU of {_MTU}")
        if not _has(receiver, packet.destination):
            raise _DroppedAt(receiver, "misrouted", f"{receiver.name} does not have {packet.destination}")
        return receiver

    async def _carry(self, packet: Packet, sender: Node, route: Route) -> Node | None:
        """Put it into the device; where it comes out, or ``None``. :raises Dropped: if it is known why it does not."""
        device = self._hosts.devices(sender.name).get(str(route.device))
        if device is None or device.mtu == 0:
            raise Dropped("no_device", f"{sender.name} has no device {route.device} that is up")
        if packet.size > device.mtu:
            raise Dropped("too_big", f"{packet.size} bytes do not fit into the MTU of {device.mtu}")
        self.changed()
        for seen in self._look():
            sender.network.note(seen.node.name, f"late, out of the device: {_shown(seen.data)}")
        data = datagram(packet.source, packet.destination, packet.payload, source_port=1024 + packet.number % 60000)
        before = self._drops()
        device.kernel.send(data)
        return await self._outcome(packet, data, sender, before)

    async def _outcome(self, packet: Packet, data: bytes, sender: Node, before: _Counts) -> Node | None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._patience
        reason: _DroppedAt | None = None
        while loop.time() < until:
            for seen in self._look():
                if seen.data == data:
                    if _has(seen.node, packet.destination):
                        return seen.node
                    raise _DroppedAt(seen.node, "misrouted", f"{seen.node.name} does not have {packet.destination}")
                if seen.node is sender and data[:28] in seen.data:
                    raise Dropped("answered", f"{sender.name}'s backend answers with an ICMP error")
                sender.network.note(seen.node.name, f"unexpected, out of the device: {_shown(seen.data)}")
            if reason is None and (reason := self._counted(before)) is not None:
                until = min(until, loop.time() + _AFTER_A_DROP)
            await asyncio.sleep(_LOOK_INTERVAL)
        if reason is not None:
            raise reason
        return None

    def _look(self) -> Iterable[_Seen]:
        """All that has come out of devices and was not looked at."""
        for node in self.nodes():
            for device in self._hosts.devices(node.name).values():
                for data in _waiting(device):
                    yield _Seen(node, data)

    def _drops(self) -> _Counts:
        """What each backend says that it has dropped, by node and reason, if it says so in its status as ``drops``."""
        found = {}
        for node in self.nodes():
            drops = node.backend.status().get("drops") if node.running else None
            if isinstance(drops, dict):
                found.update({(node.name, reason): count for reason, count in drops.items()})
        return found

    def _counted(self, before: _Counts) -> _DroppedAt | None:
        """A drop that was counted since."""
        for (name, reason), count in self._drops().items():
            if count > before.get((name, reason), 0):
                node = next(node for node in self.nodes() if node.name == name)
                return _DroppedAt(node, reason, f"counted by the backend of {name}")
        return None

    def _owner(self, address: IPAddress) -> Node | None:
        """The node in whose subnet an address lies."""
        return next((node for node in self.nodes() if _has(node, address)), None)


class _DroppedAt(Dropped):
    def __init__(self, node: Node, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.node = node


def _has(node: Node, address: IPAddress) -> bool:
    """Whether it is the address of a container of the node."""
    try:
        return any(address in subnet for subnet in node.lease.subnets)
    except LookupError:
        return False


def _waiting(device: PretendedTun) -> Iterable[bytes]:
    with contextlib.suppress(BlockingIOError):
        while data := device.kernel.recv(1 << 16):
            yield data


def _shown(data: bytes) -> str:
    return f"{len(data)} bytes, {data[:28].hex(' ')}"


def _address(node: Node) -> IPv4Address:
    address = node.underlay.ipv4
    assert address is not None, f"{node.name} has no IPv4 address"
    return address
