"""The lease protocol, explored on all stores; and broken protocols, each of which the exploration sees through."""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from overlaynet import choosing, records
from overlaynet.errors import LeaseLost
from overlaynet.lease_keeping import LeaseKeeper
from overlaynet.leases import TableStore
from overlaynet.model import Lease, LeaseRequest
from overlaynet.network import Network
from overlaynet.stores.memory import MemoryTable
from overlaynet.table import Record, Table
from overlaynet.testing.etcd import EtcdServer
from tests.conformance.lease_machine import LeaseMachine
from tests.conformance.lease_nodes import StoreOn
from tests.conformance.lease_world import EtcdWorld, FileWorld, World

MORE = int(os.environ.get("OVERLAYNET_MODEL_EXAMPLES_FACTOR", "1"))
"""How many times more examples to explore than in a usual run; with more than one, they are not the same ones each time."""

_prefixes = itertools.count()

ON_MEMORY, ON_FILES, ON_ETCD = 80, 6, 3
"""How many examples a usual run explores on each store; the same ones catch the broken protocols below."""

BOUNDED = settings(
    database=None,
    deadline=None,
    derandomize=MORE == 1,
    print_blob=True,
    stateful_step_count=50,
    suppress_health_check=list(HealthCheck),
)


def explore(machine: type[LeaseMachine], examples: int) -> None:
    run_state_machine_as_test(machine, settings=settings(BOUNDED, max_examples=examples * MORE))


# The protocol, on each store


@pytest.mark.timeout(300 * MORE)
def test_whatever_fails_no_two_nodes_own_a_subnet_and_all_come_to_rest_on_memory() -> None:
    explore(LeaseMachine, ON_MEMORY)


@pytest.fixture
def on_files(tmp_path: Path) -> type[LeaseMachine]:
    numbers = itertools.count()

    class OnFiles(LeaseMachine):
        def make_world(self) -> World:
            return FileWorld(tmp_path / str(next(numbers)))

    return OnFiles


@pytest.mark.timeout(300 * MORE)
def test_whatever_fails_no_two_nodes_own_a_subnet_and_all_come_to_rest_on_files(on_files: type[LeaseMachine]) -> None:
    explore(on_files, ON_FILES)


@pytest.fixture
def on_etcd(etcd: EtcdServer) -> type[LeaseMachine]:
    class OnEtcd(LeaseMachine):
        def make_world(self) -> World:
            return EtcdWorld(etcd, f"/model{next(_prefixes)}")

    return OnEtcd


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.mark.timeout(300 * MORE)
def test_whatever_fails_no_two_nodes_own_a_subnet_and_all_come_to_rest_on_etcd(on_etcd: type[LeaseMachine]) -> None:
    explore(on_etcd, ON_ETCD)


# Broken protocols


class RenewsUnconditionally(StoreOn):
    """Renewal writes over whatever is there."""

    async def renew(self, network: Network, lease: Lease) -> Lease:
        while True:
            key, value = records.lease_key(lease.subnets), records.encode_lease(lease)
            found = await self.table.get(key)
            if found is None:
                written = await self.table.create(key, value, network.lease_ttl)
            else:
                written = await self.table.replace(found, value, network.lease_ttl)
            if written is not None:
                return attrs.evolve(lease, version=written.version)


class NeverTriesARenewalAgain(StoreOn):
    """A renewal that finds another version than it knows gives up, although its own write may have made it."""

    async def renew(self, network: Network, lease: Lease) -> Lease:
        known = Record(records.lease_key(lease.subnets), b"", lease.version)
        written = await self.table.replace(known, records.encode_lease(lease), network.lease_ttl)
        if written is None:
            raise LeaseLost("the record has changed")
        return attrs.evolve(lease, version=written.version)


