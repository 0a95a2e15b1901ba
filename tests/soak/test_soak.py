"""A long run under load: `make soak` takes ten minutes for each engine, the test suite one minute for both.

Two hosts carry all that two containers send each other, TCP and UDP, IPv4 and IPv6, while peers come and go (one each
second) and the device of one host is deleted now and then. Resident memory, descriptors and threads of both daemons are
sampled each second. After a quarter of the time, which caches and buffers have to fill, none of them may grow:

- Descriptors and threads: the median of the last quarter is no more than that of the second quarter. Both come and go for
  moments (each question to the kernel has a thread and a socket, and a deleted device leaves the engine without its own), so
  it is the number at rest that counts, which is exact.
- Memory: the median of the last quarter is at most 1 MiB above that of the second. It is not exact: what refers to itself waits
  for Python's garbage collector, which comes when there is a quarter more of everything. In ten minutes, a leak of 4 KiB with
  each change of a peer, or of a byte in thirty packets, is more. Smaller ones are looked for by tests/unit/test_memory.py,
  which counts what is in use. In half an hour, gaps between what is in use were more, too: overlaynet.allocator sees to it that
  there are few, and that all threads allocate out of one heap.
"""

import asyncio
import itertools
import os
import re
import statistics
import time
from collections.abc import Sequence
from contextlib import aclosing
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import attrs
import pytest

from overlaynet.model import Lease, LeaseRequest
from overlaynet.stores.file import FileStore
from overlaynet.testing.lab import NETWORK6, DaemonProcess, Host, Lab, wait_until
from overlaynet.testing.load import full_load

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
"""How long the load lasts."""
ENGINES = [("native", "native"), ("python", "python")] if "SOAK_SECONDS" in os.environ else [("native", "python")]
"""Of the two hosts, in each run."""
DEVICE_DELETED_EVERY = 10
"""Seconds."""
MEMORY_SLACK = 2**20
"""Bytes; see above."""
ARENA = 64 * 2**20
"""Bytes."""


@attrs.frozen
class Sample:
    memory: int
    descriptors: int
    threads: int


def sample(daemon: DaemonProcess) -> Sample:
    process = Path("/proc", str(daemon.pid))
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Sample(
        memory=int(status["VmRSS"].split()[0]) * 1024,
        descriptors=len(list((process / "fd").iterdir())),
        threads=int(status["Threads"]),
    )


def at_rest(samples: Sequence[Sample], name: str) -> int:
    return int(statistics.median_low(getattr(each, name) for each in samples))


