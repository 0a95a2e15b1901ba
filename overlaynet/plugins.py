"""Finding, checking and loading drivers and plugins.

A driver is one of many, picked by name: it stands in its axis's entry-point group, and only the one that is asked for is
imported. A plugin observes: all in the group ``overlaynet.plugins`` are loaded, and one that is broken is reported and
left out. Nothing here is global: each :class:`Plugins` is a world of its own.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from overlaynet import hookspecs, options
from overlaynet.drivers import API, Backend, Driver, Observer, Router, Store
from overlaynet.entry_points import GROUPS, OBSERVERS, entries, identify, load, refuse_twins
from overlaynet.errors import ConfigError, PluginError, did_you_mean
from overlaynet.hooks import hook_implementations, hook_problem
from overlaynet.logs import fields

log = logging.getLogger(__name__)
trace_log = logging.getLogger("overlaynet.trace")

_BASES: dict[str, type[Driver]] = {"store": Store, "backend": Backend, "router": Router}
_ENTRY_POINTS = "entry points"
_LONGEST_RESULT = 200
"""Characters of a hook's result or argument that a trace shows."""


class _EntryPointDrivers:
    """The core's last-resort answer to ``overlaynet_driver``: the entry points."""

    @staticmethod
    @hookspecs.hookimpl(trylast=True)
    def overlaynet_driver(axis: str, name: str) -> type[Driver] | None:
        matching = [entry for entry in entries(GROUPS[axis]) if entry.name == name]
        return load_driver(axis, matching[0]) if matching else None


LONG = 1.0
"""Seconds that a hook of an observer may take before it is reported."""
TOO_LONG = 30.0
"""Seconds that one may take before its plugin is disabled: half of what the systemd unit's watchdog waits."""


