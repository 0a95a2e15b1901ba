"""``overlaynet plugins``: what is installed, from where, with which options, and what is broken."""

from __future__ import annotations

import argparse
import json
import platform
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs

from overlaynet import __version__, config
from overlaynet.catalogue import Details, Found, catalogue, details
from overlaynet.cli import BUILT_IN
from overlaynet.cli._new import AXES, new
from overlaynet.cli._store import resolve
from overlaynet.commands import Command, Commands
from overlaynet.drivers import API
from overlaynet.entry_points import OBSERVERS, entries
from overlaynet.options import Described
from overlaynet.plugins import Plugins, refuse_strangers

WIDTH = 100
"""Columns at which texts are wrapped."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions; without one, ``list`` is meant."""
    parser.add_argument("--json", action="store_true", help="JSON instead of text")
    parser.set_defaults(act=_list)
    actions = parser.add_subparsers(metavar="list|show|doctor|new")
    for action, function, summary in (
        ("list", _list, "list all drivers and plugins (what is done without an action)"),
        ("show", _show, "show one: what it is, where it is from, and its options"),
        ("doctor", _doctor, "check all, and say of each problem what to do; ends with 1 if there is one"),
    ):
        added = actions.add_parser(
            action, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        added.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="JSON instead of text")
        added.set_defaults(act=function)
        if action == "show":
            added.add_argument("name", metavar="NAME", help="name of a driver or plugin, such as udp")
    summary = "write a small package with a driver or observer that works, and its tests, to begin from"
    maker = actions.add_parser("new", help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
    maker.set_defaults(act=_new)
    maker.add_argument("name", metavar="NAME", help="name of the driver or observer; the package is overlaynet-NAME")
    maker.add_argument("--axis", required=True, choices=AXES, help="what it is to be")
    maker.add_argument("--directory", type=Path, metavar="DIR", help="where to write it (default: overlaynet-NAME)")


def run(arguments: argparse.Namespace) -> int:
    """Do the action; exit status 1 if anything that it looked at is broken."""
    status: int = arguments.act(arguments)
    return status


def _list(arguments: argparse.Namespace) -> int:
    found = _catalogue()
    if arguments.json:
        print(json.dumps([attrs.asdict(entry) for entry in found], indent=2))
        return _status(found)
    headings = ("GROUP", "NAME", "DISTRIBUTION", "STATE")
    _print_table(
        headings,
        [
            (entry.group, entry.name, f"{entry.distribution} {entry.version}", "BROKEN" if entry.problem else "ok")
            for entry in found
        ],
    )
    for problem in _problems(found):
        print(f"\n{problem}")
    return _status(found)


def _show(arguments: argparse.Namespace) -> int:
    shown = details(arguments.name, *_circumstances())
    if arguments.json:
        print(json.dumps([attrs.asdict(each) for each in shown], indent=2))
    else:
        print("\n\n".join("\n".join(_text(each)) for each in shown))
    return _status([each.found for each in shown])


def _doctor(arguments: argparse.Namespace) -> int:
    found = _catalogue()
    problems = _problems(found)
    if arguments.json:
        about = {"overlaynet": __version__, "contract": API, "python": platform.python_version()}
        print(json.dumps(about | {"checked": len(found), "problems": problems}, indent=2))
        return _status(found)
    contract = ".".join(map(str, API))
    print(f"overlaynet {__version__}, version {contract} of the plugin contract, Python {platform.python_version()}")
    for problem in problems:
        print(f"\n{problem}")
    state = f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "no problem"
    print(f"\n{len(found)} drivers and plugins checked: {state}")
    return _status(found)


def _new(arguments: argparse.Namespace) -> int:
    directory = new(arguments.name, arguments.axis, arguments.directory)
    print(f"{directory} holds the {arguments.axis} {arguments.name}; its README.md says how to go on")
    return 0


def _catalogue() -> list[Found]:
    return catalogue(*_circumstances())


def _circumstances() -> tuple[Callable[[Plugins], object], Mapping[str, Mapping[str, str]]]:
    """How observers are tried: with the commands of overlaynet and of each other, and the options that the settings give.

    As for the commands of plugins, environment and configuration file say which.

    :raises SettingsError: for options of an observer that is not installed.
    """
    commands = Commands(reserved=BUILT_IN)
    with config.from_settings():
        given = config.plugin_options(resolve(argparse.Namespace()).settings)
        refuse_strangers(given, entries(OBSERVERS))
    return lambda plugins: plugins.notify("overlaynet_cli", commands=commands), given


def _problems(found: list[Found]) -> list[str]:
    return list(dict.fromkeys(entry.problem for entry in found if entry.problem is not None))


def _status(found: list[Found]) -> int:
    return 1 if _problems(found) else 0


def _text(shown: Details) -> Iterator[str]:
    found = shown.found
    yield f"{shown.axis} {found.name}"
    yield f"  from      {found.distribution} {found.version}" + (f": {shown.summary}" if shown.summary else "")
    if shown.plugin is None:
        yield f"  is        {found.target}, in the entry-point group {found.group}"
    else:
        what = f"{found.target}, which " if found.target else "what "
        yield f"  is        {what}the plugin {shown.plugin} answers with when asked for it, before any entry point"
    if found.problem is not None:
        yield f"  BROKEN    {found.problem}"
        return
    if shown.api is not None:
        yield f"  contract  {'.'.join(map(str, shown.api))}"
    if shown.documentation:
        yield ""
        for paragraph in shown.documentation.split("\n\n"):
            yield textwrap.indent(paragraph, "  ")
            yield ""
    if shown.axis == "observer":
        yield f"  hooks     {', '.join(shown.hooks)}"
    if shown.options:
        yield f"  options   {_how_to_give(shown)}"
        for option in shown.options:
            yield f"\n    {option.name}  ({', '.join(_facts(option))})"
            yield textwrap.fill(option.help, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    elif shown.axis != "observer":
        yield "  options   none"


def _how_to_give(shown: Details) -> str:
    if shown.axis == "observer":
        return f"--plugin-option {shown.found.name}.NAME=VALUE of `overlaynet run`"
    if shown.axis == "backend":
        shared = "members of Backend in the network document, or --backend-option of `overlaynet network set`"
        own = "; a node's own, --backend-option of `overlaynet run`"
        return shared + (own if any(option.node for option in shown.options) else "")
    return f"--{shown.axis}-option NAME=VALUE of `overlaynet run`"


def _facts(option: Described) -> Iterator[str]:
    yield option.type
    if option.check is not None:
        yield option.check
    if option.secret:
        yield "secret"
    if option.node:
        yield "each node may have its own"
    if option.required:
        yield "required"
    elif option.default not in (None, "", []):
        yield f"default {json.dumps(option.default)}"


def _print_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    for row in (headings, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


COMMAND = Command("plugins", BUILT_IN["plugins"], configure, run)
