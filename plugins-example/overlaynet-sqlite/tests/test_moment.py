"""Lifetimes pass alike for all who read them: by the boot clock within one boot, by the wall clock between two."""

import math
from collections.abc import Callable

import pytest

from overlaynet_sqlite import SqliteTable, _moment
from overlaynet_sqlite._moment import Moment

MakeTable = Callable[..., SqliteTable]
BOOT = Moment("boot", 1000.0, 50_000.0)


def test_within_one_boot_the_wall_clock_does_not_matter() -> None:
    expires = BOOT.after(60)
    clock_was_set = Moment("boot", 1010.0, 90_000.0)
    assert clock_was_set.until(expires) == 50.0


def test_between_two_boots_the_wall_clock_decides() -> None:
    expires = BOOT.after(60)
    after_a_reboot = Moment("another", 5.0, 50_030.0)
    assert after_a_reboot.until(expires) == 30.0
    assert Moment("another", 5.0, 50_070.0).until(expires) == -10.0


def test_now_is_on_both_clocks_of_this_machine() -> None:
    before, after = _moment.now(), _moment.now()
    assert before.boot == after.boot != ""
    assert before.boottime <= after.boottime
    assert _moment.now().until(before) <= 0


@pytest.mark.anyio
async def test_a_wall_clock_that_jumps_ends_no_lease(make_table: MakeTable, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table()
    assert await table.create("subnets/a", b"", 3600) is not None
    real = _moment.now()
    monkeypatch.setattr("overlaynet_sqlite._database.now", lambda: Moment(real.boot, real.boottime, real.time + 86400))
    found = await table.get("subnets/a")
    assert found is not None
    assert found.ttl == pytest.approx(3600, abs=60)
    # Another machine knows but the wall clock.
    monkeypatch.setattr("overlaynet_sqlite._database.now", lambda: Moment("other", 1.0, real.time + 3000))
    found = await table.get("subnets/a")
    assert found is not None
    assert found.ttl == pytest.approx(600, abs=60)
    monkeypatch.setattr("overlaynet_sqlite._database.now", lambda: Moment("other", 1.0, real.time + 4000))
    assert await table.get("subnets/a") is None
    assert await table.create("subnets/b", b"", math.inf) is not None
