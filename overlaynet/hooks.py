"""What is wrong with a plugin's hooks, found out before pluggy lets it pass or says it in words of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from overlaynet import hookspecs
from overlaynet.errors import did_you_mean

_MARK = "overlaynet_impl"


def hook_implementations(plugin: object) -> Mapping[str, tuple[str, Callable[..., Any]]]:
    """The functions that are marked with ``hookimpl``: by their name, the hook that each is for, and the function."""
    return {
        name: (mark["specname"] or name, function)
        for name, function, mark in _marked(plugin)
        if inspect.isroutine(function)
    }


def hook_problem(plugin: object) -> str | None:
    """What would not work, as a sentence; ``None`` if nothing."""
    for name in dir(plugin):
        function = _function(plugin, name)
        if name.startswith("overlaynet_") and inspect.isfunction(function) and _MARK not in vars(function):
            return f"{name} is not marked with overlaynet.api.hookimpl, so it would never be called"
    for name, function, _ in _marked(plugin):
        if not inspect.isroutine(function):
            return (
                f"{name} is marked with overlaynet.api.hookimpl, but is no function ({type(function).__name__}), "
                f"so it would never be called; write one that calls it"
            )
    specifications = _specifications()
    for name, (hook, function) in hook_implementations(plugin).items():
        if hook not in specifications:
            return f"there is no hook {hook!r}{did_you_mean(hook, specifications)}"
        marks = vars(function)[_MARK]
        if marks["wrapper"] or marks["hookwrapper"]:
            return f"{name} is a wrapper; hooks are called one by one, so there is nothing to wrap"
        if inspect.iscoroutinefunction(function):
            return f"{name} is a coroutine function; hooks are plain functions"
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            return f"{name} is a generator function; hooks are plain functions"
        if problem := _parameter_problem(plugin, name, list(inspect.signature(specifications[hook]).parameters)):
            return problem
    return None


def _parameter_problem(plugin: object, name: str, known: list[str]) -> str | None:
    if isinstance(plugin, type) and not isinstance(inspect.getattr_static(plugin, name), (staticmethod, classmethod)):
        return f"{name} is a method of the class {plugin.__name__}; name an instance of it as the plugin"
    for parameter in inspect.signature(getattr(plugin, name)).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY):
            return f"{name}: the parameter {parameter} cannot be given; name the arguments that it needs"
        if parameter.name not in known:
            hint = did_you_mean(parameter.name, known)
            return f"{name}: the hook has no argument {parameter.name!r}{hint} (it has {', '.join(known) or 'none'})"
        if parameter.default is not parameter.empty:
            return f"{name}: {parameter.name!r} has a default, which would hide the hook's argument; remove it"
    return None


def _marked(plugin: object) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """What is marked, whatever it is: its name, itself, and its mark."""
    for name in dir(plugin):
        member = _function(plugin, name)
        mark = getattr(member, "__dict__", {}).get(_MARK)
        if mark is not None:
            yield name, member, mark


def _function(plugin: object, name: str) -> Any:
    member = inspect.getattr_static(plugin, name, None)
    return getattr(member, "__func__", member)


def _specifications() -> Mapping[str, Callable[..., Any]]:
    return {name: function for name, function in vars(hookspecs).items() if name.startswith("overlaynet_")}
