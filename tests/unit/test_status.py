"""The status socket."""

import asyncio
import socket
from pathlib import Path

import pytest

from overlaynet._threads import call_in_thread
from overlaynet.errors import ConfigError
from overlaynet.status import StatusServer, ask

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    """The socket is a real one."""
    return "asyncio"


async def test_every_connection_gets_the_status_of_the_moment(tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "status.sock")
    count = 0

    def status() -> dict[str, object]:
        nonlocal count
        count += 1
        return {"count": count}

    async with StatusServer(path, status):  # type: ignore[arg-type]
        assert await call_in_thread(ask, path) == {"count": 1}
        assert await call_in_thread(ask, path) == {"count": 2}
        assert Path(path).stat().st_mode & 0o077 == 0
    assert not Path(path).exists()


async def test_a_socket_that_a_crash_left_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "status.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    async with StatusServer(path, lambda: {"ready": True}):
        assert await call_in_thread(ask, path) == {"ready": True}


async def test_a_socket_in_use_or_something_else_is_left_alone_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "status.sock")
    async with StatusServer(path, lambda: {"first": True}):
        async with StatusServer(path, lambda: {"second": True}):
            assert await call_in_thread(ask, path) == {"first": True}
        assert await call_in_thread(ask, path) == {"first": True}
    file = tmp_path / "precious"
    file.write_text("data")
    async with StatusServer(str(file), dict):
        pass
    assert file.read_text() == "data"
    assert [record.message for record in caplog.records] == ["no status socket"] * 2


def test_no_daemon_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="no daemon answers at .*status.sock .No such file or directory.; is `overlaynet run`"
    ):
        ask(str(tmp_path / "status.sock"))


async def test_a_daemon_that_hangs_does_not_hang_who_asks(tmp_path: Path) -> None:
    path = str(tmp_path / "status.sock")
    asked_long_enough = asyncio.Event()

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked_long_enough.wait()
        writer.close()

    async with await asyncio.start_unix_server(hang, path):
        with pytest.raises(ConfigError, match="no daemon answers at .*timed out"):
            await call_in_thread(ask, path, 0.2)
        asked_long_enough.set()
