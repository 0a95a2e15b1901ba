"""Traffic between two containers of a lab, as much as goes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from overlaynet.testing.lab import Container, wait_until

_SINK = """
import select, socket
stream, datagrams = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
for each in (stream, datagrams):
    each.bind(("", 9))
stream.listen()
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
client = socket.socket(type=socket.SOCK_DGRAM)
while True:
    with contextlib.suppress(OSError):
        client.sendto(bytes(1000), (sys.argv[1], 9))
"""


@contextmanager
def full_load(a: Container, b: Container) -> Iterator[None]:
    """A TCP stream and UDP datagrams each way, each as fast as it goes, while the context is open."""
    with ExitStack() as stack:

        def start(container: Container, program: str, *arguments: str) -> None:
            command = [sys.executable, "-S", "-c", program, *arguments]
            process = container.namespace.popen(command, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)

        for container in (a, b):
            start(container, _SINK)
        for container, other in ((a, b), (b, a)):
            listening = ["ss", "-Hltn", "sport = :9"]
            wait_until(lambda: other.namespace.execute(listening).stdout, 20, "the sink")  # noqa: B023 - called at once
            start(container, _STREAM, str(other.ip))
            start(container, _DATAGRAMS, str(other.ip))
        yield
