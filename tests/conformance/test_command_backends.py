"""The laws of backends, for those that leave the packets to others."""

import os
from collections.abc import Mapping
from typing import ClassVar

import pytest

from overlaynet.backends.alloc import AllocBackend, AllocOptions
from overlaynet.backends.extension import ExtensionBackend, ExtensionOptions
from overlaynet.testing.backends import BackendConformance, MakeBackend

_NOTHING = "it makes nothing of the host"


class TestAllocBackend(BackendConformance):
    lacks: ClassVar[Mapping[str, str]] = {
        "conflicts": "any number of them can live on one host",
        "routes": "others route the packets",
        "earlier runs": _NOTHING,
        "observation": _NOTHING,
        "write counts": _NOTHING,
        "repair": _NOTHING,
        "failure": "it has nothing that could fail",
        "delivery": "others carry the packets",
        "sender checks": "others carry the packets",
        "lost devices": _NOTHING,
    }

    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        return lambda: AllocBackend(AllocOptions())


class TestExtensionBackend(BackendConformance):
    lacks: ClassVar[Mapping[str, str]] = {
        "routes": "the commands make what routes are needed",
        "earlier runs": "what the commands leave is theirs to clear away",
        "observation": "what the commands make is not known",
        "write counts": "what the commands make is not known",
        "repair": "what the commands make is not known",
        "failure": "it has nothing of its own that could fail",
        "delivery": "others carry the packets",
        "sender checks": "others carry the packets",
        "lost devices": "what the commands make is not known",
    }

    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        return lambda: ExtensionBackend(
            ExtensionOptions(
                name=f"test{os.getpid()}",
                pre_startup_command="echo data",
                post_startup_command="true",
                subnet_add_command="true $SUBNET",
                subnet_remove_command="true $SUBNET",
                underlay_change_command="true $PUBLIC_IP",
                shutdown_command="true",
            )
        )
