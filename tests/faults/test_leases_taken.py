"""Real daemons on a real etcd, whose leases others write over, release, or surround with nonsense, under real traffic."""

import base64
import json
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import SWITCH_ADDRESS, Host, Lab, wait_until

PREFIX = "/coreos.com/network"
ROUTER_PROTOCOL = "82"


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("taken", default_route=True) as lab:
        yield lab


@pytest.fixture
def etcd(lab: Lab) -> Iterator[EtcdServer]:
    with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name) as etcd:
        yield etcd


def start_all(lab: Lab, etcd: EtcdServer, *arguments: str) -> None:
    for host in lab.hosts:
        host.start_overlaynet(["--store", "etcd", "--etcd-endpoints", etcd.endpoint], list(arguments))
        host.connect_containers()
    wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), 20, "a ping to arrive")


def start_all_on_files(lab: Lab) -> None:
    for host in lab.hosts:
        host.start_overlaynet(lab.file_store)
        host.connect_containers()
    wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), 20, "a ping to arrive")


def get(etcd: EtcdServer, key: str) -> str:
    text = {"key": base64.b64encode(f"{PREFIX}/subnets/{key}".encode()).decode()}
    (found,) = etcd.post("/v3/kv/range", text)["kvs"]
    return base64.b64decode(found["value"]).decode()


def put(etcd: EtcdServer, key: str, value: str) -> None:
    text = {"key": base64.b64encode(f"{PREFIX}/subnets/{key}".encode()).decode()}
    etcd.post("/v3/kv/put", {**text, "value": base64.b64encode(value.encode()).decode()})


def subnet_of(host: Host) -> str:
    """What the status says."""
    subnets = host.status()["subnets"]
    assert isinstance(subnets, list)
    return str(subnets[0])


def device_address(host: Host) -> str:
    (device,) = host.namespace.ip_json("-4", "address", "show", "dev", "overlay0")
    return str(device["addr_info"][0]["local"])


def routes(host: Host) -> list[tuple[str, str, str | None]]:
    found = host.namespace.ip_json("route", "show", "proto", "82")
    return sorted((route["type"], route["dst"], route.get("dev")) for route in found)


def overlaynet(host: Host, etcd: EtcdServer, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "overlaynet", *arguments, "--etcd-endpoints", etcd.endpoint]
    result = host.namespace.execute(command, check=False, timeout=60)
    return result.returncode, result.stdout + result.stderr


def thief(subnet: str) -> tuple[str, str]:
    """The key and value of another node's lease on that subnet."""
    return subnet.replace("/", "-"), '{"PublicIP":"172.16.130.199","PublicIPv6":null,"Overlaynet":{"Node":"thief"}}'


def test_a_daemon_whose_lease_is_taken_ends_with_one_sentence_and_status_1(lab: Lab, etcd: EtcdServer) -> None:
    start_all(lab, etcd)
    host = lab.hosts[0]
    daemon, subnet = host.daemon, subnet_of(host)
    put(etcd, *thief(subnet))
    wait_until(lambda: not daemon.running, 10, "the daemon to end")
    assert daemon.exit_status == 1
    assert daemon.log.splitlines()[-1] == (
        f"overlaynet: the lease on {subnet} was taken by node thief at 172.16.130.199"
    )
    assert routes(host) == [("unreachable", "10.244.0.0/16", None)]
    host.start_overlaynet(["--store", "etcd", "--etcd-endpoints", etcd.endpoint])
    assert subnet_of(host) != subnet, "a restart finds another"


def test_a_daemon_whose_lease_is_taken_goes_on_with_another_if_so_configured(lab: Lab, etcd: EtcdServer) -> None:
    start_all(lab, etcd, "--on-lease-lost", "reacquire")
    host, other = lab.hosts
    pid, subnet, device = host.daemon.pid, subnet_of(host), device_address(host)
    put(etcd, *thief(subnet))
    wait_until(lambda: host.status()["ready"] and subnet_of(host) != subnet, 20, "another lease")
    assert host.daemon.pid == pid
    assert host.daemon.running
    new = IPv4Network(subnet_of(host))
    assert device_address(host) == str(new.network_address) != device
    assert routes(host) == [("unicast", "10.244.0.0/16", "overlay0"), ("unreachable", "10.244.0.0/16", None)]
    assert f"FLANNEL_SUBNET={new.network_address + 1}/24\n" in host.subnet_file.read_text()
    wait_until(lambda: str(new) in str(other.status()["packets"]), 10, "the other host to know")
    sent = other.namespace.execute(["ping", "-n", "-c", "1", "-W", "2", str(new.network_address)], check=False)
    assert sent.returncode == 0, "the new subnet's device answers"
    assert [record["reason"] for record in host.daemon.records if record.get("message") == "lease lost"] == [
        f"the lease on {subnet} was taken by node thief at 172.16.130.199"
    ]


