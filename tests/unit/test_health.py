"""Problems are reported when they come, now and then while they last, and when they are over."""

import asyncio
import logging

import pytest

from overlaynet.health import REMINDER, Health
from overlaynet.hookspecs import hookimpl
from overlaynet.plugins import Plugins

pytestmark = pytest.mark.anyio


class Observer:
    def __init__(self) -> None:
        self.events: list[str] = []

    @hookimpl
    def overlaynet_degraded(self, reason: str) -> None:
        self.events.append(reason)

    @hookimpl
    def overlaynet_recovered(self) -> None:
        self.events.append("recovered")


async def test_a_lasting_problem_is_mentioned_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plugins, observer = Plugins(), Observer()
    plugins.register(observer)
    health = Health(plugins)
    for _ in range(int(3 * REMINDER)):
        health.degraded("store", "etcd does not answer")
        await asyncio.sleep(1)
    assert [record.message for record in caplog.records] == ["degraded", "still degraded", "still degraded"]
    health.degraded("routes", "refused")
    health.recovered("store")
    assert observer.events == ["store: etcd does not answer", "routes: refused"]
    health.recovered("routes")
    health.recovered("routes")
    assert observer.events[-1] == "recovered"
    assert observer.events.count("recovered") == 1
    assert health.problems == {}
