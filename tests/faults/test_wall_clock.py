"""Real daemons under traffic, on a real etcd and on files, on a host whose wall clock is set by a day, and back by two."""

import datetime
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import NETWORK, SWITCH_ADDRESS, Host, Lab, wait_until
from tests.faults.processor import cpu_seconds
from tests.faults.wall_clock import WallClock

DAY = 86_400
PATIENCE = 30.0
TTL = 6
SUBNETS = {"host-a": "10.244.1.0/24", "host-b": "10.244.2.0/24"}


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Three hosts; the third one's daemon starts later, and had the subnet of the second once."""
    with Lab("wallclock", hosts=3) as lab:
        lab.hosts[2].seed_subnet_file(IPv4Network(SUBNETS["host-b"]))
        yield lab


@pytest.fixture(params=["etcd", "files"])
def store(request: pytest.FixtureRequest, lab: Lab) -> Iterator[list[str | Path]]:
    if request.param == "files":
        yield lab.file_store
    else:
        with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name) as server:
            yield ["--store", "etcd", "--etcd-endpoints", server.endpoint]


def overlaynet(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-P", "-m", "overlaynet", *arguments]


def subnet_of(host: Host) -> str:
    """What the status says."""
    subnets: Any = host.status()["subnets"]
    return str(subnets[0])


def renewals(host: Host) -> int:
    return len([record for record in host.daemon.records if record["message"] == "lease renewed"])


def is_told(host: Host, step: float) -> bool:
    """True if the last line of the daemon's log has about this time."""
    told = datetime.datetime.fromisoformat(host.daemon.records[-1]["time"])
    right = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=step)
    return abs(told - right) < datetime.timedelta(seconds=PATIENCE)


def complaints(hosts: list[Host]) -> list[dict[str, Any]]:
    """What the logs say of anything that is not as it was, or should be."""
    expected = ("lease renewed", "peer added")
    after_start = [record for host in hosts for record in _since_ready(host.daemon.records)]
    return [record for record in after_start if record["level"] != "info" or record["message"] not in expected]


def _since_ready(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ready = [record["message"] for record in records].index("ready")
    return records[ready + 1 :]


@contextmanager
def pinging(lab: Lab) -> Iterator[None]:
    """Pings all the time, from the first host's container to the second's; each has to come back, but for the very last."""
    command = ["ping", "-n", "-q", "-i", "0.05", str(lab.containers[1].ip)]
    process = lab.containers[0].namespace.popen(command, stdout=subprocess.PIPE)
    try:
        yield
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=PATIENCE)[0].decode()
    finally:
        process.kill()
        process.wait()
    match = re.search(r"(\d+) packets transmitted, (\d+) received", output)
    assert match is not None, output
    sent, received = map(int, match.groups())
    assert sent > 50
    assert received >= sent - 1, output


def check_leases(host: Host, store: list[str | Path], expected: dict[str, str]) -> None:
    found = json.loads(host.namespace.execute(overlaynet("leases", "--json", *store), timeout=PATIENCE).stdout)
    assert {lease["node"]: lease["subnets"] for lease in found["leases"]} == {
        node: [subnet] for node, subnet in expected.items()
    }
    assert len(found["leases"]) == len(expected)
    assert all(0 < lease["expires_in_seconds"] <= TTL for lease in found["leases"]), found


def test_a_wall_clock_that_is_set_under_running_daemons_changes_nothing(
    lab: Lab, store: list[str | Path], wall_clock: WallClock
) -> None:
    a, b, c = lab.hosts
    lab.switch.execute(overlaynet("network", "set", *store, "--network", str(NETWORK), "--lease-ttl", str(TTL)))
    with wall_clock.shown():
        a.start_overlaynet(store)
    b.start_overlaynet(store)
    lab.wait_until_acquainted()
    for host in (a, b):
        host.connect_containers()
    wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), PATIENCE, "a ping to arrive")
    running, leased = [a, b], dict(SUBNETS)
    with pinging(lab):
        for step in (DAY, -DAY):
            wall_clock.set(step)
            began, cpu, before = time.monotonic(), cpu_seconds(a.daemon), [renewals(a), renewals(b)]
            wait_until(lambda: is_told(a, step), PATIENCE, "the daemon to go by the clock")  # noqa: B023 - awaited at once
            for host, count in zip((a, b), before, strict=True):
                wait_until(lambda: renewals(host) >= count + 2, PATIENCE, "renewals")  # noqa: B023
            took = time.monotonic() - began
            assert renewals(a) - before[0] <= took / (TTL / 3) + 2, "no more than before"
            assert cpu_seconds(a.daemon) - cpu < took / 2, "it does not spin"
            if not c.daemons:
                with wall_clock.shown():
                    c.start_overlaynet(store)
                leased[c.label] = subnet_of(c)
                assert leased[c.label] not in SUBNETS.values()
                running.append(c)
            for host in running:
                status = host.status()
                assert (status["ready"], status["problems"], status["subnets"]) == (True, {}, [leased[host.label]])
                assert status["skipped_records"] == []
                assert 0 < int(str(status["lease_seconds_left"])) <= TTL
            check_leases(b, store, leased)
            with wall_clock.shown():
                check_leases(a, store, leased)
    assert complaints(running) == []
    assert all(host.daemon.running for host in running)
