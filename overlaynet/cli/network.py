"""``overlaynet network set`` and ``overlaynet network show``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from overlaynet import config, network, options
from overlaynet.cli._store import add_store_flags, load_plugins, read_document, resolve, with_store
from overlaynet.commands import Command
from overlaynet.drivers import Store
from overlaynet.errors import ConfigError, PluginError
from overlaynet.plugins import Plugins


def configure(parser: argparse.ArgumentParser) -> None:
    """Add ``set`` and ``show``."""
    actions = parser.add_subparsers(dest="action", metavar="set|show", required=True)
    setter = actions.add_parser("set", help="write the network document", allow_abbrev=False)
    setter.add_argument("--network", metavar="CIDR", help="IPv4 network of the overlay, such as 10.244.0.0/16")
    setter.add_argument("--ipv6-network", metavar="CIDR", help="IPv6 network of the overlay, such as fd00:10:244::/48")
    setter.add_argument("--backend", default="udp", metavar="NAME", help="backend of all nodes (default: udp)")
    setter.add_argument(
        "--backend-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the backend, such as Port=8285; repeatable",
    )
    setter.add_argument("--subnet-len", type=int, metavar="BITS", help="prefix length of a node's subnet (default: 24)")
    setter.add_argument("--subnet-min", metavar="ADDRESS", help="first subnet to lease (default: the network's second)")
    setter.add_argument("--subnet-max", metavar="ADDRESS", help="last subnet to lease (default: the network's last)")
    setter.add_argument("--ipv6-subnet-len", type=int, metavar="BITS", help="the same for IPv6 (default: 64)")
    setter.add_argument("--ipv6-subnet-min", metavar="ADDRESS", help="the same for IPv6")
    setter.add_argument("--ipv6-subnet-max", metavar="ADDRESS", help="the same for IPv6")
    setter.add_argument("--lease-ttl", type=float, metavar="SECONDS", help="lifetime of a lease (default: a day)")
    add_store_flags(setter)
    shower = actions.add_parser("show", help="print the network document", allow_abbrev=False)
    add_store_flags(shower)


def run(arguments: argparse.Namespace) -> int:
    """Write or print the document."""
    return _set(arguments) if arguments.action == "set" else _show(arguments)


def _set(arguments: argparse.Namespace) -> int:
    plugins = load_plugins(resolve(arguments).settings)
    with config.from_settings():
        document = json.dumps(_document(arguments, plugins))
        network.parse(document)

    async def write(store: Store) -> str | None:
        before = await store.read_network()
        if before != document:
            await store.replace_network(document)
            print(f"the network document of {store} is now:")
        else:
            print(f"the network document of {store} is already:")
        return before

    before = with_store(arguments, write, plugins)
    print(_shown(document, plugins))
    if before is not None and before != document:
        was = _shown(before, plugins)
        print(f"it was: {was}\nnodes that are running follow when they are restarted", file=sys.stderr)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    plugins = load_plugins(resolve(arguments).settings)
    document = with_store(arguments, read_document, plugins)
    print(_shown(document, plugins))
    network.parse(document)
    return 0


def _shown(document: str, plugins: Plugins) -> str:
    """The document as it may be shown: without the values of the backend's secret options.

    One that is not JSON is shown whole: nothing tells what in it is a secret, and its writer has to see what is wrong.
    """
    try:
        content = json.loads(document)
    except (ValueError, RecursionError):
        return document
    if not isinstance(content, dict):
        return document
    shown = {
        name: _shown_backend(value, plugins) if name.lower() == "backend" and isinstance(value, dict) else value
        for name, value in content.items()
    }
    return document if shown == content else json.dumps(shown)


def _shown_backend(backend: dict[str, Any], plugins: Plugins) -> dict[str, Any]:
    values = {name: value for name, value in backend.items() if name.lower() != "type"}
    types = {name: value for name, value in backend.items() if name.lower() == "type"}
    named = [value.lower() for value in types.values() if isinstance(value, str)]
    try:
        known = plugins.driver("backend", named[-1]).Options if named else None
    except PluginError as error:
        known = None
        if values:
            print(f"options are masked, as nothing tells which of them are secret: {error}", file=sys.stderr)
    return types | options.masked(known, values)


def _document(arguments: argparse.Namespace, plugins: Plugins) -> dict[str, Any]:
    """The document that the flags describe; what is not given is left to the defaults."""
    if arguments.network is None and arguments.ipv6_network is None:
        raise ConfigError("name the overlay's network with --network, such as 10.244.0.0/16, or with --ipv6-network")
    document: dict[str, Any] = {
        "Network": arguments.network,
        "EnableIPv4": False if arguments.network is None else None,
        "SubnetLen": arguments.subnet_len,
        "SubnetMin": arguments.subnet_min,
        "SubnetMax": arguments.subnet_max,
        "EnableIPv6": None if arguments.ipv6_network is None else True,
        "IPv6Network": arguments.ipv6_network,
        "IPv6SubnetLen": arguments.ipv6_subnet_len,
        "IPv6SubnetMin": arguments.ipv6_subnet_min,
        "IPv6SubnetMax": arguments.ipv6_subnet_max,
        "LeaseTTL": arguments.lease_ttl,
    }
    document = {name: value for name, value in document.items() if value is not None}
    backend_class = plugins.driver("backend", arguments.backend)
    texts = config.key_values(arguments.backend_option, "--backend-option")
    values = options.read_shared(backend_class.Options, texts, f"backend {arguments.backend}")
    document["Backend"] = {"Type": arguments.backend} | values
    return document


COMMAND = Command("network", "set or show the network document that all nodes share", configure, run)
