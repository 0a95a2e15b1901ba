"""What the service manager is told: readiness, troubles, and that the daemon is alive (sd_notify(3)).

A manager that wants to know hands over the name of a datagram socket in ``NOTIFY_SOCKET``, and in ``WATCHDOG_USEC`` how
often it wants to hear from its service.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping

from overlaynet.errors import ConfigError
from overlaynet.hookspecs import hookimpl
from overlaynet.logs import fields
from overlaynet.model import Lease

log = logging.getLogger(__name__)


class ServiceManager:
    """A plugin that passes events on to the service manager. Closed by its user.

    :param path: the socket's path; a name in the abstract namespace begins with ``@``.
    :param watchdog: seconds within which the manager wants each next sign of life; ``None`` if it wants none.
    """

    def __init__(self, path: str, watchdog: float | None = None) -> None:
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._watchdog = watchdog
        self._lease: Lease | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ServiceManager | None:
        """The manager that the environment names; ``None`` if it names none.

        :raises ConfigError: if the environment says nonsense.
        """
        path = environment.get("NOTIFY_SOCKET")
        if not path:
            return None
        if path[0] not in "/@":
            raise ConfigError(f"NOTIFY_SOCKET is {path!r}, neither a path nor an abstract name; unset it")
        # The watchdog is for the process that it names, which may be one that started this one.
        watched = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        if "WATCHDOG_USEC" not in environment or not watched:
            return cls(path)
        text = environment["WATCHDOG_USEC"]
        if not (text.isascii() and text.isdigit() and int(text) > 0):
            raise ConfigError(f"WATCHDOG_USEC is {text!r}, not a number of microseconds; unset it")
        return cls(path, int(text) / 1e6)

    async def give_signs_of_life(self) -> None:
        """Tell the manager at twice the pace it asks for that the event loop turns; for ever, or not at all."""
        while self._watchdog is not None:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog / 2)

    def close(self) -> None:
        """Tell nothing more. Idempotent."""
        self._socket.close()

    @hookimpl
    def overlaynet_ready(self, lease: Lease) -> None:
        """The node carries packets."""
        self._lease = lease
        self._tell("READY=1", f"STATUS={self._well()}")

    @hookimpl
    def overlaynet_degraded(self, reason: str) -> None:
        """Something is wrong, and the manager's status line says what."""
        self._tell(f"STATUS=degraded: {' '.join(reason.split())}")

    @hookimpl
    def overlaynet_recovered(self) -> None:
        """All is well again."""
        self._tell(f"STATUS={self._well()}")

    @hookimpl
    def overlaynet_stopping(self) -> None:
        """The daemon is on its way out."""
        self._tell("STOPPING=1", "STATUS=stopping")

    def _well(self) -> str:
        return f"ready, {self._lease.subnets} leased" if self._lease is not None else "starting"

    def _tell(self, *lines: str) -> None:
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:  # it may be restarting itself
            log.warning("service manager not told", extra=fields(message=lines[0], reason=error.strerror))
