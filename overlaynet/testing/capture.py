"""Captures on several interfaces at once, in any namespaces: what really went over each of them, and when."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self

import attrs

from overlaynet.errors import OverlaynetError
from overlaynet.testing.namespaces import NetworkNamespace
from overlaynet.testing.packets import Ethernet, IPPacket, parse_frame

_ALL_PROTOCOLS = 3
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_SO_TIMESTAMPNS = 35
_OUTGOING = 4
_LARGEST = 65536 + 14  # a whole IP packet (with offloads, they do get that long) and an Ethernet header
_TIMESTAMP = struct.Struct("@ll")


@attrs.frozen
class Packet:
    """One packet as it passed a tap."""

    tap: str
    """Label of the tap."""
    time: float
    """When, in seconds since the epoch, by the kernel's clock."""
    outgoing: bool
    """True if the namespace of the tap sent it, false if it received it."""
    link: Ethernet | None
    """``None`` on interfaces without link headers (TUN devices), and if the frame cannot be read."""
    ip: IPPacket | None
    """``None`` if the frame carries something else, or cannot be read."""
    data: bytes = attrs.field(repr=False)
    """The whole frame, link header included."""
    problem: str | None = None
    """Why it cannot be read."""


class Capture:
    """Captures from construction until :meth:`close`, which leaving the ``with`` block does.

    Packets are read by one thread; memory is bounded, and what did not fit is counted in :attr:`missed`.

    :param taps: for each label, the namespace and the name of an interface in it, which must exist.
    :param keep: which packets to keep; all by default. Called in the capture's thread; if it raises, the capture
        ends, and :meth:`wait_for` and :attr:`packets` say so.
    :param limit: bytes of packets to keep at most.
    :raises OverlaynetError: if an interface does not exist.
    """

    def __init__(
        self,
        taps: Mapping[str, tuple[NetworkNamespace, str]],
        keep: Callable[[Packet], bool] | None = None,
        *,
        limit: int = 16 << 20,
    ) -> None:
        self._keep = keep
        self._limit = limit
        self._packets: list[Packet] = []
        self._size = 0
        self._missed = 0
        self._error: Exception | None = None
        self._changed = threading.Condition()
        with contextlib.ExitStack() as resources:
            self._selector = resources.enter_context(selectors.DefaultSelector())
            self._sockets = {}
            for label, (namespace, interface) in taps.items():
                # No protocol before it is bound to its interface: otherwise it would see all interfaces until then.
                tap = resources.enter_context(namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
                _bind(tap, interface, namespace)
                self._selector.register(tap, selectors.EVENT_READ, label)
                self._sockets[label] = tap
            self._wake, wake = os.pipe()
            resources.callback(os.close, self._wake)
            self._stop = resources.enter_context(os.fdopen(wake, "wb", buffering=0))
            self._selector.register(self._wake, selectors.EVENT_READ, None)
            self._thread = threading.Thread(target=self._read, name="capture", daemon=True)
            self._thread.start()
            self._resources = resources.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def packets(self) -> list[Packet]:
        """What was captured up to now, in the order of time."""
        with self._changed:
            self._raise_error()
            return sorted(self._packets, key=lambda packet: packet.time)

    @property
    def missed(self) -> int:
        """How many packets are missing: for lack of room here, or because the kernel could not hand them over in time."""
        with self._changed:
            return self._missed

    def wait_for(self, predicate: Callable[[Packet], bool], seconds: float = 10, what: str = "packet") -> Packet:
        """The first packet that fulfils the predicate, which may have been captured already or be still to come.

        :raises TimeoutError: if there was none within so many seconds; ``what`` names it in the message.
        """
        deadline = time.monotonic() + seconds
        seen = 0
        with self._changed:
            while True:
                self._raise_error()
                for packet in self._packets[seen:]:
                    if predicate(packet):
                        return packet
                seen = len(self._packets)
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise TimeoutError(f"no {what} was captured on {', '.join(self._sockets)} within {seconds:g} s")

    def close(self) -> None:
        """End the capture, with all that had arrived until now. What was captured can still be asked for. Idempotent."""
        if self._thread.is_alive():
            with contextlib.suppress(OSError, ValueError):
                self._stop.write(b"x")
            self._thread.join()
        self._resources.close()

    def _read(self) -> None:
        try:
            stopping = False
            while not stopping:
                for key, _ in self._selector.select():
                    stopping = stopping or key.data is None
                for label, tap in self._sockets.items():
                    # Never more than a burst, so that other taps have their turn; at the end, what a socket can hold.
                    for packet in itertools.islice(_drain(tap, label), 65536 if stopping else 256):
                        self._add(packet)
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            with self._changed:
                for tap in self._sockets.values():
                    counters = tap.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
                    self._missed += struct.unpack("@II", counters)[1]

    def _add(self, packet: Packet) -> None:
        if self._keep is not None and not self._keep(packet):
            return
        with self._changed:
            if self._size + len(packet.data) > self._limit:
                self._missed += 1
                return
            self._size += len(packet.data)
            self._packets.append(packet)
            self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise OverlaynetError(f"the capture ended: {self._error}") from self._error


def _bind(tap: socket.socket, interface: str, namespace: NetworkNamespace) -> None:
    tap.setblocking(False)
    tap.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    try:
        tap.bind((interface, _ALL_PROTOCOLS))
    except OSError as error:
        raise OverlaynetError(
            f"the interface {interface} in {namespace.name} cannot be captured: {error.strerror}"
        ) from error


def _drain(tap: socket.socket, label: str) -> Iterator[Packet]:
    """What waits in a socket."""
    while True:
        try:
            data, ancillary, _, address = tap.recvmsg(_LARGEST, 128)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENETDOWN:
                raise
            return  # the interface went down or away; it may come up again
        seconds = time.time()
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                whole, nanoseconds = _TIMESTAMP.unpack(content)
                seconds = whole + nanoseconds / 1e9
        link, ip, problem = None, None, None
        try:
            link, ip = parse_frame(data, address[3])
        except ValueError as error:
            problem = str(error)
        yield Packet(label, seconds, address[2] == _OUTGOING, link, ip, data, problem)