def least(samples: Sequence[Sample], name: str) -> int:
    """What there is in all samples but a tenth, in which the device is away: what grows for good is in all of them.

    Less than half may be at rest when the machine is busy: a thread that reads the store takes its time then.
    """
    return int(sorted(getattr(each, name) for each in samples)[len(samples) // 10])


def growth(samples: Sequence[Sample]) -> list[str]:
    """What has grown from the second quarter to the last, in words."""
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[3 * quarter :]
    found = []
    for name in ("descriptors", "threads"):
        before, after = at_rest(early, name), least(late, name)
        if after > before:
            found.append(f"{name} at rest: from {before} to {after}")
    before, after = (int(statistics.median(each.memory for each in part)) for part in (early, late))
    if after > before + MEMORY_SLACK:
        found.append(f"memory: from {before / 2**20:.2f} to {after / 2**20:.2f} MiB")
    return found


def describe(label: str, samples: Sequence[Sample]) -> str:
    quarter = len(samples) // 4
    quarters = [samples[place * quarter : (place + 1) * quarter] for place in range(4)]
    memory = [f"{statistics.median(each.memory for each in part) / 2**20:.2f}" for part in quarters]
    descriptors = [str(at_rest(part, "descriptors")) for part in quarters]
    threads = [str(at_rest(part, "threads")) for part in quarters]
    return (
        f"{label}, by quarters: memory {', '.join(memory)} MiB (medians); "
        f"descriptors at rest {', '.join(descriptors)}; threads at rest {', '.join(threads)}"
    )


@pytest.mark.parametrize(
    ("grown", "words"),
    [
        (Sample(30 * 2**20, 20, 5), []),
        (Sample(31 * 2**20 + 1, 20, 5), ["memory: from 30.00 to 31.00 MiB"]),
        (Sample(30 * 2**20, 21, 5), ["descriptors at rest: from 20 to 21"]),
        (Sample(30 * 2**20, 20, 6), ["threads at rest: from 5 to 6"]),
    ],
)
def test_growth_is_told_from_what_comes_and_goes(grown: Sample, words: list[str]) -> None:
    steady, peak, starting = Sample(30 * 2**20, 20, 5), Sample(40 * 2**20, 30, 9), Sample(10 * 2**20, 5, 1)
    without_engine = Sample(30 * 2**20, 18, 4)
    early = [peak, steady, without_engine, steady, steady] * 4
    assert growth([starting] * 10 + early + [grown, grown, grown, peak, grown] * 2) == words


def arenas(daemon: DaemonProcess) -> int:
    """How many arenas the C library has made for threads: each keeps 64 MiB of addresses, at a multiple of that.

    :data:`HEAP_MAX_SIZE` of glibc's malloc/arena.c: what the arena uses comes first, and then what it does not.
    """
    lines = Path("/proc", str(daemon.pid), "maps").read_text().splitlines()
    found = (re.match("([0-9a-f]+)-([0-9a-f]+) (....)", line) for line in lines)
    ranges = [(int(match[1], 16), int(match[2], 16), match[3]) for match in found if match]
    return sum(
        start % ARENA == 0 and used == "rw-p" and (left, end, kept) == (middle, start + ARENA, "---p")
        for (start, middle, used), (left, end, kept) in itertools.pairwise(ranges)
    )


def delivered(host: Host) -> int:
    packets: Any = host.status()["packets"]
    return sum(int(peer["received_packets"]) for peer in packets["peers"].values())


async def change_peers(lab: Lab, leases: list[Lease]) -> None:
    """Let a third node, which only stands in the store, come if it is not there, and go if it is."""
    async with aclosing(FileStore(FileStore.Options(path=str(lab.directory / "store")))) as store:
        if leases:
            await store.release(leases.pop())
        else:
            request = LeaseRequest("a third", "run", public_ipv4=IPv4Address("172.16.130.99"))
            leases.append(await store.acquire(lab.overlay, request))


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("engines", ENGINES, ids="-".join)
def test_a_long_run_under_load_shows_no_growth(engines: tuple[str, str]) -> None:
    with Lab("soak", overlay6=NETWORK6) as lab:
        for host, engine in zip(lab.hosts, engines, strict=True):
            host.start_overlaynet(lab.file_store, ["--udp-engine", engine])
            host.connect_containers()
        lab.wait_until_acquainted()
        samples: dict[str, list[Sample]] = {host.label: [] for host in lab.hosts}
        leases: list[Lease] = []
        deleted = lab.hosts[0]
        deletions = 0
        with full_load(*lab.containers):
            began = time.monotonic()
            before = [delivered(host) for host in lab.hosts]
            for second in range(1, int(SECONDS) + 1):
                time.sleep(max(0.0, began + second - time.monotonic()))
                asyncio.run(change_peers(lab, leases))
                if second % DEVICE_DELETED_EVERY == 0:
                    deleted.namespace.ip("link delete overlay0")
                    deletions += 1
                for host in lab.hosts:
                    assert host.daemon.running, host.daemon.last_words()
                    samples[host.label].append(sample(host.daemon))
        wait_until(lambda: said(deleted, "device made again") == deletions, 30, "the device to be made the last time")
        for host, count in zip(lab.hosts, before, strict=True):
            packets: Any = host.status()["packets"]
            label = f"{host.label}, {packets['engine']} engine"
            print(describe(label, samples[host.label]), f"{delivered(host) - count} packets received", sep="; ")  # noqa: T201
            assert delivered(host) - count > 100 * SECONDS, "there was a load"
            assert host.status()["problems"] == {}
            assert said(host, "peer added") >= SECONDS / 4, "peers came and went"
            assert arenas(host.daemon) == 0
        grown = {host.label: found for host in lab.hosts if (found := growth(samples[host.label]))}
        assert not grown
        for host in lab.hosts:
            assert host.daemon.stop() == 0


def said(host: Host, message: str) -> int:
    """How many times the daemon has logged this."""
    return sum(record["message"] == message for record in host.daemon.records)
