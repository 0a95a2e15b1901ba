"""Network namespaces, the lab and its captures, for real: needs root."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP as ScapyICMP  # noqa: N811 - both names are needed
from scapy.layers.inet import IP as ScapyIP  # noqa: N811
from scapy.layers.inet import UDP as ScapyUDP  # noqa: N811
from scapy.packet import Raw

from overlaynet.errors import OverlaynetError
from overlaynet.testing import namespaces
from overlaynet.testing.capture import Capture, Packet
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import NETWORK6, Lab, standing, take_down, wait_until
from overlaynet.testing.namespaces import NamespaceError, NetworkNamespace, requirements
from overlaynet.testing.packets import ICMP, UDP

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    with NetworkNamespace(label="test") as made:
        made.ip("link set lo up")
        yield made


def own_namespace() -> str:
    return os.readlink("/proc/thread-self/ns/net")


class TestNetworkNamespace:
    def test_this_machine_has_what_is_needed(self) -> None:
        assert requirements() == []

    def test_it_exists_only_inside_of_the_with_block(self) -> None:
        with NetworkNamespace(label="test") as made:
            assert made.name in namespaces.names()
            assert made.path.exists()
        assert made.name not in namespaces.names()
        made.close()

    def test_a_name_that_is_taken_is_refused(self, namespace: NetworkNamespace) -> None:
        with pytest.raises(NamespaceError, match="File exists"):
            NetworkNamespace(namespace.name)
        assert namespace.name in namespaces.names()

    def test_functions_run_inside_and_the_caller_stays_outside(self, namespace: NetworkNamespace) -> None:
        before = own_namespace()
        inside = namespace.run(own_namespace)
        assert inside != before
        assert own_namespace() == before
        assert namespace.execute(["readlink", "/proc/self/ns/net"]).stdout.strip() == inside

    def test_results_and_errors_come_back(self, namespace: NetworkNamespace) -> None:
        assert namespace.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            namespace.run(divmod, 7, 0)

    def test_coroutines_run_inside(self, namespace: NetworkNamespace) -> None:
        async def work(number: int, *, more: int) -> tuple[str, int]:
            await asyncio.sleep(0)
            return own_namespace(), number + more

        assert namespace.run_async(work, 1, more=2) == (namespace.run(own_namespace), 3)

    def test_an_interrupted_caller_cancels_the_coroutine(self, namespace: NetworkNamespace) -> None:
        events = []

        async def work() -> None:
            try:
                events.append("started")
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(60)
            finally:
                events.append("cancelled")

        with pytest.raises(KeyboardInterrupt):
            namespace.run_async(work)
        assert events == ["started", "cancelled"]

    def test_sockets_belong_to_it(self, namespace: NetworkNamespace) -> None:
        namespace.ip("address add 10.9.9.9/32 dev lo")
        with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as inside:
            inside.bind(("10.9.9.9", 0))
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside,
            pytest.raises(OSError, match="Cannot assign"),
        ):
            outside.bind(("10.9.9.9", 0))

    def test_commands_run_inside(self, namespace: NetworkNamespace) -> None:
        assert namespace.execute(["cat"], input="text").stdout == "text"
        assert namespace.execute(["false"], check=False).returncode == 1
        with pytest.raises(NamespaceError, match=r"`sh -c echo why >&2; exit 3` failed with exit status 3: why"):
            namespace.execute(["sh", "-c", "echo why >&2; exit 3"])
        with pytest.raises(NamespaceError, match="did not end within"):
            namespace.execute(["sleep", "60"], timeout=0.1)

    def test_ip_commands_end_with_the_first_error(self, namespace: NetworkNamespace) -> None:
        with pytest.raises(NamespaceError, match="nowhere"):
            namespace.ip("link add one type bridge", "link set nowhere up", "link add two type bridge")
        links = {link["ifname"] for link in namespace.ip_json("link", "show")}
        assert "one" in links
        assert "two" not in links

    def test_kernel_parameters_are_its_own(self, namespace: NetworkNamespace) -> None:
        path = Path("/proc/sys/net/ipv4/ip_default_ttl")
        before = path.read_text()
        namespace.set_sysctl("net.ipv4.ip_default_ttl", 77)
        assert namespace.run(path.read_text) == "77\n"
        assert path.read_text() == before
        with pytest.raises(NamespaceError, match=r"net.ipv4.no_such_thing cannot be set"):
            namespace.set_sysctl("net.ipv4.no_such_thing", 1)

    def test_closing_kills_what_was_started_and_its_children(self) -> None:
        with NetworkNamespace(label="test") as made:
            alone = made.popen(["sleep", "600"])
            parent = made.popen(["sh", "-c", "sleep 601 & exit 0"])
            parent.wait(10)
            (child,) = set(made.processes()) - {alone.pid}
        assert alone.returncode == -signal.SIGKILL
        # Of an orphan that has ended, no more than its name stays until init asks for it.
        wait_until(lambda: not Path(f"/proc/{child}/ns/net").exists(), 10, "the end of the child")

    def test_what_others_started_is_left_alone(self) -> None:
        with NetworkNamespace(label="test") as made:
            other = subprocess.Popen(["ip", "netns", "exec", made.name, "sleep", "600"])
            wait_until(lambda: other.pid in made.processes(), 10, "the other process")
        try:
            assert other.poll() is None
        finally:
            other.kill()
            other.wait()


@pytest.fixture
def wire() -> Iterator[tuple[NetworkNamespace, NetworkNamespace]]:
    """Two namespaces with a cable between them: 10.9.0.1 and 10.9.0.2."""
    with NetworkNamespace(label="left") as left, NetworkNamespace(label="right") as right:
        left.ip(
            f"link add eth0 address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns {right.name}",
            "link set eth0 up",
            "address add 10.9.0.1/24 dev eth0",
        )
        right.ip("link set eth0 up", "address add 10.9.0.2/24 dev eth0")
        yield left, right


def is_udp(packet: Packet) -> bool:
    return packet.ip is not None and isinstance(packet.ip.transport, UDP)


class TestCapture:
    def test_it_sees_what_scapy_wrote_on_both_ends(self, wire: tuple[NetworkNamespace, NetworkNamespace]) -> None:
        left, right = wire
        inner = ScapyIP(src="10.244.1.96", dst="10.244.2.194", ttl=63) / ScapyICMP(type=8, id=5, seq=6) / Raw(b"ping")
        outer = ScapyIP(src="10.9.0.1", dst="10.9.0.2", ttl=9) / ScapyUDP(sport=8285, dport=8285) / Raw(bytes(inner))
        with (
            Capture({"sent": (left, "eth0"), "received": (right, "eth0")}, is_udp) as capture,
            left.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
        ):
            raw.sendto(bytes(outer), ("10.9.0.2", 0))
            received = capture.wait_for(lambda packet: packet.tap == "received")
        sent = next(packet for packet in capture.packets if packet.tap == "sent")
        assert (sent.outgoing, received.outgoing) == (True, False)
        assert sent.time <= received.time
        for packet in (sent, received):
            assert packet.problem is None
            assert packet.link is not None
            assert (packet.link.source, packet.link.destination) == ("02:00:00:00:00:01", "02:00:00:00:00:02")
            assert packet.ip is not None
            assert packet.ip.header.ttl == 9
            assert packet.ip.inner is not None
            assert packet.ip.inner.data == bytes(inner)
            assert isinstance(packet.ip.inner.transport, ICMP)
            assert (packet.ip.inner.transport.identifier, packet.ip.inner.transport.sequence) == (5, 6)
        assert capture.missed == 0

    def test_it_sees_tun_devices_without_link_header(self, namespace: NetworkNamespace) -> None:
        def open_tun() -> int:
            descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", b"overlay0", IFF_TUN | IFF_NO_PI))
            return descriptor

        device = namespace.run(open_tun)
        try:
            namespace.ip("address add 10.244.1.0/32 dev overlay0", "link set overlay0 up")
            namespace.ip("route add 10.244.0.0/16 dev overlay0")
            with (
                Capture({"overlay0": (namespace, "overlay0")}, is_udp) as capture,
                namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
            ):
                sender.sendto(b"hello", ("10.244.2.194", 9))
                seen = capture.wait_for(lambda packet: True)
        finally:
            os.close(device)
        assert seen.link is None
        assert seen.outgoing
        assert seen.ip is not None
        assert (seen.ip.data, seen.ip.payload) == (seen.data, b"hello")
        assert (seen.ip.header.source, seen.ip.header.destination) == (
            IPv4Address("10.244.1.0"),
            IPv4Address("10.244.2.194"),
        )

    def test_what_cannot_be_read_is_kept_with_the_reason(self, wire: tuple[NetworkNamespace, NetworkNamespace]) -> None:
        left, right = wire
        damaged = bytes.fromhex("020000000002 020000000001 0800") + b"\x45" + bytes(45)
        with (
            Capture({"received": (right, "eth0")}) as capture,
            left.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw,
        ):
            raw.bind(("eth0", 0))
            raw.send(damaged)
            packet = capture.wait_for(lambda packet: packet.problem is not None)
        assert packet.data == damaged
        assert packet.ip is None
        assert packet.problem == "an IPv4 packet of 0 bytes with a header of 20"

    def test_memory_is_bounded_and_what_is_missed_is_counted(
        self, wire: tuple[NetworkNamespace, NetworkNamespace]
    ) -> None:
        left, right = wire
        with (
            Capture({"received": (right, "eth0")}, is_udp, limit=5000) as capture,
            left.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            for _ in range(10):
                sender.sendto(bytes(1000), ("10.9.0.2", 9))
            wait_until(lambda: len(capture.packets) + capture.missed >= 10, 10, "ten packets")
        assert len(capture.packets) == 4
        assert capture.missed == 6

    def test_waiting_in_vain_ends_with_a_clear_message(self, namespace: NetworkNamespace) -> None:
        with (
            Capture({"here": (namespace, "lo")}) as capture,
            pytest.raises(TimeoutError, match=r"no echo reply was captured on here within 0.1 s"),
        ):
            capture.wait_for(lambda packet: True, 0.1, "echo reply")

    def test_waiting_ends_as_soon_as_the_packet_comes(self, namespace: NetworkNamespace) -> None:
        with (
            Capture({"lo": (namespace, "lo")}) as capture,
            namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            late = threading.Timer(0.2, sender.sendto, [b"late", ("127.0.0.1", 9)])
            late.start()
            packet = capture.wait_for(is_udp, 30)
            late.join()
        assert packet.ip is not None
        assert packet.ip.payload == b"late"

    def test_an_error_in_the_filter_is_told(self, namespace: NetworkNamespace) -> None:
        with Capture({"lo": (namespace, "lo")}, lambda packet: bool(1 / 0)) as capture:
            namespace.execute(["ping", "-c", "1", "127.0.0.1"])
            with pytest.raises(OverlaynetError, match="the capture ended: division by zero"):
                capture.wait_for(lambda packet: True)

    def test_an_interface_that_does_not_exist_is_named(self, namespace: NetworkNamespace) -> None:
        with pytest.raises(OverlaynetError, match=r"the interface eth7 in .* cannot be captured: No such device"):
            Capture({"lo": (namespace, "lo"), "eth7": (namespace, "eth7")})

    def test_an_interface_that_goes_away_ends_nothing(self, namespace: NetworkNamespace) -> None:
        namespace.ip("link add gone type bridge", "link set gone up")
        with Capture({"gone": (namespace, "gone"), "lo": (namespace, "lo")}) as capture:
            namespace.ip("link delete gone")
            namespace.execute(["ping", "-c", "1", "127.0.0.1"])
            capture.wait_for(lambda packet: packet.tap == "lo")

    def test_closing_leaves_no_socket_and_no_thread(self, namespace: NetworkNamespace) -> None:
        before = set(os.listdir("/proc/self/fd"))
        capture = Capture({"lo": (namespace, "lo")})
        capture.close()
        capture.close()
        assert set(os.listdir("/proc/self/fd")) == before
        assert not any(thread.name == "capture" for thread in threading.enumerate())


class TestLab:
    def test_it_is_the_documented_design(self) -> None:
        with Lab() as lab:
            first, second = lab.hosts
            assert [str(host.address) for host in lab.hosts] == ["172.16.130.140/24", "172.16.130.164/24"]
            first.connect_containers()
            second.connect_containers()
            assert [str(container.address) for container in lab.containers] == ["10.244.1.96/24", "10.244.2.194/24"]
            routes = {(route["dst"], route["dev"]) for route in first.namespace.ip_json("route", "show")}
            assert routes == {("10.244.1.0/24", "cni0"), ("172.16.130.0/24", "eth0")}
            (inside,) = first.containers
            assert {(route["dst"], route.get("gateway")) for route in inside.namespace.ip_json("route", "show")} == {
                ("default", "10.244.1.1"),
                ("10.244.1.0/24", None),
            }
            mtus = {link["ifname"]: link["mtu"] for link in first.namespace.ip_json("link", "show")}
            assert (mtus["eth0"], mtus["cni0"]) == (1500, 1472)
            first.namespace.execute(["ping", "-c", "1", "-W", "5", str(second.address.ip)])
            inside.namespace.execute(["ping", "-c", "1", "-W", "5", str(first.address.ip)])

    def test_many_hosts_have_addresses_and_names_of_their_own(self) -> None:
        with Lab(hosts=28) as lab:
            assert [host.label for host in lab.hosts[24:]] == ["host-y", "host-z", "host-aa", "host-ab"]
            assert [str(host.address.ip) for host in lab.hosts[1:4]] == [
                "172.16.130.164",
                "172.16.130.165",
                "172.16.130.166",
            ]
            for host in lab.hosts[2:4]:
                host.connect_containers()
            assert [str(container.address) for container in lab.containers[2:4]] == ["10.244.3.10/24", "10.244.4.10/24"]
        with pytest.raises(OverlaynetError, match="from 1 to 92 hosts, not 93"):
            Lab(hosts=93)

    def test_nothing_appears_in_the_machines_own_namespace_and_nothing_is_left(self) -> None:
        def interfaces() -> set[str]:
            return set(os.listdir("/sys/class/net"))

        before = interfaces()
        with Lab() as lab:
            for host in lab.hosts:
                host.connect_containers()
            assert interfaces() == before
            assert standing().count(lab.name) == 1
            name, directory = lab.name, lab.directory
            sleeper = lab.hosts[0].namespace.popen(["sleep", "600"])
        assert sleeper.returncode == -signal.SIGKILL
        assert interfaces() == before
        assert not directory.exists()
        assert not [other for other in namespaces.names() if other.startswith(name)]
        lab.close()

    def test_labs_stand_side_by_side(self) -> None:
        with Lab(hosts=1) as one, Lab(hosts=1) as other:
            assert one.name != other.name
            assert {one.name, other.name} <= set(standing())

    def test_a_failure_while_it_is_made_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(namespace: NetworkNamespace, name: str, value: object) -> None:
            raise NamespaceError("no such luck")

        monkeypatch.setattr(NetworkNamespace, "set_sysctl", fail)
        lab = Lab(label="failing")
        with pytest.raises(NamespaceError, match="no such luck"):
            lab.__enter__()
        prefix = f"overlaynet-failing-{os.getpid()}"
        assert not [other for other in namespaces.names() if other.startswith(prefix)]
        assert not list(Path("/run").glob(f"{prefix}*"))

    def test_sigint_leaves_nothing(self) -> None:
        script = (
            "import time\n"
            "from overlaynet.testing.lab import Lab\n"
            "with Lab('killed') as lab:\n"
            "    lab.hosts[0].namespace.popen(['sleep', '600'])\n"
            "    print(lab.name, flush=True)\n"
            "    time.sleep(600)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            name = process.stdout.readline().strip()
            assert name in standing()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        assert "KeyboardInterrupt" in errors
        assert name not in standing()
        assert not Path("/run", name).exists()

    def test_what_a_killed_process_left_up_can_be_taken_down(self) -> None:
        script = (
            "import os, signal, subprocess\n"
            "from overlaynet.testing.lab import Lab\n"
            "lab = Lab('orphan')\n"
            "lab.open()\n"
            "lab.hosts[0].namespace.popen(['sleep', '600'], stdout=subprocess.DEVNULL)\n"
            "print(lab.name, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False, timeout=60
        )
        assert result.returncode == -signal.SIGKILL
        name = result.stdout.strip()
        assert name in standing()
        wait_until(lambda: namespaces.process_ids(f"{name}-host-a"), 10, "the process that is left")
        (process,) = namespaces.process_ids(f"{name}-host-a")
        assert take_down(name)
        assert name not in standing()
        assert not Path("/run", name).exists()
        wait_until(lambda: not Path(f"/proc/{process}/ns/net").exists(), 10, "the end of the process")
        assert not take_down(name)

    @pytest.mark.parametrize("name", ["../etc", "overlaynet", "overlaynet-demo-1/..", "overlaynet-demo-", ""])
    def test_only_labs_are_taken_down(self, name: str) -> None:
        with pytest.raises(OverlaynetError, match="is not the name of a lab"):
            take_down(name)

    def test_taking_one_lab_down_leaves_those_with_a_longer_name(self) -> None:
        with Lab(hosts=1) as one, Lab(hosts=1) as other, NetworkNamespace(f"{one.name}-7-switch") as third:
            take_down(one.name)
            assert other.name in standing()
            assert third.name in namespaces.names()

    def test_a_link_can_be_cut_and_restored(self) -> None:
        with Lab() as lab:
            first, second = lab.hosts
            ping = ["ping", "-c", "1", "-W", "1", str(second.address.ip)]
            first.namespace.execute(ping)
            first.disconnect()
            assert first.namespace.execute(ping, check=False).returncode != 0
            (link,) = first.namespace.ip_json("link", "show", "dev", "eth0")
            assert "NO-CARRIER" in link["flags"]
            first.reconnect()
            wait_until(lambda: first.namespace.execute(ping, check=False).returncode == 0, 10, "the link")

    def test_containers_follow_a_changed_subnet(self) -> None:
        with Lab(hosts=1, seed=False) as lab:
            (host,) = lab.hosts
            with pytest.raises(OverlaynetError, match="host-a has no subnet yet"):
                host.connect_containers()
            with pytest.raises(OverlaynetError, match="container-a is not plugged in yet"):
                _ = host.containers[0].ip
            host.seed_subnet_file(IPv4Network("10.244.7.0/24"))
            host.connect_containers()
            host.connect_containers()
            assert host.containers[0].ip == IPv4Address("10.244.7.96")
            host.seed_subnet_file(IPv4Network("10.244.8.0/24"))
            host.connect_containers()
            assert host.containers[0].ip == IPv4Address("10.244.8.96")
            host.containers[0].namespace.execute(["ping", "-c", "1", "-W", "5", "10.244.8.1"])

    def test_containers_reach_each_other_once_there_is_an_overlay(self) -> None:
        with Lab(overlay6=NETWORK6, hosts=2) as lab:
            near, far = lab.containers
            with pytest.raises(OverlaynetError, match="container-b is not plugged in yet"):
                near.reaches(far)
            for host in lab.hosts:
                host.start_overlaynet(lab.file_store)
                host.connect_containers()
            lab.wait_until_acquainted()
            for version in (4, 6):
                wait_until(lambda v=version: near.reaches(far, version=v), 20, "a ping to arrive")  # type: ignore[misc]
            assert not near.reaches(far, "-M", "do", "-s", "1473"), "more than the MTU"
            lab.hosts[1].daemon.stop()
            assert not near.reaches(far)


class TestDaemonProcess:
    def test_a_host_without_a_daemon_says_so(self) -> None:
        with Lab(hosts=1) as lab:
            (host,) = lab.hosts
            assert (host.daemons, host.running) == ([], False)
            with pytest.raises(OverlaynetError, match=r"host-a has had no daemon yet: call its start_overlaynet\(\)"):
                host.daemon.stop()

    def test_a_daemon_is_started_watched_and_stopped(self) -> None:
        with Lab() as lab:
            first, second = lab.hosts
            for host in lab.hosts:
                host.start_overlaynet(lab.file_store)
            lab.wait_until_acquainted()
            assert first.status()["subnets"] == ["10.244.1.0/24"]
            assert second.status()["subnets"] == ["10.244.2.0/24"]
            daemon = first.daemon
            assert daemon.wait_for("lease acquired")["subnet"] == "10.244.1.0/24"
            assert daemon.running
            assert daemon.exit_status is None
            assert any("info: ready  subnet=10.244.1.0/24" in line for line in daemon.log_lines())
            assert (first.daemons, first.running) == ([daemon], True)
            with pytest.raises(OverlaynetError, match="overlaynet runs on host-a already"):
                first.start_overlaynet(lab.file_store)
            assert daemon.stop() == 0
            assert not daemon.running
            again = first.start_overlaynet(lab.file_store)
            assert again.log_file != daemon.log_file
            again.kill()
            assert again.exit_status == -signal.SIGKILL

    def test_a_daemon_that_ends_instead_is_told_with_its_last_words(self) -> None:
        with Lab(hosts=1) as lab:
            (host,) = lab.hosts
            with pytest.raises(OverlaynetError, match=r"overlaynet on host-a ended with exit status 2: .*nope"):
                host.start_overlaynet(lab.file_store, ["--backend", "nope"])


def test_waiting_in_vain_says_for_what() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"waited 0.1 s in vain for a miracle"):
        wait_until(lambda: False, 0.1, "a miracle")
    assert time.monotonic() - start >= 0.1
    assert wait_until(lambda: 42, 0, "nothing") == 42


class _Interrupted(BaseException):
    pass


@pytest.mark.parametrize("how", ["popen", "execute", "a namespace", "etcd"])
def test_an_interruption_between_the_begin_of_a_process_and_its_registration_leaves_none(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As when a signal comes while a machine under load takes its time to execute the program."""
    begun: list[int] = []
    real = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def execute_child(self: subprocess.Popen[bytes], command: list[str], *rest: object) -> None:
        real(self, command, *rest)
        if expected in command:
            begun.append(self.pid)
            os.kill(os.getpid(), signal.SIGUSR1)

    def interrupt(number: int, frame: object) -> None:
        raise _Interrupted

    def do() -> None:
        if how == "popen":
            lab.hosts[0].namespace.popen(["sleep", "300"])
        elif how == "execute":
            lab.hosts[0].namespace.execute(["sleep", "300"])
        elif how == "a namespace":
            lab.open()
        else:
            with EtcdServer("127.0.0.1", network_namespace=lab.switch.name, directory=lab.directory):
                pass

    expected = {"a namespace": "add", "etcd": "--data-dir"}.get(how, "sleep")
    before = signal.signal(signal.SIGUSR1, interrupt)
    lab = Lab("interrupted", hosts=1)
    try:
        if how != "a namespace":
            lab.open()
        monkeypatch.setattr(subprocess.Popen, "_execute_child", execute_child)
        with pytest.raises(_Interrupted):
            do()
    finally:
        name = lab.name
        lab.close()
        signal.signal(signal.SIGUSR1, before)
    monkeypatch.undo()
    assert len(begun) == 1
    assert not Path(f"/proc/{begun[0]}").exists(), "it is ended, and waited for"
    assert not [other for other in namespaces.names() if other.startswith(name)]


def test_whatever_runs_in_a_lab_ends_with_it() -> None:
    """Also what a process has left behind in a session of its own."""
    with Lab("leftovers", hosts=1) as lab:
        namespace = lab.hosts[0].namespace
        namespace.execute(["sh", "-c", "setsid sleep 300 >/dev/null 2>&1 </dev/null &"])
        wait_until(namespace.processes, 10, "the process")
        (left,) = namespace.processes()
    wait_until(lambda: not Path(f"/proc/{left}/cwd").exists(), 10, "its end")
