"""The example backend keeps overlaynet's laws for backends."""

from collections.abc import Mapping
from typing import ClassVar

import pytest
from overlaynet_example import ExampleBackend, ExampleOptions

from overlaynet.testing.backends import BackendConformance, MakeBackend


class TestExampleBackend(BackendConformance):
    """The laws. Each capability that is named here keeps some of them from being tested, and says why."""

    lacks: ClassVar[Mapping[str, str]] = {
        "conflicts": "any number of them can live on one host",
        "earlier runs": "it makes nothing that could be left",
        "observation": "it makes nothing that could be seen",
        "write counts": "it changes nothing of the host",
        "repair": "it makes nothing that could be disturbed",
        "failure": "it has nothing that could fail",
        "delivery": "the kernel carries the packets, by its routes",
    }

    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        return lambda: ExampleBackend(ExampleOptions())
