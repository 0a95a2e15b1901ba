"""A kernel that grants the header of ``IFF_VNET_HDR`` and takes no packet with it: the device is made again without."""

import asyncio
import logging
from ipaddress import IPv4Address, IPv4Network

import pytest

from overlaynet.backends.udp import UdpBackend, UdpOptions
from overlaynet.backends.udp.engine import HeaderRefused
from overlaynet.backends.udp.native_engine import NativeEngine
from overlaynet.model import Lease, Subnets, Underlay
from overlaynet.network import parse
from overlaynet.testing.namespaces import NetworkNamespace

ADDRESS = IPv4Address("172.16.130.140")


def test_the_device_is_made_again_without_the_header(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = NativeEngine.run
    ended: list[NativeEngine] = []

    def refused_once(engine: NativeEngine) -> None:
        if not ended:
            ended.append(engine)
            raise HeaderRefused("Invalid argument")
        run(engine)

    monkeypatch.setattr(NativeEngine, "run", refused_once)
    headers = []

    async def live(host: NetworkNamespace) -> None:
        def header() -> bool:
            (link,) = host.ip_json("link", "show", "overlay0")
            return bool(link["linkinfo"]["info_data"]["vnet_hdr"])

        backend = UdpBackend(UdpOptions(), engine="native", threads="1")
        await backend.open(
            parse('{"Network": "10.244.0.0/16"}'), Underlay("eth0", 1500, ipv4=ADDRESS, public_ipv4=ADDRESS)
        )
        headers.append(header())
        try:
            await backend.start(Lease(Subnets(IPv4Network("10.244.1.0/24")), public_ipv4=ADDRESS))
            await asyncio.wait_for(backend.changed(), 20)
            while "device refuses packets with the header that offloads need" not in caplog.messages:
                await asyncio.wait_for(backend.changed(), 20)
            await backend.set_peers([])
            headers.append(header())
            offloads = backend.status()["offloads"]
            assert isinstance(offloads, dict)
            assert offloads["tun_tcp"] == offloads["tun_udp"] == "off: EOPNOTSUPP"
        finally:
            await backend.aclose()

    with NetworkNamespace(label="refused") as host:
        host.ip("link add eth0 type veth peer name eth1", f"address add {ADDRESS}/24 dev eth0", "link set eth0 up")
        host.run_async(live, host)
    assert headers == [True, False]
    assert caplog.messages[-1] == "device made again"
    assert "device lost" not in caplog.messages
