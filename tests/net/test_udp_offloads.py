"""The native engine beside the one in plain Python: streams through kernels that verify all."""

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, TypeVar

import pytest

from overlaynet import tun
from overlaynet.backends.udp import UdpBackend, UdpOptions, backend, wire
from overlaynet.errors import BackendError
from overlaynet.model import Lease, Peer, Subnets, Underlay
from overlaynet.network import parse
from overlaynet.testing.daemons import wait_until
from overlaynet.testing.namespaces import NetworkNamespace

T = TypeVar("T")
NETWORK = parse('{"Network": "10.244.0.0/16"}')
UNDERLAYS = (IPv4Address("172.16.130.140"), IPv4Address("172.16.130.164"))
SUBNETS = (IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24"))
PATIENCE = 60.0
STREAM = bytes(range(251)) * 20000


@contextlib.contextmanager
def loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, made).result(PATIENCE)
    finally:
        made.call_soon_threadsafe(made.stop)
        thread.join(PATIENCE)
        made.close()


def _close(run: Callable[[Coroutine[Any, Any, Any]], Any], backend: UdpBackend) -> None:
    run(backend.aclose())


async def _run(backend: UdpBackend) -> None:
    with contextlib.suppress(BackendError):  # it is closed
        await backend.run()


@contextlib.contextmanager
def tunnel(engines: tuple[str, str], threads: int = 1) -> Iterator[tuple[list[NetworkNamespace], list[UdpBackend]]]:
    """Two hosts with these engines; a native one has so many threads."""
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(NetworkNamespace(label=f"offload-{number}")) for number in range(2)]
        hosts[0].ip("link set lo up", f"link add eth0 type veth peer name eth0 netns {hosts[1].name}")
        backends: list[UdpBackend] = []
        running: list[asyncio.Task[None]] = []
        for number, host in enumerate(hosts):
            host.ip(f"address add {UNDERLAYS[number]}/24 dev eth0", "link set eth0 up", "link set lo up")
            run = host.run(lambda: stack.enter_context(loop()))

            async def start(number: int = number) -> UdpBackend:
                address = UNDERLAYS[number]
                engine = engines[number]
                backend = UdpBackend(UdpOptions(), engine=engine, threads=str(threads if engine == "native" else 1))
                await backend.open(NETWORK, Underlay("eth0", 1500, ipv4=address, public_ipv4=address))
                await backend.start(Lease(Subnets(SUBNETS[number]), public_ipv4=address))
                await backend.set_peers([Peer(Subnets(SUBNETS[1 - number]), UNDERLAYS[1 - number])])
                running.append(asyncio.create_task(_run(backend)))
                return backend

            backends.append(run(start()))
            stack.callback(_close, run, backends[-1])
            host.ip("route replace 10.244.0.0/16 dev overlay0")
        yield hosts, backends


def transfer(sender: NetworkNamespace, receiver: NetworkNamespace, address: str, streams: int = 3) -> None:
    """Send several streams at once, and compare what arrives."""
    with receiver.socket() as listener, contextlib.ExitStack() as stack:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of an earlier transfer, ends may linger
        listener.bind((address, 5000))
        listener.listen()
        listener.settimeout(PATIENCE)
        digests: list[str] = []

        def receive(connection: socket.socket) -> None:
            digest = hashlib.sha256()
            with connection:
                connection.settimeout(PATIENCE)
                while piece := connection.recv(1 << 16):
                    digest.update(piece)
            digests.append(digest.hexdigest())

        def send(client: socket.socket) -> None:
            client.sendall(STREAM)
            client.shutdown(socket.SHUT_WR)

        threads = []
        for _ in range(streams):
            client = stack.enter_context(sender.socket())
            client.settimeout(PATIENCE)
            client.connect((address, 5000))
            threads += [
                threading.Thread(target=receive, args=(listener.accept()[0],)),
                threading.Thread(target=send, args=(client,)),
            ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert digests == [hashlib.sha256(STREAM).hexdigest()] * streams


def checksum_errors(host: NetworkNamespace) -> dict[str, int]:
    lines = host.run(Path("/proc/thread-self/net/snmp").read_text).splitlines()
    counts = {}
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        counts.update(
            {
                f"{names.split()[0]}{name}": int(value)
                for name, value in zip(names.split()[1:], values.split()[1:], strict=True)
            }
        )
    return {name: counts[name] for name in ("Tcp:InErrs", "Tcp:InCsumErrors", "Udp:InCsumErrors", "Ip:InHdrErrors")}


@pytest.mark.parametrize(
    ("engines", "threads"),
    [
        (("native", "native"), 1),
        (("native", "native"), 2),
        (("native", "python"), 1),
        (("python", "native"), 1),
        (("python", "python"), 1),
    ],
)
def test_streams_arrive_whole_and_no_checksum_is_wrong(engines: tuple[str, str], threads: int) -> None:
    with tunnel(engines, threads) as (hosts, backends):
        transfer(hosts[0], hosts[1], "10.244.2.0")
        transfer(hosts[1], hosts[0], "10.244.1.0")
        for host in hosts:
            assert set(checksum_errors(host).values()) == {0}
        for backend in backends:
            offloads: Any = backend.status()["offloads"]
            assert set(offloads.values()) == {"on"}


@pytest.mark.parametrize(("engine", "threads"), [("native", 1), ("native", 2), ("python", 1)])
def test_where_the_underlay_takes_no_runs_packets_go_alone_and_the_log_says_so(
    engine: str, threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(backend, "LOOK_INTERVAL", 0.1)
    with tunnel((engine, engine), threads) as (hosts, backends):
        for host in hosts:
            host.ip("link set eth0 mtu 1300")
        transfer(hosts[0], hosts[1], "10.244.2.0", streams=1)
        offloads: Any = backends[0].status()["offloads"]
        assert "failing: " in offloads["udp_segment"]
        wait_until(lambda: "offload failing" in caplog.messages, PATIENCE, "the log to say so")
        assert "offload works again" not in caplog.messages
        for host in hosts:
            host.ip("link set eth0 mtu 1500")
        deadline = time.monotonic() + PATIENCE
        while "failing: " in offloads["udp_segment"]:
            assert time.monotonic() < deadline
            transfer(hosts[0], hosts[1], "10.244.2.0", streams=1)
            offloads = backends[0].status()["offloads"]
        assert offloads["udp_segment"].startswith("on (failed ")
        wait_until(lambda: "offload works again" in caplog.messages, PATIENCE, "the log to say so")


@pytest.mark.parametrize("refused", ["queue", "socket"])
def test_where_the_kernel_gives_no_second_queue_or_socket_one_thread_carries_all(
    refused: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> object:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    module, function = {"queue": (tun, "_open_next_queue"), "socket": (wire, "_open_next_socket")}[refused]
    monkeypatch.setattr(module, function, refuse)
    with tunnel(("native", "native"), 2) as (hosts, backends):
        for host, each in zip(hosts, backends, strict=True):
            assert (each.status()["threads"], each.status()["threads_refused"]) == (1, 1)
            (link,) = host.ip_json("link", "show", "overlay0")
            assert link["linkinfo"]["info_data"].get("numqueues", 1) == 1
            assert len(host.execute(["ss", "-Hlun", "sport = :8285"]).stdout.splitlines()) == 1
        transfer(hosts[0], hosts[1], "10.244.2.0")
        transfer(hosts[1], hosts[0], "10.244.1.0")
    expected = {"queue": "the device has fewer queues than asked for", "socket": "fewer sockets than asked for"}[
        refused
    ]
    assert caplog.messages == [expected] * 2
