"""The life of the tunnel: its device, its sockets, and the engine that carries packets between them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_interface
from pathlib import Path
from typing import ClassVar, TypeVar

import attrs

from overlaynet._threads import call_in_thread
from overlaynet.backends.udp.encapsulation import LARGEST_PAYLOAD, fitting_mtu, peer_address
from overlaynet.backends.udp.engine import DeviceGone, Engine, EnginePeer, PeerTable
from overlaynet.backends.udp.python_engine import PythonEngine
from overlaynet.backends.udp.tun import DeviceNameTaken, check_name, open_tun
from overlaynet.backends.udp.wire import open_socket
from overlaynet.drivers import Backend
from overlaynet.errors import BackendError
from overlaynet.logs import fields
from overlaynet.model import JSON, Device, Lease, LeaseData, Peer, Route, Subnets, Underlay
from overlaynet.netlink import Netlink, NetlinkError, netlink
from overlaynet.network import Network
from overlaynet.options import between, option

T = TypeVar("T")
log = logging.getLogger(__name__)

ALIAS = "overlaynet udp"
"""What the device's alias says, so that anyone can tell whose it is."""

_QUEUE_LENGTH = 1000
"""Packets that wait in the device while the engine is busy."""


@attrs.frozen
class UdpOptions:
    """The members of ``Backend`` in the network document."""

    port: int = option(8285, "UDP port on which every node sends and receives", check=between(1, 65535))
    name: str = option("overlay0", "Name of the TUN device", check=check_name)
    mtu: int | None = option(
        None,
        "Bytes in the largest packet that containers can send; by default as much as fits into the underlay's MTU",
        name="MTU",
        check=between(576, LARGEST_PAYLOAD),
    )


@attrs.frozen
class _Opened:
    """What :meth:`UdpBackend.open` has taken. The engine's thread closes the descriptors once there is one."""

    network: Network
    mtu: int
    tun: int
    index: int
    """The device's interface index: a later device of the same name has another."""
    wires: Mapping[int, socket.socket]
    """A socket for each IP version of the underlay."""

    def close(self) -> None:
        for wire in self.wires.values():
            wire.close()
        os.close(self.tun)


