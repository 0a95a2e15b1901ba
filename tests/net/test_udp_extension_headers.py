"""TCP whose packets have more between addresses and transport than usual: the kernel hands out runs of these, too."""

import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import attrs
import pytest

from overlaynet.testing.lab import NETWORK, NETWORK6, Host, Lab

PATIENCE = 20.0
STREAM = bytes(range(250)) * 400
IPV6_HOPOPTS, IPV6_DSTOPTS = 54, 59  # of Linux (in6.h)
PADDED = bytes([0, 0, 1, 4, 0, 0, 0, 0])
"""An extension header of options, with nothing but padding."""


@pytest.fixture(scope="module", params=["python", "native"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab("extensions", overlay=NETWORK, overlay6=NETWORK6) as lab:
        for host in lab.hosts:
            host.start_overlaynet(lab.file_store, ["--udp-engine", request.param])
            host.connect_containers()
        lab.wait_until_acquainted()
        yield lab


@attrs.frozen
class Between:
    """What a socket puts between addresses and transport."""

    name: str
    family: socket.AddressFamily
    level: int
    option: int
    value: bytes


CASES = [
    Between("destination options", socket.AF_INET6, socket.IPPROTO_IPV6, IPV6_DSTOPTS, PADDED),
    Between("hop-by-hop options", socket.AF_INET6, socket.IPPROTO_IPV6, IPV6_HOPOPTS, PADDED),
    Between(
        "long destination options",
        socket.AF_INET6,
        socket.IPPROTO_IPV6,
        IPV6_DSTOPTS,
        bytes([0, 31, 0x1E, 252]) + bytes(252),
    ),
    Between("IPv4 options", socket.AF_INET, socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([7, 39, 4]) + bytes(37)),
]


def transfer(sender: Host, receiver: Host, address: str, between: Between) -> None:
    """Send a stream from host to host, and compare what arrives."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(receiver.namespace.socket(between.family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, 5000))
        listener.listen()
        listener.settimeout(PATIENCE)
        client = stack.enter_context(sender.namespace.socket(between.family))
        client.setsockopt(between.level, between.option, between.value)
        client.settimeout(PATIENCE)
        client.connect((address, 5000))
        connection = stack.enter_context(listener.accept()[0])
        connection.settimeout(PATIENCE)
        digest = hashlib.sha256()

        def receive() -> None:
            while piece := connection.recv(1 << 16):
                digest.update(piece)

        thread = threading.Thread(target=receive)
        thread.start()
        client.sendall(STREAM)
        client.shutdown(socket.SHUT_WR)
        thread.join(PATIENCE)
        assert digest.hexdigest() == hashlib.sha256(STREAM).hexdigest()


def device_address(host: Host, family: socket.AddressFamily) -> str:
    (link,) = host.namespace.ip_json("address", "show", "dev", "overlay0")
    name = "inet" if family == socket.AF_INET else "inet6"
    (found,) = [address["local"] for address in link["addr_info"] if address["family"] == name]
    return str(found)


def drops(host: Host) -> dict[str, int]:
    status: Any = host.status()["packets"]
    found: dict[str, int] = status["drops"]
    return found


@pytest.mark.parametrize("between", CASES, ids=lambda between: between.name)
def test_a_stream_with_more_headers_arrives_whole(lab: Lab, between: Between) -> None:
    # Hosts, not containers: what it forwards, the kernel itself takes for larger than it is where it has such headers.
    sender, receiver = lab.hosts
    before = [drops(host) for host in lab.hosts]
    transfer(sender, receiver, device_address(receiver, between.family), between)
    for host, earlier in zip(lab.hosts, before, strict=True):
        now = drops(host)
        # What hosts themselves send to everybody, now and then, has no route; of the stream there are many more packets.
        assert now["no_route"] - earlier["no_route"] < 5
        assert now | {"no_route": 0} == earlier | {"no_route": 0}
