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

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import attrs

from overlaynet.errors import ConfigError, did_you_mean
from overlaynet.model import JSON

T = TypeVar("T")
Check = Callable[[Any], str | None]
"""Looks at a value; returns what is wrong with it ("must be between 1 and 65535"), or ``None``.

The first line of its docstring says what a value must be ("an interface name of 1 to 15 bytes"), for readers of the
option's documentation, and for the message about a secret value, which must not quote it.
"""

MASK = "********"
"""Stands where a secret value is not shown."""

_TYPE_NAMES: Mapping[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "string",
    tuple[str, ...]: "list of strings",
}
_SUPPORTED = "int, float, bool, str, tuple[str, ...]"


def option(
    default: Any = attrs.NOTHING,
    help: str = "",
    *,
    name: str | None = None,
    secret: bool = False,
    node: bool = False,
    check: Check | None = None,
) -> Any:
    """One option of a driver; an attrs field.

    :param default: value when it is not given; without a default the option is required.
    :param help: one sentence for the reference page.
    :param name: how the option is written in documents (``MTU``); by default made from the attribute (``VtepPort``).
    :param secret: the value is never shown, nor what ``check`` says of it, which may quote it.
    :param node: of a backend: each node may have a value of its own (a file's path, say), given with ``--backend-option``
        of ``overlaynet run``, which wins over that of the network document. All other options are the same everywhere.
    :param check: looks at the value once its type is right.

    What options must be beside each other, the class itself checks in ``__attrs_post_init__``, which raises ``ValueError``
    with a sentence that names the options; so do validators of attrs. The message says whose options they are.
    """
    metadata = {"help": help, "name": name, "secret": secret, "node": node, "check": check}
    return attrs.field(default=default, metadata=metadata, repr=not secret, kw_only=True)


@attrs.frozen
class _Between:
    low: float
    high: float

    def __call__(self, value: Any) -> str | None:
        return None if self.low <= value <= self.high else f"must be {self}, not {value}"

    def __str__(self) -> str:
        return f"between {self.low} and {self.high}"


@attrs.frozen
class _OneOf:
    choices: tuple[str, ...]

    def __call__(self, value: Any) -> str | None:
        return None if value in self.choices else f"must be {self}, not {value!r}"

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}"


def between(low: float, high: float) -> Check:
    """A check that a number lies within ``low`` and ``high``, both allowed."""
    return _Between(low, high)


def one_of(*choices: str) -> Check:
    """A check that a value is one of ``choices``."""
    return _OneOf(choices)


@attrs.frozen
class Described:
    """One option, in words: what ``overlaynet plugins show`` and the reference page say of it."""

    name: str
    type: str
    required: bool
    default: JSON
    """``None`` if there is none, or it is a secret."""
    check: str | None
    """What the value must be beside its type: ``between 1 and 65535``."""
    help: str
    secret: bool
    node: bool
    """Whether each node may have a value of its own, as only options of backends can."""


def describe(cls: type[Any]) -> list[Described]:
    """The options of ``cls``, in the order in which they are declared."""
    hints = typing.get_type_hints(cls)
    return [
        Described(
            display_name(field),
            _type_name(hints[field.name]),
            field.default is attrs.NOTHING,
            None if field.default is attrs.NOTHING or field.metadata.get("secret") else _default(field),
            _check_name(field.metadata.get("check")),
            field.metadata.get("help") or "",
            bool(field.metadata.get("secret")),
            bool(field.metadata.get("node")),
        )
        for field in attrs.fields(cls)
    ]


