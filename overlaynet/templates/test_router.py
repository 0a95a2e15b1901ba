"""The example router keeps overlaynet's laws for routers."""

from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import ClassVar

import pytest
from overlaynet_example import ExampleOptions, ExampleRouter

from overlaynet.api import Route, RouterError
from overlaynet.testing.routers import INSTANCE, CountWrites, Installed, MakeRouter, RouterConformance


class TestExampleRouter(RouterConformance):
    """The laws. Each capability that is named here keeps some of them from being tested, and says why."""

    lacks: ClassVar[Mapping[str, str]] = {
        "foreign routes": "nobody else has routes in its file",
        "refusal": "a file takes any route",
        "changes": "it does not watch its file; what was changed by hand, the next audit repairs",
    }

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / INSTANCE

    @pytest.fixture
    def make_router(self, tmp_path: Path) -> MakeRouter:
        return lambda: ExampleRouter(ExampleOptions(directory=str(tmp_path)))

    @pytest.fixture
    def installed(self, file: Path) -> Installed:
        return lambda: set(map(_route, file.read_text().splitlines())) if file.exists() else set()

    @pytest.fixture
    def count_writes(self, file: Path) -> CountWrites:
        seen = _version(file)

        def count() -> int:
            nonlocal seen
            before, seen = seen, _version(file)
            return int(before != seen)

        return count

    @pytest.mark.parametrize("instance", ["../elsewhere", "..", "/etc/passwd", ""])
    async def test_a_name_that_leads_elsewhere_is_refused(self, make_router: MakeRouter, instance: str) -> None:
        with pytest.raises(RouterError, match="the overlay's name cannot be that of a file: it must be"):
            await make_router().open(instance)


def _version(file: Path) -> object:
    return (file.stat().st_ino, file.stat().st_mtime_ns) if file.exists() else None


def _route(line: str) -> Route:
    kind, destination, *words = line.split()
    values = dict(zip(words[::2], words[1::2], strict=False))
    return Route(
        ip_network(destination),
        kind="unreachable" if kind == "unreachable" else "unicast",
        device=values.get("dev"),
        gateway=ip_address(values["via"]) if "via" in values else None,
        onlink="onlink" in words,
    )
