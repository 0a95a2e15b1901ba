"""Several threads of the native engine: queues of one device, sockets that share a port, the kernel that spreads packets."""

import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Network
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.packet import Raw

from overlaynet import tun
from overlaynet.backends.udp import wire
from overlaynet.errors import BackendError
from overlaynet.testing.lab import Host, Lab, wait_until
from overlaynet.testing.namespaces import NetworkNamespace

TWO_THREADS = ("--udp-engine", "native", "--udp-threads", "2")
PATIENCE = 20.0


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("queues") as lab:
        yield lab


def start_all(lab: Lab) -> None:
    for host in lab.hosts:
        host.start_overlaynet(lab.file_store, TWO_THREADS)
        host.connect_containers()
    lab.wait_until_acquainted()


def packets(host: Host) -> Any:
    return host.status()["packets"]


def queues(host: Host) -> int:
    """How many queues the device has that somebody reads."""
    (link,) = host.namespace.ip_json("-details", "link", "show", "overlay0")
    data = link["linkinfo"]["info_data"]
    assert data["multi_queue"]
    return int(data["numqueues"])


def sockets(host: Host) -> int:
    return len(host.namespace.execute(["ss", "-Hlun", "sport = :8285"]).stdout.splitlines())


def bound(namespace: NetworkNamespace, address: str, port: int = 0) -> socket.socket:
    made = namespace.socket(type=socket.SOCK_DGRAM)
    made.bind((address, port))
    made.settimeout(PATIENCE)
    return made


def test_each_thread_has_a_queue_and_a_socket_and_whatever_comes_in_by_any_is_delivered(lab: Lab) -> None:
    start_all(lab)
    host, other = lab.hosts
    assert host.daemon.wait_for("packet engine started")["threads"] == 2
    assert (packets(host)["threads"], packets(host)["threads_refused"]) == (2, 0)
    assert (queues(host), sockets(host)) == (2, 2)
    container, far = lab.containers
    source, destination = str(far.ip), str(container.ip)
    with bound(container.namespace, destination, 4444) as listener:
        # Of 32 ports, some are hashed to each socket; that all are to one is as likely as 1 in 2 ** 31.
        for number in range(32):
            packet = IP(src=source, dst=destination) / UDP(sport=5555, dport=4444) / Raw(struct.pack("I", number))
            with bound(other.namespace, str(other.address.ip)) as sender:
                sender.sendto(bytes(packet), (str(host.address.ip), 8285))
        assert {struct.unpack("I", listener.recv(100))[0] for _ in range(32)} == set(range(32))


@pytest.mark.parametrize("answered", [False, True])
def test_the_packets_of_a_flow_arrive_in_order(lab: Lab, answered: bool) -> None:
    """Sixteen flows at once: without an answer, a flow has its queue by a hash; with one, by where the answer came in."""
    flows, burst, bursts = 16, 30, 10
    start_all(lab)
    near, far = lab.containers
    assert lab.containers[0].reaches(lab.containers[1])
    listeners = [bound(far.namespace, str(far.ip), 7000 + number) for number in range(flows)]
    clients = [bound(near.namespace, str(near.ip), 6000 + number) for number in range(flows)]
    try:
        for client, listener in zip(clients, listeners, strict=True):
            client.connect(listener.getsockname())
            if answered:
                client.send(b"a question")
                listener.sendto(listener.recv(100), client.getsockname())
                assert client.recv(100) == b"a question"
        came: list[list[int]] = [[] for _ in range(flows)]
        for start in range(0, burst * bursts, burst):
            for number in range(start, start + burst):
                for client in clients:
                    client.send(struct.pack("I", number))
            for listener, numbers in zip(listeners, came, strict=True):
                numbers += [struct.unpack("I", listener.recv(100))[0] for _ in range(burst)]
        assert came == [list(range(burst * bursts))] * flows
    finally:
        for each in (*clients, *listeners):
            each.close()


def test_a_deleted_device_is_made_again_with_all_its_queues(lab: Lab) -> None:
    start_all(lab)
    host = lab.hosts[0]
    host.namespace.ip("link delete overlay0")
    host.daemon.wait_for("device made again")
    wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), PATIENCE, "a ping to arrive")
    assert (packets(host)["threads"], queues(host), sockets(host)) == (2, 2, 2)


