"""The example backend keeps overlaynet's laws for backends."""

import os
from collections.abc import Mapping
from typing import ClassVar

import attrs
import pytest
from overlaynet_example import ExampleBackend, ExampleOptions

from overlaynet.api import Underlay
from overlaynet.testing.backends import BackendConformance, Bring, MakeBackend, MakePeer


class TestExampleBackend(BackendConformance):
    """The laws. Each capability that is named here keeps some of them from being tested, and says why."""

    lacks: ClassVar[Mapping[str, str]] = {
        "earlier runs": "it makes nothing that could be left",
        "observation": "it makes nothing that could be seen",
        "write counts": "it changes nothing of the host",
        "repair": "it makes nothing that could be disturbed",
        "failure": "it has nothing that could fail",
        "delivery": "the kernel carries the packets, by its routes",
    }

    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        # Names are claimed for a whole network namespace, and this is the machine's.
        return lambda: ExampleBackend(ExampleOptions(name=f"test{os.getpid()}"))

    async def test_another_underlay_is_followed(self, bring: Bring, underlay: Underlay, make_peer: MakePeer) -> None:
        backend = (await bring("given peers")).backend
        device = await backend.set_underlay(attrs.evolve(underlay, interface="eth1", mtu=1400))
        assert device is not None
        assert (device.name, device.mtu) == ("eth1", 1400)
        assert [route.device for route in backend.routes([make_peer(2)])] == ["eth1"]
