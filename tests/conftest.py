"""Fixtures for all tests."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def anyio_backend() -> object:
    """Async tests run on asyncio, with the real clock."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The commands configure logging for their whole process; here, they are called inside of the tests'."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
