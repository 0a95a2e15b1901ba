"""What plugin authors test with, and what the demonstration is built from. Public.

Nothing here but the suites needs pytest, and they are imported only when they are asked for.
"""

from __future__ import annotations

import sys

_SUITES = ("conformance", "stores", "backends", "routers", "tables", "hosts")

# The suites are shipped, and pytest rewrites only the assertions of a user's own tests by default: without this, a law
# that is broken would show no values. They are not imported before this module, so it is never too late here.
if "pytest" in sys.modules:
    sys.modules["pytest"].register_assert_rewrite(*(f"{__name__}.{suite}" for suite in _SUITES))
