"""The file store under `kill -9`: writers die at any instant, again and again, and nothing is torn, stuck or held twice.

Run as a program, this file is the supervisor: it forks writers, kills them, and forks others in their place. What each
writer is told by the store it writes to its standard output at once, one JSON array a line.
"""

import asyncio
import itertools
import json
import mmap
import os
import random
import signal
import sys
import time
import zlib
from collections import Counter, defaultdict
from contextlib import aclosing
from pathlib import Path
from typing import NoReturn

import attrs
import pytest

from overlaynet.stores._file_directory import Directory
from overlaynet.stores.file import FileTable
from overlaynet.table import Record
from overlaynet.testing.tables import Listing

pytestmark = pytest.mark.anyio

SECONDS, PATIENCE = 12.0, 75.0
"""How long the writers go on: at least, and at most, for a busy machine lets them write less."""
ENOUGH = 120
"""Writes that are told."""
WRITERS = 4
KEYS = [f"subnets/10.244.{i}.0-24" for i in range(3)]
LIFETIMES = (0.1, 0.2, 0.5)


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def make_value(writer: str) -> bytes:
    filler = "x" * random.choice([0, 100, 50_000])
    return json.dumps([writer, filler, zlib.crc32(f"{writer}{filler}".encode())]).encode()


def is_whole(value: bytes) -> bool:
    try:
        writer, filler, checksum = json.loads(value)
    except ValueError:
        return False
    return bool(zlib.crc32(f"{writer}{filler}".encode()) == checksum)


# The program


_told = mmap.mmap(-1, 8)
"""How many writes have been told, about: shared by all processes, and two at once may count as one."""


def told() -> int:
    return int.from_bytes(_told[:], "little")


def tell(*event: object) -> None:
    os.write(sys.stdout.fileno(), json.dumps(event).encode() + b"\n")  # so short that it is written whole or not at all
    if event[0] == "told":
        _told[:] = (told() + 1).to_bytes(8, "little")


async def write(table: FileTable, writer: str) -> None:
    """Take one of the keys, if it is free; hold it for a while; give it back."""
    key, lifetime = random.choice(KEYS), random.choice(LIFETIMES)
    asked = now()
    held: Record | None = await table.create(key, make_value(writer), lifetime)
    if held is None:
        found = await table.get(key)
        if found is not None and not is_whole(found.value):
            tell("torn", writer, key)
        return
    tell("told", writer, key, asked, now(), lifetime)
    for _ in range(random.choice([0, 1, 5])):
        asked = now()
        held = await table.replace(held, make_value(writer), lifetime)
        if held is None:
            tell("lost", writer, key, now())
            return
        tell("told", writer, key, asked, now(), lifetime)
    if random.random() < 0.5:
        tell("leaving", writer, key, now())
        await table.delete(held)


async def write_for_ever(directory: str, writer: str, parent: int) -> None:
    table = FileTable(Directory(directory))
    while os.getppid() == parent:
        await write(table, writer)


def supervise(directory: str) -> None:
    parent = os.getpid()
    writers: dict[int, float] = {}
    names = itertools.count()
    began = now()
    while now() < began + (SECONDS if told() >= ENOUGH else PATIENCE):
        while len(writers) < WRITERS:
            name = f"writer-{next(names)}"
            child = os.fork()
            if child == 0:
                random.seed(name)
                be_a_writer(directory, name, parent)
            writers[child] = now() + random.uniform(0.005, 0.15)
        due = min(writers, key=lambda child: writers[child])
        time.sleep(max(0.0, writers[due] - now()))
        kill(due)
        del writers[due]
    for child in writers:
        kill(child)


def be_a_writer(directory: str, name: str, parent: int) -> NoReturn:
    try:
        asyncio.run(write_for_ever(directory, name, parent))
    except BaseException as error:
        tell("failed", name, repr(error))
    finally:
        os._exit(0)


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    tell("killed", os.waitstatus_to_exitcode(status))


# The test


@attrs.define
class Held:
    """A writer could act as the holder of a key from ``start`` to ``end``."""

    writer: str
    start: float
    end: float


def read_story(events: list[list[object]]) -> dict[str, list[Held]]:
    """Who held which key when, by what each writer was told."""
    held: dict[str, list[Held]] = defaultdict(list)
    for kind, *rest in events:
        if kind == "told":
            writer, key, asked, told, lifetime = rest
            assert isinstance(asked, float)
            assert isinstance(lifetime, float)
            held[str(key)].append(Held(str(writer), float(str(told)), asked + lifetime))
        elif kind in ("leaving", "lost"):
            writer, key, at = rest
            assert isinstance(at, float)
            own = [one for one in held[str(key)] if one.writer == writer]
            assert kind == "leaving" or at >= own[-1].end, f"{writer} lost {key} before its time"
            for one in own:
                one.end = min(one.end, at)
    return held


async def test_killed_writers_tear_nothing_block_nobody_and_hold_nothing_twice(tmp_path: Path) -> None:
    root = tmp_path / "store"
    table = FileTable(Directory(str(root)))
    seen: list[list[Listing]] = [[], []]
    program = await asyncio.create_subprocess_exec(
        sys.executable, __file__, str(root), stdout=asyncio.subprocess.PIPE, limit=1 << 20
    )

    async def watch(seen: list[Listing]) -> None:
        async with aclosing(table.watch("")) as listings:
            async for listing in listings:
                seen.append(listing)

    watching = [asyncio.create_task(watch(listings)) for listings in seen]
    try:
        assert program.stdout is not None
        lines = (await program.stdout.read()).splitlines()
        assert await program.wait() == 0
        async with asyncio.timeout(30):  # by then all lifetimes are over, and the watches have come to see it
            while not all(listings and listings[-1] == {} for listings in seen):
                await asyncio.sleep(0.05)
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
        await table.aclose()
        await asyncio.gather(*watching)
    events = [json.loads(line) for line in lines]
    kinds = Counter(kind for kind, *_ in events)
    assert kinds["killed"] > 50, kinds
    assert kinds["told"] > 100, kinds
    assert not [event for event in events if event[0] in ("torn", "failed")]
    assert all(code == -signal.SIGKILL for kind, code, *_ in events if kind == "killed")

    # No key had two holders at a time.
    for key, held in read_story(events).items():
        for one, other in itertools.combinations(held, 2):
            if one.writer != other.writer:
                assert min(one.end, other.end) <= max(one.start, other.start), (key, one, other)

    # The watches have seen much, and nothing torn.
    for listings in seen:
        assert len(listings) > 10
        assert all(is_whole(record.value) for listing in listings for record in listing.values())

    # The next writer finds no lock, and leaves nothing but its own.
    assert await table.create("config", b"{}") is not None
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == [".lock", "config"]


if __name__ == "__main__":
    supervise(sys.argv[1])
