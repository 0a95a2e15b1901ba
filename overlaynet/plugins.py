"""Finding, checking and loading drivers and plugins.

A driver is one of many, picked by name: it stands in its axis's entry-point group, and only the one that is asked for is
imported. A plugin observes: all in the group ``overlaynet.plugins`` are loaded, and one that is broken is reported and
left out. Nothing here is global: each :class:`Plugins` is a world of its own.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

import attrs
import pluggy

from overlaynet import hookspecs
from overlaynet.drivers import API, Backend, Driver, Router, Store
from overlaynet.errors import PluginError
from overlaynet.logs import fields

log = logging.getLogger(__name__)

OBSERVERS = "overlaynet.plugins"
GROUPS: dict[str, str] = {
    "store": "overlaynet.stores",
    "backend": "overlaynet.backends",
    "router": "overlaynet.routers",
}
_BASES: dict[str, type[Driver]] = {"store": Store, "backend": Backend, "router": Router}


@attrs.frozen
class Found:
    """One entry point, looked at: what it is, where it comes from, and what is wrong with it, if anything."""

    group: str
    name: str
    target: str
    distribution: str
    version: str
    problem: str | None = None


class _EntryPointDrivers:
    """The core's last-resort answer to ``overlaynet_driver``: the entry points."""

    @staticmethod
    @hookspecs.hookimpl(trylast=True)
    def overlaynet_driver(axis: str, name: str) -> type[Driver] | None:
        matching = [entry for entry in _entries(GROUPS[axis]) if entry.name == name]
        if not matching:
            return None
        if len(matching) > 1:
            raise PluginError(f"{GROUPS[axis]}: {name!r} is claimed by {_claimants(matching)}; uninstall all but one")
        return _load_driver(axis, matching[0])


class Plugins:
    """The hooks and drivers of one process."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("overlaynet")
        self._manager.add_hookspecs(hookspecs)
        self._manager.register(_EntryPointDrivers(), name="entry points")

    def register(self, plugin: object, name: str | None = None) -> None:
        """Add an observer. :raises PluginError: naming what is wrong with its hooks; then it is not added."""
        name = name or str(getattr(plugin, "__name__", type(plugin).__name__))
        if problem := _hook_problem(plugin):
            raise PluginError(f"plugin {name}: {problem}")
        try:
            self._manager.register(plugin, name=name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            raise PluginError(f"plugin {name}: {' '.join(str(error).split())}") from error

    def load_observers(self) -> None:
        """Load all plugins of the group ``overlaynet.plugins``; report and leave out those that are broken."""
        for entry in _entries(OBSERVERS):
            try:
                self.register(_import(entry), name=entry.name)
            except PluginError as error:
                log.warning("plugin left out", extra=fields(plugin=_identify(entry), problem=str(error)))

    def driver(self, axis: str, name: str) -> type[Any]:
        """The driver class ``name`` of an axis (``"store"``, ``"backend"``, ``"router"``).

        :raises PluginError: if there is none (with the nearest name), or it is broken, claimed twice, or made for
            another version of the contract.
        """
        for implementation in reversed(self._manager.hook.overlaynet_driver.get_hookimpls()):
            try:
                found = _call(implementation, {"axis": axis, "name": name})
            except PluginError:
                raise
            except Exception as error:
                raise PluginError(
                    f"plugin {implementation.plugin_name} failed when asked for the {axis} {name!r}: {error!r}"
                ) from error
            if found is not None:
                check_driver(axis, found, f"{axis} {name!r} of plugin {implementation.plugin_name}")
                return found  # type: ignore[no-any-return]
        installed = sorted({entry.name for entry in _entries(GROUPS[axis])})
        near = difflib.get_close_matches(name, installed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PluginError(f"there is no {axis} {name!r}{hint} (installed: {', '.join(installed)})")

    def notify(self, hook: str, **arguments: object) -> None:
        """Call every implementation of an event hook. One that raises is reported, and its plugin disabled."""
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            try:
                _call(implementation, arguments)
            except Exception as error:
                log.exception(
                    "plugin disabled", extra=fields(plugin=implementation.plugin_name, hook=hook, error=repr(error))
                )
                self._manager.unregister(name=implementation.plugin_name)


def catalogue() -> list[Found]:
    """Every driver and plugin that is installed, each imported and checked."""
    return [_look_at(group, entry) for group in (*GROUPS.values(), OBSERVERS) for entry in _entries(group)]


def check_driver(axis: str, found: object, who: str) -> None:
    """:raises PluginError: if ``found`` is not a driver class of the axis that fits this overlaynet."""
    base = _BASES[axis]
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(f"{who} is {found!r}, not a subclass of overlaynet.api.{base.__name__}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise PluginError(f"{who} does not implement {', '.join(missing)}")
    if found.api[0] != API[0] or found.api > API:
        raise PluginError(
            f"{who} is made for version {_dotted(found.api)} of the plugin contract, and this overlaynet has {_dotted(API)}"
        )


def _look_at(group: str, entry: EntryPoint) -> Found:
    problem = None
    try:
        twins = [other for other in _entries(group) if other.name == entry.name]
        if len(twins) > 1:
            raise PluginError(f"the name is claimed by {_claimants(twins)}; uninstall all but one")
        if group == OBSERVERS:
            Plugins().register(_import(entry), name=entry.name)
        else:
            _load_driver(next(axis for axis in GROUPS if GROUPS[axis] == group), entry)
    except PluginError as error:
        problem = str(error)
    distribution, version = _origin(entry)
    return Found(group, entry.name, entry.value, distribution, version, problem)


def _entries(group: str) -> list[EntryPoint]:
    """The group's entry points, by name; reads metadata, imports nothing."""
    unique = {
        (entry.name, entry.value, _origin(entry)): entry for entry in importlib.metadata.entry_points(group=group)
    }
    return [unique[key] for key in sorted(unique)]


def _load_driver(axis: str, entry: EntryPoint) -> type[Driver]:
    found = _import(entry)
    check_driver(axis, found, _identify(entry))
    return found  # type: ignore[no-any-return]


def _import(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # whatever a third party's module raises at import
        raise PluginError(f"{_identify(entry)} failed to import: {error!r}") from error


def _identify(entry: EntryPoint) -> str:
    distribution, version = _origin(entry)
    return f"{entry.group}: {entry.name} = {entry.value} ({distribution} {version})"


def _origin(entry: EntryPoint) -> tuple[str, str]:
    if entry.dist is None:
        return "unknown distribution", ""
    return entry.dist.name, entry.dist.version


def _claimants(entries: list[EntryPoint]) -> str:
    return " and ".join(" ".join(_origin(entry)) for entry in entries)


def _hook_problem(plugin: object) -> str | None:
    """What pluggy lets pass, but would not work here."""
    for name, function in _hook_functions(plugin):
        if inspect.iscoroutinefunction(function):
            return f"{name} is a coroutine function; hooks are plain functions"
        marks = vars(function)["overlaynet_impl"]
        if marks["wrapper"] or marks["hookwrapper"]:
            return f"{name} is a wrapper; hooks are called one by one, so there is nothing to wrap"
    return None


def _hook_functions(plugin: object) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in dir(plugin):
        if name.startswith("overlaynet_"):
            member = inspect.getattr_static(plugin, name, None)
            function = getattr(member, "__func__", member)
            if "overlaynet_impl" in getattr(function, "__dict__", {}):
                yield name, function


def _call(implementation: Any, arguments: dict[str, object]) -> Any:
    return implementation.function(*(arguments[name] for name in implementation.argnames))


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
