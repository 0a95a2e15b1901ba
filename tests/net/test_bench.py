"""The bench for real, as short as it goes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from bench import peers, site, spray, traffic
from bench.command import PATHS
from bench.measures import MEASURES
from overlaynet.testing import namespaces
from overlaynet.testing.capture import Capture, Packet
from overlaynet.testing.daemons import wait_until
from overlaynet.testing.namespaces import NetworkNamespace
from overlaynet.testing.packets import UDP

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def bench(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """``make bench``, which is ended with the block if it still runs."""
    command = [sys.executable, "-m", "bench", "--quick", *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def left_by(process: subprocess.Popen[str]) -> list[str]:
    return [name for name in namespaces.names() if name.startswith(f"overlaynet-{process.pid}-")]


def test_a_quick_run_measures_everything_and_leaves_nothing(tmp_path: Path) -> None:
    json_file, chart = tmp_path / "run.json", tmp_path / "run.svg"
    options = ["--paths", "host,native", "--peers", "10", "--engines", "native", "--pings", "5"]
    with bench(*options, "--json", json_file, "--chart", chart) as process:
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert "left)" in output
    assert "overlaynet, native" in output
    found = json.loads(json_file.read_text())
    kernel = {measure.name for measure in MEASURES} - {"cpu_daemons"}
    assert set(found["paths"]["wire"]["host"]) == kernel
    assert set(found["paths"]["wire"]["native"]) == kernel | {"cpu_daemons"}
    assert set(found["peers"]["native"]["10"]) == {measure.name for measure in peers.MEASURES}
    figures = [figure for path in found["paths"]["wire"].values() for rounds in path.values() for figure in rounds]
    assert all(figure > 0 for figure in figures)
    assert found["engines"]["wire"]["native"]["a"]["engine"] == "native"
    assert "overlaynet, native" in chart.read_text()
    assert not left_by(process)


def test_an_interrupted_run_leaves_nothing_and_keeps_what_it_has_found(tmp_path: Path) -> None:
    json_file = tmp_path / "run.json"
    options: list[str | Path] = [
        "--paths",
        "host,native",
        "--rounds",
        "50",
        "--pings",
        "1",
        "--peers",
        "none",
        "--json",
        json_file,
    ]
    with bench(*options) as process:
        assert process.stdout is not None
        while "overlaynet, native" not in (line := process.stdout.readline()):
            assert line, "it ended by itself"
        wait_until(lambda: len(left_by(process)) == 4, 10, "its hosts and containers")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "interrupted" in output
    assert not left_by(process)
    assert set(json.loads(json_file.read_text())["paths"]["wire"]) == {"host"}


@pytest.mark.parametrize(("mode", "whole"), [("wire", True), ("plain", False)])
def test_only_in_the_wire_like_mode_frames_are_as_small_as_on_a_wire(mode: str, whole: bool) -> None:
    with site.build(mode) as hosts, PATHS["vxlan"].open(hosts) as way:
        with Capture({"sender": (hosts.a.namespace, "eth0")}, limit=1 << 24) as capture:
            assert traffic.tcp(way, 1, 1).size > 1 << 20
        sizes = [len(packet.data) for packet in capture.packets if packet.outgoing]
    assert (max(sizes) <= 1500 + 14) is whole
    assert max(sizes) > 1400


def test_a_transfer_that_fails_is_an_error_in_words_of_iperf3() -> None:
    with site.build("wire") as hosts, PATHS["host"].open(hosts) as way:
        hosts.b.namespace.ip("link set eth0 down")
        with pytest.raises(traffic.TrafficError, match="iperf3 failed: unable to connect"):
            traffic.tcp(way, 1, 1)
        with pytest.raises(traffic.TrafficError, match="no ping was answered"):
            traffic.round_trip(way, 1)


def test_a_port_that_is_taken_is_an_error_of_the_server() -> None:
    with site.build("wire") as hosts, PATHS["host"].open(hosts) as way, way.server.socket() as taken:
        taken.bind(("0.0.0.0", 5201))
        taken.listen()
        with pytest.raises(traffic.TrafficError, match="the iperf3 server did not start: .*Address already in use"):
            traffic.tcp(way, 1, 1)


def test_there_is_a_buffer_for_datagrams_as_large_as_the_kernel_allows() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as each:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, traffic.socket_buffer())
        # The kernel takes twice as much, for its own needs, and cuts what is more than it allows (socket(7)).
        assert each.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * traffic.socket_buffer()


@pytest.mark.parametrize("name", [name for name, path in PATHS.items() if path.packages])
def test_other_tunnels_come_up_and_leave_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = PATHS[name]
    if name == "flanneld":
        # No package has it. overlaynet takes flannel's options, and answers for it: how the bench goes about it is tested,
        # and flannel itself is not.
        program = tmp_path / "flanneld"
        run = f"{sys.executable} -m overlaynet run --backend udp --store etcd --state-directory {tmp_path}/state"
        program.write_text(f'#!/bin/sh\nexec {run} --status-socket "{tmp_path}/$$.sock" "$@"\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert not path.missing(), "scripts/setup test installs them"
    with site.build("wire") as hosts:
        with path.open(hosts) as way:
            assert traffic.round_trip(way, 3) > 0
            assert len(way.daemons) == 2
        # Nothing of it is left: packets find no way any more.
        with pytest.raises(traffic.TrafficError):
            traffic.round_trip(way, 1)


@pytest.mark.parametrize("run", [1, spray.BATCH])
def test_each_flow_is_sent_in_its_turn_from_its_own_address(run: int) -> None:
    pairs = [(IPv4Address(f"10.0.1.{number}"), IPv4Address(f"10.0.2.{number}")) for number in range(1, 33)]
    with NetworkNamespace(label="spray") as namespace:
        namespace.ip("link set lo up", "route add local 10.0.0.0/8 dev lo")
        with namespace.socket(type=socket.SOCK_DGRAM) as receiver:
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            receiver.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
            receiver.settimeout(5)
            receiver.bind(("0.0.0.0", spray.PORT))
            assert namespace.run(spray.Sender(64, run, pairs).run, 0.001) >= spray.BATCH
            came = []
            for _ in range(spray.BATCH):
                data, ancillary, _, (source, _) = receiver.recvmsg(2048, 128)
                assert len(data) == 64
                came.append((source, socket.inet_ntoa(ancillary[0][2][8:12])))
    expected = [pairs[place // run] for place in range(spray.BATCH)]
    assert came == [(str(source), str(destination)) for source, destination in expected]


def test_packets_come_from_and_go_to_every_peer() -> None:
    subnets = [spray.subnets(IPv4Network(network), 10) for network in ("10.0.0.0/9", "10.128.0.0/9")]
    host_bits = 32 - subnets[0][0].prefixlen
    seen: set[tuple[int, int]] = set()

    def note(packet: Packet) -> bool:
        if packet.ip is not None and isinstance(packet.ip.transport, UDP):
            header = packet.ip.header
            seen.add((int(header.source) >> host_bits, int(header.destination) >> host_bits))
        return False

    with peers.running("wire", "native") as (hosts, set_peers):
        assert set_peers(10) > 0
        with Capture({"server": (hosts.b.container, "eth0")}, note):
            assert peers.send_to_all(hosts, 64, 1, 10, 1) > 1000
    expected = [[int(subnet.network_address) >> host_bits for subnet in each] for each in subnets]
    assert seen == set(zip(*expected, strict=True))
