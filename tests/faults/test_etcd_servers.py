"""The private etcd of tests and of the demonstration: it starts, ends and explains itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlaynet.errors import OverlaynetError
from overlaynet.testing.etcd import EtcdCluster, EtcdServer, make_certificates

KEY = {"key": "YQ=="}


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"etcd-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_it_keeps_port_and_data_over_a_restart_and_nothing_after_the_end() -> None:
    with EtcdServer() as etcd:
        endpoint, pid, log = etcd.endpoint, etcd.pid, etcd.log()
        assert "serving client traffic" in log
        etcd.post("/v3/kv/put", {**KEY, "value": "Yg=="})
        for end in (etcd.stop, etcd.kill):
            end()
            end()
            assert etcd.pid is None
            etcd.start()
            assert etcd.pid != pid
            assert etcd.endpoint == endpoint
            assert etcd.post("/v3/kv/range", KEY)["kvs"][0]["value"] == "Yg=="
        home = Path(f"/proc/{etcd.pid}/cwd").readlink()
    etcd.close()
    assert etcd.pid is None
    assert not home.exists()


def test_it_ends_although_it_hangs() -> None:
    with EtcdServer() as etcd:
        etcd.pause()
        etcd.stop()
        etcd.start()
        etcd.pause()
        etcd.resume()
        assert "header" in etcd.post("/v3/kv/range", KEY)


def test_it_runs_in_a_network_namespace(namespace: str) -> None:
    with EtcdServer("::1", network_namespace=namespace) as etcd:
        assert etcd.endpoint == "http://[::1]:2379"
        inside = f"import urllib.request; print(urllib.request.urlopen('{etcd.endpoint}/health').read().decode())"
        command = ["ip", "netns", "exec", namespace, sys.executable, "-c", inside]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert json.loads(done.stdout)["health"] == "true"


def test_it_takes_no_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_QUOTA_BACKEND_BYTES", "nonsense")
    with EtcdServer():
        pass


def test_what_keeps_it_from_starting_is_told() -> None:
    with EtcdServer() as etcd:
        with pytest.raises(OverlaynetError, match=f"127.0.0.1:{etcd.port}: bind: address already in use"):
            EtcdServer(port=etcd.port).__enter__()
        with pytest.raises(OverlaynetError, match=f"the etcd at {etcd.endpoint} is already running"):
            etcd.start()
        with pytest.raises(OverlaynetError, match=r"/v3/nothing at .* answered 404"):
            etcd.post("/v3/nothing", {})
    with pytest.raises(OverlaynetError, match="its last words: flag provided but not defined: -nonsense"):
        EtcdServer(arguments=["--nonsense"]).__enter__()
    with pytest.raises(OverlaynetError, match="is used as a context manager"):
        EtcdServer().start()
    with pytest.raises(OverlaynetError, match="is not running"):
        etcd.pause()


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OverlaynetError, match="there is no etcd; install it: apt-get install etcd-server"):
        EtcdServer().__enter__()
    with pytest.raises(OverlaynetError, match="there is no openssl; install it: apt-get install openssl"):
        make_certificates(tmp_path)


def test_a_cluster_elects_another_leader() -> None:
    with EtcdCluster() as cluster:
        assert len(set(cluster.endpoints)) == 3
        first = cluster.leader
        first.kill()
        second = cluster.leader
        assert second is not first
        second.post("/v3/kv/put", {**KEY, "value": "Yg=="})
        first.start()
        assert first.post("/v3/kv/range", KEY)["kvs"][0]["value"] == "Yg=="
