"""Kernels that refuse what the engines make use of, one thing at a time, under whole daemons: all is carried on, and told.

A library before libc makes up the refusals (tests/fuzz/refusals.c); the first host's daemon runs with it. All that differs
from a daemon of every day is that it looks at its offloads ten times a second.
"""

import contextlib
import errno
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv6Network
from pathlib import Path
from typing import Any

import pytest

from overlaynet.errors import OverlaynetError
from overlaynet.testing.lab import Container, DaemonProcess, Lab, wait_until
from tests.fuzz.refusals import Call, Refusals
from tests.net.traffic import errors, send_segmented, transfer

PROGRAM = """
import sys
from overlaynet.backends.udp import backend
from overlaynet.cli import main
backend.LOOK_INTERVAL = 0.1
sys.exit(main())
"""
OFFLOADS = {"native": {"tun_tcp", "tun_udp", "udp_segment", "udp_gro"}, "python": {"tun_gro", "udp_segment", "udp_gro"}}
PATIENCE = 30.0
_starts = itertools.count(1)
OUT, IN = 0, 1
"""Which container sends: the first is the refused daemon's."""


class Refused:
    """Two hosts with a container each; the daemon of the first one has an engine of this name, and refusals."""

    def __init__(self, lab: Lab, refusals: Refusals, engine: str) -> None:
        self.lab, self.refusals, self.engine = lab, refusals, engine
        self.host = lab.hosts[0]

    @property
    def daemon(self) -> DaemonProcess:
        return self.host.daemon

    def start(self, *, store: list[str | Path] | None = None) -> DaemonProcess:
        """Start the daemon of the first host."""
        host, store = self.host, store or self.lab.file_store
        command: list[str | Path] = [sys.executable, "-P", "-c", PROGRAM, "run", *store, "--iface", "eth0"]
        command += ["--node", host.label, "--subnet-file", host.subnet_file, "--status-socket", host.status_socket]
        command += ["--state-directory", host.directory / "state", "--log-format", "json"]
        command += ["--udp-engine", self.engine, "--udp-threads", "1"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OVERLAYNET_")}
        log_file = host.directory / f"{self.engine}-{next(_starts)}.log"
        with log_file.open("xb") as log:
            process = host.namespace.popen(
                command, stdout=log, stderr=log, env={**environment, **self.refusals.environment}
            )
        host.daemons.append(DaemonProcess(host.label, process, log_file, host.subnet_file))
        return host.daemon

    def packets(self) -> dict[str, Any]:
        packets = self.host.status()["packets"]
        assert isinstance(packets, dict)
        return packets

    def offloads(self) -> dict[str, str]:
        return dict(self.packets()["offloads"])

    def drops(self) -> dict[str, int]:
        """By reason; but for what the hosts themselves send to everybody, which has no route."""
        return {reason: count for reason, count in self.packets()["drops"].items() if reason != "no_route"}

    def said(self, message: str, since: int = 0) -> list[str]:
        """Of which offloads the log has said this, from a place in it on."""
        return sorted(record["offload"] for record in self.daemon.records[since:] if record["message"] == message)

    def ends(self, direction: int) -> tuple[Container, Container]:
        near, far = self.lab.containers
        return (near, far) if direction == OUT else (far, near)

    def carry(self, *directions: int) -> None:
        """Send streams and datagrams of both versions, and compare what arrives."""
        for direction in directions:
            sender, receiver = self.ends(direction)
            for version, source, address in (
                (4, str(sender.ip), str(receiver.ip)),
                (6, str(sender.ip6), str(receiver.ip6)),
            ):
                transfer(sender.namespace, receiver.namespace, address, streams=1)
                send_segmented(sender.namespace, receiver.namespace, version, source, address)

    def carry_until(self, direction: int, reached: Callable[[], bool]) -> None:
        """Send until something has come of it."""
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < deadline, self.offloads()
            self.carry(direction)

    def wrong(self) -> int:
        """How many packets containers and hosts have found wrong."""
        namespaces = [host.namespace for host in self.lab.hosts]
        namespaces += [container.namespace for container in self.lab.containers]
        return sum(sum(errors(namespace).values()) for namespace in namespaces)

    def make_device_anew(self) -> None:
        """Delete the device: the daemon makes it again, and with it an engine that finds out what the kernel offers."""
        before = len(self.daemon.records)
        self.host.namespace.ip("link delete overlay0")

        def made() -> bool:
            return "device made again" in [record["message"] for record in self.daemon.records[before:]]

        wait_until(made, PATIENCE, "the device to be made again")
        wait_until(self.reaches, PATIENCE, "a ping to arrive by each version")

    def lacks_threads(self) -> bool:
        """Whether the daemon says that it is in want of threads."""
        with contextlib.suppress(OverlaynetError):
            return "TasksMax=" in str(self.host.status()["problems"])
        return False

    def reaches(self) -> bool:
        near, far = self.lab.containers
        return all(near.reaches(far, version=version) for version in (4, 6))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("refusals", overlay6=IPv6Network("fd00:244::/48")) as lab:
        lab.hosts[1].start_overlaynet(lab.file_store, ["--udp-threads", "1"])
        lab.hosts[1].connect_containers()
        yield lab


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Refusals]:
    with contextlib.closing(Refusals(tmp_path_factory.mktemp("refusals"))) as made:
        yield made


