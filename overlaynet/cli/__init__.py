"""The command line: ``overlaynet COMMAND …``.

Only the module of the command asked for is imported; plugins are asked for a command only when no built-in one has its
name. So ``overlaynet --help`` is fast, and no plugin can break it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from overlaynet import __version__
from overlaynet.commands import Command, Commands
from overlaynet.errors import IdentityTaken, OverlaynetError, SettingsError, did_you_mean

BUILT_IN = {
    "run": "be a node: lease a subnet and carry packets (the daemon)",
    "network": "set or show the network document that all nodes share",
    "leases": "list who holds which subnet",
    "reserve": "keep a subnet for one node, whether or not it runs",
    "unreserve": "let a reserved subnet be given to anybody",
    "release": "end the lease of a node that is gone",
    "status": "ask the daemon of this host how it is",
    "cleanup": "remove what a daemon that is gone left in the kernel",
    "plugins": "show the drivers and plugins that are installed, find what is broken, begin a new one",
    "demo": "show the whole thing at work on this machine, in network namespaces",
}


class UnknownCommand(Exception):
    """There is no command of that name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors of the operator's become one line on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0 if given else 2
    if given[0] == "--version":
        print(f"overlaynet {__version__}")
        return 0
    try:
        try:
            command = _find(given[0])
        except UnknownCommand as error:
            print(f"overlaynet: {error}", file=sys.stderr)
            return 2
        parser = argparse.ArgumentParser(
            prog=f"overlaynet {command.name}",
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            allow_abbrev=False,
        )
        command.configure(parser)
        return command.run(parser.parse_args(given[1:]))
    except OverlaynetError as error:
        print(f"overlaynet: {error}", file=sys.stderr)
        return _exit_status(error)
    except KeyboardInterrupt:
        print("overlaynet: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output (head, less) has had enough; keep the interpreter from saying so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _exit_status(error: OverlaynetError) -> int:
    """What the systemd unit reads: it starts nothing again that ended with 2 or 3."""
    if isinstance(error, SettingsError):
        return 2
    return 3 if isinstance(error, IdentityTaken) else 1


def _find(name: str) -> Command:
    """The command of that name, a plugin's only if there is no built-in one. :raises UnknownCommand: with the nearest."""
    if name in BUILT_IN:
        command: Command = importlib.import_module(f"overlaynet.cli.{name}").COMMAND
        return command
    commands = plugin_commands()
    found = commands.get(name)
    if found is None:
        raise UnknownCommand(_unknown(name, sorted({*BUILT_IN, *commands.names()})))
    return found


def plugin_commands() -> Commands:
    """The commands that plugins add. Environment and configuration file say which plugins; flags come after the command."""
    # These import third parties' code, and what it needs.
    from overlaynet.cli._store import load_plugins, resolve  # noqa: PLC0415

    plugins = load_plugins(resolve(argparse.Namespace()).settings)
    commands = Commands(reserved=BUILT_IN)
    plugins.notify("overlaynet_cli", commands=commands)
    return commands


def _unknown(name: str, known: Sequence[str]) -> str:
    return f"there is no command {name!r}{did_you_mean(name, known)} (there are {', '.join(known)})"


def _help() -> str:
    width = max(map(len, BUILT_IN))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in BUILT_IN.items())
    return f"""\
usage: overlaynet COMMAND [--help] ...

One flat IP network for the containers of many hosts.

commands:
{rows}

`overlaynet COMMAND --help` teaches a command; plugins may add more commands.
`overlaynet --version` prints the version.

On one machine, to see it:   overlaynet demo
On every host, to use it:    overlaynet network set --network 10.244.0.0/16 --backend udp
                             overlaynet run --backend udp --store etcd
"""
