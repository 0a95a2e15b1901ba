"""Fleets of whole daemons, with faults for all at once: at the end, every node's peer table is the truth."""

import asyncio
from ipaddress import IPv4Network

import attrs
import pytest

from bench.convergence import fleet, measure_memory_store
from overlaynet.model import Subnets
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.stores.memory import MemoryTable
from overlaynet.table import Table
from overlaynet.testing.clock import VirtualClockLoop
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.relay import Relay

pytestmark = pytest.mark.anyio

PATIENCE = 60.0


def test_a_hundred_nodes_join_at_once_lose_a_third_and_take_it_back() -> None:
    figures, _ = measure_memory_store(100)
    assert [figure.phase for figure in figures] == ["all join", "a third killed", "it comes back"]
    # Whatever others do, a node asks the store as often as if it were alone.
    few, _ = measure_memory_store(10)
    for small, large in zip(few, figures, strict=True):
        assert large.requests <= 2 * small.requests + 2


@pytest.mark.parametrize("wrong", ["address", "subnet", "holder"])
def test_a_table_of_the_right_length_that_is_not_what_the_store_has_is_no_convergence(wrong: str) -> None:
    async def run() -> None:
        table = MemoryTable()
        async with fleet(3, lambda _: table.another()) as nodes:
            nodes.start(nodes.members)
            await nodes.converge(PATIENCE)
            backend = nodes.members[0].drivers.backends[-1]
            first, second = backend.peers
            if wrong == "address":
                backend.peers = (attrs.evolve(first, public_ipv4=second.public_ipv4), second)
            elif wrong == "subnet":
                backend.peers = (attrs.evolve(first, subnets=Subnets(IPv4Network("10.255.255.0/24"))), second)
            else:
                assert backend.lease is not None
                backend.lease = attrs.evolve(backend.lease, subnets=Subnets(IPv4Network("10.255.255.0/24")))
            with pytest.raises(AssertionError, match="knows other peers|not what node-0 has"):
                await nodes.converge(1.0)

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(run())


async def test_twenty_nodes_on_etcd_over_a_restart_of_it_and_a_partition() -> None:
    with EtcdServer() as etcd:
        async with Relay("127.0.0.1", int(etcd.endpoint.rpartition(":")[2])) as relay:

            def make_table(number: int) -> Table:
                behind_relay = number < 16 and number % 2
                endpoint = f"http://{relay.address}:{relay.port}" if behind_relay else etcd.endpoint
                return EtcdStore(EtcdOptions(endpoints=(endpoint,))).make_table()

            async with fleet(20, make_table) as nodes:
                first, late = nodes.members[:16], nodes.members[16:]
                nodes.start(first)
                await nodes.converge(PATIENCE)
                held = {member.name: member.subnets for member in first}

                await relay.refuse()
                nodes.start(late)
                with pytest.raises(AssertionError, match="knows 15 peers of 19"):
                    await nodes.converge(2.0)

                etcd.kill()
                await nodes.kill(first[:6])
                await asyncio.to_thread(etcd.start)
                nodes.start(first[:6])
                await relay.accept()
                await nodes.converge(PATIENCE)
                assert {member.name: member.subnets for member in first} == held
