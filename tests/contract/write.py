"""Writes api.txt: all that plugins can rely on, a line for each, so that no change of the contract goes unnoticed.

Run ``python tests/contract/write.py`` after a change, and raise ``API`` (overlaynet/drivers.py) by the rule that stands there.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from overlaynet import api, hookspecs

FILE = Path(__file__).with_name("api.txt")


def text() -> str:
    """The contract of this overlaynet."""
    lines = [f"API {api.API}"]
    for name in sorted(api.__all__):
        lines += of(name, getattr(api, name))
    for name, function in sorted(vars(hookspecs).items()):
        if name.startswith("overlaynet_"):
            options = sorted(key for key, value in vars(function)["overlaynet_spec"].items() if value)
            lines.append(f"hook {name}{signature(function)} {' '.join(options)}".rstrip())
    return "\n".join(lines) + "\n"


def part_to_raise(before: str, now: str) -> str:
    """Which part of ``API`` this change raises: the minor one, if something is only added, and asks nothing of drivers."""
    gone, new = _whole_lines(before) - _whole_lines(now), _whole_lines(now) - _whole_lines(before)
    # A hook that has another argument is still taken by those that do not name it.
    hooks = {line.partition("(")[0]: line for line in new if line.startswith("hook ")}
    grown = {
        line
        for line in gone
        if line.startswith("hook ") and _arguments(line) < _arguments(hooks.get(line.partition("(")[0], ""))
    }
    asks = {line for line in new if "  abstract " in line or line.endswith(", required")}
    return "major" if gone - grown or asks else "minor"


def _whole_lines(contract: str) -> set[str]:
    """The lines, those of members with the class that they belong to."""
    found, owner = set(), ""
    for line in contract.splitlines():
        owner = owner if line.startswith(" ") else line.partition("(")[0]
        found.add(f"{owner}{line}" if line.startswith(" ") else line)
    return found


def _arguments(hook: str) -> set[str]:
    return set(hook.partition("(")[2].partition(")")[0].split(", ")) - {""}


def of(name: str, thing: Any) -> Iterator[str]:
    """What there is to say of one name of overlaynet.api."""
    if inspect.isclass(thing):
        bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
        yield f"class {name}({bases})"
        yield from sorted(f"  {line}" for line in members(thing))
    elif inspect.isfunction(thing):
        yield f"function {name}{signature(thing)}"
    elif name != "API":
        arguments = ", ".join(sorted(str(each) for each in typing.get_args(thing)))
        yield f"other {name}: {arguments or type(thing).__name__}"


def members(cls: type[Any]) -> Iterator[str]:
    """The fields, attributes and methods of a class, but those that it inherits."""
    fields = attrs.fields_dict(cls) if attrs.has(cls) else {}
    for field in fields.values():
        if not field.name.startswith("_"):
            default = "required" if field.default is attrs.NOTHING else "has a default"
            yield f"field {field.name}: {field.type}, {default}"
    constructor = "" if fields or "__init__" not in vars(cls) else inspect.getsource(vars(cls)["__init__"])
    yield from (
        f"attribute self.{name}" for name in sorted(set(re.findall(r"\bself\.([a-z]\w*)(?::.+)? = ", constructor)))
    )
    for name, member in vars(cls).items():
        abstract = getattr(member, "__isabstractmethod__", False)
        if name in fields or (name.startswith("_") and not abstract and (name != "__init__" or fields)):
            continue
        if isinstance(member, property):
            yield f"property {name}"
        elif inspect.isroutine(member) or isinstance(member, (staticmethod, classmethod)):
            function = getattr(member, "__func__", member)
            kind = f"{'abstract ' if abstract else ''}{'async ' if inspect.iscoroutinefunction(function) else ''}"
            yield f"{kind}method {name}{signature(function)}"
        else:
            yield f"attribute {name}"


def signature(function: Any) -> str:
    """Parameters and result, as the source has them."""
    return str(inspect.signature(function)).replace("'", "")


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
