"""The log's part of falling back: which offload begins to fail, and which works again."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from overlaynet.logs import fields

log = logging.getLogger(__name__)


class OffloadLog:
    """Compares what an engine says of its offloads (:attr:`Counters.offloads`) with what it said when last looked at.

    An offload counts as failing from its first failure until a look finds it on and no failure since the look before: so one
    that works for one peer and fails for another is one line in the log, not a line each second. So does one that the kernel
    does not offer, if it was there before: another engine has asked again. What is off from the beginning is logged with the
    engine's start.
    """

    def __init__(self) -> None:
        self._before: Mapping[str, str] = {}
        self._failing: set[str] = set()

    def look(self, offloads: Mapping[str, str]) -> None:
        """Log what has changed since the last call."""
        for name, state in offloads.items():
            unchanged = state == self._before.get(name)
            withdrawn = state.startswith("off: ") and name in self._before
            failed = not unchanged and ("failing" in state or "failed" in state or withdrawn)
            if failed and name not in self._failing:
                self._failing.add(name)
                log.warning("offload failing", extra=fields(offload=name, state=state, hint="packets go on without it"))
            elif name in self._failing and not failed and state.startswith("on"):
                self._failing.discard(name)
                log.info("offload works again", extra=fields(offload=name))
        self._before = dict(offloads)
