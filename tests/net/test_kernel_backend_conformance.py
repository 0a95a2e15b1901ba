"""The laws of backends, for those whose packets stay in the kernel, on a real one."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import attrs
import pytest

from overlaynet.backends.host_gw import HostGwBackend
from overlaynet.backends.vxlan import VxlanBackend
from overlaynet.drivers import Backend
from overlaynet.model import JSON, LeaseData, Peer
from overlaynet.testing import KernelBackendConformance
from overlaynet.testing.backends import MakeBackend, MakePeer, Observe
from overlaynet.testing.far_hosts import numbered_peer
from overlaynet.testing.hosts import HostPair


class TestVxlan(KernelBackendConformance):
    lacks: ClassVar[Mapping[str, str]] = {
        "failure": "a device that is deleted is made again",
        "changes": "they are left to the audit",
        "sender checks": "the kernel decapsulates whatever comes; who may send it is for a firewall to say",
    }

    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        return lambda: VxlanBackend(VxlanBackend.Options())

    @pytest.fixture
    def make_peer(self, ip_version: int) -> MakePeer:
        def make(number: int) -> Peer:
            published: JSON = {"VNI": 1, "VtepMAC": f"02:00:00:00:00:{number:02x}"}
            data = LeaseData("vxlan", published) if ip_version == 4 else LeaseData("vxlan", ipv6=published)
            return attrs.evolve(numbered_peer(number, ip_version), data=data)

        return make

    @pytest.fixture
    def crash(self) -> Callable[[Backend], None]:
        def crash(backend: Backend) -> None:
            assert isinstance(backend, VxlanBackend)
            assert backend._claim is not None
            backend._claim.close()
            backend._close_signal()

        return crash


class TestHostGw(KernelBackendConformance):
    lacks: ClassVar[Mapping[str, str]] = {
        "failure": "it has nothing that could fail",
        "lost devices": "it makes none",
        "sender checks": "packets come as they are; who may send them is for a firewall to say",
        "repair": "it makes nothing that could be disturbed",
        "changes": "it makes nothing that could be disturbed",
        "earlier runs": "it leaves nothing behind: its routes are the router's",
    }

    @pytest.fixture
    def backends(self) -> list[Backend]:
        """Those that were made, the newest last."""
        return []

    @pytest.fixture
    def make_backend(self, backends: list[Backend]) -> MakeBackend:
        def make() -> Backend:
            backends.append(HostGwBackend(HostGwBackend.Options()))
            return backends[-1]

        return make

    @pytest.fixture
    def make_peer(self, ip_version: int) -> MakePeer:
        return lambda number: attrs.evolve(numbered_peer(number, ip_version), data=LeaseData("host-gw"))

    @pytest.fixture
    def observe(self, hosts: HostPair, backends: list[Backend]) -> Observe:
        """The kernel, and the hosts that routes are to lead to, which the backend only tells."""
        return lambda: (hosts.near.observe(), [peers for b in backends if (peers := b.status()["peers"])])
