"""Traffic over a path: iperf3 and ping, each for a few seconds and never longer."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import attrs

from bench.paths import Way
from overlaynet.errors import OverlaynetError
from overlaynet.testing.namespaces import NetworkNamespace

PING_INTERVAL = 0.01
"""Seconds from one ping to the next."""

SOCKET_BUFFER = 4 << 20
"""Bytes that the sockets of datagrams may hold, where the kernel allows that much.

With the usual 208 KiB, of which a small datagram takes 768 bytes, a receiver that has not had the processor for two
milliseconds loses what arrives: that would measure the receiver, and not the path.
"""

_GRACE = 20.0
"""Seconds that a program may take beyond the time it was asked to send for."""
_RAMP_UP = 0.5
"""Seconds that a TCP stream has run before pings meet it."""
_TIME = re.compile(r"time[=<]([0-9.]+) ms")


class TrafficError(OverlaynetError):
    """Traffic did not get through, or the program that sends it failed."""


@attrs.frozen
class Transfer:
    """What arrived over TCP."""

    size: int
    """Bytes."""
    seconds: float


def tcp(way: Way, streams: int, seconds: int) -> Transfer:
    """So many TCP streams at once, for so many seconds. :raises TrafficError: if iperf3 fails."""
    with _server(way.server):
        end = _client(way, seconds, ["-P", str(streams)])["sum_received"]
    return Transfer(end["bytes"], end["seconds"])


def udp(way: Way, size: int, seconds: int) -> float:
    """Datagrams per second that arrive while one socket sends as many with so many bytes of payload as it can.

    :raises TrafficError: if iperf3 fails.
    """
    with _server(way.server):
        end = _client(way, seconds, ["-u", "-b", "0", "-l", str(size), "-w", str(socket_buffer())])["sum"]
    return float((end["packets"] - end["lost_packets"]) / end["seconds"])


def socket_buffer() -> int:
    """:data:`SOCKET_BUFFER`, or the most that this machine's kernel allows: iperf3 fails where it gets less."""
    limits = (Path(f"/proc/sys/net/core/{name}_max") for name in ("rmem", "wmem"))
    return min(SOCKET_BUFFER, *(int(limit.read_text()) for limit in limits))


def round_trip(way: Way, count: int) -> float:
    """The median time of so many pings, :data:`PING_INTERVAL` apart, in milliseconds.

    :raises TrafficError: if none is answered.
    """
    return statistics.median(_ping(way.client, way.address, count))


def round_trip_under_load(way: Way, seconds: int) -> float:
    """Like :func:`round_trip` for so many seconds, while one TCP stream uses the path."""
    with _server(way.server):
        command = ["iperf3", "-J", "-c", str(way.address), "-t", str(seconds + 1)]
        load = way.client.popen(command, stdout=subprocess.PIPE)
        with contextlib.suppress(subprocess.TimeoutExpired):
            load.wait(_RAMP_UP)
        # At most as long as the load lasts, also where each ping takes longer than the interval.
        times = _ping(way.client, way.address, int(seconds / PING_INTERVAL), deadline=seconds)
        try:
            output, _ = load.communicate(timeout=seconds + _GRACE)
        except subprocess.TimeoutExpired:
            load.kill()
            raise TrafficError("iperf3 did not end in time") from None
    _result(output.decode())
    return statistics.median(times)


def read_pings(output: str) -> list[float]:
    """The round-trip times in what ping printed, in milliseconds. :raises TrafficError: if there are none."""
    times = [float(match[1]) for match in _TIME.finditer(output)]
    if not times:
        raise TrafficError(f"no ping was answered: {output.strip().splitlines()[-1:] or 'ping printed nothing'}")
    return times


def _ping(namespace: NetworkNamespace, address: IPv4Address, count: int, deadline: int | None = None) -> list[float]:
    command = ["ping", "-n", "-i", str(PING_INTERVAL), "-c", str(count), "-W", "2", str(address)]
    command[1:1] = ["-w", str(deadline)] if deadline is not None else []
    return read_pings(namespace.execute(command, check=False, timeout=count * PING_INTERVAL * 10 + _GRACE).stdout)


@contextlib.contextmanager
def _server(namespace: NetworkNamespace) -> Iterator[None]:
    """An iperf3 server for one test."""
    server = namespace.popen(["iperf3", "-s", "-1", "--forceflush"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert server.stdout is not None
    try:
        said = ""
        while "Server listening" not in said:
            line = server.stdout.readline().decode()
            if not line:
                raise TrafficError(f"the iperf3 server did not start: {said.strip() or 'it said nothing'}")
            said += line
        yield
        server.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        raise TrafficError("the iperf3 server did not end in time") from None
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def _client(way: Way, seconds: int, arguments: list[str]) -> dict[str, Any]:
    command = ["iperf3", "-J", "-c", str(way.address), "--connect-timeout", "5000", "-t", str(seconds), *arguments]
    return _result(way.client.execute(command, check=False, timeout=seconds + _GRACE).stdout)


def _result(output: str) -> dict[str, Any]:
    """The part ``end`` of what iperf3 printed in JSON. :raises TrafficError: with iperf3's message, if it failed."""
    try:
        document = json.loads(output)
    except json.JSONDecodeError:
        raise TrafficError(f"iperf3 failed: {output.strip() or 'it printed nothing'}") from None
    # With -J, some versions exit 0 after an error.
    if "error" in document:
        raise TrafficError(f"iperf3 failed: {document['error']}")
    end: dict[str, Any] = document["end"]
    return end
