"""What the demonstration measures between containers: round trips, a TCP transfer, and who reaches whom."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import permutations
from statistics import fmean

import attrs

from overlaynet.errors import OverlaynetError
from overlaynet.testing.lab import Container

_TIME = re.compile(r"time[=<]([0-9.]+) ms")
_PORT = 5001
_BLOCK = 1 << 18
_AT_ONCE = 12


@attrs.frozen
class RoundTrips:
    """Some pings."""

    sent: int
    milliseconds: tuple[float, ...]
    """Of those that were answered."""

    @property
    def average(self) -> float:
        """Mean of the round trip times, in milliseconds."""
        return fmean(self.milliseconds)


@attrs.frozen
class Transfer:
    """A TCP transfer. The digests are SHA-256, in hexadecimal."""

    size: int
    """Bytes sent."""
    seconds: float
    """From the first byte until the receiver has said that it has the last one."""
    sent_digest: str
    received_digest: str

    @property
    def megabits_per_second(self) -> float:
        """Payload only."""
        return self.size * 8 / self.seconds / 1e6


def ping(source: Container, target: Container, count: int, interval: float = 0.1) -> RoundTrips:
    """Send so many pings, so many seconds apart; each is waited for 2 seconds."""
    command = ["ping", "-n", "-c", str(count), "-i", str(interval), "-W", "2", str(target.ip)]
    output = source.namespace.execute(command, check=False, timeout=30 + count * (interval + 2)).stdout
    return RoundTrips(count, tuple(float(match[1]) for match in _TIME.finditer(output)))


def reach(containers: Sequence[Container]) -> Mapping[tuple[str, str], bool]:
    """Send one ping from each container to each other, some at once; whether it was answered, by label."""
    pairs = list(permutations(containers, 2))
    reached = {}
    for start in range(0, len(pairs), _AT_ONCE):
        running = []
        for source, target in pairs[start : start + _AT_ONCE]:
            command = ["ping", "-n", "-q", "-c", "1", "-W", "2", str(target.ip)]
            process = source.namespace.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            running.append((source, target, process))
        for source, target, process in running:
            reached[source.label, target.label] = process.wait(30) == 0
    return reached


def transfer(source: Container, target: Container, seconds: float = 2.0, limit: int = 1 << 30) -> Transfer:
    """Send random bytes over one TCP connection for so many seconds, ``limit`` bytes at most, and compare what arrives.

    :raises OverlaynetError: if the connection fails or stalls.
    """
    with target.namespace.socket() as listener, source.namespace.socket() as sender:
        for end in (listener, sender):
            end.settimeout(10)
        receiver = _Receiver(listener)
        try:
            listener.bind((str(target.ip), _PORT))
            listener.listen(1)
            receiver.start()
            sender.connect((str(target.ip), _PORT))
            # One random block that is changed a little each time: making all of it would take longer than sending it.
            block, sent_digest, size = bytearray(os.urandom(_BLOCK)), hashlib.sha256(), 0
            start = time.monotonic()
            while time.monotonic() < start + seconds and size < limit:
                block[:8] = size.to_bytes(8)
                sender.sendall(block)
                sent_digest.update(block)
                size += len(block)
            sender.shutdown(socket.SHUT_WR)
            # The receiver closes the connection once it has everything.
            if sender.recv(1):
                raise OverlaynetError("the TCP transfer was answered with bytes that nobody sent")
            took = time.monotonic() - start
        except OSError as error:
            reason = "it stalled" if isinstance(error, TimeoutError) else error.strerror
            raise OverlaynetError(f"the TCP transfer from {source.label} to {target.label} failed: {reason}") from error
        receiver.join(10)
    return Transfer(size, took, sent_digest.hexdigest(), receiver.digest.hexdigest())


class _Receiver(threading.Thread):
    """Takes one connection and reads it to its end."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(name="receiver", daemon=True)
        self.digest = hashlib.sha256()
        self._listener = listener

    def run(self) -> None:
        try:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(10)
                while piece := connection.recv(_BLOCK):
                    self.digest.update(piece)
        except OSError:
            pass  # the sender is told by the same network, and by the digests
