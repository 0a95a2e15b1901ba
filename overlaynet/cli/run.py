"""``overlaynet run``: the daemon."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import sys
from collections.abc import AsyncIterator, Coroutine
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from overlaynet import __version__, allocator, config, privileges
from overlaynet.cli._signals import stopped_by_signals
from overlaynet.cli._store import load_plugins, open_store, resolve
from overlaynet.commands import Command
from overlaynet.daemon import Daemon
from overlaynet.identity import IdentityFiles, default_identity
from overlaynet.logs import fields
from overlaynet.model import Underlay
from overlaynet.netlink_events import ChangeSignal
from overlaynet.network import Network
from overlaynet.privileges import Capability
from overlaynet.service_manager import ServiceManager
from overlaynet.settings import Settings
from overlaynet.status import StatusServer
from overlaynet.underlay import find_underlay

log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.epilog = (
        f"Every setting is also an environment variable ({config.ENVIRONMENT_PREFIX}ETCD_ENDPOINTS for --etcd-endpoints) "
        "and a key of the TOML file that --config names (etcd-endpoints); flags win over the environment, the environment "
        "over the file."
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the effective settings and where each comes from, and end"
    )
    config.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Be a node until SIGTERM or SIGINT."""
    resolved = resolve(arguments)
    if arguments.print_config:
        print("\n".join(resolved.lines()))
        return 0
    for warning in resolved.warnings:
        log.warning(warning)
    # While there is one thread only, both.
    allocator.keep_compact()
    if resolved.settings.privileges == "drop":
        kept = privileges.keep_only()
        log.debug("privileges dropped", extra=fields(kept=[Capability(number).name for number in sorted(kept)]))
    asyncio.run(_live(resolved.settings))
    return 0


async def _live(settings: Settings) -> None:
    plugins = load_plugins(settings)
    manager = ServiceManager.from_environment()
    if manager is not None:
        plugins.register(manager, name="service manager")

    host = _Host(settings)
    daemon = Daemon(settings, open_store(settings, plugins), plugins, host.find_underlay, host.changed)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(stopped_by_signals(daemon.stop))
        log.info("starting", extra=fields(version=__version__, python=sys.version.split()[0], store=settings.store))
        stack.callback(host.close)
        if manager is not None:
            stack.callback(manager.close)
            await stack.enter_async_context(_kept_running(manager.give_signs_of_life()))
        if settings.status_socket:
            await stack.enter_async_context(StatusServer(settings.status_socket, daemon.status))
        await daemon.run()


@contextlib.asynccontextmanager
async def _kept_running(coroutine: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


class _Host:
    """What the daemon asks of this host, again and again. Made inside the event loop.

    :raises overlaynet.netlink.NetlinkError: if the kernel does not tell this process of its changes.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._underlay: Underlay | None = None
        self._identities = IdentityFiles(Path(settings.state_directory))
        self._not_forwarding: set[str] = set()
        self._signal = ChangeSignal()

    async def changed(self) -> None:
        """Return when the underlay may be another, or the parameters for forwarding have changed."""
        await self._signal.wait()

    def close(self) -> None:
        """Stop following the kernel's changes."""
        self._signal.close()

    async def find_underlay(self, network: Network) -> tuple[Underlay, str]:
        """How this host is attached to the network of the hosts now, and who it is unless the settings say so."""
        settings = self._settings
        self._warn_if_not_forwarding(network)
        self._underlay = underlay = await find_underlay(
            interfaces=settings.iface,
            interface_patterns=settings.iface_regex,
            can_reach=None if settings.iface_can_reach is None else ipaddress.ip_address(settings.iface_can_reach),
            public_ip=None if settings.public_ip is None else IPv4Address(settings.public_ip),
            public_ipv6=None if settings.public_ipv6 is None else IPv6Address(settings.public_ipv6),
            ipv4=network.ipv4 is not None,
            ipv6=network.ipv6 is not None,
            current=self._underlay,
        )
        if settings.node is not None:
            return underlay, await default_identity(underlay)
        return underlay, await self._identities.identity(underlay)

    def _warn_if_not_forwarding(self, network: Network) -> None:
        """Nothing of ours to change, but without it containers reach nobody, and nothing else says why."""
        for family, parameter in (
            (network.ipv4, "net/ipv4/ip_forward"),
            (network.ipv6, "net/ipv6/conf/all/forwarding"),
        ):
            file, name = Path("/proc/sys", parameter), parameter.replace("/", ".")
            if family is None or not file.exists():
                continue
            if file.read_text().strip() != "0":
                if name in self._not_forwarding:
                    self._not_forwarding.remove(name)
                    log.info("this host forwards containers' packets again", extra=fields(network=family.network))
            elif name not in self._not_forwarding:
                self._not_forwarding.add(name)
                log.warning(
                    "this host does not forward containers' packets",
                    extra=fields(network=family.network, hint=f"sysctl {name}=1"),
                )


COMMAND = Command("run", "be a node: lease a subnet and carry packets until SIGTERM or SIGINT", configure, run)
