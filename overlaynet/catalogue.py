"""Everything that is installed, each imported and checked: what ``overlaynet plugins`` shows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import attrs

from overlaynet import options
from overlaynet.drivers import Observer
from overlaynet.entry_points import GROUPS, OBSERVERS, entries, load, origin, strays
from overlaynet.errors import PluginError, did_you_mean
from overlaynet.hooks import hook_implementations
from overlaynet.options import Described
from overlaynet.plugins import Plugins, load_driver

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
    """All there is to tell of one entry point."""

    axis: str
    found: Found
    summary: str | None
    """What its distribution says of itself."""
    documentation: str | None
    api: tuple[int, int] | None = None
    options: tuple[Described, ...] = ()
    hooks: tuple[str, ...] = ()
    """The hooks that an observer implements."""


def catalogue(prepare: Callable[[Plugins], object] | None = None) -> list[Found]:
    """Every driver and plugin that is installed, each imported and checked.

    :param prepare: called with a strict :class:`Plugins` that holds one observer, to try it; may raise PluginError.
    """
    found = [_look_at(entry, prepare) for group in AXES for entry in entries(group)]
    return found + [_found(entry, problem) for entry, problem in strays()]


def details(name: str) -> list[Details]:
    """What there is to tell of all entry points of this name. :raises PluginError: if there is none."""
    known = [entry for group in AXES for entry in entries(group)]
    matching = [entry for entry in known if entry.name == name]
    if not matching:
        names = sorted({entry.name for entry in known})
        hint = did_you_mean(name, names)
        raise PluginError(f"there is no driver or plugin {name!r}{hint} (installed: {', '.join(names)})")
    return [_detail(entry) for entry in matching]


def _look_at(entry: EntryPoint, prepare: Callable[[Plugins], object] | None = None) -> Found:
    try:
        if entry.group == OBSERVERS:
            plugins = Plugins(strict=True)
            plugins.load_observer(entry)
            if prepare is not None:
                prepare(plugins)
        else:
            load_driver(AXES[entry.group], entry)
    except PluginError as error:
        return _found(entry, str(error))
    return _found(entry)


def _detail(entry: EntryPoint) -> Details:
    found = _look_at(entry)
    given = None if entry.dist is None else entry.dist.metadata.json.get("summary")
    summary = given if isinstance(given, str) else None
    if found.problem is not None:
        return Details(AXES[entry.group], found, summary, None)
    thing: Any = load(entry)
    # A class inherits its contract's docstring, which says nothing of this driver.
    own = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    documentation = None if own is None else inspect.cleandoc(own)
    hooks: tuple[str, ...] = ()
    if entry.group == OBSERVERS:
        hooks = tuple(sorted(hook for hook, _ in hook_implementations(thing).values()))
        if not (isinstance(thing, type) and issubclass(thing, Observer)):
            return Details(AXES[entry.group], found, summary, documentation, hooks=hooks)
    described = tuple(options.describe(thing.Options))
    return Details(AXES[entry.group], found, summary, documentation, api=thing.api, options=described, hooks=hooks)


def _found(entry: EntryPoint, problem: str | None = None) -> Found:
    return Found(entry.group, entry.name, entry.value, *origin(entry), problem)
