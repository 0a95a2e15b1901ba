"""``overlaynet status``: how the daemon of this host is."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping

from overlaynet import config
from overlaynet.commands import Command
from overlaynet.model import JSON
from overlaynet.status import ask


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("--json", action="store_true", help="the whole answer as JSON")
    config.add_flags(parser, groups=("node",))


def run(arguments: argparse.Namespace) -> int:
    """Print the status; exit status 1 if the node is not ready or has a problem."""
    settings = config.resolve(arguments, os.environ).settings
    status = ask(settings.status_socket)
    if arguments.json:
        print(json.dumps(status, indent=2))
    else:
        for line in _lines(status):
            print(line)
    return 0 if status.get("ready") and not status.get("problems") else 1


def _lines(value: JSON, indent: str = "") -> Iterator[str]:
    """An object as indented ``name: value`` lines."""
    if not isinstance(value, Mapping):
        return
    width = max((len(name) for name, inner in value.items() if not isinstance(inner, Mapping)), default=0)
    for name, inner in value.items():
        shown = name.replace("_", " ")
        if isinstance(inner, Mapping):
            yield f"{indent}{shown}:" + ("" if inner else " none")
            yield from _lines(inner, indent + "  ")
        elif isinstance(inner, list):
            yield f"{indent}{shown + ':':<{width + 2}}{', '.join(map(str, inner)) or 'none'}"
        else:
            text = (
                {True: "yes", False: "no", None: "-"}.get(inner) if inner is None or isinstance(inner, bool) else inner
            )
            yield f"{indent}{shown + ':':<{width + 2}}{text}"


COMMAND = Command("status", "ask the daemon of this host how it is", configure, run)
