"""What the suites for stores, backends, routers and tables have in common.

Each suite is a class of tests to derive from. A subclass overrides one fixture, which makes a driver; each further
fixture that it overrides lets the suite look deeper, and a test whose fixture is missing is skipped and says so. What a
driver cannot do by its nature stands in :attr:`Conformance.lacks`, with the reason.

The tests are async, and run by anyio's pytest plugin, which is there wherever anyio is installed.
"""

from __future__ import annotations

import asyncio
import os
import threading
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

import attrs

from overlaynet import options
from overlaynet.checks import check_driver
from overlaynet.drivers import Driver
from overlaynet.errors import ConfigError, did_you_mean
from overlaynet.testing._requirements import pytest

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds that a suite waits for what must happen before it calls it missing."""

_ODD_VALUES: Mapping[object, tuple[object, ...]] = {
    int: (0, -1, 1, 2**63),
    float: (0.0, -1.0, 1e300),
    bool: (True, False),
    str: ("", "a", "ä", "a b", "a/b", "..", "x" * 300, "\0"),
    tuple: ((), ("",), ("a", "a")),
}
_TURNS = (*range(10), 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765, 10946)


class Conformance:
    """The base of the suites."""

    pytestmark = pytest.mark.anyio

    capabilities: ClassVar[Mapping[str, str]] = {}
    """What not every driver has, and what it means to have it."""
    lacks: ClassVar[Mapping[str, str]] = {}
    """Which of the capabilities this driver lacks, and why; tests that need one are skipped with the reason."""
    optional_fixtures: ClassVar[Mapping[str, str]] = {}
    """The fixtures that need not be overridden, and the capability that each stands for."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name in cls.lacks:
            if name not in cls.capabilities:
                hint = did_you_mean(name, cls.capabilities)
                known = ", ".join(map(repr, cls.capabilities))
                raise TypeError(f"{cls.__name__}.lacks: there is no capability {name!r}{hint} (there are {known})")

    @pytest.fixture
    def anyio_backend(self) -> object:
        """The event loop of the tests: asyncio with the real clock. Override it for a virtual one."""
        return "asyncio"

    @pytest.fixture(autouse=True)
    def _skip_what_is_lacking(self, request: pytest.FixtureRequest) -> None:
        for fixture, capability in self.optional_fixtures.items():
            if fixture in request.fixturenames:
                self.needs(capability)

    def needs(self, capability: str) -> None:
        """Skip the test if the driver lacks the capability."""
        if capability in self.lacks:
            pytest.skip(f"it lacks {capability}: {self.lacks[capability]}")

    def not_overridden(self, fixture: str) -> NoReturn:
        """Skip the test, which needs a fixture that the subclass has not overridden."""
        pytest.skip(f"not tested, for want of {self.optional_fixtures[fixture]}: override the fixture {fixture!r}")


class DriverConformance(Conformance):
    """What stores, backends and routers have in common: how they are loaded, made and configured, and that they end."""

    axis: ClassVar[str]

    @pytest.fixture
    def make_driver(self) -> Callable[[], Driver]:
        """Makes drivers. Each suite has a fixture of its own that is to be overridden instead: ``make_backend``, …"""
        raise NotImplementedError

    @pytest.fixture
    async def make(self, make_driver: Callable[[], Driver]) -> AsyncIterator[Callable[[], Any]]:
        """Makes drivers that are closed after the test, the newest first."""
        made: list[Driver] = []

        def make() -> Driver:
            made.append(make_driver())
            return made[-1]

        yield make
        for driver in reversed(made):
            await promptly(driver.aclose())

    async def test_it_is_a_driver_that_overlaynet_loads(self, make: Callable[[], Driver]) -> None:
        driver = make()
        check_driver(self.axis, type(driver), type(driver).__name__)

    async def test_it_keeps_its_options(self, make: Callable[[], Driver]) -> None:
        driver = make()
        assert isinstance(driver.options, driver.Options)

    async def test_every_option_is_explained(self, make: Callable[[], Driver]) -> None:
        options_are_explained(make().Options)

    async def test_a_value_that_an_option_cannot_have_is_a_config_error(self, make: Callable[[], Driver]) -> None:
        wrong_values_are_config_errors(make().Options)

    async def test_making_one_takes_nothing(self, make: Callable[[], Driver]) -> None:
        before = Resources()
        make()
        await before.return_to_this()

    async def test_one_that_was_only_made_can_be_closed_twice(self, make: Callable[[], Driver]) -> None:
        driver = make()
        await promptly(driver.aclose())
        await promptly(driver.aclose())