@pytest.fixture(scope="module")
def running(lab: Lab, library: Refusals, request: pytest.FixtureRequest) -> Iterator[Refused]:
    library.clear()
    made = Refused(lab, library, request.param)
    made.start().wait_until_ready()
    made.host.connect_containers()
    lab.wait_until_acquainted()
    wait_until(made.reaches, PATIENCE, "a ping to arrive by each version")
    yield made
    assert made.daemon.stop() == 0


@pytest.fixture
def refused(running: Refused) -> Iterator[Refused]:
    """As it is in between: nothing is refused, and nothing fails any more."""
    assert all(state.startswith("on") for state in running.offloads().values())
    wait_until(
        lambda: running.said("offload failing") == running.said("offload works again"), PATIENCE, "the log to say so"
    )
    wrong = running.wrong()
    yield running
    running.refusals.clear()
    assert running.wrong() == wrong


NATIVE = ["native"]
BOTH = ["native", "python"]
both_engines = pytest.mark.parametrize("running", BOTH, indirect=True, scope="module")
native_engine = pytest.mark.parametrize("running", NATIVE, indirect=True, scope="module")
refusal = pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL, errno.EMSGSIZE], ids=errno.errorcode.get)


def falls_back_and_returns(refused: Refused, call: Call, error: int, offloads: set[str], direction: int) -> None:
    """While the call fails, packets go on without these offloads, and no other; then these work again."""
    before, drops, since = refused.offloads(), refused.drops(), len(refused.daemon.records)
    refused.refusals.refuse(call, error)
    refused.carry(direction)
    found = refused.offloads()
    failures = refused.refusals.refused(call)
    assert {name for name, state in found.items() if state != before[name]} == offloads
    for name in offloads:
        assert found[name].startswith(f"failing: {errno.errorcode[error]} (")
    wait_until(lambda: set(refused.said("offload failing", since)) == offloads, PATIENCE, "the log to say so")
    # It is not tried with each send: about once a second for each peer and kind.
    assert 0 < failures < 50
    counted = sum(int(found[name].split("(")[1].split()[0]) - earlier(before[name]) for name in offloads)
    assert counted == failures

    refused.refusals.clear()
    refused.carry_until(direction, lambda: all(refused.offloads()[name].startswith("on ") for name in offloads))
    wait_until(lambda: set(refused.said("offload works again", since)) == offloads, PATIENCE, "the log to say so")
    assert refused.said("offload failing", since) == refused.said("offload works again", since) == sorted(offloads)
    assert refused.drops() == drops


def earlier(state: str) -> int:
    """How often an offload that is on has failed before."""
    return int(state.split()[2]) if "failed" in state else 0


@refusal
@both_engines
def test_sends_of_several_datagrams_are_refused(refused: Refused, error: int) -> None:
    falls_back_and_returns(refused, Call.SEND_SEGMENTED, error, {"udp_segment"}, OUT)


@refusal
@native_engine
def test_writes_of_runs_to_the_device_are_refused(refused: Refused, error: int) -> None:
    falls_back_and_returns(refused, Call.WRITE_RUN, error, {"tun_tcp", "tun_udp"}, IN)


