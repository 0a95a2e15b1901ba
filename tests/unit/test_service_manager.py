"""What a service manager hears, by a real socket."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from overlaynet.errors import ConfigError
from overlaynet.model import Lease, Subnets
from overlaynet.plugins import Plugins
from overlaynet.service_manager import ServiceManager

LEASE = Lease(Subnets(IPv4Network("10.244.1.0/24")))


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.settimeout(10)
        yield made


def hear(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().splitlines()


@pytest.mark.parametrize("abstract", [False, True])
def test_it_hears_what_becomes_of_the_node(manager: socket.socket, tmp_path: Path, abstract: bool) -> None:
    name = f"@overlaynet-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    manager.bind("\0" + name[1:] if abstract else name)
    plugin = ServiceManager.from_environment({"NOTIFY_SOCKET": name})
    assert plugin is not None
    plugins = Plugins()
    plugins.register(plugin, name="service manager")
    plugins.notify("overlaynet_degraded", reason="store: no answer\nfor long")
    assert hear(manager) == ["STATUS=degraded: store: no answer for long"]
    plugins.notify("overlaynet_recovered")
    assert hear(manager) == ["STATUS=starting"]
    plugins.notify("overlaynet_ready", lease=LEASE)
    assert hear(manager) == ["READY=1", "STATUS=ready, 10.244.1.0/24 leased"]
    plugins.notify("overlaynet_degraded", reason="store: no answer")
    assert hear(manager) == ["STATUS=degraded: store: no answer"]
    plugins.notify("overlaynet_recovered")
    assert hear(manager) == ["STATUS=ready, 10.244.1.0/24 leased"]
    plugins.notify("overlaynet_stopping")
    assert hear(manager) == ["STOPPING=1", "STATUS=stopping"]
    plugin.close()
    plugin.close()


def test_without_a_manager_there_is_nobody_to_tell() -> None:
    assert ServiceManager.from_environment({}) is None
    assert ServiceManager.from_environment({"NOTIFY_SOCKET": ""}) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NOTIFY_SOCKET": "run/notify"}, "NOTIFY_SOCKET is 'run/notify', neither a path nor an abstract name"),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "soon"}, "WATCHDOG_USEC is 'soon', not a number of microseconds"),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "0"}, "WATCHDOG_USEC is '0', not a number of microseconds"),
    ],
)
def test_nonsense_in_the_environment_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServiceManager.from_environment(environment)


def test_a_manager_that_has_gone_is_reported_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugin = ServiceManager(str(tmp_path / "nobody"))
    plugin.overlaynet_ready(LEASE)
    plugin.close()
    assert "service manager not told" in caplog.text


class TestWatchdog:
    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.mark.anyio
    async def test_it_hears_that_the_event_loop_turns(self, manager: socket.socket, tmp_path: Path) -> None:
        manager.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "20000"}
        plugin = ServiceManager.from_environment(environment | {"WATCHDOG_PID": str(os.getpid())})
        assert plugin is not None
        signs = asyncio.create_task(plugin.give_signs_of_life())
        for _ in range(3):
            assert await asyncio.to_thread(hear, manager) == ["WATCHDOG=1"]
        signs.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await signs
        plugin.close()

    @pytest.mark.anyio
    @pytest.mark.parametrize("watchdog", [{}, {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}])
    async def test_who_does_not_watch_hears_nothing(
        self, manager: socket.socket, tmp_path: Path, watchdog: dict[str, str]
    ) -> None:
        manager.bind(str(tmp_path / "notify"))
        plugin = ServiceManager.from_environment({"NOTIFY_SOCKET": str(tmp_path / "notify")} | watchdog)
        assert plugin is not None
        await plugin.give_signs_of_life()
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)
        plugin.close()
