"""A backend's device in an event loop, with a pretended kernel."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Network

import pytest

from overlaynet.delivery import Dropped
from overlaynet.errors import BackendError
from overlaynet.model import Device, Subnets
from overlaynet.packet_device import BURST, PacketDevice
from overlaynet.testing.conformance import Resources, eventually
from overlaynet.testing.pretended import PretendedHosts, datagram

pytestmark = pytest.mark.anyio

OWN = Subnets(IPv4Network("10.244.1.0/24"))
PACKET = datagram("10.244.1.9", "10.244.2.9", b"content")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def hosts() -> Iterator[PretendedHosts]:
    with PretendedHosts() as hosts:
        yield hosts


@pytest.fixture
def taken() -> list[bytes]:
    return []


@pytest.fixture
async def device(hosts: PretendedHosts, taken: list[bytes]) -> AsyncIterator[PacketDevice]:
    device = PacketDevice("overlay0", "mine", taken.append)
    yield device
    device.close()


async def test_packets_come_out_of_it_and_go_into_it(
    device: PacketDevice, hosts: PretendedHosts, taken: list[bytes]
) -> None:
    assert not device.exists
    await device.open()
    assert device.exists
    assert await device.mend(1400, OWN) == Device("overlay0", 1400)
    pretended = hosts.devices()["overlay0"]
    assert (pretended.mtu, [str(address) for address in pretended.addresses]) == (1400, ["10.244.1.0"])
    for _ in range(BURST + 1):
        pretended.kernel.send(PACKET)
    await eventually(lambda: len(taken) == BURST + 1)
    assert set(taken) == {PACKET}
    device.write(PACKET)
    assert pretended.kernel.recv(1 << 16) == PACKET


async def test_what_is_dropped_is_counted_and_the_next_packet_is_taken(hosts: PretendedHosts) -> None:
    def take(packet: bytes) -> None:
        raise Dropped("no_route" if packet == PACKET else "malformed", "as the test wants it")

    device = PacketDevice("overlay0", "mine", take)
    await device.open()
    for packet in (PACKET, b"no packet", PACKET):
        hosts.devices()["overlay0"].kernel.send(packet)
    await eventually(lambda: device.drops.total() == 3)
    assert device.drops == {"no_route": 2, "malformed": 1}
    device.close()


async def test_one_that_was_deleted_is_made_again(
    device: PacketDevice,
    hosts: PretendedHosts,
    taken: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    await device.open()
    await device.mend(1400, OWN)
    hosts.devices()["overlay0"].delete()
    await asyncio.sleep(0.01)
    assert await device.mend(1400, OWN) == Device("overlay0", 1400)
    assert [record.message for record in caplog.records] == ["device made again"]
    hosts.devices()["overlay0"].kernel.send(PACKET)
    await eventually(lambda: taken == [PACKET])


async def test_while_its_name_is_taken_there_is_none_and_what_is_written_is_dropped(
    device: PacketDevice, hosts: PretendedHosts
) -> None:
    await device.open()
    hosts.devices()["overlay0"].delete()
    other = PacketDevice("overlay0", "other", lambda packet: None)
    await other.open()
    with pytest.raises(BackendError, match="overlay0 belongs to another"):
        await device.mend(1400, OWN)
    assert not device.exists
    with pytest.raises(Dropped, match="no_device"):
        device.write(PACKET)
    other.close()
    await device.mend(1400, OWN)
    assert device.exists


async def test_one_whose_name_is_taken_cannot_be_opened_and_leaves_nothing(
    device: PacketDevice, hosts: PretendedHosts
) -> None:
    await device.open()
    before = Resources()
    other = PacketDevice("overlay0", "other", lambda packet: None)
    with pytest.raises(BackendError):
        await other.open()
    await before.return_to_this()


async def test_once_it_is_closed_it_is_not_made_again(device: PacketDevice, hosts: PretendedHosts) -> None:
    await device.open()
    device.close()
    device.close()
    with pytest.raises(BackendError, match="closed meanwhile"):
        await device.mend(1400, OWN)
    assert hosts.devices() == {}


async def test_changes_of_one_that_was_not_opened_are_a_defect(device: PacketDevice) -> None:
    with pytest.raises(BackendError, match="not opened"):
        await device.changed()


async def test_what_the_kernel_does_not_take_is_dropped(device: PacketDevice, hosts: PretendedHosts) -> None:
    await device.open()

    def write_many() -> None:
        for _ in range(100_000):  # nobody reads them, so there is room for some only
            device.write(PACKET)

    with pytest.raises(Dropped, match=r"^refused: "):
        write_many()
