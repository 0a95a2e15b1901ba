"""What the bench reads from the kernel, iperf3 and ping, and which datagrams it sends."""

import os
import time
from collections import Counter
from ipaddress import IPv4Network

import pytest

from bench import cpu, spray, traffic

NETWORK = IPv4Network("10.128.0.0/9")


def test_work_is_all_but_idling_waiting_and_stolen_time() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    #       user nice system idle iowait irq softirq steal guest guest_nice
    stat = "cpu  1    2    4      8    16     32  64      128   256   512\ncpu0 9 9 9 9 9 9 9 9 9 9\n"
    assert cpu.parse_busy(stat) == (1 + 2 + 4 + 32 + 64) / ticks


def test_a_process_with_a_strange_name_is_read() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    stat = "42 (a ) b) S 1 42 42 0 -1 4194304 100 0 0 0 300 50 7 7 20 0 1 0 12345"
    assert cpu.parse_process(stat) == 350 / ticks


def test_the_accounts_of_this_machine_can_be_read() -> None:
    busy, own = cpu.busy(), cpu.processes([os.getpid()])
    while time.process_time() < own + 0.05:
        pass
    assert cpu.processes([os.getpid()]) > own
    assert cpu.busy() > busy
    assert cpu.machine().cores >= 1


def test_pings_are_read_one_by_one() -> None:
    output = (
        "64 bytes from 10.0.0.1: icmp_seq=1 ttl=63 time=0.187 ms\n64 bytes: icmp_seq=2 ttl=63 time<1 ms\nrtt min/avg"
    )
    assert traffic.read_pings(output) == [0.187, 1.0]


def test_no_answer_to_pings_is_an_error() -> None:
    with pytest.raises(traffic.TrafficError, match="100% packet loss"):
        traffic.read_pings("PING 10.0.0.1\n\n5 packets transmitted, 0 received, 100% packet loss\n")


@pytest.mark.parametrize("count", [1, 2, 10, 100, 1_000, 10_000])
def test_flows_are_spread_evenly_over_all_subnets(count: int) -> None:
    subnets = spray.subnets(NETWORK, count)
    assert len(set(subnets)) == count
    assert all(subnet.subnet_of(NETWORK) for subnet in subnets)
    addresses = spray.addresses(NETWORK, count)
    assert len(set(addresses)) == spray.FLOWS
    size = subnets[0].num_addresses
    shares = Counter((int(address) - int(NETWORK.network_address)) // size for address in addresses)
    assert set(shares) == set(range(count))
    assert max(shares.values()) - min(shares.values()) <= 1


def test_no_flow_uses_an_address_of_the_bridge_or_its_container() -> None:
    bridge = IPv4Network((NETWORK.network_address, 24))
    for count in (1, 2, 10_000):
        assert not [address for address in spray.addresses(NETWORK, count) if address in bridge]


def test_both_ends_of_a_flow_lie_at_the_same_place() -> None:
    other = IPv4Network("10.0.0.0/9")
    offset = int(NETWORK.network_address)
    assert [int(address) - offset for address in spray.addresses(NETWORK, 10)] == [
        int(address) - int(other.network_address) for address in spray.addresses(other, 10)
    ]
