"""What a node does before it is one: find out which network it belongs to, and claim its subnets.

The store may be down, and nobody may have written the network document yet: both are waited for, and said.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import attrs

from overlaynet import boot_clock, config, options
from overlaynet import network as documents
from overlaynet.drivers import Backend, Router, Store
from overlaynet.errors import ConfigError, StoreUnavailable
from overlaynet.health import REMINDER, Health
from overlaynet.logs import fields
from overlaynet.model import Lease, LeaseRequest
from overlaynet.network import Network
from overlaynet.plugins import Plugins
from overlaynet.retry import Backoff
from overlaynet.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

DOCUMENT_POLL = 1.0
"""Seconds between two looks for the network document while there is none."""
STORE_TIMEOUT = 60.0
"""Seconds after which a store's driver that gives no answer is taken to be unavailable."""


@attrs.frozen
class Found:
    """The network that a node is to join."""

    network: Network
    unwritten: str | None = None
    """The network document that the settings ask for, as the store has none yet."""


async def find_network(store: Store, settings: Settings, plugins: Plugins, health: Health) -> Found:
    """Read the network document, which is waited for unless the settings name a network. Nothing is written.

    :raises ConfigError: if it is wrong, or names another backend than the settings expect.
    :raises SettingsError: if the network that the settings name is wrong, or their backend is not installed; before
        anything is asked of the store.
    """
    if settings.backend is not None:
        with config.from_settings():
            _backend_class(plugins, settings.backend, settings)
    wanted = None
    if settings.network is not None:
        document = json.dumps({"Network": settings.network, "Backend": {"Type": settings.backend or "udp"}})
        with config.from_settings():
            wanted = documents.parse(document)
            make_backend(plugins, wanted, settings)
        text = await ask(store.read_network, health)
        if text is None:
            return Found(wanted, document)
    else:
        text = await _wait_for_document(store, health)
    try:
        network = documents.parse(text)
    except ConfigError as error:
        raise ConfigError(f"{error} (in the network document of {store})") from error
    if settings.backend is not None and settings.backend != network.backend_type:
        raise ConfigError(
            f"the network document of {store} names the backend {network.backend_type!r}, but this node expects "
            f"{settings.backend!r}; change --backend, or the document with `overlaynet network set`"
        )
    if wanted is not None and tuple(wanted) != tuple(network):
        log.warning("the network document names another network", extra=fields(document=network, flag=settings.network))
    return Found(network)


async def write_network(store: Store, found: Found, health: Health) -> bool:
    """Write the network document if it is not written yet; ``False`` if another node was first: then find it anew."""
    document = found.unwritten
    if document is None:
        return True
    created = await ask(lambda: store.create_network(document), health)
    if created:
        log.info("network document created", extra=fields(network=found.network, store=store))
    return created


def make_backend(plugins: Plugins, network: Network, settings: Settings) -> Backend:
    """The backend that the network document names, with its options, this node's own and its settings; nothing is opened.

    :raises PluginError: if it is not installed, or broken.
    :raises ConfigError: if its options are wrong.
    """
    name = network.backend_type
    backend_class = _backend_class(plugins, name, settings)
    where = f"backend {name} of the network document"
    own = config.key_values(settings.backend_option, "--backend-option")
    parsed = options.parse(backend_class.Options, network.backend_options, where, texts=own)
    arguments = config.backend_arguments(settings, name)
    # Another class may stand in for a built-in backend, and know nothing of its settings.
    known = {argument: arguments[argument] for argument in backend_class.node_settings & arguments.keys()}
    backend: Backend = backend_class(parsed, **known)
    return backend


def _backend_class(plugins: Plugins, name: str, settings: Settings) -> type[Backend]:
    """The backend of this name, which may have the options that are this node's own. Raises like :func:`make_backend`."""
    backend_class: type[Backend] = plugins.driver("backend", name)
    own = config.key_values(settings.backend_option, "--backend-option")
    with config.from_settings():
        options.check_own(backend_class.Options, own, f"backend {name}")
    return backend_class


def find_router(plugins: Plugins, settings: Settings) -> Callable[[], Router]:
    """What makes the router that the settings name, with its options.

    :raises SettingsError: if it is not installed, or broken, or its options are wrong.
    """
    texts = config.key_values(settings.router_option, "--router-option")
    with config.from_settings():
        router_class: type[Router] = plugins.driver("router", settings.router)
        return partial(router_class, options.parse(router_class.Options, {}, f"router {settings.router}", texts=texts))


@attrs.frozen
class Promised:
    """A lease, as the store has granted it."""

    lease: Lease
    until: float
    """Time of the boot clock until which the store promises it."""


async def acquire(store: Store, network: Network, request: LeaseRequest, health: Health) -> Promised:
    """Claim subnets.

    :raises SubnetsExhausted: if there is none left.
    """

    async def try_once() -> Promised:
        # The lifetime begins in the store, no earlier than it was asked for.
        asked_at = boot_clock.now()
        return Promised(await store.acquire(network, request), asked_at + network.lease_ttl)

    promised = await ask(try_once, health)
    lease = promised.lease
    log.info("lease acquired", extra=fields(subnet=lease.subnets, ttl=network.lease_ttl, node=lease.node))
    return promised


async def ask(question: Callable[[], Awaitable[T]], health: Health) -> T:
    """Ask the store until it answers."""
    backoff = Backoff()
    while True:
        try:
            answer = await in_time(question())
        except StoreUnavailable as error:
            health.degraded("store", str(error), hint="trying again until it answers")
            await asyncio.sleep(backoff.next())
        else:
            health.recovered("store")
            return answer


async def in_time(answer: Awaitable[T]) -> T:
    """Wait for a store's answer, but not for ever: whatever a driver does, it does not hang the node.

    :raises StoreUnavailable: after :data:`STORE_TIMEOUT`.
    """
    try:
        async with asyncio.timeout(STORE_TIMEOUT):
            return await answer
    except TimeoutError as error:
        raise StoreUnavailable(f"the store gave no answer within {STORE_TIMEOUT:.0f} seconds") from error


async def _wait_for_document(store: Store, health: Health) -> str:
    loop = asyncio.get_running_loop()
    mention_at = loop.time()
    while (text := await ask(store.read_network, health)) is None:
        if loop.time() >= mention_at:
            log.info(
                "waiting for the network document",
                extra=fields(store=store, hint="set it with: overlaynet network set --network CIDR"),
            )
            mention_at = loop.time() + REMINDER
        await asyncio.sleep(DOCUMENT_POLL)
    return text
