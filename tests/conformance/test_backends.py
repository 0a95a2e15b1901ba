"""The laws of backends, for those that need no root, or none with pretended devices."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest

from overlaynet.backends.udp import UdpBackend, UdpOptions
from overlaynet.drivers import Backend
from overlaynet.testing.backends import BackendConformance, MakeBackend, Observe
from overlaynet.testing.fakes import FakeBackend, FakeBackendOptions
from overlaynet.testing.tuns import TunBackendConformance


class TestFakeBackend(BackendConformance):
    lacks: ClassVar[Mapping[str, str]] = {
        "conflicts": "any number of fakes can be on one host",
        "earlier runs": "nothing of a fake outlives it",
        "repair": "nobody can disturb a fake",
        "changes": "nobody can disturb a fake",
        "delivery": "a fake that is by itself carries no packets",
        "sender checks": "a fake that is by itself is sent no packets",
    }

    @pytest.fixture
    def backends(self) -> list[FakeBackend]:
        """Those that the test has made, the newest last."""
        return []

    @pytest.fixture
    def make_backend(self, backends: list[FakeBackend]) -> MakeBackend:
        def make() -> FakeBackend:
            backends.append(FakeBackend(FakeBackendOptions()))
            return backends[-1]

        return make

    @pytest.fixture
    def observe(self, backends: list[FakeBackend]) -> Observe:
        return lambda: [set(backend.peers) for backend in backends if not backend.closed and backend.peers]

    @pytest.fixture
    def take_device(self, backends: list[FakeBackend]) -> Callable[[], None]:
        return lambda: backends[-1].lose("the device overlay0 is gone")

    @pytest.fixture
    def break_it(self) -> Callable[[Backend], None]:
        def break_it(backend: Backend) -> None:
            assert isinstance(backend, FakeBackend)
            backend.fail("its device has gone")

        return break_it


class TestUdpBackend(TunBackendConformance):
    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        return lambda: UdpBackend(UdpOptions(), engine="python")
