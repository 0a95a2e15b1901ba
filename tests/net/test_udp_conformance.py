"""The laws of backends, for the udp backend with real devices and sockets, with either engine."""

from collections.abc import Mapping
from typing import ClassVar

import pytest

from overlaynet.backends.udp import UdpBackend, UdpOptions
from overlaynet.testing.backends import MakeBackend, Observe
from overlaynet.testing.hosts import HostPair, KernelBackendConformance


class TestPythonEngine(KernelBackendConformance):
    engine, threads = "python", 1
    lacks: ClassVar[Mapping[str, str]] = {
        "earlier runs": "the kernel takes its device away when the process ends",
        "failure": "a device that is deleted is made again",
    }

    @pytest.fixture
    def backends(self) -> list[UdpBackend]:
        """Those that were made, the newest last."""
        return []

    @pytest.fixture
    def make_backend(self, backends: list[UdpBackend]) -> MakeBackend:
        def make() -> UdpBackend:
            backends.append(UdpBackend(UdpOptions(), engine=self.engine, threads=str(self.threads)))
            return backends[-1]

        return make

    @pytest.fixture
    def observe(self, hosts: HostPair, backends: list[UdpBackend]) -> Observe:
        """The kernel, and the peers of the engine, which the kernel does not see."""

        def observe() -> object:
            peers = [backend.status()["peers"] for backend in backends] if hosts.near.own_links() else []
            return hosts.near.observe(), [table for table in peers if table]

        return observe


class TestNativeEngine(TestPythonEngine):
    engine = "native"


class TestNativeEngineWithTwoThreads(TestPythonEngine):
    engine, threads = "native", 2
