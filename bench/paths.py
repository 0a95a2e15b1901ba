"""The ways from one container to the other (or from host to host) that are measured, each set up when its turn comes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from ipaddress import IPv4Address
from pathlib import Path as FilePath

import attrs

from bench.site import CONTAINER_MTU, OVERLAY, Host, Site
from overlaynet import network, status, subnet_file
from overlaynet.errors import OverlaynetError
from overlaynet.model import JSON, Lease, Subnets
from overlaynet.testing.daemons import DaemonProcess
from overlaynet.testing.namespaces import NetworkNamespace


@attrs.frozen
class Way:
    """A path that is set up: who talks to whom, and who carries it."""

    client: NetworkNamespace
    server: NetworkNamespace
    address: IPv4Address
    """Of the server."""
    daemons: tuple[int, ...] = ()
    """Ids of the processes that carry the packets; none if the kernel does it."""
    engines: Callable[[], JSON] = lambda: None
    """What the daemons say of themselves; for the record."""


@attrs.frozen
class Path:
    """A path by name, and how to set it up: a context manager that takes it down again."""

    name: str
    title: str
    open: Callable[[Site], AbstractContextManager[Way]]
    packages: Mapping[str, str | None] = attrs.field(factory=dict)
    """The commands it needs, each with the Debian package that brings it, if there is one."""

    def missing(self) -> Mapping[str, str | None]:
        """Those of the commands that are not here."""
        return {command: package for command, package in self.packages.items() if shutil.which(command) is None}


def between_containers(site: Site, daemons: tuple[subprocess.Popen[bytes], ...] = ()) -> Way:
    """The way from container to container, whatever carries it."""
    return Way(
        site.a.container,
        site.b.container,
        site.b.container_address,
        tuple(process.pid for process in daemons),
    )


@contextlib.contextmanager
def bare(site: Site) -> Iterator[Way]:
    """From host to host, without a tunnel: what the machine can do at most."""
    yield Way(site.a.namespace, site.b.namespace, site.b.underlay)


@contextlib.contextmanager
def vxlan(site: Site) -> Iterator[Way]:
    """The kernel's own tunnel."""
    for here, there in site.hosts:
        here.namespace.ip(
            f"link add vxlan0 mtu {CONTAINER_MTU} type vxlan id 1 dstport 4789 local {here.underlay} "
            f"remote {there.underlay} dev eth0",
            f"address add {here.subnet[0]}/32 dev vxlan0",
            "link set vxlan0 up",
            f"route add {there.subnet} via {there.subnet[0]} dev vxlan0 onlink",
        )
    try:
        yield between_containers(site)
    finally:
        for host, _ in site.hosts:
            host.namespace.ip("link delete vxlan0")


def overlaynet(*arguments: str) -> Callable[[Site], AbstractContextManager[Way]]:
    """Real daemons, run with these arguments, which share a file store."""

    @contextlib.contextmanager
    def opened(site: Site) -> Iterator[Way]:
        with tempfile.TemporaryDirectory(prefix="overlaynet-bench-") as name, contextlib.ExitStack() as stack:
            directory = FilePath(name)
            daemons = []
            for host, _ in site.hosts:
                daemons.append(_start(host, directory, arguments))
                stack.callback(daemons[-1].stop)
            for daemon in daemons:
                daemon.wait_until_ready()
            way = between_containers(site)
            yield attrs.evolve(
                way, daemons=tuple(daemon.pid for daemon in daemons), engines=lambda: _engines(site, directory)
            )

    return opened


def write_subnet_file(path: FilePath, host: Host) -> None:
    """As an earlier run on this host would have left it: a daemon then takes the subnet that the container lies in."""
    overlay = network.parse(json.dumps({"Network": str(OVERLAY)}))
    subnet_file.write(path, subnet_file.render(overlay, Lease(Subnets(ipv4=host.subnet)), CONTAINER_MTU))


def _start(host: Host, directory: FilePath, arguments: tuple[str, ...]) -> DaemonProcess:
    subnets = directory / f"{host.label}.env"
    write_subnet_file(subnets, host)
    command = [sys.executable, "-m", "overlaynet", "run", "--backend", "udp", "--network", str(OVERLAY)]
    command += ["--store", "file", "--store-path", str(directory / "store"), "--node", host.label, "--iface", "eth0"]
    command += ["--subnet-file", str(subnets), "--status-socket", str(directory / f"{host.label}.sock")]
    command += ["--log-format", "json", *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OVERLAYNET_")}
    log_file = directory / f"{host.label}.log"
    with log_file.open("xb") as log:
        process = host.namespace.popen(command, stdout=log, stderr=log, env=environment)
    return DaemonProcess(host.label, process, log_file, subnets)


def _engines(site: Site, directory: FilePath) -> JSON:
    """Which engine and offloads each daemon uses, and what it dropped."""
    told: dict[str, JSON] = {}
    for host, _ in site.hosts:
        packets = status.ask(str(directory / f"{host.label}.sock")).get("packets")
        if not isinstance(packets, Mapping):
            raise OverlaynetError(f"the daemon on {host.label} told nothing of its packets: {packets!r}")
        drops = packets.get("drops")
        told[host.label] = {
            "engine": packets.get("engine"),
            "offloads": packets.get("offloads"),
            "drops": {reason: count for reason, count in drops.items() if count}
            if isinstance(drops, Mapping)
            else None,
        }
    return told