def test_the_sockets_follow_the_underlay_to_another_address(lab: Lab) -> None:
    start_all(lab)
    host = lab.hosts[0]
    host.namespace.ip("address flush dev eth0", "address add 172.16.130.99/24 dev eth0")
    wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), 2 * PATIENCE, "a ping to arrive")
    listening = host.namespace.execute(["ss", "-Hlun", "sport = :8285"]).stdout
    assert [line.split()[3] for line in listening.splitlines()] == ["172.16.130.99:8285"] * 2
    assert packets(host)["threads"] == 2


def test_after_a_crash_a_daemon_with_another_number_of_threads_takes_over(lab: Lab) -> None:
    start_all(lab)
    host = lab.hosts[0]
    subnet = host.subnet_file.read_text()
    for threads in (1, 3, 2):
        host.daemon.kill()
        host.start_overlaynet(lab.file_store, [*TWO_THREADS, "--udp-threads", str(threads)])
        assert (packets(host)["threads"], sockets(host)) == (threads, threads)
        assert host.subnet_file.read_text() == subnet
        wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), PATIENCE, "a ping to arrive")


def test_each_thread_has_a_socket_of_each_ip_version() -> None:
    with Lab("queues", overlay6=IPv6Network("fd00:244::/48"), underlay=(4, 6)) as lab:
        start_all(lab)
        assert [(queues(host), sockets(host)) for host in lab.hosts] == [(2, 4), (2, 4)]
        for host in lab.hosts:  # from now on a peer can be reached by IPv6 alone
            host.namespace.ip(f"address delete {host.address} dev eth0")
        wait_until(lambda: [sockets(host) for host in lab.hosts] == [2, 2], 2 * PATIENCE, "two sockets")
        wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), 2 * PATIENCE, "a ping to arrive by IPv6")
        assert [packets(host)["threads"] for host in lab.hosts] == [2, 2]


def test_the_python_engine_has_one_thread_and_says_so(lab: Lab) -> None:
    host = lab.hosts[0]
    host.start_overlaynet(lab.file_store, ["--udp-engine", "python", "--udp-threads", "2"])
    assert host.daemon.wait_for("the Python engine has one thread")["wanted"] == "2"
    assert (packets(host)["threads"], sockets(host)) == (1, 1)


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    with NetworkNamespace(label="queue") as made:
        made.ip("link set lo up")
        yield made


def test_a_kernel_without_several_queues_gives_one(
    namespace: NetworkNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device is made as for such a kernel, and then this one refuses."""
    features = tun._features
    monkeypatch.setattr(tun, "_features", lambda descriptor: features(descriptor) & ~tun._IFF_MULTI_QUEUE)
    descriptors = namespace.run(tun.open_queues, "overlay0", 3)
    try:
        assert len(descriptors) == 1
        (record,) = caplog.records
        assert record.message == "the device has fewer queues than asked for"
        assert record.__dict__["fields"]["queues"] == 1
        assert record.__dict__["fields"]["wanted"] == 3
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert namespace.ip_json("link", "show", "type", "tun") == []


def test_a_device_that_was_renamed_while_it_was_made_is_refused(
    namespace: NetworkNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_queue = tun._open_next_queue

    def rename(name: str, first: int) -> int:
        namespace.ip("link set overlay0 name foreign")
        return next_queue(name, first)

    monkeypatch.setattr(tun, "_open_next_queue", rename)
    with pytest.raises(BackendError, match="deleted or renamed as soon as it was made"):
        namespace.run(tun.open_queues, "overlay0", 2)
    assert namespace.ip_json("link", "show", "type", "tun") == []


def test_another_daemon_cannot_share_the_port(namespace: NetworkNamespace) -> None:
    address = IPv4Address("127.0.0.1")
    opened = namespace.run(wire.open_sockets, [address], 8285, 3)
    try:
        assert len(opened[address]) == 3
        with pytest.raises(BackendError, match="UDP port 8285 on 127.0.0.1 is in use by another program"):
            namespace.run(wire.open_sockets, [address], 8285, 3)
    finally:
        for each in opened[address]:
            each.close()