def class_problem(cls: object) -> str | None:
    """What keeps ``cls`` from declaring options, as a sentence; ``None`` if nothing."""
    if not (isinstance(cls, type) and attrs.has(cls)):
        return f"Options is {cls!r}, not an attrs class; decorate it with attrs.frozen"
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:  # whatever evaluating a third party's annotations raises
        return f"the types of its Options cannot be told: {error!r}"
    names: dict[str, str] = {}
    for field in attrs.fields(cls):
        shown = f"option {display_name(field)}"
        if not field.init:
            return f"{shown} is declared with init=False, so it could never be given; remove that"
        folded = _fold(display_name(field))
        if folded in names:
            return f"{shown} cannot be told from {names[folded]}, as case, - and _ make no difference; rename one"
        names[folded] = display_name(field)
        hint = hints.get(field.name)
        if _without_none(hint) not in _TYPE_NAMES:
            return f"{shown} has the type {hint}; an option has one of {_SUPPORTED}, or one of them or None"
        if field.default is attrs.NOTHING:
            continue
        try:
            wrong = _default_problem(field, hint)
        except Exception as error:  # whatever a third party's factory raises
            return f"the default of {shown} cannot be made: {_raised(error, field)}"
        if wrong is not None:
            return f"the default of {shown} {wrong}"
    return None


def declares(cls: type[Any], name: str) -> bool:
    """Whether ``cls`` has an option of this name, however it is written."""
    return any(_fold(display_name(field)) == _fold(name) for field in attrs.fields(cls))


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
    return _make(cls, read(cls, values, where) | read(cls, texts or {}, where, from_text=True), where)


def read(cls: type[Any], values: Mapping[str, object], where: str, *, from_text: bool = False) -> dict[str, object]:
    """Check values against the options of ``cls``, each by itself; returns them by attribute, for those that are given.

    :raises ConfigError: as :func:`parse` does, but for options that are missing, or do not fit together.
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
        wrong = _refused(field, typed_value)
        if wrong is not None:
            raise ConfigError(f"{shown} {wrong}")
        arguments[field.name] = typed_value
    return arguments


def read_shared(cls: type[Any], texts: Mapping[str, str], where: str) -> dict[str, object]:
    """Read what all nodes of a network are to share of a backend's options, from a command line; by name in documents.

    :raises ConfigError: as :func:`parse` does. What each node may have a value of its own for is not missed here; and while
        there is such an option, only the nodes can tell whether all fit together.
    """
    arguments = read(cls, texts, where, from_text=True)
    fields = attrs.fields(cls)
    for field in fields:
        if not field.metadata.get("node"):
            _require(field, arguments, where)
    if not any(field.metadata.get("node") for field in fields):
        _make(cls, arguments, where)
    return {display_name(field): arguments[field.name] for field in fields if field.name in arguments}


def masked(cls: type[Any] | None, values: Mapping[str, T]) -> dict[str, T | str]:
    """The values as they may be shown: those of secret options of ``cls`` are not.

    Neither are those that ``cls`` does not know, for they may be misspelt; nor any, if it is not known which class they
    are for (``None``).
    """
    fields = () if cls is None else attrs.fields(cls)
    plain = {_fold(display_name(field)) for field in fields if not field.metadata.get("secret")}
    return {name: value if _fold(name) in plain else MASK for name, value in values.items()}


def check_own(cls: type[Any], names: Iterable[str], where: str) -> None:
    """Make sure that a node may have values of its own for these options of a backend.

    :raises ConfigError: naming the first one that is the same for all nodes.
    """
    for field in attrs.fields(cls):
        name = display_name(field)
        if not field.metadata.get("node") and _fold(name) in map(_fold, names):
            raise ConfigError(
                f"{where}: option {name} is the same for all nodes; set it in the network document, with "
                f"`overlaynet network set`, not for this node alone"
            )


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
        raise ValueError(f"must be {_with_article(hint)}")
    if hint is int or hint is float:
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"must be {_with_article(hint)}") from None
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
        raise ValueError(f"must be {_with_article(hint)}")
    if type(value) is not hint:
        raise ValueError(f"must be {_with_article(hint)}")
    return value


def _make(cls: type[T], arguments: Mapping[str, object], where: str) -> T:
    """Make the options, given by attribute. :raises ConfigError: if one is missing, or the class refuses them together."""
    fields = attrs.fields(typing.cast(Any, cls))
    for field in fields:
        _require(field, arguments, where)
    try:
        return cls(**{field.alias: arguments[field.name] for field in fields if field.name in arguments})
    except (ValueError, TypeError) as error:  # what validators raise
        # Those of attrs say more than a sentence, and the sentence first.
        text = str(error.args[0] if error.args else "its options are refused, and nothing is said of why")
        if any(secret in text for field in fields for secret in _secrets(field, arguments)):
            raise ConfigError(f"{where}: its options are refused by a message that shows a secret one") from None
        raise ConfigError(f"{where}: {text}") from error


def _secrets(field: attrs.Attribute[Any], arguments: Mapping[str, object]) -> list[str]:
    """The texts that must not be shown, for a secret option that is given."""
    if not field.metadata.get("secret"):
        return []
    value = arguments.get(field.name)
    return [str(part) for part in (value if isinstance(value, tuple) else (value,)) if part not in (None, "")]


def _require(field: attrs.Attribute[Any], arguments: Mapping[str, object], where: str) -> None:
    if field.default is attrs.NOTHING and field.name not in arguments:
        raise ConfigError(f"{where}: option {display_name(field)} is missing; it has no default")


def _complaint(error: ValueError, field: attrs.Attribute[Any], value: object) -> str:
    return str(error) if field.metadata.get("secret") else f"{error}, not {value!r}"


def _refused(field: attrs.Attribute[Any], value: object) -> str | None:
    """What the field's check says of a value of the right type, or what is wrong with the check."""
    check: Check | None = field.metadata.get("check")
    if check is None or value is None:
        return None
    try:
        wrong: object = check(value)
    except Exception as error:  # whatever a third party's check raises
        return f"cannot be checked: {_raised(error, field)}"
    if wrong is None:
        return None
    if not isinstance(wrong, str):
        kind = type(wrong).__name__
        return f"cannot be checked: its check returns a value of type {kind}, not what is wrong as a string, or None"
    if field.metadata.get("secret"):
        meant = _check_name(check)
        return "is refused by its check" if meant is None else f"must be {meant}"
    return wrong


