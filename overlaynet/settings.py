"""The settings of a node, each declared once.

A setting's flag (``--etcd-endpoints``), its environment variable (``OVERLAYNET_ETCD_ENDPOINTS``) and its key in a
configuration file (``etcd-endpoints``) follow from its name; :mod:`overlaynet.config` reads them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import attrs

from overlaynet import options

GROUPS = {
    "network": "the overlay",
    "store": "the store of leases",
    "underlay": "how the other hosts reach this one",
    "node": "this node",
    "plugins": "the plugins that observe",
    "log": "what it tells",
}


def _address(family: Callable[[str], object], kind: str) -> options.Check:
    def check(value: Any) -> str | None:
        try:
            family(value)
        except ValueError:
            return f"must be an {kind} address, not {value!r}"
        return None

    return check


def setting(
    default: Any,
    help: str,
    *,
    group: str,
    metavar: str | None = None,
    secret: bool = False,
    check: options.Check | None = None,
    split: bool = True,
    driver_option: tuple[str, str] | None = None,
    backend_argument: tuple[str, str] | None = None,
) -> Any:
    """One setting.

    :param split: for lists: whether a comma separates items, as it cannot in regular expressions.
    :param driver_option: the store driver and the name of its option that this setting is passed on as.
    :param backend_argument: the backend and the name of its argument that this setting is passed on as: what each node
        chooses for itself, and the network document does not say.
    """
    metadata = {
        "help": help,
        "group": group,
        "metavar": metavar,
        "secret": secret,
        "check": check,
        "split": split,
        "driver_option": driver_option,
        "backend_argument": backend_argument,
    }
    return attrs.field(default=default, metadata=metadata, repr=not secret, kw_only=True)


def _threads(value: str) -> str | None:
    if value == "auto" or (value.isascii() and value.isdecimal() and 1 <= int(value) <= 64):
        return None
    return f"must be auto, or a whole number from 1 to 64, not {value!r}"


@attrs.frozen
class Settings:
    """All settings of ``overlaynet run``. Names and defaults are flannel's where it has them."""

    backend: str | None = setting(
        None,
        "backend that this node expects; it ends with an error if the network document names another",
        group="network",
        metavar="NAME",
    )
    network: str | None = setting(
        None,
        "create the network document with this network, such as 10.244.0.0/16, if the store has none",
        group="network",
        metavar="CIDR",
    )
    store: str = setting(
        "etcd", "store of the leases: etcd, file, memory, or one of a plugin", group="store", metavar="NAME"
    )
    store_path: str = setting(
        "/var/lib/overlaynet/store",
        "directory of the file store",
        group="store",
        metavar="DIR",
        driver_option=("file", "path"),
    )
    store_option: tuple[str, ...] = setting(
        (),
        "option of the store's driver, as KEY=VALUE; repeatable",
        group="store",
        metavar="KEY=VALUE",
        split=False,
    )
    etcd_endpoints: tuple[str, ...] = setting(
        ("http://127.0.0.1:4001", "http://127.0.0.1:2379"),
        "URLs of the etcd members, separated by commas",
        group="store",
        metavar="URLS",
        driver_option=("etcd", "endpoints"),
    )
    etcd_prefix: str = setting(
        "/coreos.com/network",
        "prefix of all keys in etcd",
        group="store",
        metavar="PREFIX",
        driver_option=("etcd", "prefix"),
    )
    etcd_cafile: str | None = setting(
        None,
        "certificates of the authorities that sign the etcd servers' certificates (PEM); the system's if not given",
        group="store",
        metavar="FILE",
        driver_option=("etcd", "cafile"),
    )
    etcd_certfile: str | None = setting(
        None,
        "certificate to show to etcd (PEM)",
        group="store",
        metavar="FILE",
        driver_option=("etcd", "certfile"),
    )
    etcd_keyfile: str | None = setting(
        None,
        "key of the certificate to show to etcd (PEM)",
        group="store",
        metavar="FILE",
        driver_option=("etcd", "keyfile"),
    )
    etcd_username: str | None = setting(
        None, "user of etcd", group="store", metavar="NAME", driver_option=("etcd", "username")
    )
    etcd_password: str | None = setting(
        None,
        "password of etcd; anyone on this host can read it from the command line, so prefer --etcd-password-file",
        group="store",
        metavar="PASSWORD",
        secret=True,
        driver_option=("etcd", "password"),
    )
    etcd_password_file: str | None = setting(
        None,
        "file that holds the password of etcd",
        group="store",
        metavar="FILE",
        driver_option=("etcd", "password_file"),
    )
    iface: tuple[str, ...] = setting(
        (),
        "interface towards the other hosts, by name or address; repeatable, the first that exists is taken",
        group="underlay",
        metavar="NAME|ADDRESS",
    )
    iface_regex: tuple[str, ...] = setting(
        (),
        "regular expression for the interface's address or name; repeatable, tried after --iface",
        group="underlay",
        metavar="REGEX",
        split=False,
    )
    iface_can_reach: str | None = setting(
        None,
        "take the interface that leads to this address",
        group="underlay",
        metavar="ADDRESS",
        check=_address(ipaddress.ip_address, "IP"),
    )
    public_ip: str | None = setting(
        None,
        "address at which the other hosts reach this one; by default that of the interface",
        group="underlay",
        metavar="ADDRESS",
        check=_address(IPv4Address, "IPv4"),
    )
    public_ipv6: str | None = setting(
        None,
        "IPv6 address at which the other hosts reach this one; by default that of the interface, "
        "if the overlay has IPv6 or the interface has no IPv4",
        group="underlay",
        metavar="ADDRESS",
        check=_address(IPv6Address, "IPv6"),
    )
    node: str | None = setting(
        None,
        "identity of this node, by which it finds its lease again; "
        "by default made from the machine's identity and the interface's hardware address, and kept in --state-directory",
        group="node",
        metavar="NAME",
        check=lambda name: None if name and name.isprintable() and len(name) <= 253 else "must be a printable name",
    )
    backend_option: tuple[str, ...] = setting(
        (),
        "value of this node's own for an option of the backend that allows it (`overlaynet plugins show NAME` tells which), "
        "as KEY=VALUE; repeatable",
        group="node",
        metavar="KEY=VALUE",
        split=False,
    )
    router: str = setting("netlink", "router: who tells the kernel the routes", group="node", metavar="NAME")
    router_option: tuple[str, ...] = setting(
        (),
        "option of the router's driver, as KEY=VALUE; repeatable",
        group="node",
        metavar="KEY=VALUE",
        split=False,
    )
    udp_engine: str = setting(
        "auto",
        "engine of the udp backend: native, python, or auto for the native one where it was built",
        group="node",
        metavar="NAME",
        check=options.one_of("auto", "native", "python"),
        backend_argument=("udp", "engine"),
    )
    udp_offload: str = setting(
        "auto",
        "offloads of the udp backend's engines: auto for what the kernel has, or off",
        group="node",
        metavar="auto|off",
        check=options.one_of("auto", "off"),
        backend_argument=("udp", "offload"),
    )
    udp_threads: str = setting(
        "auto",
        "threads that carry packets in the udp backend's native engine, each with a queue of the device: "
        "auto for half of the CPUs, 4 at most; or a number",
        group="node",
        metavar="auto|N",
        check=_threads,
        backend_argument=("udp", "threads"),
    )
    subnet_file: str = setting(
        "/run/flannel/subnet.env",
        "file that tells the container runtime this node's subnet and MTU, in flannel's format",
        group="node",
        metavar="FILE",
    )
    state_directory: str = setting(
        "/var/lib/overlaynet",
        "directory where the node's identity is kept, so that a replaced interface makes no other node of it",
        group="node",
        metavar="DIR",
    )
    subnet_lease_renew_margin: int = setting(
        60,
        "minutes before its end at which the lease is renewed; at most two thirds of its lifetime",
        group="node",
        metavar="MINUTES",
        check=options.between(1, 1439),
    )
    on_lease_lost: str = setting(
        "exit",
        "what to do when another node has taken this node's lease: exit with status 1, or reacquire: lease another subnet "
        "and go on with that",
        group="node",
        metavar="exit|reacquire",
        check=options.one_of("exit", "reacquire"),
    )
    release_on_stop: bool = setting(
        False, "give the lease back on a clean stop; by default the node finds it again", group="node"
    )
    status_socket: str = setting(
        "/run/overlaynet/status.sock",
        "Unix socket at which `overlaynet status` asks; empty for none",
        group="node",
        metavar="PATH",
    )
    privileges: str = setting(
        "drop",
        "drop: give up every privilege but those for the network at the start; keep: what the commands of the backend "
        "extension need may be more",
        group="node",
        metavar="WHAT",
        check=options.one_of("drop", "keep"),
    )
    plugins: bool = setting(True, "load the plugins that observe; drivers are found in any case", group="plugins")
    plugin_option: tuple[str, ...] = setting(
        (),
        "option of a plugin that observes, as NAME.KEY=VALUE; repeatable",
        group="plugins",
        metavar="NAME.KEY=VALUE",
        split=False,
    )
    strict_plugins: bool = setting(
        False,
        "end with an error if a plugin that observes is broken, or a hook of it raises or takes more than 30 seconds, "
        "instead of leaving it out",
        group="plugins",
    )
    trace_plugins: bool = setting(
        False,
        "log each call of a plugin's hook: its arguments, result and duration, whatever the log level is",
        group="plugins",
    )
    log_level: str = setting(
        "info",
        "debug, info, warning or error",
        group="log",
        metavar="LEVEL",
        check=options.one_of("debug", "info", "warning", "error"),
    )
    log_format: str = setting(
        "text",
        "text for people, json for machines",
        group="log",
        metavar="FORMAT",
        check=options.one_of("text", "json"),
    )