class Plugins:
    """The hooks and drivers of one process.

    :param trace: log each call of a hook: plugin, arguments, result and duration, whatever the log level is.
    :param strict: a broken observer is an error, instead of being reported and left out.
    """

    def __init__(self, *, trace: bool = False, strict: bool = False) -> None:
        self._trace = trace
        self._strict = strict
        self._identities: dict[str, str] = {}
        self._manager = pluggy.PluginManager("overlaynet")
        self._manager.add_hookspecs(hookspecs)
        self._manager.register(_EntryPointDrivers(), name=_ENTRY_POINTS)
        if trace:
            trace_log.setLevel(logging.INFO)

    def register(self, plugin: object, name: str | None = None) -> None:
        """Add an observer. :raises PluginError: naming what is wrong with its hooks; then it is not added."""
        name = name or str(getattr(plugin, "__name__", type(plugin).__name__))
        self._register(plugin, name, f"plugin {name}")

    def load_observers(self, given: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """Load all plugins of the group ``overlaynet.plugins``; report and leave out those that are broken.

        :param given: options of plugins, by the plugin's name.
        :raises ConfigError: for options of a plugin that is not there, or that it does not have.
        :raises PluginError: for the first that is broken, if this is strict.
        """
        found, given = entries(OBSERVERS), given or {}
        for name in given:
            known = sorted({entry.name for entry in found})
            if name not in known:
                raise ConfigError(
                    f"--plugin-option: there is no plugin {name!r}{did_you_mean(name, known)} "
                    f"(installed: {', '.join(known) or 'none'})"
                )
        for entry in found:
            try:
                self.load_observer(entry, given.get(entry.name))
            except PluginError as error:
                if self._strict:
                    raise
                log.warning("plugin left out", extra=fields(plugin=identify(entry), problem=str(error)))

    def load_observer(self, entry: EntryPoint, given: Mapping[str, str] | None = None) -> None:
        """Load one plugin.

        :raises ConfigError: for an option that it does not have, or a value that it cannot have.
        :raises PluginError: if it is broken, or another has the same name.
        """
        refuse_twins(entry)
        plugin = load(entry)
        if isinstance(plugin, type) and issubclass(plugin, Observer):
            plugin = _make_observer(plugin, entry, given or {})
        elif given:
            raise ConfigError(
                f"plugin {entry.name}: it has no options; remove --plugin-option {entry.name}.{min(given)}"
            )
        if not hook_implementations(plugin) and hook_problem(plugin) is None:
            raise PluginError(f"{identify(entry)} implements no hook; mark its functions with overlaynet.api.hookimpl")
        self._register(plugin, entry.name, identify(entry))
        self._identities[entry.name] = identify(entry)

    def driver(self, axis: str, name: str) -> type[Any]:
        """The driver class ``name`` of an axis (``"store"``, ``"backend"``, ``"router"``).

        :raises PluginError: if there is none (with the nearest name), or it is broken, claimed twice, or made for
            another version of the contract.
        """
        found = self._ask(axis, name, self._implementations("overlaynet_driver"))
        if found is not None:
            return found
        installed = sorted({entry.name for entry in entries(GROUPS[axis])})
        hint = did_you_mean(name, installed)
        raise PluginError(f"there is no {axis} {name!r}{hint} (installed: {', '.join(installed)})")

    def answer(self, axis: str, name: str) -> type[Any] | None:
        """The driver class that an observer answers with, before entry points are looked at; ``None`` if none does.

        :raises PluginError: as :meth:`driver` does.
        """
        observers = [each for each in self._implementations("overlaynet_driver") if each.plugin_name != _ENTRY_POINTS]
        return self._ask(axis, name, observers)

    def _ask(self, axis: str, name: str, implementations: list[Any]) -> type[Any] | None:
        for implementation in implementations:
            try:
                found = self._call("overlaynet_driver", implementation, {"axis": axis, "name": name})
            except PluginError:
                raise
            except Exception as error:
                raise PluginError(
                    f"plugin {self._who(implementation)} failed when asked for the {axis} {name!r}: {error!r}; "
                    f"repair or uninstall it, or leave observers out with --no-plugins"
                ) from error
            if found is not None:
                check_driver(axis, found, f"{axis} {name!r} of plugin {self._who(implementation)}")
                return found  # type: ignore[no-any-return]
        return None

    def notify(self, hook: str, **arguments: object) -> None:
        """Call every implementation of an event hook. One that raises is reported, and its plugin disabled.

        So is one that takes longer than :data:`TOO_LONG`; one that takes longer than :data:`LONG` is only reported.

        :raises PluginError: if this is strict and one raises; the others are called all the same.
        """
        failure = None
        for implementation in self._implementations(hook):
            begun = time.monotonic()
            try:
                self._call(hook, implementation, arguments)
            except Exception as error:
                who = self._who(implementation)
                self._manager.unregister(name=implementation.plugin_name)
                if self._strict and failure is None:
                    failure = PluginError(f"plugin {who} failed in {hook}: {error!r}; repair or uninstall it")
                    failure.__cause__ = error
                else:
                    log.exception("plugin disabled", extra=fields(plugin=who, hook=hook, error=repr(error)))
            else:
                self._judge_speed(hook, implementation, time.monotonic() - begun)
        if failure is not None:
            raise failure

    def _judge_speed(self, hook: str, implementation: Any, seconds: float) -> None:
        if seconds <= LONG:
            return
        told = {"plugin": self._who(implementation), "hook": hook, "seconds": round(seconds, 1)}
        if seconds <= TOO_LONG:
            hint = "everything else waits for it; have it do its work in a thread"
            log.warning("plugin is slow", extra=fields(**told, hint=hint))
        else:
            self._manager.unregister(name=implementation.plugin_name)
            log.error("plugin disabled", extra=fields(**told, error="everything else waited for it"))

    def _register(self, plugin: object, name: str, who: str) -> None:
        problem = hook_problem(plugin)
        if problem is None and self._manager.has_plugin(name):
            problem = "there is a plugin of that name already; give it another"
        if problem is None and self._manager.is_registered(plugin):
            problem = f"it is registered already, as {self._manager.get_name(plugin)}; once is enough"
        if problem is not None:
            raise PluginError(f"{who}: {problem}")
        self._manager.register(plugin, name=name)

    def _implementations(self, hook: str) -> list[Any]:
        """A hook's implementations, in the order in which they are called."""
        found = list(reversed(getattr(self._manager.hook, hook).get_hookimpls()))
        if self._trace and not found:
            trace_log.info("hook not implemented", extra=fields(hook=hook))
        return found

    def _call(self, hook: str, implementation: Any, arguments: dict[str, object]) -> Any:
        def call() -> Any:
            return implementation.function(*(arguments[name] for name in implementation.argnames))

        if not self._trace:
            return call()
        told: dict[str, object] = {"hook": hook, "plugin": implementation.plugin_name}
        told |= {f"argument_{name}": _short(value) for name, value in arguments.items()}
        begun = time.perf_counter()
        try:
            result = call()
        except BaseException as error:
            trace_log.info("hook failed", extra=fields(**told, error=repr(error), milliseconds=_since(begun)))
            raise
        trace_log.info("hook called", extra=fields(**told, result=_short(result), milliseconds=_since(begun)))
        return result

    def _who(self, implementation: Any) -> str:
        name: str = implementation.plugin_name
        return self._identities.get(name, name)


def _make_observer(cls: type[Observer], entry: EntryPoint, given: Mapping[str, str]) -> Observer:
    who = identify(entry)
    if problem := _version_problem(cls.api):
        raise PluginError(f"{who} {problem}")
    if problem := options.class_problem(cls.Options):
        raise PluginError(f"{who}: {problem}")
    for described in options.describe(cls.Options):
        if described.required:
            raise PluginError(
                f"{who}: option {described.name} has no default; an observer is loaded wherever it is installed"
            )
    chosen = options.parse(cls.Options, {}, f"plugin {entry.name}", texts=given)
    try:
        return cls(chosen)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{who} could not be made: {error!r}; repair or uninstall it") from error


def load_driver(axis: str, entry: EntryPoint) -> type[Driver]:
    """The driver class of an entry point. :raises PluginError: if it is broken, or another has the same name."""
    refuse_twins(entry)
    found = load(entry)
    check_driver(axis, found, identify(entry))
    return found  # type: ignore[no-any-return]


def check_driver(axis: str, found: object, who: str) -> None:
    """:raises PluginError: if ``found`` is not a driver class of the axis that fits this overlaynet."""
    base = _BASES[axis]
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(
            f"{who} is {found!r}, not a subclass of overlaynet.api.{base.__name__}; derive it from that, "
            f"or name another object in the entry point"
        )
    if problem := _version_problem(found.api):
        raise PluginError(f"{who} {problem}")
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


def _version_problem(version: object) -> str | None:
    """Why a driver made for this version of the contract does not fit; the rule is that of :data:`overlaynet.drivers.API`."""
    if not (isinstance(version, tuple) and len(version) == 2 and all(type(part) is int for part in version)):
        return f"has api = {version!r}; it must be a pair of whole numbers, such as {API!r}"
    if version[0] == API[0] and version <= API:
        return None
    remedy = "upgrade overlaynet" if version > API else "upgrade the driver's distribution"
    return f"is made for version {_dotted(version)} of the plugin contract, and this overlaynet has {_dotted(API)}; {remedy}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_RESULT else f"{text[:_LONGEST_RESULT]}…"


def _since(begun: float) -> float:
    return round((time.perf_counter() - begun) * 1000, 3)
