"""The life of the tunnel: its device, its sockets, and the engine that carries packets between them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs

from overlaynet.backends.udp.choice import EngineChoice, choose
from overlaynet.backends.udp.engine import NOTHING, Counters, Engine, EnginePeer, HeaderRefused, PeerTable, Queue
from overlaynet.backends.udp.engine_thread import EngineThread
from overlaynet.backends.udp.offload_log import OffloadLog
from overlaynet.backends.udp.wire import Losses, open_sockets
from overlaynet.devices import check_name
from overlaynet.drivers import Backend
from overlaynet.encapsulation import LARGEST_PACKET, fitting_mtu, largest_mtu, peer_address
from overlaynet.errors import BackendError, DeviceGone
from overlaynet.logs import fields
from overlaynet.model import JSON, Device, IPAddress, Lease, LeaseData, Peer, Route, Subnets, Underlay
from overlaynet.netlink import NetlinkError
from overlaynet.netlink_events import ChangeSignal, Group
from overlaynet.network import Network
from overlaynet.options import between, option
from overlaynet.tun_device import TunDevice

log = logging.getLogger(__name__)

OVERHEAD = {4: 28, 6: 48}
"""Bytes that the tunnel adds to each packet, by IP version of the underlay: an IP header without options, a UDP header."""
LOOK_INTERVAL = 5.0
"""Seconds between two looks at the engine's offloads."""


@attrs.frozen
class UdpOptions:
    """The members of ``Backend`` in the network document."""

    port: int = option(8285, "UDP port on which every node sends and receives", check=between(1, 65535))
    name: str = option("overlay0", "Name of the TUN device", check=check_name)
    mtu: int | None = option(
        None,
        "Bytes in the largest packet that containers can send; by default as much as fits into the underlay's MTU",
        name="MTU",
        check=between(576, LARGEST_PACKET - OVERHEAD[4]),
    )


