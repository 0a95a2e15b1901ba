"""Driver options: declared once as an attrs class, read strictly from whatever source names them.

A driver declares::

    @attrs.frozen
    class Options:
        port: int = option(8285, "UDP port of every node", check=between(1, 65535))

Names are matched without regard to case, ``-`` or ``_`` (``Port``, ``port``), so that the same class serves the network
document, ``--store-option`` and a configuration file. Values from JSON and TOML must have the declared type; values from
a command line or an environment variable are strings and are read as that type.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs

from overlaynet.errors import ConfigError

T = TypeVar("T")
Check = Callable[[Any], str | None]
"""Looks at a value; returns what is wrong with it ("must be between 1 and 65535"), or ``None``."""


def option(
    default: Any = attrs.NOTHING,
    help: str = "",
    *,
    name: str | None = None,
    secret: bool = False,
    check: Check | None = None,
) -> Any:
    """One option of a driver; an attrs field.

    :param default: value when it is not given; without a default the option is required.
    :param help: one sentence for the reference page.
    :param name: how the option is written in documents (``MTU``); by default made from the attribute (``VtepPort``).
    :param secret: the value is never shown.
    :param check: looks at the value once its type is right.
    """
    metadata = {"help": help, "name": name, "secret": secret, "check": check}
    return attrs.field(default=default, metadata=metadata, repr=not secret, kw_only=True)


def between(low: float, high: float) -> Check:
    """A check that a number lies within ``low`` and ``high``, both allowed."""

    def check(value: Any) -> str | None:
        return None if low <= value <= high else f"must be between {low} and {high}, not {value}"

    return check


def one_of(*choices: str) -> Check:
    """A check that a value is one of ``choices``."""

    def check(value: Any) -> str | None:
        return None if value in choices else f"must be one of {', '.join(choices)}, not {value!r}"

    return check


def display_name(field: attrs.Attribute[Any]) -> str:
    """How the option is written in documents: ``peer_timeout`` is ``PeerTimeout``."""
    given: str | None = field.metadata.get("name")
    return given or "".join(word.capitalize() for word in field.name.split("_"))


def parse(cls: type[T], values: Mapping[str, object], where: str, texts: Mapping[str, str] | None = None) -> T:
    """Make the options of ``cls``.

    :param values: from JSON or TOML, or by the program: of the declared types.
    :param where: what the values belong to, for messages: ``"backend udp"``.
    :param texts: from a command line: to be read as the declared types; they win over ``values``.
    :raises ConfigError: for a name that is not an option (with the nearest one), a value of the wrong type or out of
        bounds, or a required option that is missing.
    """
    arguments = read(cls, values, where) | read(cls, texts or {}, where, from_text=True)
    for field in attrs.fields(typing.cast(Any, cls)):
        if field.default is attrs.NOTHING and field.name not in arguments:
            raise ConfigError(f"{where}: option {display_name(field)} is missing; it has no default")
    return cls(**arguments)


def read(cls: type[Any], values: Mapping[str, object], where: str, *, from_text: bool = False) -> dict[str, object]:
    """Check values against the options of ``cls``; returns them by attribute, for those that are given.

    :raises ConfigError: as :func:`parse` does, but for options that are missing.
    """
    fields = {_fold(display_name(field)): field for field in attrs.fields(cls)}
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        field = fields.get(_fold(name))
        if field is None:
            raise ConfigError(_unknown(name, [display_name(f) for f in fields.values()], where))
        shown = f"{where}: option {display_name(field)}"
        try:
            typed_value = typed(hints[field.name], read_text(hints[field.name], str(value)) if from_text else value)
        except ValueError as error:
            raise ConfigError(f"{shown} {_complaint(error, field, value)}") from None
        check: Check | None = field.metadata.get("check")
        wrong = check(typed_value) if check is not None and typed_value is not None else None
        if wrong is not None:
            raise ConfigError(f"{shown} {wrong}")
        arguments[field.name] = typed_value
    return arguments


def read_text(hint: Any, text: str) -> object:
    """Read a string as ``hint`` (``int``, ``float``, ``bool``, ``str``, ``tuple[str, ...]``, or one of them or ``None``).

    A tuple is separated by commas. :raises ValueError: with what the value must be.
    """
    hint = _without_none(hint)
    if hint is bool:
        folded = text.strip().lower()
        if folded in ("true", "yes", "on", "1"):
            return True
        if folded in ("false", "no", "off", "0"):
            return False
        raise ValueError("must be true or false")
    if hint is int or hint is float:
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"must be a {'whole ' if hint is int else ''}number") from None
    if typing.get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def typed(hint: Any, value: object) -> object:
    """The value, if JSON or TOML gave it the declared type. No coercion but int to float and list to tuple.

    :raises ValueError: with what the value must be.
    """
    if value is None and hint is not _without_none(hint):
        return None
    hint = _without_none(hint)
    if hint is float and type(value) is int:
        return float(value)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)) and all(type(item) is str for item in value):
            return tuple(value)
        raise ValueError("must be a list of strings")
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise ValueError(f"must be {names[hint]}")
    return value


def _complaint(error: ValueError, field: attrs.Attribute[Any], value: object) -> str:
    return str(error) if field.metadata.get("secret") else f"{error}, not {value!r}"


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (inner,) = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner
    return hint


def _fold(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def _unknown(name: str, known: list[str], where: str) -> str:
    if not known:
        return f"{where} has no options, so {name!r} cannot be set"
    near = difflib.get_close_matches(_fold(name), [_fold(option) for option in known], n=1)
    hint = f"; did you mean {next(o for o in known if _fold(o) == near[0])!r}?" if near else ""
    return f"{where} has no option {name!r}{hint} (it has {', '.join(sorted(known))})"