def options_are_explained(cls: type[Any]) -> None:
    """:raises AssertionError: naming an option that has no sentence of help."""
    for field in attrs.fields(cls):
        assert field.metadata.get("help"), f"{field.name} has no sentence of help: declare it with option()"


def wrong_values_are_config_errors(cls: type[Any]) -> None:
    """Give each option values at the edge of its type. :raises AssertionError: if one is neither taken nor refused in words."""
    hints = typing.get_type_hints(cls)
    for field in attrs.fields(cls):
        for value in _odd_values(hints[field.name]):
            try:
                read = options.read(cls, {options.display_name(field): value}, "the odd value")
            except ConfigError as error:
                refusal = str(error)
            else:
                refusal = ""
                assert read == {field.name: value}
            assert "cannot be checked" not in refusal, refusal


class Resources:
    """The descriptors, threads and tasks of this process, as they were when this was made."""

    def __init__(self) -> None:
        self._before = _resources()

    async def return_to_this(self) -> None:
        """Wait until nothing is there that was not there before. :raises AssertionError: naming what stays."""
        try:
            await eventually(lambda: not self._more())
        except TimeoutError:
            raise AssertionError(f"not freed: {', '.join(sorted(self._more()))}") from None

    def _more(self) -> set[str]:
        return _resources() - self._before


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds. :raises TimeoutError: if it does not within :data:`PATIENCE`."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


async def promptly(call: Awaitable[T]) -> T:
    """What the call returns. :raises AssertionError: if it hangs."""
    try:
        async with asyncio.timeout(PATIENCE):
            return await call
    except TimeoutError:
        raise AssertionError(f"{call!r} did not end within {PATIENCE:g} seconds") from None


def interruptions() -> Iterator[int]:
    """After how many turns of the event loop a call is to be cancelled: each of the first, and ever fewer later ones."""
    return iter(_TURNS)


async def interrupt(call: Coroutine[Any, Any, Any], turns: int) -> bool:
    """Cancel the call once the event loop has turned that often; ``False`` if it ended before.

    :raises AssertionError: if it does not end promptly, or not by the cancellation.
    """
    name = getattr(call, "__qualname__", str(call))
    task = asyncio.create_task(call)
    for _ in range(turns):
        if task.done():
            break
        await asyncio.sleep(0)
    if task.done():
        task.result()
        return False
    task.cancel()
    await asyncio.wait({task}, timeout=PATIENCE)
    assert task.done(), f"{name} goes on {PATIENCE:g} seconds after it was cancelled"
    if not task.cancelled():
        task.result()
        raise AssertionError(f"{name} was cancelled after {turns} turns, and returned all the same")
    return True


def _resources() -> set[str]:
    found = {f"thread {thread.name}" for thread in threading.enumerate()}
    found |= {f"task {task.get_name()}" for task in asyncio.all_tasks()}
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"descriptor {number} ({os.readlink(f'/proc/self/fd/{number}')})")
        except FileNotFoundError:
            continue  # that of the listing itself
    return found


def _odd_values(hint: Any) -> tuple[object, ...]:
    parts = [part for part in typing.get_args(hint) or (hint,) if part is not type(None)]
    return _ODD_VALUES.get(tuple if typing.get_origin(hint) is tuple else parts[0], ())
