"""What several commands share: their settings, the plugins that these ask for, and opening the store."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import math
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from overlaynet import config, logs, options
from overlaynet.config import Resolved
from overlaynet.drivers import Store
from overlaynet.errors import ConfigError
from overlaynet.model import IPNetwork, Subnets
from overlaynet.plugins import Plugins
from overlaynet.settings import Settings

T = TypeVar("T")


def add_store_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the store is, and which plugins may answer for drivers."""
    config.add_flags(parser, groups=("store", "plugins", "log"))


def load_plugins(settings: Settings) -> Plugins:
    """The hooks and drivers of this process, with the observers that are installed, as the settings say.

    Every command that needs a driver finds it through these, so that all find the same one: an observer may answer for it.

    :raises SettingsError: if one is broken and the settings are strict, or for options that none has.
    """
    plugins = Plugins(trace=settings.trace_plugins, strict=settings.strict_plugins)
    if settings.plugins:
        with config.from_settings():
            plugins.load_observers(config.plugin_options(settings))
    return plugins


def open_store(settings: Settings, plugins: Plugins) -> Store:
    """Make the selected store; no I/O yet. The caller closes it.

    :raises SettingsError: if it is not installed, or broken, or its options are wrong.
    """
    with config.from_settings():
        store_class = plugins.driver("store", settings.store)
        store: Store = store_class(
            options.parse(
                store_class.Options,
                config.store_options(settings),
                f"store {settings.store}",
                texts=config.key_values(settings.store_option, "--store-option"),
            )
        )
    return store


def resolve(arguments: argparse.Namespace) -> Resolved:
    """Settings from flags, environment and file; sets up logging as they say."""
    resolved = config.resolve(arguments, os.environ)
    logs.configure(resolved.settings.log_level, resolved.settings.log_format)
    return resolved


def with_store(
    arguments: argparse.Namespace, use: Callable[[Store], Awaitable[T]], plugins: Plugins | None = None
) -> T:
    """Open the store that the flags name, use it, and close it.

    :param plugins: those that the flags ask for, if they are loaded already.
    """
    settings = resolve(arguments).settings
    loaded = load_plugins(settings) if plugins is None else plugins

    async def run() -> T:
        store = open_store(settings, loaded)
        try:
            return await use(store)
        finally:
            await store.aclose()

    return asyncio.run(run())


async def read_document(store: Store) -> str:
    """The network document. :raises ConfigError: if the store has none."""
    document = await store.read_network()
    if document is None:
        raise ConfigError(
            f"{store} holds no network document; write one with `overlaynet network set --network 10.244.0.0/16`"
        )
    return document


def read_subnet(text: str) -> IPNetwork:
    """A subnet, from the command line. :raises ConfigError: if the text is none."""
    try:
        if "/" not in text:
            raise ValueError("the length of its prefix is missing")
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a subnet such as 10.244.7.0/24: {error}") from error


def covers(subnets: Subnets, given: Iterable[IPNetwork]) -> bool:
    """True if each subnet that the operator named is one of these; of a pair, one is enough to name it."""
    return all(subnet in tuple(subnets) for subnet in given)


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return "-"
    if math.isinf(seconds):
        return "never"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute:02} min"
    return f"{minute} min {second:02} s" if minute else f"{second} s"
