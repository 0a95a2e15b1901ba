"""What plugin authors test with, and what the demonstration is built from. Public.

The suites, the in-process network and the lab are to be had from here by name. They are imported when they are asked for: only
they need pytest, and the commands use other modules of this package.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from overlaynet.testing.backends import BackendConformance
    from overlaynet.testing.capture import Capture
    from overlaynet.testing.clock import VIRTUAL_CLOCK
    from overlaynet.testing.etcd import EtcdServer, make_certificates
    from overlaynet.testing.hosts import HostPair, KernelBackendConformance
    from overlaynet.testing.lab import Lab
    from overlaynet.testing.namespaces import NetworkNamespace
    from overlaynet.testing.network import Network, Node
    from overlaynet.testing.observers import ObserverConformance
    from overlaynet.testing.pretended import PretendedHosts
    from overlaynet.testing.routers import RouterConformance
    from overlaynet.testing.stores import StoreConformance
    from overlaynet.testing.tables import TableConformance
    from overlaynet.testing.tuns import TunBackendConformance

__all__ = [
    "VIRTUAL_CLOCK",
    "BackendConformance",
    "Capture",
    "EtcdServer",
    "HostPair",
    "KernelBackendConformance",
    "Lab",
    "Network",
    "NetworkNamespace",
    "Node",
    "ObserverConformance",
    "PretendedHosts",
    "RouterConformance",
    "StoreConformance",
    "TableConformance",
    "TunBackendConformance",
    "make_certificates",
]

_HOMES = {
    "VIRTUAL_CLOCK": "clock",
    "BackendConformance": "backends",
    "Capture": "capture",
    "EtcdServer": "etcd",
    "HostPair": "hosts",
    "KernelBackendConformance": "hosts",
    "Lab": "lab",
    "Network": "network",
    "NetworkNamespace": "namespaces",
    "Node": "network",
    "PretendedHosts": "pretended",
    "RouterConformance": "routers",
    "StoreConformance": "stores",
    "ObserverConformance": "observers",
    "TableConformance": "tables",
    "TunBackendConformance": "tuns",
    "make_certificates": "etcd",
}
_SUITES = ("conformance", "stores", "backends", "hosts", "routers", "tables", "observers", "tuns")

# The suites are shipped, and pytest rewrites only the assertions of a user's own tests by default: without this, a law
# that is broken would show no values. They are not imported before this module, so it is never too late here.
if (_pytest := sys.modules.get("pytest")) is not None:
    _pytest.register_assert_rewrite(*(f"{__name__}.{suite}" for suite in _SUITES))


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
