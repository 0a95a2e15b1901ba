"""What somebody does to a running node's kernel is mended, and told by these lines and no others, for each backend."""

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import pytest

from overlaynet.testing.lab import SWITCH_ADDRESS, Host, Lab, wait_until
from tests.faults.picture import picture

PATIENCE = 30.0
DEFAULT_ROUTE = f"route replace default via {SWITCH_ADDRESS.ip}"


@attrs.frozen
class Fault:
    """Something that is done to the first host, and undone where that is not the daemon's to do."""

    do: Sequence[str | Callable[[Host], None]]
    told: Sequence[str]
    """What is logged for it: the messages, and of troubles the part."""
    undo: Sequence[str | Callable[[Host], None]] = ()
    told_then: Sequence[str] = ()


def sysctl(name: str, value: int) -> Callable[[Host], None]:
    return lambda host: host.namespace.set_sysctl(name, value)


def forget_the_way_to_the_peer(host: Host) -> None:
    """Delete the forwarding entry of the other host's device."""
    (entry, *_) = [
        line
        for line in host.namespace.execute(["bridge", "fdb", "show", "dev", "overlay0"]).stdout.splitlines()
        if "172.16.130.164" in line
    ]
    host.namespace.execute(["bridge", "fdb", "del", entry.split()[0], "dev", "overlay0", "self"])


TROUBLE = ["degraded underlay"]
NO_TROUBLE = ["recovered underlay"]
ALL_FLUSHED = Fault(["route flush proto 82"], ["routes changed"])
MTU = Fault(
    ["link set eth0 mtu 1400"],
    ["underlay changed", "subnet file written"],
    ["link set eth0 mtu 1500"],
    ["underlay changed", "subnet file written"],
)
FORWARDING = Fault(
    [sysctl("net.ipv4.ip_forward", 0)],
    ["this host does not forward containers' packets"],
    [sysctl("net.ipv4.ip_forward", 1)],
    ["this host forwards containers' packets again"],
)
UNDERLAY_DOWN = Fault(["link set eth0 down"], TROUBLE, ["link set eth0 up", DEFAULT_ROUTE], NO_TROUBLE)
UNDERLAY_BARE = Fault(
    ["address flush dev eth0"], TROUBLE, ["address add 172.16.130.140/24 dev eth0", DEFAULT_ROUTE], NO_TROUBLE
)
ROUTE_TAKEN = ["degraded routes"], ["recovered routes", "routes changed"]

FAULTS: Mapping[str, Mapping[str, Fault]] = {
    "udp": {
        "a route deleted": Fault(["route delete 10.244.0.0/16 dev overlay0"], ["routes changed"]),
        "all routes deleted": ALL_FLUSHED,
        "a route replaced": Fault(
            ["route replace 10.244.0.0/16 dev eth0"],
            ROUTE_TAKEN[0],
            ["route delete 10.244.0.0/16 dev eth0"],
            ROUTE_TAKEN[1],
        ),
        "the device deleted": Fault(["link delete overlay0"], ["device lost", "device made again", "routes changed"]),
        "the device set down": Fault(["link set overlay0 down"], ["device mended it was down", "routes changed"]),
        "the device's MTU": Fault(["link set overlay0 mtu 1000"], ["device mended MTU"]),
        "the device's address removed": Fault(
            ["address flush dev overlay0"], ["device mended addresses", "routes changed"]
        ),
        "an address added to the device": Fault(["address add 10.9.9.9/32 dev overlay0"], ["device mended addresses"]),
        "a parameter of the device": Fault(
            [sysctl("net.ipv4.conf.overlay0.accept_local", 0), "link set overlay0 mtu 1000"],
            ["device mended MTU, accept_local"],
        ),
        "the underlay set down": UNDERLAY_DOWN,
        "the underlay's address removed": UNDERLAY_BARE,
        "the underlay's MTU": MTU,
        "forwarding switched off": FORWARDING,
    },
    "vxlan": {
        "a route deleted": Fault(["route delete 10.244.2.0/24"], ["routes changed"]),
        "all routes deleted": ALL_FLUSHED,
        "a route replaced": Fault(
            ["route replace 10.244.2.0/24 dev eth0"],
            ROUTE_TAKEN[0],
            ["route delete 10.244.2.0/24 dev eth0"],
            ROUTE_TAKEN[1],
        ),
        "the device deleted": Fault(["link delete overlay0"], ["device was gone", "tunnels changed", "routes changed"]),
        "the device set down": Fault(
            ["link set overlay0 down"], ["device mended it was down", "tunnels changed", "routes changed"]
        ),
        "the device's MTU": Fault(["link set overlay0 mtu 1300"], ["device mended MTU"]),
        "the device's address removed": Fault(
            ["address flush dev overlay0"], ["device mended addresses", "tunnels changed", "routes changed"]
        ),
        "an address added to the device": Fault(["address add 10.9.9.9/32 dev overlay0"], ["device mended addresses"]),
        "a parameter of the device": Fault(
            [sysctl("net.ipv6.conf.overlay0.accept_ra", 1), "link set overlay0 mtu 1300"],
            ["device mended MTU, accept_ra"],
        ),
        "a forwarding entry deleted": Fault([forget_the_way_to_the_peer], ["tunnels changed"]),
        "a neighbour deleted": Fault(["neighbour delete 10.244.2.0 dev overlay0"], ["tunnels changed"]),
        "the underlay set down": UNDERLAY_DOWN,
        "the underlay's address removed": UNDERLAY_BARE,
        "the underlay's address": Fault(
            ["address flush dev eth0", "address add 172.16.130.77/24 dev eth0", DEFAULT_ROUTE],
            ["underlay changed", "device replaced", "address published", "tunnels changed", "routes changed"],
            ["address flush dev eth0", "address add 172.16.130.140/24 dev eth0", DEFAULT_ROUTE],
            ["underlay changed", "device replaced", "address published", "tunnels changed", "routes changed"],
        ),
        "the underlay's MTU": MTU,
        "forwarding switched off": FORWARDING,
    },
    "host-gw": {
        "a route deleted": Fault(["route delete 10.244.2.0/24"], ["routes changed"]),
        "all routes deleted": ALL_FLUSHED,
        "the underlay set down": attrs.evolve(
            UNDERLAY_DOWN, told=[*TROUBLE, "peer not reachable"], told_then=[*NO_TROUBLE, "routes changed"]
        ),
        "the underlay's address removed": attrs.evolve(
            UNDERLAY_BARE, told=[*TROUBLE, "peer not reachable"], told_then=[*NO_TROUBLE, "routes changed"]
        ),
        "the underlay's MTU": MTU,
        "forwarding switched off": FORWARDING,
    },
}


