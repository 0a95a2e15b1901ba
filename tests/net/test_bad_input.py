"""Bad input: one clear sentence that names the thing and the way out, a non-zero exit, no traceback, nothing changed."""

import base64
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlaynet.testing.etcd import EtcdServer, make_certificates
from overlaynet.testing.lab import SWITCH_ADDRESS, Host, Lab

SECRET = "hunter2-never-to-be-seen"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("badinput", hosts=1, seed=False) as lab:
        yield lab


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    (host,) = lab.hosts
    yield host
    assert not host.running
    assert "overlay0" not in [link["ifname"] for link in host.namespace.ip_json("link", "show")]
    assert host.namespace.ip_json("route", "show", "proto", "82") == [], "no route was left"
    assert not host.subnet_file.exists()


def store(tmp_path: Path) -> list[str]:
    return ["--store", "file", "--store-path", str(tmp_path / "store")]


def refusal(host: Host, *arguments: str, iface: str = "eth0") -> str:
    """Start a daemon that must refuse; returns the sentence it ended with."""
    command = [sys.executable, "-m", "overlaynet", "run", "--iface", iface, "--node", "x"]
    command += ["--subnet-file", str(host.subnet_file), "--status-socket", "", "--state-directory", str(host.directory)]
    command += arguments
    result = host.namespace.execute(command, check=False, timeout=60)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert SECRET not in result.stderr + result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("overlaynet: ")
    return last.removeprefix("overlaynet: ")


def written(tmp_path: Path) -> list[Path]:
    """What was written to the store: lease records, and the network document, which bad input must not create either."""
    return [*(tmp_path / "store").glob("subnets/*"), *(tmp_path / "store").glob("config")]


NETWORK = ("--network", "10.244.0.0/16")


def test_a_port_in_use(host: Host, tmp_path: Path) -> None:
    with host.namespace.socket(type=2) as taken:
        taken.bind((str(host.address.ip), 8285))
        message = refusal(host, *store(tmp_path), *NETWORK)
    assert message == (
        "UDP port 8285 on 172.16.130.140 is in use by another program (flanneld, or another overlaynet?); stop it, or "
        "choose another Port in the network document's Backend"
    )
    assert not written(tmp_path)


def test_an_interface_that_does_not_exist(host: Host, tmp_path: Path) -> None:
    message = refusal(host, *store(tmp_path), *NETWORK, iface="eth7")
    assert "eth7" in message
    assert "eth0" in message, "what there is, is listed"
    assert not written(tmp_path)


def test_an_interface_without_an_address(host: Host, tmp_path: Path) -> None:
    host.namespace.ip("link add bare type bridge", "link set bare up")
    try:
        message = refusal(host, *store(tmp_path), *NETWORK, iface="bare")
    finally:
        host.namespace.ip("link delete bare")
    assert "bare" in message
    assert "address" in message
    assert not written(tmp_path)


def test_a_device_name_taken_by_something_else(host: Host, tmp_path: Path) -> None:
    host.namespace.ip("link add overlay0 type bridge")
    try:
        message = refusal(host, *store(tmp_path), *NETWORK)
        assert [link["ifname"] for link in host.namespace.ip_json("link", "show")].count("overlay0") == 1
    finally:
        host.namespace.ip("link delete overlay0")
    assert message.startswith("the device name overlay0 is taken by another interface (bridge); delete that with")
    assert not written(tmp_path)


def test_exhausted_subnets(host: Host, tmp_path: Path) -> None:
    document = {"Network": "10.244.0.0/16", "SubnetMin": "10.244.1.0", "SubnetMax": "10.244.1.0"}
    (tmp_path / "store").mkdir()
    command = [sys.executable, "-m", "overlaynet", "network", "set", *store(tmp_path), "--network", document["Network"]]
    command += ["--subnet-min", document["SubnetMin"], "--subnet-max", document["SubnetMax"]]
    host.namespace.execute(command)
    (tmp_path / "store" / "subnets").mkdir(exist_ok=True)
    (tmp_path / "store" / "subnets" / "10.244.1.0-24").write_text("whatever this is, the subnet is taken")
    assert refusal(host, *store(tmp_path)).startswith("all 1 subnets of 10.244.0.0/16 are leased; widen SubnetMin")