def _raised(error: Exception, field: attrs.Attribute[Any]) -> str:
    """An exception, in words that show no secret."""
    return type(error).__name__ if field.metadata.get("secret") else repr(error)


def _default_problem(field: attrs.Attribute[Any], hint: Any) -> str | None:
    value = _default(field)
    try:
        typed(hint, value)
    except ValueError as error:
        return _complaint(error, field, value)
    return _refused(field, value)


def _default(field: attrs.Attribute[Any]) -> Any:
    made: Any = field.default
    return made.factory() if isinstance(made, attrs.Factory) else made  # type: ignore[arg-type]


def _type_name(hint: Any) -> str:
    return _TYPE_NAMES[_without_none(hint)]


def _with_article(hint: Any) -> str:
    return _TYPE_NAMES[hint] if hint is bool else f"a {_TYPE_NAMES[hint]}"


def _check_name(check: Check | None) -> str | None:
    """A check in words: what it says it is, or the first line of its docstring."""
    if check is None:
        return None
    if isinstance(check, (_Between, _OneOf)):
        return str(check)
    documentation = inspect.getdoc(check) if inspect.isroutine(check) else None
    if not documentation:
        return None
    line = documentation.splitlines()[0].rstrip(".")
    return line if line[1:2].isupper() else line[0].lower() + line[1:]


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner[0] if len(inner) == 1 else hint
    return hint


def _fold(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def _unknown(name: str, known: list[str], where: str) -> str:
    if not known:
        return f"{where} has no options, so {name!r} cannot be set"
    return f"{where} has no option {name!r}{did_you_mean(name, known, _fold)} (it has {', '.join(sorted(known))})"
