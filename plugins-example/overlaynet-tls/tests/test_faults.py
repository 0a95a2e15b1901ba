"""Whole daemons with the tls backend, on a network that fails: no root is needed."""

import pytest

from overlaynet.testing import Network, Node
from overlaynet_tls import TlsOptions

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def network(options: TlsOptions) -> Network:
    """Two nodes, on addresses that the certificate names."""
    files = {"Certificate": options.certificate, "Key": options.key, "Authority": options.authority}
    return Network(
        2,
        backend="tls",
        backend_options={"Port": 18443},
        backend_option=tuple(f"{name}={file}" for name, file in files.items()),
    )


async def reach(network: Network, sender: Node, receiver: Node) -> None:
    """Send until one arrives: the first ones may be too early for a connection."""
    for _ in range(20):
        packet = network.send(sender, receiver, b"hello")
        await network.deliver()
        if packet.delivered:
            return
    pytest.fail(f"{sender.name} does not reach {receiver.name}:\n{network.diagram()}")


async def test_a_connection_outlives_a_partition(network: Network) -> None:
    async with network:
        a, b = network.nodes
        await reach(network, a, b)
        network.partition([a], [b])
        lost = network.send(a, b, b"into the dark")
        await network.deliver()
        assert lost.dropped == "partition: they are on two sides"
        network.heal()
        await reach(network, a, b)


async def test_a_peer_that_has_crashed_is_called_again(network: Network) -> None:
    async with network:
        a, b = network.nodes
        await reach(network, a, b)
        await b.crash()
        lost = network.send(a, b)
        await network.deliver()
        assert not lost.delivered
        b.start()
        await network.converge()
        await reach(network, a, b)
        await reach(network, b, a)
