"""Finding, checking and loading drivers and plugins.

A driver is one of many, picked by name: it stands in its axis's entry-point group, and only the one that is asked for is
imported. A plugin observes: all in the group ``overlaynet.plugins`` are loaded, and one that is broken is reported and
left out. Nothing here is global: each :class:`Plugins` is a world of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from overlaynet import hookspecs, options
from overlaynet.checks import check_driver, check_driver_name, check_observer
from overlaynet.drivers import Driver, Observer
from overlaynet.entry_points import FAILURES, GROUPS, OBSERVERS, entries, identify, load, refuse_twins
from overlaynet.errors import ConfigError, PluginError, did_you_mean
from overlaynet.hooks import hook_implementations, hook_problem
from overlaynet.logs import fields

log = logging.getLogger(__name__)
trace_log = logging.getLogger("overlaynet.trace")

_ENTRY_POINTS = "entry points"
_LONGEST_RESULT = 200
"""Characters of a hook's result or argument that a trace shows."""


class _EntryPointDrivers:
    """The core's last-resort answer to ``overlaynet_driver``: the entry points."""

    @staticmethod
    @hookspecs.hookimpl(trylast=True)
    def overlaynet_driver(axis: str, name: str) -> type[Driver] | None:
        matching = [entry for entry in entries(GROUPS[axis]) if entry.name == name]
        return load_driver(axis, matching[0], matching) if matching else None


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
        refuse_strangers(given, found)
        for entry in found:
            try:
                self.load_observer(entry, found, given.get(entry.name))
            except PluginError as error:
                if self._strict:
                    raise
                log.warning("plugin left out", extra=fields(plugin=identify(entry), problem=str(error)))

    def load_observer(
        self, entry: EntryPoint, group: Collection[EntryPoint], given: Mapping[str, str] | None = None
    ) -> None:
        """Load one plugin, of all those that are installed.

        :raises ConfigError: for an option that it does not have, or a value that it cannot have.
        :raises PluginError: if it is broken, or another has the same name.
        """
        refuse_twins(entry, group)
        plugin = load(entry)
        if isinstance(plugin, type) and issubclass(plugin, Observer):
            plugin = make_observer(plugin, entry.name, identify(entry), given or {})
        elif isinstance(plugin, Observer):
            raise PluginError(
                f"{identify(entry)} is an instance of {type(plugin).__name__}; name the class itself in the entry point, "
                f"and overlaynet makes one with the options that are given"
            )
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
            except FAILURES as error:
                raise PluginError(
                    f"plugin {self._who(implementation)} failed when asked for the {axis} {name!r}: {error!r}; "
                    f"repair or uninstall it, or leave observers out with --no-plugins"
                ) from error
            if found is not None:
                who = f"{axis} {name!r} of plugin {self._who(implementation)}"
                check_driver(axis, found, who, "have overlaynet_driver return another class, or None")
                check_driver_name(axis, name, who)
                return found  # type: ignore[no-any-return]
        return None

    def notify(self, hook: str, **arguments: object) -> None:
        """Call every implementation of an event hook. One that raises is reported, and its plugin disabled.

        So is one that takes longer than :data:`TOO_LONG`; one that takes longer than :data:`LONG` is only reported.

        :raises PluginError: if this is strict, in the place of disabling a plugin; the others are called all the same.
        """
        failure: PluginError | None = None
        for implementation in self._implementations(hook):
            raised: BaseException | None = None
            begun = time.monotonic()
            try:
                self._call(hook, implementation, arguments)
            except FAILURES as error:
                raised = error
            seconds = time.monotonic() - begun
            if raised is not None or seconds > TOO_LONG:
                self._manager.unregister(name=implementation.plugin_name)
                who = self._who(implementation)
                if self._strict and failure is None:
                    failure = _failure(who, hook, raised, seconds)
                else:
                    why = "everything else waited for it" if raised is None else repr(raised)
                    told = fields(plugin=who, hook=hook, seconds=round(seconds, 1), error=why)
                    log.error("plugin disabled", extra=told, exc_info=raised)
            elif seconds > LONG:
                hint = "everything else waits for it; have it do its work in a thread"
                told = fields(plugin=self._who(implementation), hook=hook, seconds=round(seconds, 1), hint=hint)
                log.warning("plugin is slow", extra=told)
        if failure is not None:
            raise failure

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
            _tell("hook not implemented", hook=hook)
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
            _tell("hook failed", **told, error=repr(error), milliseconds=_since(begun))
            raise
        _tell("hook called", **told, result=_short(result), milliseconds=_since(begun))
        return result

    def _who(self, implementation: Any) -> str:
        name: str = implementation.plugin_name
        return self._identities.get(name, name)


def _failure(who: str, hook: str, raised: BaseException | None, seconds: float) -> PluginError:
    """What a strict node ends with, of a hook that raised, or if it did not, took too long."""
    if raised is None:
        what = (
            f"took {seconds:.1f} seconds in {hook}, and everything else waited for it; have it do its work in a thread"
        )
    else:
        what = f"failed in {hook}: {raised!r}; repair"
    failure = PluginError(f"plugin {who} {what} or uninstall it")
    failure.__cause__ = raised
    return failure


def make_observer(cls: type[Observer], name: str, who: str, given: Mapping[str, str]) -> Observer:
    """Check a class of observers, and make one with the options that are given.

    :raises ConfigError: for an option that it does not have, or a value that it cannot have.
    :raises PluginError: if it is broken.
    """
    check_observer(cls, who)
    try:
        chosen = options.parse(cls.Options, {}, f"plugin {name}", texts=given)
    except ConfigError as error:
        if given:
            raise
        raise PluginError(f"{who} refuses its own defaults: {error}") from error
    try:
        return cls(chosen)
    except FAILURES as error:
        raise PluginError(f"{who} could not be made: {error!r}; repair or uninstall it") from error


def load_driver(axis: str, entry: EntryPoint, group: Collection[EntryPoint]) -> type[Driver]:
    """The driver class of an entry point, of all those in its group.

    :raises PluginError: if it is broken, or another has the same name.
    """
    refuse_twins(entry, group)
    check_driver_name(axis, entry.name, identify(entry))
    found = load(entry)
    check_driver(axis, found, identify(entry))
    return found  # type: ignore[no-any-return]


def refuse_strangers(given: Mapping[str, Mapping[str, str]], group: Collection[EntryPoint]) -> None:
    """:raises ConfigError: if options are given for a plugin that is not among those that are installed."""
    known = sorted({entry.name for entry in group})
    for name in given:
        if name not in known:
            raise ConfigError(
                f"--plugin-option: there is no plugin {name!r}{did_you_mean(name, known)} "
                f"(installed: {', '.join(known) or 'none'})"
            )


def _tell(message: str, **values: object) -> None:
    """Log a line of a trace, whatever level is logged: who asked for a trace gets one."""
    record = trace_log.makeRecord(trace_log.name, logging.INFO, "", 0, message, (), None, extra=fields(**values))
    trace_log.handle(record)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_RESULT else f"{text[:_LONGEST_RESULT]}…"


def _since(begun: float) -> float:
    return round((time.perf_counter() - begun) * 1000, 3)
