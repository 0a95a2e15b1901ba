"""Waiting longer after each failure."""

from __future__ import annotations

import random


class Backoff:
    """How long to wait before the next try: doubling from ``first`` to ``most`` seconds, each within ± 20 %.

    The spread keeps many nodes that failed together from trying again together.
    """

    def __init__(self, first: float = 0.5, most: float = 15.0) -> None:
        self._first = first
        self._most = most
        self._next = first

    def next(self) -> float:
        """Seconds to wait now."""
        delay = self._next
        self._next = min(self._next * 2, self._most)
        return delay * random.uniform(0.8, 1.2)

    def reset(self) -> None:
        """It worked: begin from ``first`` again."""
        self._next = self._first