def test_a_subnet_file_that_cannot_be_written(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    message = refusal(host, *store(tmp_path), *NETWORK, "--subnet-file", str(file / "subnet.env"))
    assert message.startswith(f"the subnet file {file}/subnet.env cannot be written: ")
    assert message.endswith("; choose another with --subnet-file")
    assert not written(tmp_path)


def test_malformed_json_in_the_store(host: Host, lab: Lab) -> None:
    with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name) as etcd:
        key, value = (base64.b64encode(text).decode() for text in (b"/coreos.com/network/config", b"{oops"))
        etcd.post("/v3/kv/put", {"key": key, "value": value})
        message = refusal(host, "--store", "etcd", "--etcd-endpoints", etcd.endpoint)
    assert message.startswith("the network document is not JSON: ")
    assert message.endswith(f"(in the network document of etcd at {etcd.endpoint}, prefix /coreos.com/network)")


def test_no_permission_for_a_device(host: Host, tmp_path: Path) -> None:
    command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-m", "overlaynet"]
    command += ["run", *store(tmp_path), *NETWORK, "--iface", "eth0", "--subnet-file", str(host.subnet_file)]
    command += ["--state-directory", str(host.directory)]
    result = host.namespace.execute([*command, "--status-socket", ""], check=False, timeout=60)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "overlaynet: making a TUN device needs root, or the capability CAP_NET_ADMIN; run overlaynet with it"
    )
    assert not written(tmp_path)


def test_an_etcd_that_does_not_answer_is_waited_for_and_mentioned(host: Host) -> None:
    daemon = host.start_overlaynet(["--store", "etcd", "--etcd-endpoints", "http://172.16.130.1:2399"], wait=False)
    record = daemon.wait_for("degraded")
    assert "etcd at http://172.16.130.1:2399" in record["reason"]
    time.sleep(1)
    assert daemon.running
    assert daemon.stop() == 0


def test_a_wrong_password(host: Host, lab: Lab, tmp_path: Path) -> None:
    with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name) as etcd:
        etcd.post("/v3/auth/user/add", {"name": "root", "password": "right"})
        etcd.post("/v3/auth/user/grant", {"user": "root", "role": "root"})
        etcd.post("/v3/auth/enable", {})
        file = tmp_path / "password"
        file.write_text(SECRET)
        endpoints = ["--store", "etcd", "--etcd-endpoints", etcd.endpoint]
        message = refusal(host, *endpoints, "--etcd-username", "root", "--etcd-password-file", str(file), *NETWORK)
        assert etcd.endpoint in message
        assert "'root'" in message
        assert "--etcd-password" in message
        file.write_text("right\n")
        daemon = host.start_overlaynet([*endpoints, "--etcd-username", "root", "--etcd-password-file", file])
        assert daemon.stop() == 0
        host.subnet_file.unlink()
        host.namespace.execute([sys.executable, "-m", "overlaynet", "cleanup"])


def test_a_wrong_authority(host: Host, lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    right = make_certificates(tmp_path / "right", [f"IP:{SWITCH_ADDRESS.ip}"])
    wrong = make_certificates(tmp_path / "wrong", [f"IP:{SWITCH_ADDRESS.ip}"])
    with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name, certificates=right) as etcd:
        endpoints = ["--store", "etcd", "--etcd-endpoints", etcd.endpoint]
        message = refusal(host, *endpoints, "--etcd-cafile", str(wrong.cafile), *NETWORK)
        assert etcd.endpoint in message
        assert "--etcd-cafile" in message
        daemon = host.start_overlaynet([*endpoints, "--etcd-cafile", right.cafile])
        assert daemon.stop() == 0
        host.subnet_file.unlink()
        host.namespace.execute([sys.executable, "-m", "overlaynet", "cleanup"])


def test_secrets_stay_out_of_logs_and_process_lists(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(SECRET)
    endpoint = ["--store", "etcd", "--etcd-endpoints", "http://172.16.130.1:2399", "--etcd-username", "x"]
    daemon = host.start_overlaynet([*endpoint, "--etcd-password-file", file], ["--log-level", "debug"], wait=False)
    daemon.wait_for("degraded")
    assert SECRET not in daemon.log
    assert SECRET.encode() not in Path(f"/proc/{daemon.pid}/cmdline").read_bytes()
    assert json.dumps(dict(os.environ)).count(SECRET) == 0
    daemon.stop()


def test_a_host_that_does_not_forward_is_warned_of(host: Host, tmp_path: Path) -> None:
    host.namespace.set_sysctl("net.ipv4.ip_forward", 0)
    try:
        daemon = host.start_overlaynet(store(tmp_path))
        assert (
            daemon.wait_for("this host does not forward containers' packets")["hint"] == "sysctl net.ipv4.ip_forward=1"
        )
        assert daemon.stop() == 0
    finally:
        host.namespace.set_sysctl("net.ipv4.ip_forward", 1)
    host.subnet_file.unlink()
    host.namespace.execute([sys.executable, "-m", "overlaynet", "cleanup"])
