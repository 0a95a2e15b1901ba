"""Traffic between two containers of a lab, as much as goes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from overlaynet.testing.lab import Container, wait_until

_SINK = """
import select, socket
stream = socket.create_server(("", 9), family=socket.AF_INET6, dualstack_ipv6=True)
datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
datagrams.bind(("", 9))
sockets = [stream, datagrams]
while True:
    for each in select.select(sockets, [], [])[0]:
        if each is stream:
            sockets.append(stream.accept()[0])
        elif not each.recv(1 << 16) and each is not datagrams:
            sockets.remove(each)
"""
_STREAM = """
import socket, sys
client = socket.create_connection((sys.argv[1], 9))
while True:
    client.sendall(bytes(1 << 16))
"""
_DATAGRAMS = """
import contextlib, socket, sys
client = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
while True:
    with contextlib.suppress(OSError):
        client.sendto(bytes(1000), (sys.argv[1], 9))
"""


@contextmanager
def full_load(a: Container, b: Container) -> Iterator[None]:
    """A TCP stream and UDP datagrams each way, each as fast as it goes, while the context is open.

    Between containers that have both IP versions, each way has the stream over the one and the datagrams over the other.
    """
    with ExitStack() as stack:

        def start(container: Container, program: str, *arguments: str) -> None:
            command = [sys.executable, "-S", "-c", program, *arguments]
            process = container.namespace.popen(command, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)

        for container in (a, b):
            start(container, _SINK)
        for number, (container, other) in enumerate(((a, b), (b, a))):
            addresses = [str(each.ip) for each in (other.address, other.address6) if each is not None]
            listening = ["ss", "-Hltn", "sport = :9"]
            wait_until(lambda: other.namespace.execute(listening).stdout, 20, "the sink")  # noqa: B023 - called at once
            start(container, _STREAM, addresses[number % len(addresses)])
            start(container, _DATAGRAMS, addresses[(number + 1) % len(addresses)])
        yield
