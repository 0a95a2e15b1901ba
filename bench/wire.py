"""Throughput of tunnels between two hosts in network namespaces, beside the kernel's VXLAN; all interleaved, medians.

    .venv/bin/python bench/wire.py [--rounds 3] [--seconds 3] [--plain] [--only native,vxlan] [--json FILE]

The two modes are those of the real world and of the laboratory: by default each frame on the underlay is at most 1500
bytes, as between real network cards (segmentation offloads off at the sender, GRO on at the receiver); with ``--plain``
veth hands 64 KiB frames over whole. Needs root, iperf3 and ethtool. Only ratios within one run mean anything.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from overlaynet.backends.udp import UdpBackend, UdpOptions
from overlaynet.model import Lease, Peer, Subnets, Underlay
from overlaynet.network import parse
from overlaynet.testing.namespaces import NetworkNamespace

NETWORK = parse('{"Network": "10.244.0.0/16"}')
UNDERLAYS = (IPv4Address("172.16.130.1"), IPv4Address("172.16.130.2"))
SUBNETS = (IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24"))
PATHS = ("host", "vxlan", "native", "single", "python")
MEASURES = ("tcp1", "tcp4", "udp1400", "udp64", "rtt", "rtt_load")


def carry(namespace: NetworkNamespace, here: int, engine: str, offload: str, peers: int) -> None:
    """In a process of its own: one host's tunnel, until standard input is closed."""

    async def live() -> None:
        there = 1 - here
        underlay = Underlay("eth0", 1500, ipv4=UNDERLAYS[here], public_ipv4=UNDERLAYS[here])
        backend = UdpBackend(UdpOptions(), engine=engine, offload=offload)
        await backend.open(NETWORK, underlay)
        await backend.start(Lease(Subnets(SUBNETS[here]), public_ipv4=UNDERLAYS[here]))
        others = [
            Peer(Subnets(IPv4Network((0x0A800000 + number * 256, 24))), IPv4Address(0xAC190000 + number))
            for number in range(peers - 1)
        ]
        await backend.set_peers([Peer(Subnets(SUBNETS[there]), UNDERLAYS[there]), *others])
        print("ready", flush=True)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        print(json.dumps(backend.status() | {"peers": len(others) + 1}), flush=True)
        await backend.aclose()

    namespace.run(asyncio.run, live())


class Namespace(NetworkNamespace):
    """A namespace that exists already."""

    def __init__(self, name: str) -> None:
        self.name = name


@contextlib.contextmanager
def hosts(plain: bool) -> Iterator[tuple[NetworkNamespace, ...]]:
    with NetworkNamespace(label="a") as a, NetworkNamespace(label="b") as b:
        a.ip("link set lo up", f"link add eth0 type veth peer name eth0 netns {b.name}")
        for namespace, address in zip((a, b), UNDERLAYS, strict=True):
            namespace.ip(f"address add {address}/24 dev eth0", "link set eth0 up", "link set lo up")
            if not plain:
                off = "tso off gso off tx-udp-segmentation off tx-udp_tnl-segmentation off gro on"
                namespace.execute(["ethtool", "-K", "eth0", *off.split()])
        with container(a, 0) as c, container(b, 1) as d:
            yield a, b, c, d


@contextlib.contextmanager
def container(host: NetworkNamespace, number: int) -> Iterator[NetworkNamespace]:
    """A container on a host, behind the bridge cni0."""
    with NetworkNamespace(label=f"container-{number}") as made:
        host.set_sysctl("net.ipv4.ip_forward", 1)
        host.ip(
            "link add cni0 type bridge",
            f"address add {SUBNETS[number][1]}/24 dev cni0",
            "link set cni0 up",
            f"link add veth0 type veth peer name eth0 netns {made.name}",
            "link set veth0 master cni0 up",
        )
        made.ip(
            "link set lo up",
            f"address add {SUBNETS[number][96]}/24 dev eth0",
            "link set eth0 mtu 1450 up",
            f"route add default via {SUBNETS[number][1]}",
        )
        yield made


