"""The database under `kill -9`: writers die at any instant, again and again, and nothing is torn, stuck or held twice.

Run as a program, this file is a writer. What the store tells it, it writes to its standard output at once, one JSON
array a line.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from overlaynet.api import Record
from overlaynet.testing import Network
from overlaynet_sqlite import SqliteOptions, SqliteStore, SqliteTable

pytestmark = pytest.mark.anyio

MakeTable = Callable[..., SqliteTable]

KILLS = 40
WRITERS = 3
KEYS = [f"subnets/10.244.{number}.0-24" for number in range(3)]
LIFETIMES = (0.3, 0.6)


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def make_value(writer: str) -> bytes:
    filler = "x" * random.choice([0, 100, 50_000])
    return json.dumps([writer, filler, zlib.crc32(f"{writer}{filler}".encode())]).encode()


def is_whole(value: bytes) -> bool:
    writer, filler, checksum = json.loads(value)
    return bool(zlib.crc32(f"{writer}{filler}".encode()) == checksum)


# The program


def tell(*event: object) -> None:
    os.write(sys.stdout.fileno(), json.dumps(event).encode() + b"\n")  # so short that it is written whole or not at all


async def write_for_ever(path: str, writer: str) -> None:
    """Take a key that is free, again and again; hold it for a while; give it back, or leave it to expire."""
    table = SqliteTable(SqliteOptions(path=path))
    parent = os.getppid()
    while os.getppid() == parent:
        key, lifetime = random.choice(KEYS), random.choice(LIFETIMES)
        asked = now()
        held: Record | None = await table.create(key, make_value(writer), lifetime)
        for _ in range(random.choice([0, 2])):
            if held is not None:
                tell("told", writer, key, asked, now(), lifetime)
                asked = now()
                held = await table.replace(held, make_value(writer), lifetime)
                if held is None:
                    tell("lost", writer, key, now())
        if held is not None:
            tell("told", writer, key, asked, now(), lifetime)
            if random.random() < 0.5:
                tell("leaving", writer, key, now())
                await table.delete(held)


# The tests


def held_by(events: list[list[object]]) -> dict[str, list[tuple[str, float, float]]]:
    """Who could act as the holder of which key from when to when, by what each was told."""
    held: dict[str, list[tuple[str, float, float]]] = {key: [] for key in KEYS}
    for kind, writer, key, *times in events:
        at = [float(str(time)) for time in times]
        own = held[str(key)]
        if kind == "told":
            asked, told, lifetime = at
            own.append((str(writer), told, asked + lifetime))
        else:
            latest = max(end for name, _, end in own if name == writer)
            assert kind == "leaving" or at[0] >= latest, f"{writer} lost {key} before its time"
            held[str(key)] = [(name, start, min(end, at[0]) if name == writer else end) for name, start, end in own]
    return held


async def test_killed_writers_tear_nothing_block_nobody_and_hold_nothing_twice(
    path: Path, tmp_path: Path, make_table: MakeTable
) -> None:
    table = make_table()
    await table.list("")
    watched: list[Record] = []

    async def watch() -> None:
        async with aclosing(table.watch("")) as listings:
            async for listing in listings:
                watched.extend(listing.values())

    watching = asyncio.create_task(watch())
    names = itertools.count()
    outputs = []
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        outputs.append(tmp_path / f"output-{next(names)}")
        with outputs[-1].open("wb") as output:
            command = [sys.executable, __file__, str(path), outputs[-1].name]
            running.append(subprocess.Popen(command, stdout=output))

    try:
        for _ in range(WRITERS):
            start()
        for _ in range(KILLS):
            await asyncio.sleep(random.uniform(0.05, 0.3))
            victim = running.pop(0)
            if (tmp_path / f"output-{len(outputs) - WRITERS}").stat().st_size:  # it has begun
                victim.kill()
                victim.wait()
                assert victim.returncode == -signal.SIGKILL
                start()
            else:
                running.insert(0, victim)
    finally:
        for process in running:
            process.kill()
            process.wait()
    async with asyncio.timeout(30):  # by then all lifetimes are over, and no lock is left
        while await table.list(""):
            await asyncio.sleep(0.05)
    assert await table.create("config", b"{}") is not None
    await table.aclose()
    await watching

    events = [json.loads(line) for output in outputs for line in output.read_text().splitlines()]
    assert Counter(kind for kind, *_ in events)["told"] > 50
    for key, holders in held_by(events).items():
        for one, other in itertools.combinations(holders, 2):
            if one[0] != other[0]:
                assert min(one[2], other[2]) <= max(one[1], other[1]), (key, one, other)
    assert len(watched) > 10
    assert all(is_whole(record.value) for record in watched if record.key in KEYS)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_a_writer_killed_in_the_middle_of_its_transaction_leaves_nothing(
    path: Path, make_table: MakeTable
) -> None:
    table = make_table()
    created = await table.create("config", b"before")
    assert created is not None
    program = f"""
import sqlite3, sys, time
connection = sqlite3.connect({str(path)!r}, isolation_level=None)
connection.execute("PRAGMA cache_size = 1")  # so that it writes to the file before it commits
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE records SET value = 'torn'")
for number in range(100):
    connection.execute("INSERT INTO records (key, value) VALUES (?, randomblob(10000))", (f"subnets/{{number}}",))
print("in the middle", flush=True)
time.sleep(60)
"""
    size = path.stat().st_size
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert await asyncio.to_thread(writer.stdout.readline) == b"in the middle\n"
        assert path.stat().st_size > size
        assert path.with_name(f"{path.name}-journal").exists()
        writer.kill()
    async with asyncio.timeout(30):
        assert await table.list("") == {"config": created}
        assert await table.replace(created, b"after") is not None
    assert not path.with_name(f"{path.name}-journal").exists()


async def test_whole_daemons_find_each_other_by_it(path: Path) -> None:
    options = SqliteOptions(path=str(path), poll_interval=0.02)
    async with Network(3, make_store=lambda: SqliteStore(options)) as network:
        a, b, c = network.nodes
        packet = network.send(a, b, b"hello")
        await network.deliver()
        assert packet.delivered
        subnets = c.lease.subnets
        await c.crash()
        c.start()
        await network.converge()
        assert c.lease.subnets == subnets


if __name__ == "__main__":
    random.seed(sys.argv[2])
    asyncio.run(write_for_ever(*sys.argv[1:3]))
