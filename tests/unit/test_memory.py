"""What comes and goes leaves no memory behind: blocks that are in use are counted, which takes neither load nor time.

What the process as a whole has from the kernel (its resident memory) says less: the allocators keep what was freed. How much
that is in the daemon is a matter of :mod:`overlaynet.allocator`, and of the soak.
"""

import asyncio
import ctypes
import gc
import logging
import re
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import aclosing
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import attrs
import pytest

from overlaynet import network
from overlaynet.backends.udp.engine import EnginePeer, PeerTable
from overlaynet.backends.udp.native_engine import NativeEngine
from overlaynet.daemon import Daemon
from overlaynet.model import LeaseRequest, Subnets, Underlay
from overlaynet.plugins import Plugins
from overlaynet.settings import Settings
from overlaynet.stores._file_directory import Directory
from overlaynet.stores.memory import MemoryStore, MemoryTable
from overlaynet.testing.fakes import FakeDrivers, fake_underlay

OWN = Subnets(IPv4Network("10.244.1.0/24"))
SMALLEST_BLOCK = 32
"""Bytes that the C library takes for the smallest allocation, and so for the smallest leak."""


class _MallocInfo(ctypes.Structure):
    """``struct mallinfo2`` of mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@attrs.frozen
class InUse:
    """Memory in use now."""

    blocks: int
    """Of Python's allocator."""
    bytes: int
    """Of the C library's, in all its arenas, and in blocks so large that they are mapped."""

    @classmethod
    def now(cls) -> "InUse":
        mallinfo2 = ctypes.CDLL(None).mallinfo2
        mallinfo2.restype = _MallocInfo
        gc.collect()
        info = mallinfo2()
        return cls(sys.getallocatedblocks(), info.uordblks + info.hblkhd)

    def assert_nothing_was_left_since(self, before: "InUse", changes: int) -> None:
        """Each change may have left less than half of the smallest leak: what is in use at rest varies a little."""
        assert self.blocks - before.blocks < changes / 2
        assert self.bytes - before.bytes < changes * SMALLEST_BLOCK / 2


def assert_nothing_is_left(change: Callable[[int], None], times: int) -> None:
    """Change something so often, after a while to warm up."""
    for number in range(times // 2):
        change(number)
    before = InUse.now()
    for number in range(times):
        change(number)
    InUse.now().assert_nothing_was_left_since(before, times)


def table(*numbers: int) -> PeerTable:
    address = IPv4Address("127.0.0.2")
    return PeerTable(
        OWN, tuple(EnginePeer(Subnets(IPv4Network(f"10.244.{number}.0/24")), address, 8285) for number in numbers)
    )


TABLES = [table(), table(2), table(2, 3, 4), table(3, 4, 5), table(*range(2, 102)), table(2, 2, 3)]


def test_swaps_of_the_native_engines_table_leave_nothing() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.bind(("127.0.0.1", 0))
        engine = NativeEngine(near.fileno(), [wire.fileno()], 1472, table(), device_header=False)
        thread = threading.Thread(target=engine.run)
        thread.start()

        def change(number: int) -> None:
            engine.set_table(TABLES[number % len(TABLES)])
            engine.counters()

        try:
            assert_nothing_is_left(change, 5000)
        finally:
            engine.stop()
            thread.join()
            engine.close()


def test_native_engines_that_ran_leave_nothing() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.bind(("127.0.0.1", 0))

        def change(number: int) -> None:
            queue = (near.fileno(), [wire.fileno()])
            engine = NativeEngine(*queue, 1472, TABLES[number % 4], more_queues=[queue], device_header=False)
            engine.stop()
            engine.run()
            engine.counters()
            engine.close()

        assert_nothing_is_left(change, 1000)


def test_a_refused_table_leaves_nothing() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        engine = NativeEngine(near.fileno(), [], 1472, TABLES[4], device_header=False)
        own, peer = bytes(22), bytes((4, 24, 255)) + bytes(45)

        def change(number: int) -> None:
            # The last of these peers has an address of no IP version.
            with pytest.raises(ValueError, match="cannot be"):
                engine._engine.set_table(own, peer * 3 + bytes(48), b"\xff" * 16)

        assert_nothing_is_left(change, 1000)
        engine.close()


def test_strange_files_that_come_and_go_leave_nothing_in_the_file_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)  # pytest keeps what is logged
    directory = Directory(str(tmp_path))

    def change(number: int) -> None:
        strange = tmp_path / f"no record {number}"
        strange.touch()
        directory.listing(threading.Event(), "")
        strange.unlink()
        directory.listing(threading.Event(), "")

    assert_nothing_is_left(change, 500)


