"""What is wrong at the moment: each problem reported once when it comes and once when it is over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from overlaynet.logs import fields
from overlaynet.plugins import Plugins

log = logging.getLogger(__name__)

REMINDER = 60.0
"""Seconds after which a problem that lasts is mentioned again."""


class Health:
    """The problems of one node, one for each part (``store``, ``routes``, ``lease``) at most."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._problems: dict[str, str] = {}
        self._mentioned: dict[str, float] = {}

    @property
    def problems(self) -> Mapping[str, str]:
        """The reason why each troubled part is troubled."""
        return dict(self._problems)

    def degraded(self, part: str, reason: str, **details: object) -> None:
        """Say that a part is troubled. Repeated calls are logged only now and then, or when the reason changes."""
        now = asyncio.get_running_loop().time()
        known = self._problems.get(part)
        self._problems[part] = reason
        if known == reason and now - self._mentioned[part] < REMINDER:
            return
        self._mentioned[part] = now
        message = "degraded" if known is None else "still degraded"
        log.warning(message, extra=fields(part=part, reason=reason, **details))
        if known is None:
            self._plugins.notify("overlaynet_degraded", reason=f"{part}: {reason}")

    def recovered(self, part: str) -> None:
        """Say that a part is well. Nothing happens if it was."""
        if part in self._problems:
            del self._problems[part]
            log.info("recovered", extra=fields(part=part))
            if not self._problems:
                self._plugins.notify("overlaynet_recovered")
