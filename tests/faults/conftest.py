"""Fixtures for tests of faults."""

from pathlib import Path

import pytest

from tests.faults.wall_clock import WallClock


@pytest.fixture
def wall_clock(tmp_path: Path) -> WallClock:
    """A wall clock that the test sets."""
    return WallClock(tmp_path)