@both_engines
def test_an_interruption_loses_nothing(refused: Refused) -> None:
    before, drops = refused.offloads(), refused.drops()
    for call in (Call.SEND, Call.RECEIVE, Call.WRITE):
        refused.refusals.refuse(call, errno.EINTR, times=50)
    refused.carry(OUT, IN)
    assert refused.refusals.refused(Call.SEND) == refused.refusals.refused(Call.RECEIVE) == 50
    assert refused.offloads() == before
    # In the middle of a run whose packets go one by one.
    refused.refusals.refuse(Call.SEND_SEGMENTED, errno.EIO, times=1)
    refused.refusals.refuse(Call.SEND, errno.EINTR, times=3, skip=4)
    sender, receiver = refused.ends(OUT)
    send_segmented(sender.namespace, receiver.namespace, 4, str(sender.ip), str(receiver.ip))
    assert refused.refusals.refused(Call.SEND) == 3
    assert refused.drops() == drops
    refused.carry_until(OUT, lambda: refused.offloads()["udp_segment"].startswith("on "))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errno.EAGAIN, "send_congested"),
        (errno.ENOBUFS, "send_congested"),
        (errno.ENETUNREACH, "send_unreachable"),
        (errno.ECONNREFUSED, "send_unreachable"),
        (errno.EPERM, "send_refused"),
        (errno.ENODEV, "send_failed"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
@both_engines
def test_sends_fail_for_a_while(refused: Refused, error: int, reason: str) -> None:
    before, drops = refused.offloads(), refused.drops()
    refused.refusals.refuse(Call.SEND, error, times=5, skip=100)
    sender, receiver = refused.ends(OUT)
    transfer(sender.namespace, receiver.namespace, str(receiver.ip), streams=1)
    assert refused.refusals.refused(Call.SEND) == 5
    after = refused.drops()
    assert after[reason] - drops[reason] >= 5
    assert {name for name in after if after[name] != drops[name]} == {reason}
    assert refused.offloads() == before
    refused.carry(OUT)


@pytest.mark.parametrize(
    ("error", "lost"),
    [(errno.EAGAIN, 0), (errno.ENOBUFS, 20), (errno.ENOMEM, 20), (errno.ECONNREFUSED, 20)],
    ids=lambda value: errno.errorcode[value] if value > 20 or value == errno.EAGAIN else "",
)
@both_engines
def test_the_socket_reports_errors_for_a_while(refused: Refused, error: int, lost: int) -> None:
    """They take nothing away with them: what is counted are the errors."""
    before, drops = refused.offloads(), refused.drops()
    refused.refusals.refuse(Call.RECEIVE, error, times=20, skip=100)
    refused.carry(IN)
    assert refused.refusals.refused(Call.RECEIVE) == 20
    after = refused.drops()
    assert after == drops | {"receive_failed": drops["receive_failed"] + lost}
    assert refused.offloads() == before


@native_engine
def test_packets_that_the_kernel_cannot_describe_are_dropped_and_the_device_stays(refused: Refused) -> None:
    """So a TUN device says of a run of a kind that its header has no word for; the run is gone then."""
    drops, since = refused.drops(), len(refused.daemon.records)
    refused.refusals.refuse(Call.READ, errno.EINVAL, times=5)
    refused.carry(OUT, IN)
    assert refused.refusals.refused(Call.READ) == 5
    assert refused.drops() == drops | {"unsupported": drops["unsupported"] + 5}
    assert "device lost" not in [record["message"] for record in refused.daemon.records[since:]]


@pytest.mark.parametrize(
    ("running", "call", "error", "offloads"),
    [
        ("native", Call.DEVICE_UDP, errno.EINVAL, {"tun_udp": "off: EINVAL"}),
        ("native", Call.DEVICE_OFFLOADS, errno.EINVAL, {"tun_tcp": "off: EINVAL", "tun_udp": "off: EINVAL"}),
        ("native", Call.DEVICE_HEADER, errno.EINVAL, {"tun_tcp": "off: ENOTSUP", "tun_udp": "off: ENOTSUP"}),
        *((engine, Call.SOCKET_SEGMENT, errno.ENOPROTOOPT, {"udp_segment": "off: ENOPROTOOPT"}) for engine in BOTH),
        *((engine, Call.SOCKET_GRO, errno.ENOPROTOOPT, {"udp_gro": "off: ENOPROTOOPT"}) for engine in BOTH),
        ("python", Call.DEVICE_GRO, errno.EINVAL, {"tun_gro": "off: ENOTSUP"}),
        ("python", Call.GRO_TIMEOUT, errno.EROFS, {"tun_gro": "off: EROFS"}),
    ],
    indirect=["running"],
    scope="module",
    ids=lambda value: value.name if isinstance(value, Call) else value if isinstance(value, str) else "",
)
def test_the_kernel_does_not_offer_it(refused: Refused, call: Call, error: int, offloads: dict[str, str]) -> None:
    drops, since = refused.drops(), len(refused.daemon.records)
    refused.refusals.refuse(call, error)
    refused.make_device_anew()
    assert refused.refusals.refused(call) > 0
    assert refused.offloads() == dict.fromkeys(OFFLOADS[refused.engine], "on") | offloads
    refused.carry(OUT, IN)
    assert refused.offloads() == dict.fromkeys(OFFLOADS[refused.engine], "on") | offloads
    wait_until(lambda: set(refused.said("offload failing", since)) == set(offloads), PATIENCE, "the log to say so")

    refused.refusals.clear()
    refused.make_device_anew()
    assert refused.offloads() == dict.fromkeys(OFFLOADS[refused.engine], "on")
    wait_until(lambda: set(refused.said("offload works again", since)) == set(offloads), PATIENCE, "the log to say so")
    assert refused.said("offload failing", since) == refused.said("offload works again", since) == sorted(offloads)
    after = refused.drops()
    # What nobody could take while there was no device is no loss of the engine's.
    assert {name for name in after if after[name] != drops[name]} <= {"device_failed"}


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO], ids=errno.errorcode.get)
@native_engine
def test_a_device_that_takes_nothing_with_its_header_is_made_again_without(refused: Refused, error: int) -> None:
    refused.refusals.refuse(Call.WRITE, error)
    refused.make_device_anew()
    refusal = refused.daemon.wait_for("device refuses packets with the header that offloads need")
    assert refusal["reason"] == os.strerror(error)
    assert "device lost" not in [record["message"] for record in refused.daemon.records[-3:]]
    (link,) = refused.host.namespace.ip_json("link", "show", "overlay0")
    assert not link["linkinfo"]["info_data"]["vnet_hdr"]
    without = {"tun_tcp": "off: ENOTSUP", "tun_udp": "off: ENOTSUP", "udp_segment": "on", "udp_gro": "on"}
    assert refused.offloads() == without
    refused.carry(OUT, IN)
    assert refused.offloads() == without
    assert refused.packets()["drops"]["device_failed"] > 0
    # For as long as it runs; another daemon tries again.
    refused.make_device_anew()
    assert refused.offloads() == without
    refused.refusals.clear()
    assert refused.daemon.stop() == 0
    refused.start().wait_until_ready()
    wait_until(refused.reaches, PATIENCE, "a ping to arrive by each version")
    assert set(refused.offloads().values()) == {"on"}


