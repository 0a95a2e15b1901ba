"""What the suites and fixtures need beside overlaynet: the packages of its extra ``testing``.

Modules of the kit that need pytest take it from here, so that who lacks it, or anyio, which runs the async tests, is told
what to install. The rest of :mod:`overlaynet.testing` needs neither: the demonstration is built from it.
"""

from __future__ import annotations

import importlib.util


def _not_installed(package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"the tests of overlaynet.testing need {package}, which is not installed; "
        f"install what they need with: pip install 'overlaynet[testing]'",
        name=package,
    )


try:
    import pytest
except ModuleNotFoundError as error:
    raise _not_installed(error.name or "pytest") from error
# Its plugin for pytest registers itself. Without it, pytest would skip every async test.
if importlib.util.find_spec("anyio") is None:
    raise _not_installed("anyio")

__all__ = ["pytest"]
