"""Fixtures for all tests."""

import pytest


@pytest.fixture
def anyio_backend() -> object:
    """Async tests run on asyncio, with the real clock."""
    return "asyncio"