@pytest.fixture
def lab(backend: str) -> Iterator[Lab]:
    with Lab("logged", default_route=True) as lab:
        for host in lab.hosts:
            host.start_overlaynet(lab.file_store, ["--backend", backend])
            host.connect_containers()
        lab.wait_until_acquainted()
        wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), PATIENCE, "a ping to arrive")
        yield lab


def lines(host: Host) -> list[str]:
    """All that the daemon has logged: messages, the part that a trouble is about, and what was mended."""
    return [
        " ".join([record["message"], *(record[field] for field in ("part", "mended") if field in record)])
        for record in host.daemon.records
    ]


def settle(host: Host) -> None:
    """Wait until the daemon has looked at all that has happened until now, which it does once a second, and said so."""
    last, since = lines(host), time.monotonic()
    while time.monotonic() < since + 2.5:
        time.sleep(0.1)
        if lines(host) != last:
            last, since = lines(host), time.monotonic()


def inject(host: Host, commands: Sequence[str | Callable[[Host], None]]) -> None:
    """Do all of it in one moment of the daemon's."""
    os.kill(host.daemon.pid, signal.SIGSTOP)
    try:
        for command in commands:
            if isinstance(command, str):
                host.namespace.ip(command)
            else:
                command(host)
    finally:
        os.kill(host.daemon.pid, signal.SIGCONT)


@pytest.mark.parametrize("backend", FAULTS)
def test_each_change_in_the_kernel_is_mended_and_logged_once(lab: Lab, backend: str) -> None:
    """One after the other on the same node: a line too many is seen at the end, whichever was its reason."""
    host = lab.hosts[0]
    settle(host)
    before, begun = picture(host, versions=[4]), len(lines(host))
    expected: list[str] = []

    def wait_for(told: Sequence[str], what: str) -> None:
        expected.extend(told)
        with contextlib.suppress(TimeoutError):  # what is missing is shown by the comparison
            wait_until(lambda: Counter(lines(host)[begun:]) >= Counter(expected), PATIENCE, what)
        assert not Counter(expected) - Counter(lines(host)[begun:]), f"not told of {what}"

    for name, fault in FAULTS[backend].items():
        inject(host, fault.do)
        wait_for(fault.told, name)
        if fault.undo:
            inject(host, fault.undo)
            wait_for(fault.told_then, f"the end of {name}")
        wait_until(lambda: picture(host, versions=[4]) == before, PATIENCE, f"all to be as it was before {name}")
        wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), PATIENCE, f"a ping to arrive after {name}")
    settle(host)
    # The whole log shows what a line too many belongs to.
    assert Counter(lines(host)[begun:]) - Counter(expected) == Counter(), "\n".join(host.daemon.log_lines())
