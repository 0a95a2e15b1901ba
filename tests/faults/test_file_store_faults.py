"""The file store on a host that fails: disks, permissions, clocks, and writers killed at every system call.

What needs a process of its own (another user, other mounts, another clock, an end by SIGKILL) is a function named
``program_*``: run as a program, this file calls the one that its first argument names with the others.
"""

import asyncio
import collections
import contextlib
import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from overlaynet import records
from overlaynet.errors import StoreError, StoreUnavailable, SubnetsExhausted
from overlaynet.listings import read_snapshot
from overlaynet.model import Lease, LeaseRequest
from overlaynet.network import parse
from overlaynet.stores._file_directory import Directory
from overlaynet.stores.file import FileStore
from overlaynet.testing.tables import until

if TYPE_CHECKING:
    from tests.faults.wall_clock import WallClock  # not to be had where this file runs as a program

pytestmark = pytest.mark.anyio

NETWORK = parse('{"Network": "10.244.0.0/16", "LeaseTTL": 600}')
TINY = parse('{"Network": "10.244.0.0/16", "SubnetLen": 24, "SubnetMin": "10.244.0.0", "SubnetMax": "10.244.31.0"}')
KEY = "subnets/10.244.1.0-24"
OLD, NEW = b'{"PublicIP":"192.0.2.1"}', b'{"PublicIP":"192.0.2.2"}'
NOBODY = 65534
PATIENCE = 30.0


