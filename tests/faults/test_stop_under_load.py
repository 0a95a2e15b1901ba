"""A daemon that is stopped while it carries all that it can."""

import time
from typing import Any

import pytest

from overlaynet.testing.lab import Host, Lab, wait_until
from overlaynet.testing.load import full_load


def received(host: Host) -> int:
    packets: Any = host.status()["packets"]
    return sum(int(peer["received_packets"]) for peer in packets["peers"].values())


@pytest.mark.parametrize(("engine", "threads"), [("native", 1), ("native", 2), ("python", 1)])
def test_a_daemon_under_full_load_stops_at_once_and_leaves_nothing(engine: str, threads: int) -> None:
    with Lab("stop") as lab:
        for host in lab.hosts:
            host.start_overlaynet(lab.file_store, ["--udp-engine", engine, "--udp-threads", str(threads)])
            host.connect_containers()
        lab.wait_until_acquainted()
        with full_load(*lab.containers):
            for host in lab.hosts:
                before = received(host)
                wait_until(lambda host=host, before=before: received(host) > before + 2000, 60, "traffic")  # type: ignore[misc]
            for host in lab.hosts:
                daemon = host.daemon
                assert daemon is not None
                began = time.monotonic()
                assert daemon.stop(30) == 0
                print(f"{engine} engine, {host.label}: stopped after {time.monotonic() - began:.2f} s")  # noqa: T201
                assert daemon.records[-1]["message"] == "stopped"
                assert "overlay0" not in [link["ifname"] for link in host.namespace.ip_json("link", "show")]
                (backstop,) = host.namespace.ip_json("route", "show", "proto", "82")
                assert backstop["type"] == "unreachable"
                assert not host.namespace.execute(["ss", "-Hlun", "sport = :8285"]).stdout
                assert not host.status_socket.exists()