class _Altered(MemoryTable):
    """A table before another one, which has its say."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.get = table.get  # type: ignore[method-assign]
        self.list = table.list  # type: ignore[method-assign]
        self.delete = table.delete  # type: ignore[method-assign]
        self.watch = table.watch  # type: ignore[method-assign]
        self.behind = table


class _TakesNoForAnAnswer(_Altered):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await self.behind.create(key, value, ttl) or Record(key, value, "1", ttl)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        return await self.behind.replace(record, value, ttl) or Record(record.key, value, "1", ttl)


class IgnoresLostRaces(StoreOn):
    """A failed comparison counts as success, and nobody looks again after having written."""

    def __init__(self, table: Table) -> None:
        super().__init__(_TakesNoForAnAnswer(table))

    async def _stands(self, written: Record, lease: Lease) -> bool:
        return True


class _Everlasting(_Altered):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await self.behind.create(key, value)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        return await self.behind.replace(record, value)


class WritesNoLifetime(StoreOn):
    """Records never expire."""

    def __init__(self, table: Table) -> None:
        super().__init__(_Everlasting(table))


class _ShortLived(_Altered):
    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await self.behind.create(key, value, ttl / 2)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        return await self.behind.replace(record, value, ttl / 2)


class PromisesTooMuch(StoreOn):
    """Records expire earlier than the node was told."""

    def __init__(self, table: Table) -> None:
        super().__init__(_ShortLived(table))


class ReclaimsByAddress(StoreOn):
    """A node takes over what another wrote from behind the same address, whatever has become of it since."""

    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        for key, record in sorted((await self.table.list(records.LEASE_PREFIX)).items()):
            found = records.readable_lease(key, record.value)
            if found is not None and found.public_ipv4 == request.public_ipv4:
                lease = attrs.evolve(found, node=request.node, run=request.run)
                return await RenewsUnconditionally.renew(self, network, lease)  # type: ignore[arg-type]
        return await super().acquire(network, request)


class ForgetsItsOwn(StoreOn):
    """A node that restarts takes any free subnet, and leaves what it held to expire."""

    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        while True:
            held = await self.table.list(records.LEASE_PREFIX)
            subnets = choosing.choose_free(network, [records.parse_lease_key(key) for key in held])
            lease = Lease(subnets, request.public_ipv4, node=request.node, run=request.run)
            value = records.encode_lease(lease)
            created = await self.table.create(records.lease_key(subnets), value, network.lease_ttl)
            if created is not None:
                return attrs.evolve(lease, version=created.version)


class GivesUpWhatVanished(StoreOn):
    """A node whose record has vanished, as in a wiped store, takes it for lost without looking who has the subnet now."""

    async def renew(self, network: Network, lease: Lease) -> Lease:
        if await self.table.get(records.lease_key(lease.subnets)) is None:
            raise LeaseLost("the record has vanished")
        return await super().renew(network, lease)


def expect_caught(machine: type[LeaseMachine], laws: str, examples: int) -> None:
    """The law that is expected to be broken has to be, by what a usual run explores.

    Who comes to rest is looked at only if that is the law: it changes nothing of what is explored before.
    """
    machine.at_rest = "no rest" in laws
    limits = settings(BOUNDED, max_examples=examples, phases=[Phase.generate], derandomize=True)
    with pytest.raises(AssertionError, match=f"^({laws}): "):
        run_state_machine_as_test(machine, settings=limits)


@pytest.mark.parametrize(
    ("broken", "laws"),
    [
        (RenewsUnconditionally, "two owners|claim lost"),
        (NeverTriesARenewalAgain, "claim lost"),
        (IgnoresLostRaces, "two owners|claim lost"),
        (WritesNoLifetime, "no rest"),
        (PromisesTooMuch, "claim lost|two owners"),
        (ReclaimsByAddress, "two owners|claim lost"),
        (ForgetsItsOwn, "subnet not kept"),
        (GivesUpWhatVanished, "claim lost"),
    ],
)
def test_a_broken_protocol_is_caught(broken: Callable[[Table], TableStore], laws: str) -> None:
    class Broken(LeaseMachine):
        make_store = broken

    expect_caught(Broken, laws, ON_MEMORY)


@pytest.mark.parametrize(
    ("broken", "laws"),
    [
        (NeverTriesARenewalAgain, "claim lost"),
        (IgnoresLostRaces, "two owners|claim lost"),
        (PromisesTooMuch, "claim lost|two owners"),
    ],
)
def test_a_broken_protocol_is_caught_on_files(
    on_files: type[LeaseMachine], broken: Callable[[Table], TableStore], laws: str
) -> None:
    on_files.make_store = broken
    expect_caught(on_files, laws, ON_FILES)


@pytest.mark.parametrize(
    ("broken", "laws"), [(NeverTriesARenewalAgain, "claim lost"), (IgnoresLostRaces, "two owners|claim lost")]
)
def test_a_broken_protocol_is_caught_on_etcd(
    on_etcd: type[LeaseMachine], broken: Callable[[Table], TableStore], laws: str
) -> None:
    on_etcd.make_store = broken
    expect_caught(on_etcd, laws, ON_ETCD)


def test_a_node_that_ignores_the_end_of_its_lease_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(LeaseKeeper):
        @property
        def deadline(self) -> float:
            return math.inf

        @deadline.setter
        def deadline(self, value: float) -> None:
            self.until = value

    class Broken(LeaseMachine):
        pass

    monkeypatch.setattr("tests.conformance.lease_nodes.LeaseKeeper", Careless)
    expect_caught(Broken, "claim lost|two owners", ON_MEMORY)