class UdpBackend(Backend):
    """Carries each packet, unchanged, as the payload of one UDP datagram; wire-compatible with flannel's udp backend.

    The device is not persistent: however this process ends, the kernel takes the device and all its routes away.
    """

    Options: ClassVar[type[UdpOptions]] = UdpOptions
    options: UdpOptions
    # The engine ("native", "python", or "auto" for the native one if it was built), and its offloads ("auto" or "off").
    node_settings: ClassVar[frozenset[str]] = frozenset(("engine", "offload"))

    def __init__(self, options: UdpOptions, *, engine: str = "auto", offload: str = "auto") -> None:
        super().__init__(options)
        self._engine_name = engine
        self._offload = offload != "off"
        self._engine_class: Callable[[int, list[int], int, PeerTable], Engine] = PythonEngine
        self._opened: _Opened | None = None
        self._own: Subnets | None = None
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()
        self._failure = "the udp backend is closed"
        self._peers: tuple[EnginePeer, ...] = ()
        self._unreachable_peers: frozenset[Subnets] = frozenset()
        self._unwritable: set[Path] = set()

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        """Bind the sockets and create the device, which stays down. Like flannel's udp, nothing is published."""
        native = self._choose_engine()
        mtu = fitting_mtu(self.options.mtu, network, underlay)
        addresses = [address for address in (underlay.ipv4, underlay.ipv6) if address is not None]
        if not addresses:
            raise BackendError(
                f"the interface {underlay.interface} has no address, which the udp backend needs; "
                f"give it one, or choose another with --iface"
            )
        with contextlib.ExitStack() as undo:
            wires: dict[int, socket.socket] = {}
            for address in addresses:
                wires[address.version] = open_socket(address, self.options.port)
                undo.callback(wires[address.version].close)
            try:
                tun = open_tun(self.options.name, offload_header=native and self._offload)
            except DeviceNameTaken as error:
                raise BackendError(await self._who_has_the_name()) from error
            undo.callback(os.close, tun)
            self._opened = _Opened(network, mtu, tun, await _ask(self._mark), wires)
            undo.pop_all()
        return LeaseData()

    async def start(self, lease: Lease) -> Device:
        """Configure the device, switch it on, and start the engine without peers."""
        opened = self._opened
        if opened is None or self._thread is not None:
            raise BackendError("the udp backend is started once, after it was opened; this is a defect of its caller")
        self._own = lease.subnets
        await _ask(self._configure)
        table = PeerTable(lease.subnets)
        sockets = [wire.fileno() for wire in opened.wires.values()]
        self._engine = self._engine_class(opened.tun, sockets, opened.mtu, table)
        self._thread = threading.Thread(
            target=self._carry,
            args=(self._engine, opened, asyncio.get_running_loop()),
            name=f"{self._engine.name} engine of {self.options.name}",
            daemon=True,
        )
        self._thread.start()
        log.info(
            "packet engine started",
            extra=fields(engine=self._engine.name, offloads=dict(self._engine.counters().offloads) or None),
        )
        return Device(self.options.name, opened.mtu)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        """Replace the engine's table; then repair the device, if someone has changed its MTU or address, or set it down."""
        opened = self._opened
        if self._engine is None or self._own is None or opened is None:
            raise BackendError("the udp backend was not started; this is a defect of its caller")
        reachable = []
        unreachable = set()
        for peer in peers:
            address = peer_address(peer, opened.wires)
            if address is None:
                unreachable.add(peer.subnets)
            else:
                reachable.append(EnginePeer(peer.subnets, address, self.options.port))
        has = " or ".join(f"IPv{version}" for version in opened.wires)
        for subnets in sorted(unreachable - self._unreachable_peers, key=str):
            log.warning("peer not reachable", extra=fields(subnet=subnets, reason=f"it has no {has} address"))
        self._unreachable_peers = frozenset(unreachable)
        self._peers = tuple(reachable)
        self._engine.set_table(PeerTable(self._own, self._peers))
        await _ask(self._configure)

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        """One route for each of the overlay's networks, whoever the peers are: the engine knows what lies where."""
        if self._opened is None:
            return []
        return [Route(overlay, device=self.options.name) for overlay in self._opened.network]

    async def run(self) -> None:
        """Wait until the engine ends, which only a deleted device, a defect, or :meth:`aclose` makes it do."""
        await self._ended.wait()
        raise BackendError(self._failure)

    def status(self) -> Mapping[str, JSON]:
        """Engine, device, MTU and port; counters by peer; drops by reason; ICMP errors that were sent."""
        opened, engine = self._opened, self._engine
        status: dict[str, JSON] = {
            "engine": engine.name if engine is not None else None,
            "device": self.options.name,
            "mtu": opened.mtu if opened is not None else None,
            "port": self.options.port,
        }
        if engine is None:
            return status | {"peers": {}, "drops": {}, "unreachables_sent": 0, "offloads": {}}
        counters = engine.counters()
        peers: dict[str, JSON] = {}
        for peer in self._peers:
            peers[str(peer.subnets)] = {"address": str(peer.address), **attrs.asdict(counters.peers[peer.subnets])}
        drops = {reason.name.lower(): count for reason, count in counters.drops.items()}
        return status | {
            "peers": peers,
            "drops": drops,
            "unreachables_sent": counters.unreachables_sent,
            "offloads": dict(counters.offloads),
        }

    async def aclose(self) -> None:
        """Stop the engine and close device and sockets; if it is cancelled, they are closed all the same, a moment later."""
        if self._engine is not None and self._thread is not None:
            self._engine.stop()
            await call_in_thread(self._thread.join)
        elif self._opened is not None:
            self._opened.close()
            self._opened = None
            self._ended.set()

    def _carry(self, engine: Engine, opened: _Opened, loop: asyncio.AbstractEventLoop) -> None:
        """What the engine's thread does: carry packets, and free everything in the end, whatever the end is."""
        failure = None
        try:
            engine.run()
        except DeviceGone as error:
            log.debug("device gone", extra=fields(device=self.options.name, reason=error))
            failure = self._gone()
        except Exception as error:
            log.exception("packet engine failed", extra=fields(engine=engine.name))
            failure = f"the {engine.name} packet engine failed: {error!r}; this is a defect, please report it"
        engine.close()
        # Without the device, the kernel answers senders at once; with it, packets would wait in it for nobody.
        opened.close()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._end, failure)

    def _end(self, failure: str | None) -> None:
        if failure is not None:
            self._failure = failure
        self._ended.set()

    def _choose_engine(self) -> bool:
        """Choose the class of the engine; True if it is the native one."""
        self._engine_class = functools.partial(PythonEngine, offload=self._offload)
        if self._engine_name == "python":
            return False
        try:
            from overlaynet.backends.udp.native_engine import NativeEngine  # noqa: PLC0415 - it may be missing
        except ImportError as error:
            if self._engine_name == "native":
                raise BackendError(
                    f"the native packet engine is not there ({error}); install overlaynet where there is a C compiler, "
                    f"or choose --udp-engine python"
                ) from error
            log.info("native packet engine not built", extra=fields(reason=error))
            return False
        self._engine_class = functools.partial(NativeEngine, offload=self._offload)
        return True

    # In a thread, with netlink.

    async def _who_has_the_name(self) -> str:
        name = self.options.name
        link = await _ask(lambda kernel: kernel.link(name))
        if link is not None and link.alias == ALIAS:
            return (
                f"the device {name} belongs to another overlaynet that is running; stop it, "
                f"or choose another Name in the network document's Backend"
            )
        kind = f" ({link.kind})" if link is not None and link.kind else ""
        return (
            f"the device name {name} is taken by another interface{kind}; delete that with `ip link delete {name}`, "
            f"or choose another Name in the network document's Backend"
        )

    def _mark(self, kernel: Netlink) -> int:
        """Make the device recognisable as ours; return its index."""
        kernel.configure_link(self.options.name, alias=ALIAS)
        link = kernel.link(self.options.name)
        if link is None:
            raise BackendError(self._gone())
        return link.index

    def _configure(self, kernel: Netlink) -> None:
        """Make the device what it should be. Idempotent: what is right already is not touched."""
        opened, name = self._opened, self.options.name
        link = kernel.link(name)
        if opened is None or self._own is None or link is None or link.index != opened.index:
            raise BackendError(self._gone())
        if link.mtu != opened.mtu:
            kernel.configure_link(name, mtu=opened.mtu)
        for directory, parameter, wanted in self._parameters(self._own):
            self._set_parameter(Path("/proc/sys/net", directory, "conf", name, parameter), wanted)
        if not link.up:
            kernel.configure_link(name, transmit_queue_length=_QUEUE_LENGTH, up=True)
        addresses = [(subnet.network_address, subnet.max_prefixlen) for subnet in self._own]
        kernel.set_addresses(name, [ip_interface(address) for address in addresses])

    def _parameters(self, own: Subnets) -> Iterator[tuple[str, str, str]]:
        """The device's kernel parameters, by directory and name, and what they are to be."""
        if own.ipv4 is not None:
            # The source of our ICMP errors is the device's own address, which the kernel takes for forged without this.
            yield "ipv4", "accept_local", "1"
        # A kernel, or an MTU, without IPv6 has no such parameter.
        if Path("/proc/sys/net/ipv6/conf", self.options.name).exists():
            # No link-local address, and so no router solicitations into the tunnel.
            yield "ipv6", "addr_gen_mode", "1"
        if own.ipv6 is not None:
            yield "ipv6", "disable_ipv6", "0"  # container runtimes switch IPv6 off for all new devices

    def _set_parameter(self, path: Path, value: str) -> None:
        try:
            if path.read_text().strip() != value:
                path.write_text(value)
        except OSError as error:
            if path not in self._unwritable:
                self._unwritable.add(path)
                log.warning(
                    "kernel parameter not set", extra=fields(parameter=path, wanted=value, reason=error.strerror)
                )

    def _gone(self) -> str:
        return f"the device {self.options.name} is gone: someone deleted or renamed it; start overlaynet again"


async def _ask(function: Callable[[Netlink], T]) -> T:
    """Call ``function`` in a thread, with netlink. :raises BackendError: if the kernel refuses."""
    try:
        return await netlink(function)
    except NetlinkError as error:
        raise BackendError(str(error)) from error
