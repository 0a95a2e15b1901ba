"""How the daemon of this host is asked how it is: a Unix socket that answers every connection with one JSON object."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from overlaynet.errors import ConfigError
from overlaynet.logs import fields
from overlaynet.model import JSON

log = logging.getLogger(__name__)

MAXIMUM_REPLY = 64 * 2**20


class StatusServer:
    """Serves ``status()`` at a Unix socket while the context is open.

    A socket that cannot be had (another daemon serves there, no permission) is reported and done without: the node's
    traffic does not depend on it.
    """

    def __init__(self, path: str, status: Callable[[], dict[str, JSON]]) -> None:
        self._path = Path(path)
        self._status = status
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._in_use():
                raise FileExistsError(17, "another daemon serves there")
            self._path.unlink(missing_ok=True)  # left by a run that crashed
            old_mask = os.umask(0o177)
            try:
                self._server = await asyncio.start_unix_server(self._answer, self._path)
            finally:
                os.umask(old_mask)
        except OSError as error:
            log.warning("no status socket", extra=fields(path=self._path, reason=error.strerror or str(error)))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._path.unlink(missing_ok=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):  # whoever asked went away
            writer.write(json.dumps(self._status(), default=dict).encode() + b"\n")
            await writer.drain()
        writer.close()

    def _in_use(self) -> bool:
        if not self._path.exists():
            return False
        if not stat.S_ISSOCK(self._path.stat().st_mode):
            raise FileExistsError(17, "something that is not a socket stands there")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(str(self._path)) == 0


def ask(path: str, timeout: float = 5.0) -> dict[str, JSON]:
    """Ask the daemon at ``path``. :raises ConfigError: if none answers within ``timeout`` seconds."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(path)
            with connection.makefile("rb") as stream:
                answer: dict[str, JSON] = json.loads(stream.read(MAXIMUM_REPLY))
                return answer
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer in time"
        raise ConfigError(
            f"no daemon answers at {path} ({reason}); is `overlaynet run` running, with this --status-socket?"
        ) from error
