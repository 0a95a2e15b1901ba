"""``overlaynet cleanup``: remove what a daemon that is gone left in the kernel."""

from __future__ import annotations

import argparse
import asyncio

from overlaynet import config, joining
from overlaynet.cli._store import load_plugins, resolve
from overlaynet.commands import Command
from overlaynet.devices import find_leftovers, is_in_use
from overlaynet.errors import ConfigError
from overlaynet.netlink import Netlink, netlink


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.epilog = (
        "While no daemon runs, an unreachable route keeps packets for the overlay from leaking out of the default "
        "route; it stays after `overlaynet run` ends. This removes it, for a host that leaves the overlay for good."
    )
    parser.add_argument(
        "--device",
        default="overlay0",
        metavar="NAME",
        help="device that the daemon had, which is Name in the network document's Backend (default: overlay0)",
    )
    config.add_flags(parser, groups=("node", "plugins", "log"))


def run(arguments: argparse.Namespace) -> int:
    """Remove routes and devices. Idempotent."""
    settings = resolve(arguments).settings
    router = joining.find_router(load_plugins(settings), settings)()
    name = arguments.device

    def delete_leftovers(kernel: Netlink) -> None:
        for link in find_leftovers(kernel, name):
            kernel.delete_link(link.name)

    async def clean() -> None:
        if await netlink(lambda kernel: is_in_use(kernel, name)):
            raise ConfigError(f"the device {name} exists, so its daemon seems to run; stop it first")
        try:
            await router.open(name)
            await router.apply([])
        finally:
            await router.aclose()
        await netlink(delete_leftovers)

    asyncio.run(clean())
    return 0


COMMAND = Command("cleanup", "remove what a daemon that is gone left in the kernel", configure, run)
