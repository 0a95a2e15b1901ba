"""Fixtures for the tests that need neither root nor the network."""

import pytest

from overlaynet.testing.clock import VirtualClockLoop


@pytest.fixture
def anyio_backend() -> object:
    """Async tests run on asyncio with a virtual clock: waiting costs no time."""
    return ("asyncio", {"loop_factory": VirtualClockLoop})