def test_a_live_nodes_lease_is_released_by_force_only_and_taken_back(lab: Lab, etcd: EtcdServer) -> None:
    start_all(lab, etcd)
    host, other = lab.hosts
    subnet = subnet_of(host)
    status, text = overlaynet(other, etcd, "release", subnet)
    assert status == 1
    assert "its node may be alive; stop it, or make sure that it is gone, and use --force" in text
    status, text = overlaynet(other, etcd, "release", subnet, "--force")
    assert status == 0, text
    host.daemon.wait_for("lease taken back")
    assert lab.containers[0].reaches(lab.containers[1])


def test_a_dead_nodes_reserved_subnet_waits_for_it(lab: Lab, etcd: EtcdServer) -> None:
    start_all(lab, etcd)
    host, other = lab.hosts
    subnet, node = subnet_of(host), str(host.status()["node"])
    assert overlaynet(other, etcd, "reserve", subnet, "--node", node)[0] == 0
    host.daemon.kill()
    assert overlaynet(other, etcd, "release", "--node", node, "--force")[0] == 0
    _, text = overlaynet(other, etcd, "leases", "--json")
    content = json.loads(text)
    assert [lease["node"] for lease in content["leases"]] == [other.status()["node"]]
    assert content["reservations"][0]["subnets"] == [subnet]
    assert other.status()["skipped_records"] == []
    host.subnet_file.unlink()
    host.start_overlaynet(["--store", "etcd", "--etcd-endpoints", etcd.endpoint])
    assert subnet_of(host) == subnet


@pytest.mark.parametrize("damage", ["truncated", "emptied", "edited"])
def test_a_live_nodes_record_that_was_damaged_is_made_good_by_its_node(lab: Lab, damage: str) -> None:
    start_all_on_files(lab)
    host, other = lab.hosts
    pid, subnet = host.daemon.pid, subnet_of(host)
    path = Path(str(lab.file_store[-1]), "subnets", subnet.replace("/", "-"))
    good = path.read_bytes()
    content = {"truncated": good[: len(good) // 2], "emptied": b"", "edited": good.replace(b'PublicIP\\"', b"PublicIP")}
    assert content[damage] != good
    path.write_bytes(content[damage])
    host.daemon.wait_for("damaged record of the lease is written over")
    wait_until(lambda: other.status()["skipped_records"] == [] == host.status()["skipped_records"], 20, "good records")
    wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), 20, "a ping to arrive")
    assert b"host-a" in path.read_bytes()
    assert (host.daemon.pid, subnet_of(host), host.daemon.running) == (pid, subnet, True)
    assert host.status()["problems"] == {}
    host.daemon.kill()
    host.start_overlaynet(lab.file_store)
    assert subnet_of(host) == subnet


@pytest.mark.parametrize("store", ["etcd", "files"])
def test_a_live_nodes_record_that_was_edited_is_written_again_at_once(
    lab: Lab, request: pytest.FixtureRequest, store: str
) -> None:
    """With a lifetime of a day, peers would follow the edited record for most of it."""
    where, edited = "172.16.130.164", "172.16.130.199"
    if store == "etcd":
        etcd: EtcdServer = request.getfixturevalue("etcd")
        start_all(lab, etcd)
    else:
        start_all_on_files(lab)
    first, host = lab.hosts
    subnet = subnet_of(host)
    key = subnet.replace("/", "-")
    path = Path(str(lab.file_store[-1]), "subnets", key)

    def content() -> str:
        return get(etcd, key) if store == "etcd" else path.read_text()

    good = content()
    assert where in good
    if store == "etcd":
        put(etcd, key, good.replace(where, edited))
    else:
        path.write_text(good.replace(where, edited))
    told = host.daemon.wait_for("lease record altered")
    # What is put in etcd without a lease of etcd's never ends.
    assert told["altered"] == (["public_ipv4", "ttl"] if store == "etcd" else ["public_ipv4"])
    assert told["address"] == edited
    wait_until(lambda: edited not in content() and where in content(), 20, "the record as it was")
    wait_until(lambda: where in str(first.status()["packets"]), 20, "the peer to know")
    wait_until(lambda: lab.containers[0].reaches(lab.containers[1]), 20, "a ping to arrive")
    assert [record["message"] for record in host.daemon.records if record["message"].startswith("lease")] == [
        "lease acquired",
        "lease record altered",
        "lease renewed",
    ]
    assert (subnet_of(host), host.status()["problems"], host.daemon.running) == (subnet, {}, True)