@both_engines
def test_where_no_thread_is_to_be_had_the_daemon_ends_with_one_sentence_and_one_that_runs_goes_on(
    refused: Refused,
) -> None:
    assert refused.daemon.stop() == 0
    host, refusals = refused.host, refused.refusals
    for given in itertools.count():
        refusals.refuse(Call.THREAD, errno.EAGAIN, skip=given)
        daemon = refused.start()
        wait_until(lambda: not refused.daemon.running or refused.lacks_threads(), PATIENCE, "the daemon to meet it")
        if daemon.running:
            break
        assert (daemon.exit_status, "Traceback" in daemon.log) == (1, False), daemon.log
        assert daemon.log.splitlines()[-1].startswith("overlaynet: "), daemon.log
        assert "raise the limit of tasks: TasksMax=" in daemon.log.splitlines()[-1]
        assert "overlay0" not in [link["ifname"] for link in host.namespace.ip_json("link", "show")]
        assert not host.status_socket.exists()
    assert given > 5

    # What needs a thread is tried again; what the daemon carries, it carries on.
    for _ in range(2):
        refusals.clear()
        wait_until(lambda: refused.host.status()["ready"] and not refused.lacks_threads(), PATIENCE, "it to be well")
        wait_until(refused.reaches, PATIENCE, "a ping to arrive by each version")
        refusals.refuse(Call.THREAD, errno.EAGAIN)
        host.namespace.ip("link set lo mtu 65535", "link set lo mtu 65536")  # a reason to look at all links
        wait_until(refused.lacks_threads, PATIENCE, "the status to tell")
        refused.carry(OUT, IN)
    # It ends with all that it holds, and says what could not be done.
    assert daemon.stop() == 1
    assert "Traceback" not in daemon.log
    assert "TasksMax=" in daemon.log.splitlines()[-1], daemon.log
    assert "overlay0" not in [link["ifname"] for link in host.namespace.ip_json("link", "show")]
    refusals.clear()
    refused.start().wait_until_ready()
    wait_until(refused.reaches, PATIENCE, "a ping to arrive by each version")
