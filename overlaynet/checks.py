"""Whether a class is a driver or an observer that can be used: what is found out when it is loaded, and by the test suites."""

from __future__ import annotations

import inspect

from overlaynet import options
from overlaynet.drivers import API, Backend, Driver, Observer, Router, Store
from overlaynet.errors import PluginError

_BASES: dict[str, type[Driver]] = {"store": Store, "backend": Backend, "router": Router}
_ANOTHER_OBJECT = "name another object in the entry point"


def check_driver(axis: str, found: object, who: str, otherwise: str = _ANOTHER_OBJECT) -> None:
    """Make sure that ``found`` is a driver class of the axis that fits this overlaynet.

    :param otherwise: what to do if it is no driver, and is not to be one.
    :raises PluginError: with what is wrong, and what to do.
    """
    base = _BASES[axis]
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(
            f"{who} is {found!r}, not a subclass of overlaynet.api.{base.__name__}; derive it from that, or {otherwise}"
        )
    _check_version(found.api, who)
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise PluginError(
            f"{who} does not implement {', '.join(missing)}; see the contract of overlaynet.api.{base.__name__}"
        )
    for name, declared in inspect.getmembers(base, inspect.isfunction):
        wanted = inspect.iscoroutinefunction(declared)
        made = inspect.unwrap(getattr(found, name))
        # What is no plain function, such as a callable object, may return an awaitable all the same.
        if inspect.isfunction(made) and inspect.iscoroutinefunction(made) != wanted:
            must, form = ("must", "async def") if wanted else ("must not", "def")
            raise PluginError(f"{who}: {name} {must} be a coroutine function; write `{form} {name}`")
    if problem := options.class_problem(found.Options):
        raise PluginError(f"{who}: {problem}")
    if axis == "backend" and options.declares(found.Options, "Type"):
        raise PluginError(
            f"{who}: option Type could never be given, as Type in the network document names the backend; rename it"
        )


def check_driver_name(axis: str, name: str, who: str) -> None:
    """Make sure that a driver of this name can be asked for. :raises PluginError: if not."""
    if axis == "backend" and name != name.lower():
        raise PluginError(
            f"{who} could never be run, as a backend's name in the network document is read in small letters; "
            f"rename it to {name.lower()!r}"
        )


def check_observer(cls: type[Observer], who: str) -> None:
    """Make sure that a class of observers fits this overlaynet. :raises PluginError: with what is wrong, and what to do."""
    _check_version(cls.api, who)
    if problem := options.class_problem(cls.Options):
        raise PluginError(f"{who}: {problem}")
    for described in options.describe(cls.Options):
        if described.required:
            raise PluginError(
                f"{who}: option {described.name} has no default; an observer is loaded wherever it is installed"
            )


def _check_version(version: object, who: str) -> None:
    """Refuse what is made for another version of the contract; the rule is that of :data:`overlaynet.drivers.API`."""
    if not (isinstance(version, tuple) and len(version) == 2 and all(type(part) is int for part in version)):
        raise PluginError(f"{who} has api = {version!r}; it must be a pair of whole numbers, such as {API!r}")
    if version[0] != API[0] or version > API:
        remedy = "upgrade overlaynet" if version > API else "upgrade the driver's distribution"
        raise PluginError(
            f"{who} is made for version {_dotted(version)} of the plugin contract, and this overlaynet has {_dotted(API)}; "
            f"{remedy}"
        )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
