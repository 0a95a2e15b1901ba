"""The tls backend keeps overlaynet's laws for backends: with pretended devices, and as root with real ones."""

from collections.abc import Mapping
from typing import ClassVar

import pytest

from overlaynet.testing import KernelBackendConformance, TunBackendConformance
from overlaynet.testing.backends import Alive, MakeBackend, Observe
from overlaynet.testing.hosts import HostPair
from overlaynet_tls import TlsBackend, TlsOptions


class TestTlsBackend(TunBackendConformance):
    @pytest.fixture
    def make_backend(self, options: TlsOptions) -> MakeBackend:
        return lambda: TlsBackend(options)


class TestTlsBackendInTheKernel(KernelBackendConformance):
    lacks: ClassVar[Mapping[str, str]] = {
        "earlier runs": "the kernel takes a TUN device away when its process ends",
        "failure": "a device that is deleted is made again",
    }

    @pytest.fixture
    def make_backend(self, options: TlsOptions) -> MakeBackend:
        return lambda: TlsBackend(options)

    @pytest.fixture
    def observe(self, hosts: HostPair, brought: list[Alive]) -> Observe:
        """The kernel, and the peers, which it does not see."""

        def observe() -> object:
            tables = [alive.backend.status()["peers"] for alive in brought if not alive.ended]
            return hosts.near.observe(), [table for table in tables if table]

        return observe
