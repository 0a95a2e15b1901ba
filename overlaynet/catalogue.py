"""Everything that is installed, each imported and checked: what ``overlaynet plugins`` shows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import Any

import attrs

from overlaynet import options
from overlaynet.drivers import Observer
from overlaynet.entry_points import GROUPS, OBSERVERS, entries, load, origin, strays
from overlaynet.errors import ConfigError, PluginError, did_you_mean
from overlaynet.hooks import hook_implementations
from overlaynet.options import Described
from overlaynet.plugins import Plugins, load_driver

Prepare = Callable[[Plugins], object]
Given = Mapping[str, Mapping[str, str]]

AXES = {group: axis for axis, group in GROUPS.items()} | {OBSERVERS: "observer"}
"""What the entry points of a group are."""


@attrs.frozen
class Found:
    """One entry point, looked at: what it is, where it comes from, and what is wrong with it, if anything."""

    group: str
    name: str
    target: str
    distribution: str
    version: str
    problem: str | None = None


@attrs.frozen
class Details:
    """All there is to tell of one entry point, or of a driver that a plugin answers for."""

    axis: str
    found: Found
    summary: str | None
    """What its distribution says of itself."""
    documentation: str | None
    api: tuple[int, int] | None = None
    options: tuple[Described, ...] = ()
    hooks: tuple[str, ...] = ()
    """The hooks that an observer implements."""
    plugin: str | None = None
    """The plugin that answers for the driver; ``None`` if it has an entry point of its own."""


def catalogue(prepare: Prepare | None = None, given: Given | None = None) -> list[Found]:
    """Every driver and plugin that is installed, each imported and checked.

    :param prepare: called with a strict :class:`Plugins` that holds one observer, to try it; may raise PluginError.
    :param given: options of observers, by the observer's name.
    """
    found = [found for _, found in _look_at_all(prepare, given or {})]
    return found + [_found(entry, problem) for entry, problem in strays()]


def details(name: str, prepare: Prepare | None = None, given: Given | None = None) -> list[Details]:
    """What there is to tell of all that has this name: what plugins answer for it, which is used first, and entry points.

    The arguments are those of :func:`catalogue`. Of drivers, only those with this name are imported.

    :raises PluginError: if there is none of this name.
    """
    given = given or {}
    looked_at = [each for each in _look_at_all(prepare, given, only=name) if each[0].name == name]
    found = [*_answers(name, given), *(_detail(*each) for each in looked_at)]
    if not found:
        names = sorted({entry.name for group in AXES for entry in entries(group)})
        hint = did_you_mean(name, names)
        raise PluginError(f"there is no driver or plugin {name!r}{hint} (installed: {', '.join(names)})")
    return found


def _answers(name: str, given: Given) -> Iterator[Details]:
    """The drivers of this name that plugins answer for."""
    observers = entries(OBSERVERS)
    for entry in observers:
        plugins = Plugins()
        try:
            plugins.load_observer(entry, observers, given.get(entry.name))
        except (ConfigError, PluginError):
            continue  # no command is answered by it either; the catalogue tells what is wrong
        for axis in GROUPS:
            problem, cls = None, None
            try:
                cls = plugins.answer(axis, name)
            except PluginError as error:
                problem = str(error)
            if cls is not None or problem is not None:
                target = "" if cls is None else f"{cls.__module__}:{cls.__qualname__}"
                found = Found(OBSERVERS, name, target, *origin(entry), problem)
                yield attrs.evolve(_describe(axis, found, _summary(entry), cls), plugin=entry.name)


def _look_at_all(prepare: Prepare | None, given: Given, only: str | None = None) -> Iterator[tuple[EntryPoint, Found]]:
    """Each entry point, and what was found: all observers, as each may stand in the way of another, and all drivers.

    :param only: the name of the drivers, if not all are wanted.
    """
    for group in AXES:
        listed = entries(group)
        for entry in listed:
            if group == OBSERVERS or only in (None, entry.name):
                yield entry, _look_at(entry, listed, prepare, given)


def _look_at(entry: EntryPoint, group: list[EntryPoint], prepare: Prepare | None, given: Given) -> Found:
    try:
        if entry.group == OBSERVERS:
            plugins = Plugins(strict=True)
            plugins.load_observer(entry, group, given.get(entry.name))
            if prepare is not None:
                prepare(plugins)
        else:
            load_driver(AXES[entry.group], entry, group)
    except (ConfigError, PluginError) as error:
        return _found(entry, str(error))
    return _found(entry)


def _detail(entry: EntryPoint, found: Found) -> Details:
    return _describe(AXES[entry.group], found, _summary(entry), None if found.problem is not None else load(entry))


def _summary(entry: EntryPoint) -> str | None:
    given = None if entry.dist is None else entry.dist.metadata.json.get("summary")
    return given if isinstance(given, str) else None


def _describe(axis: str, found: Found, summary: str | None, thing: Any) -> Details:
    """What there is to tell of a driver class or an observer; ``None`` if it is broken."""
    if thing is None:
        return Details(axis, found, summary, None)
    # A class inherits its contract's docstring, which says nothing of this driver.
    own = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    documentation = None if own is None else inspect.cleandoc(own)
    hooks: tuple[str, ...] = ()
    if axis == "observer":
        hooks = tuple(sorted(hook for hook, _ in hook_implementations(thing).values()))
        if not (isinstance(thing, type) and issubclass(thing, Observer)):
            return Details(axis, found, summary, documentation, hooks=hooks)
    described = tuple(options.describe(thing.Options))
    return Details(axis, found, summary, documentation, api=thing.api, options=described, hooks=hooks)


def _found(entry: EntryPoint, problem: str | None = None) -> Found:
    return Found(entry.group, entry.name, entry.value, *origin(entry), problem)