@pytest.mark.anyio
async def test_peers_that_come_and_go_leave_nothing_in_the_daemon(tmp_path: Path) -> None:
    shared = MemoryTable()
    document = '{"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}'
    overlay = network.parse(document)
    drivers, plugins = FakeDrivers(), Plugins()
    plugins.register(drivers, name="fakes")

    async def find_underlay(network: network.Network) -> tuple[Underlay, str]:
        return fake_underlay("172.16.130.140"), "a"

    async def change(numbers: range) -> None:
        for number in numbers:
            previous = Subnets(IPv4Network(f"10.244.{200 + number % 4}.0/24"))
            # Each time another process: its record is one that was never met before.
            request = LeaseRequest("b", f"run {number}", public_ipv4=IPv4Address("172.16.130.164"), previous=previous)
            lease = await store.acquire(overlay, request)
            await known([lease.subnets])
            await store.release(lease)
            await known([])

    async def known(subnets: list[Subnets]) -> None:
        while not drivers.backends or [peer.subnets for peer in drivers.backends[-1].peers] != subnets:
            assert not task.done()
            await asyncio.sleep(0.001)

    async with aclosing(MemoryStore(table=shared)) as store:
        await store.replace_network(document)
        settings = Settings(store="memory", router="memory", subnet_file=str(tmp_path / "subnet.env"))
        daemon = Daemon(settings, MemoryStore(table=shared), plugins, find_underlay)
        task = asyncio.create_task(daemon.run())
        times = 1000
        await change(range(times // 2))
        before = InUse.now()
        await change(range(times, 2 * times))
        after = InUse.now()
        daemon.stop()
        await task
    after.assert_nothing_was_left_since(before, times)


ALLOCATIONS = """
    import ctypes, sys, threading
    from overlaynet.allocator import LARGE, keep_compact

    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
    keep_compact(dict.fromkeys(sys.argv[3:], "set"))
    together = threading.Barrier(4)

    def work():
        libc.malloc(ctypes.c_size_t(100))
        together.wait(10)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(8 * LARGE))))
    for file in sys.argv[1:3]:
        told = ctypes.c_void_p(libc.fopen(file.encode(), b"w"))
        libc.malloc_info(0, told)
        libc.fclose(told)
        for _ in range(100):  # more than fit into what is free in the heap
            libc.malloc(ctypes.c_size_t(LARGE))
"""


@pytest.mark.parametrize("left_alone", [False, True])
def test_threads_share_an_arena_and_large_blocks_are_the_kernels_unless_the_environment_has_its_say(
    tmp_path: Path, left_alone: bool
) -> None:
    variables = ["MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_"] if left_alone else []
    told = tmp_path / "before", tmp_path / "after"
    command = [sys.executable, "-c", textwrap.dedent(ALLOCATIONS), *map(str, told), *variables]
    subprocess.run(command, check=True, timeout=60)
    before, after = (file.read_text() for file in told)
    arenas = before.count("<heap nr=")
    mapped = [int(re.findall('<total type="mmap" count="([0-9]+)"', text)[0]) for text in (before, after)]
    if left_alone:
        assert (arenas > 1, mapped[1] - mapped[0]) == (True, 0)
    else:
        assert (arenas, mapped[1] - mapped[0] > 50) == (1, True)
