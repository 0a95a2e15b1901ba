"""``overlaynet cleanup``: remove what a daemon that is gone left in the kernel."""

from __future__ import annotations

import argparse
import asyncio
import os

from overlaynet import config, options
from overlaynet.cli.commands import Command
from overlaynet.errors import ConfigError
from overlaynet.netlink import Netlink, netlink
from overlaynet.plugins import Plugins


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.epilog = (
        "While no daemon runs, an unreachable route keeps packets for the overlay from leaking out of the default "
        "route; it stays after `overlaynet run` ends. This removes it, for a host that leaves the overlay for good."
    )
    parser.add_argument(
        "--device", default="overlay0", metavar="NAME", help="device that the daemon had (default: overlay0)"
    )
    config.add_flags(parser, groups=("node",))


def run(arguments: argparse.Namespace) -> int:
    """Remove the routes. Idempotent."""
    settings = config.resolve(arguments, os.environ).settings
    router_class = Plugins().driver("router", settings.router)
    texts = config.key_values(settings.router_option, "--router-option")
    router = router_class(options.parse(router_class.Options, {}, f"router {settings.router}", texts=texts))

    def device_exists(kernel: Netlink) -> bool:
        return kernel.link(arguments.device) is not None

    async def clean() -> None:
        if await netlink(device_exists):
            raise ConfigError(f"the device {arguments.device} exists, so its daemon seems to run; stop it first")
        try:
            await router.open(arguments.device)
            await router.apply([])
        finally:
            await router.aclose()

    asyncio.run(clean())
    return 0


COMMAND = Command("cleanup", "remove what a daemon that is gone left in the kernel", configure, run)