ABSURD = {
    "10.244.0.0-16": "172.16.130.190",  # the whole network
    "10.244.1.128-25": "172.16.130.190",  # part of host a's subnet
    "10.244.2.128-25": "172.16.130.190",  # part of host b's subnet
    "10.244.2.194-32": "172.16.130.190",  # the very container that is pinged
    "10.244.192.0-18": "224.0.0.1",
    "10.244.40.0-24": "127.0.0.1",
    "10.244.41.0-24": "0.0.0.0",
    "10.244.42.0-24": "255.255.255.255",
    "10.244.43.0-24": "172.16.130.140",  # host a
    "10.244.44.0-24": "172.16.130.164",  # host b
    "10.244.45.0-24": "10.244.2.194",  # inside of the overlay
    "10.244.128.0-17": "172.16.130.190",  # half of the network
    "0.0.0.0-0": "172.16.130.190",
    "0.0.0.0-1": "172.16.130.190",
    "128.0.0.0-1": "172.16.130.190",
    "172.16.130.0-24": "172.16.130.190",  # the underlay itself
    "127.0.0.0-8": "172.16.130.190",
    "224.0.0.0-4": "172.16.130.190",
    "10.244.46.7-24": "172.16.130.190",  # host bits
    "10.244.47.0-33": "172.16.130.190",
    "10.99.1.0-24": "172.16.130.190",
    "what": "172.16.130.190",
}


def test_absurd_records_become_neither_peers_nor_routes_and_are_told_once(lab: Lab, etcd: EtcdServer) -> None:
    start_all(lab, etcd)
    before = our_routes(lab)
    for key, address in ABSURD.items():
        put(etcd, key, f'{{"PublicIP":"{address}","PublicIPv6":null}}')
    put(etcd, "10.244.48.0-24", '{"PublicIP":null}')
    put(etcd, "10.244.49.0-24", "\x1b[31m" * 100_000)
    put(etcd, "10.244.50.0-24", '{"PublicIP":"172.16.130.190","BackendData":' + "[" * 900 + "]" * 900 + "}")
    put(etcd, "10.244.77.0-24", '{"PublicIP":"172.16.130.177","PublicIPv6":null}')
    unreadable = ["10.244.48.0-24", "10.244.49.0-24", "10.244.50.0-24"]
    # Each host's address makes a record absurd for that host only; for the other, it is a second subnet of a peer's.
    for host, own, others in zip(lab.hosts, ("10.244.43.0-24", "10.244.44.0-24"), ("44", "43"), strict=True):
        expected = {f"subnets/{key}" for key in [*ABSURD, *unreadable]} - {f"subnets/10.244.{others}.0-24"}
        assert f"subnets/{own}" in expected
        wait_until(lambda: set(reported(host)) >= expected, 10, "all reports")  # noqa: B023 - awaited at once
        assert sorted(reported(host)) == sorted(expected), "each once"
        wait_until(lambda: host.status()["peers"] == 3, 10, "the peers")  # noqa: B023 - the reports come first
        packets = host.status()["packets"]
        assert isinstance(packets, dict)
        assert isinstance(packets["peers"], dict)
        assert set(packets["peers"]) - {subnet_of(other) for other in lab.hosts} == {
            "10.244.77.0/24",
            f"10.244.{others}.0/24",
        }
        skipped = host.status()["skipped_records"]
        assert isinstance(skipped, list)
        assert len(skipped) == len(expected)
    assert our_routes(lab) == before
    assert lab.containers[0].reaches(lab.containers[1])


def our_routes(lab: Lab) -> list[object]:
    """All routes of either host that an overlaynet has made."""
    return [host.namespace.ip_json("route", "show", "table", "all", "proto", ROUTER_PROTOCOL) for host in lab.hosts]


def reported(host: Host) -> list[str]:
    """The keys of the records that the daemon's log says it has skipped."""
    return [str(record["key"]) for record in host.daemon.records if record.get("message") == "lease record skipped"]
