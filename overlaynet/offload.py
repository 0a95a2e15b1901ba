"""What is known of an offload: whether the kernel has it, and whether it works."""

from __future__ import annotations

import errno

import attrs


@attrs.define
class Offload:
    """How a way to cross into the kernel less often does. It prints as ``on``, ``off`` or ``failing``, with the reason, such as
    ``failing: EIO (7 times)``."""

    on: bool
    """Whether it is used, when it is not failing."""
    failing: bool = False
    reason: int = 0
    """The number of the error for which it is off or failing."""
    failures: int = 0

    def failed(self, reason: int) -> None:
        """Note a failure with this error number."""
        self.failing, self.reason, self.failures = True, reason, self.failures + 1

    def __str__(self) -> str:
        name = errno.errorcode.get(self.reason, str(self.reason))
        if not self.on:
            return f"off: {name}" if self.reason else "off"
        if self.failing:
            return f"failing: {name} ({self.failures} times)"
        return f"on (failed {self.failures} times)" if self.failures else "on"