def run_program(name: str, *arguments: object, before: Sequence[str] = (), **environment: str) -> Any:
    """Call a function of this file in a process of its own; what it printed as JSON."""
    done = subprocess.run(
        [*before, sys.executable, __file__, name, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout or "null")


def tell(result: object) -> None:
    sys.stdout.write(json.dumps(result))


def make_store(root: Path | str) -> FileStore:
    return FileStore(FileStore.Options(path=str(root)))


def request(node: str) -> LeaseRequest:
    return LeaseRequest(node, "1", IPv4Address("192.0.2.1"))


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


async def acquire(store: FileStore, node: str = "a") -> Lease:
    return await store.acquire(NETWORK, request(node))


# Killed at every write: at the beginning and at the end of every system call that a write makes


PTRACE_TRACEME, PTRACE_SYSCALL, PTRACE_SETOPTIONS, PTRACE_O_EXITKILL = 0, 24, 0x4200, 0x100000


def ptrace(request: int, process: int = 0, data: int = 0) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if library.ptrace(request, process, None, data) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write_something(root: Path, operation: str) -> None:
    directory, never = Directory(str(root)), threading.Event()
    if operation == "create":
        directory.create(never, KEY, NEW, math.inf)
        return
    record = directory.get(never, KEY)
    assert record is not None
    if operation == "replace":
        directory.replace(never, record, NEW, math.inf)
    else:
        directory.delete(never, record)


def killed_after(stops: int, root: Path, operation: str) -> bool:
    """Write in a process that is killed after so many stops at system calls; whether it did not come to its end."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            ptrace(PTRACE_TRACEME)
            os.kill(os.getpid(), signal.SIGSTOP)
            write_something(root, operation)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    ptrace(PTRACE_SETOPTIONS, child, PTRACE_O_EXITKILL)
    for _ in range(stops):
        ptrace(PTRACE_SYSCALL, child)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            assert status == 0
            return False
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True


def program_kill_everywhere(place: str, operation: str) -> None:
    """Count what was found after each kill: in what state the record was, and what of it lay beside it."""
    never = threading.Event()
    found: collections.Counter[str] = collections.Counter()
    for stops in range(1, 10_000):
        root = Path(place) / str(stops)
        before = Directory(str(root))
        if operation != "create":
            before.create(never, KEY, OLD, math.inf)
            before.create(never, "subnets/10.244.2.0-24", OLD, math.inf)
        if not killed_after(stops, root, operation):
            break
        found["killed"] += 1
        if (root / ".new").exists():
            found["half written" if (root / ".new").stat().st_size == 0 else "not in place"] += 1
        # The lock is free, the record is whole, its neighbour untouched, and nothing is left behind by the next write.
        after = Directory(str(root))
        records = after.listing(never, "").records
        found[records[KEY].value.decode() if KEY in records else "none"] += 1
        assert (operation == "create") or records["subnets/10.244.2.0-24"].value == OLD
        assert after.create(never, "subnets/10.244.3.0-24", NEW, math.inf) is not None
        assert files(root) == sorted([".lock", *after.listing(never, "").records])
        shutil.rmtree(root)
    tell(found)


@pytest.mark.parametrize(
    ("operation", "outcomes"),
    [("create", {"none", NEW.decode()}), ("replace", {OLD.decode(), NEW.decode()}), ("delete", {OLD.decode(), "none"})],
)
def test_a_writer_killed_at_any_system_call_leaves_the_old_record_or_the_new_one(
    tmp_path: Path, operation: str, outcomes: set[str]
) -> None:
    found = run_program("kill_everywhere", tmp_path, operation)
    beside = {"half written", "not in place"} if operation != "delete" else set()
    assert set(found) == {"killed", *outcomes, *beside}
    assert found["killed"] > 30


# A full disk, a disk that became read-only


MOUNTS_OF_ITS_OWN = ("unshare", "--mount", "--propagation", "private")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def fill(root: Path, options: str) -> None:
    """Until no byte more fits, or no file more."""
    with (root / ".filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        for number in range(10_000):
            filler.write(bytes(512)) if "size" in options else (root / f".filler{number}").touch()


def program_fill_the_disk(place: str, options: str) -> None:
    root = Path(place)
    root.mkdir()
    mount("-t", "tmpfs", "-o", options, "tmpfs", str(root))
    asyncio.run(survive_a_full_disk(root, options))


async def survive_a_full_disk(root: Path, options: str) -> None:
    store = make_store(root)
    lease, other = await acquire(store), await acquire(store, "b")
    async with aclosing(store.watch()) as snapshots:
        assert len((await anext(snapshots)).leases) == 2
        fill(root, options)
        for call in (store.renew(NETWORK, lease), acquire(store, "c"), store.create_network("{}")):
            with pytest.raises(StoreUnavailable) as caught:
                await call
            assert str(caught.value) == f"the file store {root} is full: No space left on device; free space there"
        assert not (root / ".new").exists()
        assert {found.node: found.version for found in (await store.leases()).leases} == {
            "a": lease.version,
            "b": other.version,
        }
        await store.release(other)  # which makes room, too
        assert [found.node for found in (await anext(snapshots)).leases] == ["a"]
        for filler in root.glob(".filler*"):
            filler.unlink()
        assert (await store.renew(NETWORK, lease)).subnets == lease.subnets
        await acquire(store, "c")


@pytest.mark.parametrize("options", ["size=64k", "nr_inodes=12"])
def test_a_full_disk_loses_no_lease_and_is_told(tmp_path: Path, options: str) -> None:
    run_program("fill_the_disk", tmp_path / "store", options, before=MOUNTS_OF_ITS_OWN)


def program_turn_read_only(place: str) -> None:
    root = Path(place)
    root.mkdir()
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(root))
    asyncio.run(survive_a_read_only_disk(root))


async def survive_a_read_only_disk(root: Path) -> None:
    store = make_store(root)
    lease = await acquire(store)
    mount("-o", "remount,ro", str(root))
    for call in (store.renew(NETWORK, lease), acquire(store, "b")):
        with pytest.raises(
            StoreError, match=r"^the file store may not use .*: Read-only file system; run as the owner"
        ):
            await call
    assert (await store.leases()).leases == (lease,)
    mount("-o", "remount,rw", str(root))
    assert (await store.renew(NETWORK, lease)).subnets == lease.subnets


def test_a_disk_that_became_read_only_is_told_and_read_on(tmp_path: Path) -> None:
    run_program("turn_read_only", tmp_path / "store", before=MOUNTS_OF_ITS_OWN)


# Permissions


@pytest.fixture
def place_of_nobody() -> Iterator[Path]:
    """A directory that an ordinary user can reach and owns."""
    with tempfile.TemporaryDirectory(prefix="overlaynet-") as place:
        os.chown(place, NOBODY, NOBODY)
        yield Path(place)


def program_lose_permissions(place: str) -> None:
    root = Path(place) / "store"
    asyncio.run(acquire(make_store(Path(place) / "of root")))  # by now, all code is loaded that nobody may not read
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setgroups([])
    os.setresuid(NOBODY, NOBODY, NOBODY)
    asyncio.run(survive_lost_permissions(root))


async def survive_lost_permissions(root: Path) -> None:
    store = make_store(root)
    lease, other = await acquire(store), await acquire(store, "b")
    for mode in (0o000, 0o500):  # nothing may be used; nothing may be written
        root.chmod(mode)
        with pytest.raises(StoreError, match=r"^the file store may not use .*: Permission denied; run as the owner of"):
            await store.renew(NETWORK, lease)
    assert len((await store.leases()).leases) == 2
    root.chmod(0o700)
    theirs = root / records.lease_key(other.subnets)
    theirs.chmod(0o000)
    snapshot = await store.leases()
    assert [found.node for found in snapshot.leases] == ["a"]
    assert [malformed.key for malformed in snapshot.malformed] == [f"subnets/{theirs.name}"]
    theirs.chmod(0o600)
    assert (await store.renew(NETWORK, lease)).subnets == lease.subnets
    assert (await store.renew(NETWORK, other)).subnets == other.subnets


def test_lost_permissions_are_told_and_nothing_is_lost_with_them(place_of_nobody: Path) -> None:
    run_program("lose_permissions", place_of_nobody)


# The directory, the files


async def test_a_directory_that_is_removed_gets_its_leases_back_from_those_who_hold_them(tmp_path: Path) -> None:
    root = tmp_path / "store"
    stores = [make_store(root) for _ in range(3)]
    leases = [await acquire(store, f"node{number}") for number, store in enumerate(stores)]
    async with aclosing(stores[0].watch()) as snapshots, asyncio.timeout(PATIENCE):
        assert len((await anext(snapshots)).leases) == 3
        shutil.rmtree(root)
        while (await anext(snapshots)).leases:
            pass
        renewed = [await store.renew(NETWORK, lease) for store, lease in zip(stores, leases, strict=True)]
        while len((snapshot := await anext(snapshots)).leases) < 3:
            pass
    assert [lease.subnets for lease in renewed] == [lease.subnets for lease in leases]
    assert {lease.version for lease in snapshot.leases} == {lease.version for lease in renewed}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(b'"expires"', b'"expired"'),
        lambda text: text.replace(b"192.0.2.1", b"192.0.2.1000"),
        lambda _: b"10.244.1.0/24 is mine\n",
    ],
    ids=["truncated", "a wrong name", "a wrong address", "a note"],
)
async def test_a_file_damaged_by_hand_is_reported_at_once_and_its_subnet_given_to_nobody(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    store = make_store(tmp_path)
    async with aclosing(store.table.watch("subnets/")) as listings:
        for number in range(32):
            await store.acquire(TINY, request(f"node{number}"))
        await until(listings, lambda listing: len(listing) == 32)
        path = tmp_path / KEY
        path.write_bytes(damage(path.read_bytes()))
        listing = await until(listings, lambda listing: bool(read_snapshot(listing).malformed))
    snapshot = read_snapshot(listing)
    assert [malformed.key for malformed in snapshot.malformed] == [KEY]
    assert len(snapshot.leases) == 31
    with pytest.raises(SubnetsExhausted):
        await store.acquire(TINY, request("another"))


# Writers at once


def program_claim(root: str, name: str) -> None:
    async def claim() -> list[str]:
        store = make_store(root)
        leases = await asyncio.gather(*(store.acquire(TINY, request(f"{name}-{number}")) for number in range(8)))
        renewed = await asyncio.gather(*(store.renew(TINY, lease) for lease in leases))
        return [str(lease.subnets) for lease in renewed]

    tell(asyncio.run(claim()))


async def test_processes_that_claim_at_once_share_out_the_network_to_the_last_subnet(tmp_path: Path) -> None:
    claims = (asyncio.to_thread(run_program, "claim", tmp_path, f"process{number}") for number in range(4))
    claimed = [subnet for subnets in await asyncio.gather(*claims) for subnet in subnets]
    assert len(claimed) == len(set(claimed)) == 32
    with pytest.raises(SubnetsExhausted):
        await make_store(tmp_path).acquire(TINY, request("another"))


# Clocks


def program_read_lifetime(root: str) -> None:
    tell([lease.ttl for lease in asyncio.run(make_store(root).leases()).leases])


def program_acquire(root: str) -> None:
    asyncio.run(acquire(make_store(root)))


def check_lifetimes_agree(root: Path, **how: Any) -> None:
    """Between a process whose clock is another and this one, whichever of them wrote the lease."""
    run_program("acquire", root / "theirs", **how)
    (theirs,) = asyncio.run(make_store(root / "theirs").leases()).leases
    asyncio.run(acquire(make_store(root / "ours")))
    (ours,) = run_program("read_lifetime", root / "ours", **how)
    for left in (theirs.ttl, ours):
        assert left is not None
        assert NETWORK.lease_ttl - PATIENCE < left <= NETWORK.lease_ttl


@pytest.mark.skipif(not Path("/proc/self/ns/time").exists(), reason="this kernel has no time namespaces")
@pytest.mark.parametrize("offset", [400, 100_000])
def test_a_lease_lives_as_long_in_every_time_namespace(tmp_path: Path, offset: int) -> None:
    """Boot clocks of containers may differ; a lease that one finds expired would be given to a second owner."""
    check_lifetimes_agree(tmp_path, before=("unshare", "--time", "--boottime", str(offset), "--fork"))


@pytest.mark.parametrize("step", [10 * 86_400, -10 * 86_400])
def test_a_lease_lives_as_long_by_a_wall_clock_that_was_set(tmp_path: Path, wall_clock: "WallClock", step: int) -> None:
    wall_clock.set(step)
    clock = wall_clock.environment
    told = subprocess.run(["date", "+%s"], env={**os.environ, **clock}, capture_output=True, check=True)
    assert abs(int(told.stdout) - step - int(subprocess.check_output(["date", "+%s"]))) < PATIENCE
    check_lifetimes_agree(tmp_path, **clock)


if __name__ == "__main__":
    globals()[f"program_{sys.argv[1]}"](*sys.argv[2:])
