"""What several commands share: their settings, the plugins that these ask for, and opening the store."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

from overlaynet import config, logs, options
from overlaynet.config import Resolved
from overlaynet.drivers import Store
from overlaynet.plugins import Plugins
from overlaynet.settings import Settings

T = TypeVar("T")


def add_store_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the store is."""
    config.add_flags(parser, groups=("store", "log"))


def load_plugins(settings: Settings) -> Plugins:
    """The hooks and drivers of this process, with the observers that are installed, as the settings say.

    :raises PluginError: if one is broken and the settings are strict.
    """
    plugins = Plugins(trace=settings.trace_plugins, strict=settings.strict_plugins)
    if settings.plugins:
        plugins.load_observers()
    return plugins


def open_store(settings: Settings, plugins: Plugins) -> Store:
    """Make the selected store; no I/O yet. The caller closes it."""
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


def with_store(arguments: argparse.Namespace, use: Callable[[Store], Awaitable[T]]) -> T:
    """Open the store that the flags name, use it, and close it."""
    settings = resolve(arguments).settings

    async def run() -> T:
        store = open_store(settings, Plugins())
        try:
            return await use(store)
        finally:
            await store.aclose()

    return asyncio.run(run())
