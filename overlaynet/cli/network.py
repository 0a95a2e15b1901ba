"""``overlaynet network set`` and ``overlaynet network show``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import attrs

from overlaynet import config, network, options
from overlaynet.cli._store import add_store_flags, load_plugins, read_document, resolve, with_store
from overlaynet.commands import Command
from overlaynet.drivers import Store
from overlaynet.errors import ConfigError
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
    print(document)
    if before is not None and before != document:
        print(f"it was: {before}\nnodes that are running follow when they are restarted", file=sys.stderr)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    document = with_store(arguments, read_document)
    print(document)
    network.parse(document)
    return 0


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
    values = options.read(backend_class.Options, texts, f"backend {arguments.backend}", from_text=True)
    names = {field.name: options.display_name(field) for field in attrs.fields(backend_class.Options)}
    document["Backend"] = {"Type": arguments.backend} | {names[name]: value for name, value in values.items()}
    return document


COMMAND = Command("network", "set or show the network document that all nodes share", configure, run)
