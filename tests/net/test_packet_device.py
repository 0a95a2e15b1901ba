"""A backend's device in an event loop, with a real kernel."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Network
from typing import Any

import pytest

from overlaynet import devices, tun_device
from overlaynet.delivery import Dropped
from overlaynet.errors import BackendError
from overlaynet.model import Subnets
from overlaynet.netlink import Netlink
from overlaynet.packet_device import PacketDevice
from overlaynet.testing.conformance import eventually
from overlaynet.testing.namespaces import NetworkNamespace
from overlaynet.testing.packets import UDP, parse_ip
from overlaynet.testing.pretended import datagram
from overlaynet.tun_device import TunDevice

pytestmark = pytest.mark.anyio

OWN = Subnets(IPv4Network("10.244.1.0/24"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_packets_come_and_go_and_one_that_was_deleted_is_made_again() -> None:
    taken: list[bytes] = []
    with NetworkNamespace(label="device") as namespace, namespace.entered():
        device = PacketDevice("mine0", "mine", taken.append)
        await device.open()
        with socket.socket(type=socket.SOCK_DGRAM) as near:
            for turn in range(2):
                await device.mend(1400, OWN)
                (link,) = namespace.ip_json("link", "show", "mine0")
                assert (link["mtu"], link["ifalias"]) == (1400, "overlaynet mine")
                if turn == 0:
                    near.bind(("10.244.1.0", 9000))
                    near.setblocking(False)
                namespace.ip("route replace 10.244.2.0/24 dev mine0")
                near.sendto(b"out", ("10.244.2.9", 9000))
                await eventually(lambda: any(b"out" in packet for packet in taken))
                packet = parse_ip(next(packet for packet in taken if b"out" in packet))
                assert (str(packet.header.source), isinstance(packet.transport, UDP)) == ("10.244.1.0", True)
                device.write(datagram("10.244.2.9", "10.244.1.0", b"in"))
                assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(near, 100), 10) == b"in"
                namespace.ip("link set mine0 down")
                with pytest.raises(Dropped, match="refused"):
                    device.write(datagram("10.244.2.9", "10.244.1.0", b"in"))
                changed = asyncio.create_task(device.changed())
                namespace.ip("link delete mine0")
                await asyncio.wait_for(changed, 10)
                with pytest.raises(Dropped, match="no_device|refused"):
                    device.write(datagram("10.244.2.9", "10.244.1.0", b"in"))
                taken.clear()
        device.close()


@pytest.mark.parametrize("other", ["bridge", "another TUN device", "none"])
async def test_what_has_taken_the_name_as_soon_as_the_device_was_made_is_left_alone(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's index is asked for by its name, which means another interface by then."""
    with NetworkNamespace(label="device") as namespace, namespace.entered():
        commands = ["link delete mine0"]
        commands += {
            "bridge": ["link add mine0 type bridge"],
            "another TUN device": ["tuntap add dev mine0 mode tun"],
            "none": [],
        }[other]

        async def too_late(function: Callable[[Netlink], int]) -> int:
            namespace.ip(*commands)
            return await devices.ask(function)

        monkeypatch.setattr(tun_device, "ask", too_late)
        with pytest.raises(
            BackendError, match="the device mine0 was deleted or renamed as soon as it was made; try again"
        ):
            await TunDevice.make("mine0", backend="mine")
        left = [link for link in namespace.ip_json("link", "show") if link["ifname"] == "mine0"]
        assert [link.get("ifalias") for link in left] == ([] if other == "none" else [None])


async def test_a_device_that_was_to_be_made_is_gone_as_soon_as_that_was_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also while a thread asks the kernel about it, which keeps the device until it is answered."""
    asking, answered = threading.Event(), threading.Event()
    complete = tun_device._complete

    def slow(*arguments: Any) -> Any:
        asking.set()
        time.sleep(0.5)
        answered.set()
        return complete(*arguments)

    monkeypatch.setattr(tun_device, "_complete", slow)
    with NetworkNamespace(label="device") as namespace, namespace.entered():
        making = asyncio.create_task(TunDevice.make("mine0", backend="mine"))
        await eventually(asking.is_set)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        assert answered.is_set()
        assert [link["ifname"] for link in namespace.ip_json("link", "show")] == ["lo"]