@contextlib.contextmanager
def tunnel(path: str, namespaces: tuple[NetworkNamespace, ...], peers: int) -> Iterator[str]:
    """Set up a path from the first host to the second; yields the address to talk to."""
    if path == "host":
        yield str(UNDERLAYS[1])
    elif path == "vxlan":
        for here, namespace in enumerate(namespaces[:2]):
            there = 1 - here
            namespace.ip(
                f"link add vx0 type vxlan id 1 dstport 4789 local {UNDERLAYS[here]} remote {UNDERLAYS[there]} dev eth0",
                f"address add {SUBNETS[here][0]}/32 dev vx0",
                "link set vx0 mtu 1450 up",
                f"route add {SUBNETS[there]} via {SUBNETS[there][0]} dev vx0 onlink",
            )
        yield str(SUBNETS[1][96])
        for namespace in namespaces[:2]:
            namespace.ip("link delete vx0")
    else:
        engine, offload = {"native": ("native", "auto"), "single": ("native", "off"), "python": ("python", "off")}[path]
        processes = []
        for here, namespace in enumerate(namespaces[:2]):
            arguments = ["--carry", namespace.name, str(here), engine, offload, "--peers", str(peers)]
            process = subprocess.Popen(
                [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            processes.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            namespace.ip("route replace 10.244.0.0/16 dev overlay0")
        yield str(SUBNETS[1][96])
        for process in processes:
            output, _ = process.communicate("")
            status = json.loads(output)
            print(f"    {path}: drops { ({k: v for k, v in status['drops'].items() if v}) } {status['offloads']}")


def iperf(a: NetworkNamespace, b: NetworkNamespace, address: str, *options: str) -> dict:
    server = b.popen(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
    for _ in range(100):
        if b.execute(["ss", "-Hltn", "sport = :5201"]).stdout:
            break
        threading.Event().wait(0.02)
    result = a.execute(["iperf3", "-J", "-c", address, *options], check=False)
    server.wait(20)
    return json.loads(result.stdout)


def measure(what: str, namespaces: tuple[NetworkNamespace, ...], address: str, seconds: int, rate: str) -> float:
    a, b = namespaces[:2] if address == str(UNDERLAYS[1]) else namespaces[2:]
    if what.startswith("tcp"):
        streams = what[3:]
        found = iperf(a, b, address, "-t", str(seconds), "-P", streams, "-O", "0")
        return found["end"]["sum_received"]["bits_per_second"] / 1e6
    if what.startswith("udp"):
        found = iperf(a, b, address, "-u", "-b", "0", "-l", what[3:], "-t", str(seconds))
        total = found["end"]["sum"]
        return (total["packets"] - total["lost_packets"]) / total["seconds"] / 1e3
    if what == "rtt":
        output = a.execute(["ping", "-q", "-i", "0.01", "-c", "100", address]).stdout
        return float(output.rsplit("=", 1)[1].split("/")[1])
    server = b.popen(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
    threading.Event().wait(0.3)
    client = a.popen(["iperf3", "-c", address, "-t", str(seconds)], stdout=subprocess.DEVNULL)
    threading.Event().wait(0.5)
    output = a.execute(["ping", "-q", "-i", "0.01", "-c", str(seconds * 60), address]).stdout
    client.wait(seconds + 20)
    server.wait(20)
    return float(output.rsplit("=", 1)[1].split("/")[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--only", default=",".join(PATHS))
    parser.add_argument("--measures", default=",".join(MEASURES))
    parser.add_argument("--peers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--carry", nargs=4)
    chosen = parser.parse_args()
    if chosen.carry:
        name, here, engine, offload = chosen.carry
        carry(Namespace(name), int(here), engine, offload, chosen.peers)
        return
    paths, measures = chosen.only.split(","), chosen.measures.split(",")
    results: dict[str, dict[str, list[float]]] = {path: {what: [] for what in measures} for path in paths}
    with hosts(chosen.plain) as namespaces:
        for number in range(chosen.rounds):
            for path in paths:
                with tunnel(path, namespaces, chosen.peers) as address:
                    for what in measures:
                        found = measure(what, namespaces, address, chosen.seconds, "0")
                        results[path][what].append(found)
                row = "  ".join(f"{what} {results[path][what][-1]:.4g}" for what in measures)
                print(f"round {number + 1} {path:8} {row}", flush=True)
    medians = {
        path: {what: statistics.median(values) for what, values in each.items()} for path, each in results.items()
    }
    print(f"\n{'path':8}" + "".join(f"{what:>18}" for what in measures) + "   (Mbit/s, kpps, ms; ratio to vxlan)")
    for path in paths:
        cells = []
        for what in measures:
            value = medians[path][what]
            base = medians.get("vxlan", {}).get(what)
            cells.append(f"{value:>10.4g} ({value / base:5.2f})" if base else f"{value:>18.4g}")
        print(f"{path:8}" + "".join(cells))
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