class UdpBackend(Backend):
    """Carries each packet, unchanged, as the payload of one UDP datagram; wire-compatible with flannel's udp backend.

    The device is not persistent: however this process ends, the kernel takes the device and all its routes away. Whoever
    else takes it away while this process runs sees it made again.
    """

    Options: ClassVar[type[UdpOptions]] = UdpOptions
    options: UdpOptions
    # The engine ("native", "python", or "auto" for the native one if it was built), its offloads ("auto" or "off"), and
    # its threads ("auto" for as many as suit the CPUs, or a number).
    node_settings: ClassVar[frozenset[str]] = frozenset(("engine", "offload", "threads"))

    def __init__(
        self, options: UdpOptions, *, engine: str = "auto", offload: str = "auto", threads: str = "auto"
    ) -> None:
        super().__init__(options)
        self._settings = (engine, offload, threads)
        self._choice: EngineChoice | None = None
        self._network: Network | None = None
        self._own: Subnets | None = None
        self._mtu: int | None = None
        self._device: TunDevice | None = None
        self._wires: dict[IPAddress, list[socket.socket]] = {}
        """The sockets: of each address one for each thread, and all share its port."""
        self._old_wires: list[socket.socket] = []
        """Sockets that an engine may still be reading, but no later one is to."""
        self._engine: EngineThread | None = None
        self._earlier: Counters | None = None
        """The counts of all engines before this one."""
        self._losses = Losses()
        self._signal: ChangeSignal | None = None
        self._device_ended = asyncio.Event()
        self._device_lost = False
        """Somebody has taken the device away, and it is not yet back."""
        self._closing = False
        self._ended = asyncio.Event()
        self._failure = "the udp backend is closed"
        self._peers: tuple[Peer, ...] = ()
        self._reachable: tuple[EnginePeer, ...] = ()
        """Those of the peers that have an address of a version that this node has, too."""
        self._unreachable_peers: frozenset[Subnets] = frozenset()

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        """Bind the sockets and create the device, which stays down. Like flannel's udp, nothing is published."""
        choice = choose(*self._settings)
        mtu = fitting_mtu(network, underlay, _overhead(underlay), self.options.mtu)
        addresses = _addresses(underlay)
        with contextlib.ExitStack() as undo:
            wires = open_sockets(addresses, self.options.port, choice.threads)
            undo.callback(_close_all, wires)
            device = await self._make_device(choice, wires)
            undo.callback(device.close)
            try:
                self._signal = ChangeSignal((Group.LINKS, Group.IPV4_ADDRESSES, Group.IPV6_ADDRESSES))
            except NetlinkError as error:
                raise BackendError(str(error)) from error
            undo.pop_all()
        self._choice, self._network, self._device, self._wires = choice, network, device, wires
        self._mtu = mtu
        return LeaseData()

    async def start(self, lease: Lease) -> Device:
        """Configure the device, switch it on, and start the engine without peers."""
        if self._device is None or self._mtu is None or self._engine is not None:
            raise BackendError("the udp backend is started once, after it was opened; this is a defect of its caller")
        self._own = lease.subnets
        engine = await self._mend(self._own, self._mtu)
        log.info(
            "packet engine started",
            extra=fields(
                engine=engine.name, threads=engine.threads, offloads=self._offloads(engine.counters()) or None
            ),
        )
        return Device(self.options.name, self._mtu)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        """Replace the engine's table; then mend the device, if someone has changed it, or make it again if it is gone."""
        if self._own is None or self._mtu is None:
            raise BackendError("the udp backend was not started; this is a defect of its caller")
        self._peers = tuple(peers)
        table = self._make_table(self._own)
        if self._engine is not None:
            self._engine.engine.set_table(table)
        await self._mend(self._own, self._mtu)

    async def set_underlay(self, underlay: Underlay) -> Device:
        """Bind the sockets to the underlay's addresses, and give the device the MTU that fits into it.

        An MTU that the network document fixes stays, even if it no longer fits: the kernel cuts the datagrams up then.
        """
        if self._network is None:
            raise BackendError("the udp backend was not opened; this is a defect of its caller")
        addresses = _addresses(underlay)
        most = largest_mtu(self._network, underlay, _overhead(underlay))
        mtu = most if self.options.mtu is None else self.options.mtu
        new = open_sockets(
            (address for address in addresses if address not in self._wires), self.options.port, _fewest(self._wires)
        )
        # From here on nothing fails, and whatever interrupts it, no socket is forgotten.
        if mtu > most:
            log.warning(
                "the MTU of the network document does not fit any more",
                extra=fields(
                    mtu=mtu, most=most, interface=underlay.interface, hint="datagrams are cut up on their way"
                ),
            )
        same_mtu, self._mtu = mtu == self._mtu, mtu
        self._old_wires += [
            wire for address, wires in self._wires.items() if address not in addresses for wire in wires
        ]
        self._wires = {address: new.get(address) or self._wires[address] for address in addresses}
        if not same_mtu or new or self._old_wires:
            # An engine has its sockets and MTU for life: another takes over; what arrives meanwhile waits in the kernel.
            await self._end_engine()
        if self._own is not None:
            await self._mend(self._own, mtu)
        return Device(self.options.name, mtu)

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        """One route for each of the overlay's networks, whoever the peers are: the engine knows what lies where."""
        if self._device is None or self._network is None:
            return []
        return [Route(overlay, device=self.options.name) for overlay in self._network]

    async def run(self) -> None:
        """Log what becomes of the offloads until the engine has ended by a defect, or :meth:`aclose`."""
        offloads = OffloadLog()
        while not self._ended.is_set():
            self._count_losses()
            if self._engine is not None:
                offloads.look(self._offloads(self._engine.engine.counters()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL):
                    await self._ended.wait()
        raise BackendError(self._failure)

    async def changed(self) -> None:
        """Return when the device is gone, or something about the host's links and addresses has changed."""
        if self._signal is None:
            raise BackendError("the udp backend was not opened; this is a defect of its caller")
        waits = {asyncio.create_task(self._signal.wait()), asyncio.create_task(self._device_ended.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)
        self._device_ended.clear()

    def status(self) -> Mapping[str, JSON]:
        """Engine, threads, device, MTU and port; counters by peer; drops by reason; ICMP errors that were sent.

        Among the drops is ``receive_congested``, what the kernel has dropped at the sockets: it came faster than the engine
        could take it, or damaged. ``threads_refused`` counts the threads that were asked for and that the kernel did not give,
        or gave no queue or socket.
        """
        engine, counters = self._engine, self._counters()
        threads = engine.engine.threads if engine is not None else _fewest(self._wires)
        wanted = self._choice.threads if self._choice is not None else 0
        status: dict[str, JSON] = {
            "engine": engine.engine.name if engine is not None else None,
            "threads": threads if engine is not None else 0,
            "threads_refused": wanted - threads,
            "device": self.options.name,
            "mtu": self._mtu,
            "port": self.options.port,
        }
        if counters is None:
            return status | {"peers": {}, "drops": {}, "unreachables_sent": 0, "offloads": {}}
        peers: dict[str, JSON] = {}
        for peer in self._reachable:
            count = counters.peers.get(peer.subnets, NOTHING)
            peers[str(peer.subnets)] = {"address": str(peer.address), **attrs.asdict(count)}
        drops = {reason.name.lower(): count for reason, count in counters.drops.items()}
        drops["receive_congested"] = self._count_losses()
        return status | {
            "peers": peers,
            "drops": drops,
            "unreachables_sent": counters.unreachables_sent,
            "offloads": self._offloads(counters),
        }

    async def aclose(self) -> None:
        """Stop the engine and close device and sockets; if it is cancelled, they are closed all the same, a moment later."""
        self._closing = True
        if self._engine is not None:
            await self._engine.stop()
        self._close()

    # The parts: a device, and an engine that is at home in it. Either may be missing for a while.

    async def _mend(self, own: Subnets, mtu: int) -> Engine:
        """Make the device again if it is gone, and anything about it right that is not; return the engine, which runs.

        :raises BackendError: if that cannot be done now.
        """
        if self._closing or self._choice is None:
            raise BackendError(self._failure)
        try:
            await self._configure(own, mtu)
        except DeviceGone:
            await self._lose_device()
            device = await self._make_device(self._choice, self._wires)
            if self._closing:
                device.close()
                raise BackendError(self._failure) from None
            self._device = device
            try:
                await self._configure(own, mtu)
            except DeviceGone as error:
                raise BackendError(f"{error}, again") from error
        if self._closing or self._device is None:
            raise BackendError(self._failure)
        if self._engine is None:
            queues = self._make_queues(self._device)
            engine = self._choice.make(queues, mtu, self._make_table(own))
            self._engine = EngineThread(engine, self.options.name, self._engine_ended)
        if self._device_lost:
            self._device_lost = False
            log.info("device made again", extra=fields(device=self.options.name, peers=len(self._peers)))
        return self._engine.engine

    async def _make_device(self, choice: EngineChoice, wires: Mapping[IPAddress, list[socket.socket]]) -> TunDevice:
        queues = _fewest(wires)
        return await TunDevice.make(
            self.options.name,
            backend="udp",
            queues=queues,
            offload_header=choice.offload_header,
            gro=bool(choice.gro),
        )

    async def _configure(self, own: Subnets, mtu: int) -> None:
        if self._device is None or (self._engine is not None and not self._engine.running):
            raise DeviceGone(f"the device {self.options.name} is gone: somebody deleted or renamed it")
        await self._device.configure(mtu, own)

    async def _lose_device(self) -> None:
        """Let go of a device that is no longer what it was; also of one that lives on under another name."""
        if not self._device_lost:
            self._device_lost = True
            log.warning(
                "device lost",
                extra=fields(device=self.options.name, reason="deleted or renamed", hint="it is made again"),
            )
        device, self._device = self._device, None
        if device is not None:
            await self._end_engine()
            device.close()

    async def _end_engine(self) -> None:
        if self._engine is not None:
            await self._engine.stop()
            self._earlier = self._counters()
            self._engine = None
        self._count_losses()
        while self._old_wires:
            self._old_wires.pop().close()

    def _engine_ended(self, engine: EngineThread) -> None:
        if isinstance(engine.failure, DeviceGone):
            log.debug("device gone", extra=fields(device=self.options.name, reason=engine.failure))
            self._device_ended.set()
        elif isinstance(engine.failure, HeaderRefused) and self._choice is not None:
            log.warning(
                "device refuses packets with the header that offloads need",
                extra=fields(
                    device=self.options.name, reason=engine.failure, hint="it is made again without the header"
                ),
            )
            self._choice = attrs.evolve(self._choice, offload_header=False)
            self._device_lost = True
            self._device_ended.set()
        elif engine.failure is not None:
            name, error = engine.engine.name, engine.failure
            log.error("packet engine failed", extra=fields(engine=name), exc_info=error)
            self._failure = f"the {name} packet engine failed: {error!r}; this is a defect, please report it"
            # Without the device, the kernel answers senders at once; with it, packets would wait in it for nobody.
            self._closing = True
        if self._closing:
            self._close()

    def _close(self) -> None:
        """Close all that is open. Idempotent; only where no engine runs."""
        if self._signal is not None:
            self._signal.close()
        if self._device is not None:
            self._device.close()
        self._count_losses()
        _close_all(self._wires)
        for wire in self._old_wires:
            wire.close()
        self._ended.set()

    def _count_losses(self) -> int:
        wires = [*self._old_wires, *(wire for wires in self._wires.values() for wire in wires)]
        return self._losses.look(wire for wire in wires if wire.fileno() != -1)

    def _counters(self) -> Counters | None:
        if self._engine is None:
            return self._earlier
        counters = self._engine.engine.counters()
        return counters if self._earlier is None else counters.after(self._earlier)

    def _offloads(self, counters: Counters) -> dict[str, str]:
        """How each offload does: the engine's, and the device's own, if the engine leaves it to that to join packets."""
        offloads = {}
        if self._device is not None and self._choice is not None and self._choice.gro is not None:
            offloads["tun_gro"] = str(self._device.gro)
        return {**offloads, **counters.offloads}

    def _make_queues(self, device: TunDevice) -> list[Queue]:
        """Pairs of a queue of the device and sockets; what has no partner is given up, or packets would wait in it for ever."""
        count = min(len(device.descriptors), _fewest(self._wires))
        device.keep_queues(count)
        for wires in self._wires.values():
            while len(wires) > count:
                wires.pop().close()
        columns = zip(*self._wires.values(), strict=True)
        return [
            (descriptor, [wire.fileno() for wire in column])
            for descriptor, column in zip(device.descriptors, columns, strict=True)
        ]

    def _make_table(self, own: Subnets) -> PeerTable:
        """What the engine is to know of the peers; those that cannot be reached are reported once."""
        versions = {address.version for address in self._wires}
        reachable = []
        unreachable = set()
        for peer in self._peers:
            address = peer_address(peer, versions)
            if address is None:
                unreachable.add(peer.subnets)
            else:
                reachable.append(EnginePeer(peer.subnets, address, self.options.port))
        has = " or ".join(f"IPv{version}" for version in sorted(versions))
        for subnets in sorted(unreachable - self._unreachable_peers, key=str):
            log.warning("peer not reachable", extra=fields(subnet=subnets, reason=f"it has no {has} address"))
        self._unreachable_peers = frozenset(unreachable)
        self._reachable = tuple(reachable)
        return PeerTable(own, self._reachable)


def _fewest(wires: Mapping[IPAddress, Sequence[socket.socket]]) -> int:
    return min(map(len, wires.values()), default=0)


def _close_all(wires: Mapping[IPAddress, Sequence[socket.socket]]) -> None:
    for each in wires.values():
        for wire in each:
            wire.close()


def _overhead(underlay: Underlay) -> int:
    """Of the outer headers that may be needed, the longer ones."""
    return OVERHEAD[6 if underlay.ipv6 is not None else 4]


def _addresses(underlay: Underlay) -> list[IPAddress]:
    """The addresses of this host that sockets are bound to: one of each IP version that the underlay has."""
    addresses = [address for address in (underlay.ipv4, underlay.ipv6) if address is not None]
    if not addresses:
        raise BackendError(
            f"the interface {underlay.interface} has no address, which the udp backend needs; "
            f"give it one, or choose another with --iface"
        )
    return [*addresses]
