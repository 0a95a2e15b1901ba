"""One host's udp backend in a process of its own, whose peer table is replaced on demand.

    python -m bench.carrier '{"engine": "native", "underlay": …, "own": …, "peer": …, "range": …}'

Each line of standard input is a number of peers; the answer is a line with the seconds that ``set_peers`` took. The peers
have the first so many subnets of ``range``, and all of them the address ``peer``. End of input ends it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from ipaddress import IPv4Address, IPv4Network

from bench import spray
from overlaynet.backends.udp import UdpBackend, UdpOptions
from overlaynet.model import Lease, Peer, Subnets, Underlay
from overlaynet.network import parse


async def carry(engine: str, underlay: str, own: str, peer: str, range: str) -> None:
    """Carry packets until the end of standard input."""
    backend = UdpBackend(UdpOptions(), engine=engine)
    address = IPv4Address(underlay)
    try:
        await backend.open(
            parse('{"Network": "10.0.0.0/8"}'), Underlay("eth0", 1500, ipv4=address, public_ipv4=address)
        )
        # One lease over all the subnets of this side: so one host can stand for them all.
        await backend.start(Lease(Subnets(IPv4Network(own)), public_ipv4=address))
        while line := await asyncio.to_thread(sys.stdin.readline):
            subnets = spray.subnets(IPv4Network(range), int(line))
            table = [Peer(Subnets(subnet), IPv4Address(peer)) for subnet in subnets]
            start = time.perf_counter()
            await backend.set_peers(table)
            print(json.dumps(time.perf_counter() - start), flush=True)
    finally:
        await backend.aclose()


if __name__ == "__main__":
    asyncio.run(carry(**json.loads(sys.argv[1])))
