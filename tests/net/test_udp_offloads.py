"""The native engine beside the one in plain Python: streams through kernels that verify all."""

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any, TypeVar

import pytest

from overlaynet import tun
from overlaynet.backends.udp import UdpBackend, UdpOptions, backend, wire
from overlaynet.errors import BackendError
from overlaynet.model import Lease, Peer, Subnets, Underlay
from overlaynet.network import parse
from overlaynet.testing.daemons import wait_until
from overlaynet.testing.namespaces import NetworkNamespace
from tests.net.traffic import PATIENCE, errors, send_segmented, taken_out, transfer

T = TypeVar("T")
CLONE_NEWNS, MS_SLAVE, MS_REC = 0x20000, 1 << 19, 1 << 14
"""Of linux/sched.h and linux/mount.h."""
NETWORK = parse('{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}')
UNDERLAYS = (IPv4Address("172.16.130.140"), IPv4Address("172.16.130.164"))
SUBNETS = (
    Subnets(IPv4Network("10.244.1.0/24"), IPv6Network("fd00:10:244:1::/64")),
    Subnets(IPv4Network("10.244.2.0/24"), IPv6Network("fd00:10:244:2::/64")),
)
ADDRESSES = {4: ("10.244.1.0", "10.244.2.0"), 6: ("fd00:10:244:1::", "fd00:10:244:2::")}
"""Of the devices, by IP version."""


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


def _mount_sysfs() -> None:
    """Give the calling thread, and those that it starts, a /sys of their network namespace, as ``ip netns exec`` does."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(CLONE_NEWNS) != 0
        or libc.mount(b"none", b"/", None, MS_SLAVE | MS_REC, None) != 0
        or libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None) != 0
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _start_loop(stack: contextlib.ExitStack) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    _mount_sysfs()
    return stack.enter_context(loop())


def _close(run: Callable[[Coroutine[Any, Any, Any]], Any], backend: UdpBackend) -> None:
    run(backend.aclose())


async def _run(backend: UdpBackend) -> None:
    with contextlib.suppress(BackendError):  # it is closed
        await backend.run()


@contextlib.contextmanager
def tunnel(
    engines: tuple[str, str], threads: int = 1, offloads: tuple[str, str] = ("auto", "auto")
) -> Iterator[tuple[list[NetworkNamespace], list[UdpBackend]]]:
    """Two hosts with these engines and offloads; a native engine has so many threads."""
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(NetworkNamespace(label=f"offload-{number}")) for number in range(2)]
        hosts[0].ip("link set lo up", f"link add eth0 type veth peer name eth0 netns {hosts[1].name}")
        backends: list[UdpBackend] = []
        running: list[asyncio.Task[None]] = []
        for number, host in enumerate(hosts):
            host.ip(f"address add {UNDERLAYS[number]}/24 dev eth0", "link set eth0 up", "link set lo up")
            run = host.run(_start_loop, stack)

            async def start(number: int = number) -> UdpBackend:
                address = UNDERLAYS[number]
                engine = engines[number]
                count = str(threads if engine == "native" else 1)
                backend = UdpBackend(UdpOptions(), engine=engine, offload=offloads[number], threads=count)
                await backend.open(NETWORK, Underlay("eth0", 1500, ipv4=address, public_ipv4=address))
                await backend.start(Lease(SUBNETS[number], public_ipv4=address))
                await backend.set_peers([Peer(SUBNETS[1 - number], UNDERLAYS[1 - number])])
                running.append(asyncio.create_task(_run(backend)))
                return backend

            backends.append(run(start()))
            stack.callback(_close, run, backends[-1])
            host.ip("route replace 10.244.0.0/16 dev overlay0", "route replace fd00:10:244::/48 dev overlay0")
        yield hosts, backends


AUTO, OFF = ("auto", "auto"), ("off", "auto")


@pytest.mark.parametrize(
    ("engines", "threads", "offloads"),
    [
        (("native", "native"), 1, AUTO),
        (("native", "native"), 2, AUTO),
        (("native", "python"), 1, AUTO),
        (("python", "native"), 1, AUTO),
        (("python", "python"), 1, AUTO),
        (("native", "native"), 1, OFF),
        (("native", "python"), 1, OFF),
        (("python", "native"), 1, OFF),
    ],
)
def test_streams_and_datagrams_arrive_whole_and_no_checksum_is_wrong(
    engines: tuple[str, str], threads: int, offloads: tuple[str, str]
) -> None:
    """The Python engine hands each packet to a kernel that verifies it; so does a native one without offloads."""
    with tunnel(engines, threads, offloads) as (hosts, backends):
        for version, addresses in ADDRESSES.items():
            for sender, receiver in ((0, 1), (1, 0)):
                transfer(hosts[sender], hosts[receiver], addresses[receiver])
                before = taken_out(hosts[sender])
                sent = send_segmented(hosts[sender], hosts[receiver], version, addresses[sender], addresses[receiver])
                cut_by_engine = engines[sender] == "native" and offloads[sender] == "auto"
                assert (taken_out(hosts[sender]) - before < sent / 4) == cut_by_engine
        for host in hosts:
            assert set(errors(host).values()) == {0}
        for wanted, backend in zip(offloads, backends, strict=True):
            states: Any = backend.status()["offloads"]
            assert set(states.values()) == {"off" if wanted == "off" else "on"}


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
