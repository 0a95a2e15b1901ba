"""Tunnels of others, each with two daemons in user space, as their own documentation sets them up.

All but flanneld encrypt, which overlaynet and VXLAN do not: their figures say what that costs, and what one or two system
calls a packet cost.
"""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.paths import Way, between_containers, write_subnet_file
from bench.site import CONTAINER_MTU, OVERLAY, Host, Site
from overlaynet.errors import OverlaynetError
from overlaynet.testing.daemons import wait_until
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.namespaces import NetworkNamespace

_PORT = 4242
_PATIENCE = 20.0


@contextlib.contextmanager
def flanneld(site: Site) -> Iterator[Way]:
    """flannel with its udp backend, whose wire format overlaynet speaks, and a private etcd on host a."""
    with (
        EtcdServer(str(site.a.underlay), network_namespace=site.a.namespace.name) as etcd,
        _tunnel("flanneld") as tunnel,
    ):
        document = json.dumps({"Network": str(OVERLAY), "Backend": {"Type": "udp"}})
        key, value = (base64.b64encode(text.encode()).decode() for text in ("/coreos.com/network/config", document))
        etcd.post("/v3/kv/put", {"key": key, "value": value})
        for host, _ in site.hosts:
            subnet_file = tunnel.directory / f"{host.label}.env"
            write_subnet_file(subnet_file, host)
            arguments = ["--etcd-endpoints", etcd.endpoint, "--iface", "eth0", "--subnet-file", str(subnet_file)]
            tunnel.start(host, ["flanneld", *arguments])
        yield tunnel.ready(site)


@contextlib.contextmanager
def wireguard_go(site: Site) -> Iterator[Way]:
    """WireGuard in user space, whatever the kernel has."""
    with _tunnel("wireguard-go") as tunnel:
        private, public = {}, {}
        for host, _ in site.hosts:
            private[host.label] = host.namespace.execute(["wg", "genkey"]).stdout.strip()
            public[host.label] = host.namespace.execute(["wg", "pubkey"], input=private[host.label]).stdout.strip()
        for here, there in site.hosts:
            device = f"bench-wg-{here.label}"  # the name of its control socket, which all namespaces see
            tunnel.start(here, ["wireguard-go", "-f", device])
            tunnel.wait_for_device(here, device)
            settings = tunnel.directory / f"{device}.conf"
            settings.write_text(
                f"[Interface]\nPrivateKey = {private[here.label]}\nListenPort = {_PORT}\n"
                f"[Peer]\nPublicKey = {public[there.label]}\nAllowedIPs = {there.subnet}\n"
                f"Endpoint = {there.underlay}:{_PORT}\n"
            )
            here.namespace.execute(["wg", "setconf", device, settings])
            _bring_up(here, there, device)
        yield tunnel.ready(site)


@contextlib.contextmanager
def nebula(site: Site) -> Iterator[Way]:
    """Nebula; the containers' subnets are what it calls unsafe routes."""
    with _tunnel("nebula") as tunnel:
        run = site.a.namespace.execute
        authority, key = tunnel.directory / "ca.crt", tunnel.directory / "ca.key"
        run(["nebula-cert", "ca", "-name", "bench", "-out-crt", authority, "-out-key", key])
        addresses = {"a": "10.99.0.1", "b": "10.99.0.2"}
        for here, there in site.hosts:
            files = [tunnel.directory / f"{here.label}.{ending}" for ending in ("crt", "key")]
            sign = ["nebula-cert", "sign", "-ca-crt", str(authority), "-ca-key", str(key), "-name", here.label]
            sign += ["-ip", f"{addresses[here.label]}/24", "-subnets", str(here.subnet)]
            run([*sign, "-out-crt", str(files[0]), "-out-key", str(files[1])])
            anything = [{"port": "any", "proto": "any", "host": "any"}]
            route = {"route": str(there.subnet), "via": addresses[there.label], "mtu": CONTAINER_MTU}
            settings = {
                "pki": {"ca": str(authority), "cert": str(files[0]), "key": str(files[1])},
                "static_host_map": {addresses[there.label]: [f"{there.underlay}:{_PORT}"]},
                "lighthouse": {"am_lighthouse": False},
                "listen": {"host": "0.0.0.0", "port": _PORT},
                "tun": {"dev": "nebula0", "mtu": CONTAINER_MTU, "unsafe_routes": [route]},
                "firewall": {"inbound": anything, "outbound": anything},
            }
            path = tunnel.directory / f"{here.label}.yml"
            path.write_text(json.dumps(settings))  # which is YAML, too
            tunnel.start(here, ["nebula", "-config", path])
        yield tunnel.ready(site)


@contextlib.contextmanager
def tinc(site: Site) -> Iterator[Way]:
    """tinc 1.0, in its router mode."""
    with _tunnel("tinc") as tunnel:
        directories = {host.label: tunnel.directory / host.label for host, _ in site.hosts}
        for here, there in site.hosts:
            directory = directories[here.label]
            (directory / "hosts").mkdir(parents=True)
            (directory / "tinc.conf").write_text(
                f"Name = {here.label}\nInterface = tinc0\nAddressFamily = ipv4\nConnectTo = {there.label}\n"
            )
            own = directory / "hosts" / here.label
            # Path MTU discovery takes seconds, and until it ends, tinc carries packets in a TCP connection.
            own.write_text(f"Address = {here.underlay}\nSubnet = {here.subnet}\nPMTUDiscovery = no\n")
            here.namespace.execute(["tincd", "-c", directory, "-K2048"])
        for here, there in site.hosts:
            text = (directories[here.label] / "hosts" / here.label).read_text()
            (directories[there.label] / "hosts" / here.label).write_text(text)
        for here, there in site.hosts:
            pid_file = tunnel.directory / f"{here.label}.pid"
            tunnel.start(here, ["tincd", "-D", "-c", directories[here.label], f"--pidfile={pid_file}"])
            tunnel.wait_for_device(here, "tinc0")
            _bring_up(here, there, "tinc0")
        yield tunnel.ready(site)


class _Tunnel:
    """The daemons of one tunnel while it is up."""

    def __init__(self, name: str, directory: Path) -> None:
        self.directory = directory
        self._name = name
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self, host: Host, command: Sequence[str | Path]) -> None:
        with self._log(host).open("xb") as log:
            self._daemons.append(host.namespace.popen(command, stdout=log, stderr=log))

    def wait_for_device(self, host: Host, device: str) -> None:
        self._wait(lambda: self._exists(host.namespace, device), host, f"its device {device}")

    def ready(self, site: Site) -> Way:
        """Wait until the containers reach each other."""
        address = str(site.b.container_address)
        ping = ["ping", "-q", "-c", "1", "-W", "0.2", address]
        self._wait(lambda: self._answered(site, ping), site.a, f"an answer of {address}")
        return between_containers(site, tuple(self._daemons))

    def stop(self) -> None:
        for process in self._daemons:
            process.send_signal(signal.SIGTERM)
        for process in self._daemons:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _exists(self, namespace: NetworkNamespace, device: str) -> bool:
        return self._alive() and namespace.execute(["ip", "link", "show", device], check=False).returncode == 0

    def _answered(self, site: Site, ping: Sequence[str]) -> bool:
        return self._alive() and site.a.container.execute(ping, check=False).returncode == 0

    def _alive(self) -> bool:
        if any(process.poll() is not None for process in self._daemons):
            raise OverlaynetError("it has ended")
        return True

    def _wait(self, predicate: Callable[[], bool], host: Host, what: str) -> None:
        try:
            wait_until(predicate, _PATIENCE, what)
        except (TimeoutError, OverlaynetError) as error:
            words = " | ".join(self._log(host).read_text(errors="replace").splitlines()[-3:]) or "it wrote nothing"
            raise OverlaynetError(f"{self._name} on host {host.label} did not come up ({error}): {words}") from error

    def _log(self, host: Host) -> Path:
        return self.directory / f"{host.label}.log"


@contextlib.contextmanager
def _tunnel(name: str) -> Iterator[_Tunnel]:
    with tempfile.TemporaryDirectory(prefix="overlaynet-bench-") as directory:
        tunnel = _Tunnel(name, Path(directory))
        try:
            yield tunnel
        finally:
            tunnel.stop()


def _bring_up(here: Host, there: Host, device: str) -> None:
    here.namespace.ip(f"link set {device} mtu {CONTAINER_MTU} up", f"route replace {there.subnet} dev {device}")
