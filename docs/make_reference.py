"""Writes docs/reference.md from the code: settings, options, hooks and contracts cannot drift from what it says.

Run it after a change: ``python docs/make_reference.py``. A test fails while the page differs.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from overlaynet import api, config, drivers, errors, hookspecs, leases, model, options, table, testing
from overlaynet.cli import BUILT_IN
from overlaynet.entry_points import GROUPS as AXES
from overlaynet.plugins import Plugins
from overlaynet.settings import GROUPS, Settings
from overlaynet.testing import flow

PAGE = Path(__file__).with_name("reference.md")
BUILT_IN_DRIVERS = {
    "store": ("memory", "file", "etcd"),
    "backend": ("udp", "vxlan", "host-gw", "alloc", "extension"),
    "router": ("netlink", "memory"),
}

CONTRACTS = (
    drivers.Observer,
    drivers.Driver,
    drivers.Store,
    leases.TableStore,
    drivers.Backend,
    drivers.Router,
    table.Table,
)

HEAD = """\
# Reference

*Made from the code by `docs/make_reference.py`; a test keeps the two equal.*

Contents: [commands](#commands) · [settings](#settings) · [the network document](#the-network-document) ·
[options of the built-in drivers](#options-of-the-built-in-drivers) · [hooks](#hooks) ·
[driver contracts](#driver-contracts) · [what drivers import](#what-drivers-import) · [test suites](#test-suites) ·
[the in-process network](#the-in-process-network) · [files and exit statuses](#files-and-exit-statuses)
"""

NETWORK_DOCUMENT = """\
## The network document

One JSON document in the store, at `<prefix>/config` in etcd, shared by all nodes; flannel's format. Names are matched
without regard to case, and unknown members are ignored, but for those of `Backend`, which the backend checks.

| member | default | meaning |
|---|---|---|
| `Network` | required, unless `EnableIPv4` is false | IPv4 network of the overlay, such as `10.244.0.0/16` |
| `SubnetLen` | 24, or `Network`'s length + 2 if that is longer | prefix length of a node's subnet; at most 30 |
| `SubnetMin`, `SubnetMax` | the second and the last subnet | first and last subnet that are leased |
| `EnableIPv4`, `EnableIPv6` | true, false | which families the overlay has |
| `IPv6Network` | required if `EnableIPv6` | IPv6 network of the overlay, such as `fd00:10:244::/48` |
| `IPv6SubnetLen`, `IPv6SubnetMin`, `IPv6SubnetMax` | 64, the second, the last | the same for IPv6; at most 126 |
| `Backend` | `{"Type": "udp"}` | `Type` names the backend; its other members are the backend's options |
| `LeaseTTL` | 86400 | seconds that a lease lives unless renewed, 5 to ten years; overlaynet's own, flannel ignores it |
"""

FILES = """\
## Files and exit statuses

The subnet file (`--subnet-file`) has flannel's format, so that flannel's CNI plugin and Docker scripts read it unchanged:

    FLANNEL_NETWORK=10.244.0.0/16
    FLANNEL_SUBNET=10.244.1.1/24
    FLANNEL_MTU=1472
    FLANNEL_IPMASQ=false

It is replaced in one step, mode 0644, once the node's device and routes are up.

| exit status | of | meaning |
|---|---|---|
| 0 | `run` | stopped by SIGTERM or SIGINT |
| 1 | all | one sentence on standard error says why; `status`: there is a problem; `plugins`: something is broken |
| 2 | all | settings (flags, environment, file) are wrong, or name a driver that cannot be used: no use to try again |
| 3 | `run` | another process with this node's identity has its lease now: no use to try again, give each its own `--node` |
| 130 | all but `run` | interrupted |
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The page's text."""
    return "\n".join(
        [
            HEAD,
            *commands(),
            *settings(),
            NETWORK_DOCUMENT,
            *driver_options(),
            *hooks(),
            *contracts(),
            *imports(),
            *suites(),
            *in_process_network(),
            FILES,
        ]
    )


def commands() -> Iterator[str]:
    """Each subcommand in a line."""
    yield "## Commands\n"
    yield "`overlaynet COMMAND --help` teaches each one.\n"
    for name, summary in BUILT_IN.items():
        yield f"- `overlaynet {name}`: {summary}"
    yield ""


def settings() -> Iterator[str]:
    """Every setting, by group."""
    yield "## Settings\n"
    yield (
        "Each can be given as a flag, as an environment variable, or as a key of the TOML file that `--config` (or "
        "`OVERLAYNET_CONFIG`) names. Flags win over the environment, the environment over the file, the file over the "
        "defaults; `overlaynet run --print-config` shows the outcome.\n"
    )
    for group, title in GROUPS.items():
        yield f"### {title[0].upper()}{title[1:]}\n"
        yield "| flag | environment variable | default | meaning |"
        yield "|---|---|---|---|"
        for field in attrs.fields(Settings):
            if field.metadata["group"] == group:
                row = (f"`{config.flag_name(field)}`", f"`{config.environment_name(field)}`", _default(field.default))
                yield f"| {' | '.join(row)} | {_cell(field.metadata['help'])} |"
        yield ""


def driver_options() -> Iterator[str]:
    """The options of every built-in driver."""
    plugins = Plugins()
    yield "## Options of the built-in drivers\n"
    yield (
        "A backend's options are members of `Backend` in the network document; a store's and a router's are given with "
        "`--store-option` and `--router-option`, as `KEY=VALUE` (what a setting stands for already needs neither).\n"
    )
    for axis, names in BUILT_IN_DRIVERS.items():
        for name in names:
            described = options.describe(plugins.driver(axis, name).Options)
            yield f"### {axis} `{name}`\n"
            if not described:
                yield "It has none.\n"
                continue
            yield "| option | type | default | meaning |"
            yield "|---|---|---|---|"
            for each in described:
                kind = each.type if each.check is None else f"{each.type}, {each.check}"
                default = "required" if each.required else _default(each.default)
                yield f"| `{each.name}` | {_cell(kind)} | {default} | {_cell(each.help)} |"
            yield ""


def hooks() -> Iterator[str]:
    """Every pluggy hook."""
    yield "## Hooks\n"
    yield f"{inspect.getdoc(hookspecs)}\n"
    for name, function in vars(hookspecs).items():
        if name.startswith("overlaynet_"):
            parameters = ", ".join(inspect.signature(function).parameters)
            yield f"### `{name}({parameters})`\n\n{inspect.getdoc(function)}\n"


def contracts() -> Iterator[str]:
    """What each axis's class asks of a driver, and the table that most stores are made of."""
    yield "## Driver contracts\n"
    yield f"Entry-point groups: {', '.join(f'`{group}` ({axis}s)' for axis, group in AXES.items())}.\n"
    yield f"### `API = {drivers.API}`\n\n{attribute_texts(drivers)['API']}\n"
    for cls in CONTRACTS:
        yield f"### `{cls.__name__}`\n\n{inspect.getdoc(cls)}\n"
        texts = attribute_texts(cls)
        for name, member in contract_members(cls):
            if not inspect.isfunction(member):
                shown = member.__name__ if isinstance(member, type) else member
                yield f"#### `{cls.__name__}.{name} = {shown}`\n\n{texts[name]}\n"
                continue
            kind = "async " if inspect.iscoroutinefunction(member) else ""
            required = "" if getattr(member, "__isabstractmethod__", False) else " (optional)"
            parameters = ", ".join(p for p in inspect.signature(member).parameters if p != "self")
            yield f"#### `{kind}{cls.__name__}.{name}({parameters})`{required}\n\n{inspect.getdoc(member)}\n"


def contract_members(cls: type[Any]) -> Iterator[tuple[str, Any]]:
    """What a driver gives of its own: class attributes and methods, but those that only keep what a base asks for."""
    for name, member in vars(cls).items():
        public = not name.startswith("_") or getattr(member, "__isabstractmethod__", False)
        if public and not isinstance(member, property) and (member.__doc__ or not inspect.isfunction(member)):
            yield name, member


def attribute_texts(owner: Any) -> Mapping[str, str]:
    """The sentences that stand below the attributes of a class or module. From the source: Python keeps none of them."""
    tree = ast.parse(inspect.getsource(owner))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else tree.body
    found = {}
    for statement, following in itertools.pairwise(body):
        target = statement.target if isinstance(statement, ast.AnnAssign) else None
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
        text = following.value if isinstance(following, ast.Expr) else None
        if isinstance(target, ast.Name) and isinstance(text, ast.Constant) and isinstance(text.value, str):
            found[target.id] = inspect.cleandoc(text.value)
    return found


def imports() -> Iterator[str]:
    """The rest of what overlaynet.api offers: values, functions and errors."""
    yield "## What drivers import\n"
    yield (
        "All of it, and the classes above, from `overlaynet.api`. The explanation tells "
        "[what may change in it](explanation.md#what-a-plugin-can-rely-on). Tests import `overlaynet.testing`, too.\n"
    )
    offered = {name: getattr(api, name) for name in api.__all__}
    classes = [each for each in offered.values() if isinstance(each, type) and each not in CONTRACTS]
    yield "### Values\n"
    for module, names in ((model, ("IPAddress", "IPNetwork", "JSON")), (hookspecs, ("hookimpl",))):
        for name in names:
            yield f"- `{name}`: {_one_line(attribute_texts(module)[name])}"
    yield ""
    for cls in classes:
        if not issubclass(cls, Exception):
            yield f"#### `{cls.__name__}`\n\n{inspect.getdoc(cls)}\n"
            yield from _fields(cls)
            yield from _members(cls)
    yield "### Functions\n"
    for name, function in offered.items():
        if inspect.isfunction(function):
            yield f"#### `{name}({', '.join(inspect.signature(function).parameters)})`\n\n{inspect.getdoc(function)}\n"
    yield "### Errors\n"
    for cls in classes:
        if issubclass(cls, Exception):
            base = "" if cls is errors.OverlaynetError else f", a kind of `{cls.__base__.__name__}`"
            yield f"- `{cls.__name__}`{base}: {_sentence(cls)}"
    yield ""


def _fields(cls: type[Any]) -> Iterator[str]:
    if not attrs.has(cls) or not attrs.fields(cls):
        return
    texts = attribute_texts(cls)
    yield "| field | type | default | meaning |"
    yield "|---|---|---|---|"
    for field in attrs.fields(cls):
        default = "required" if field.default is attrs.NOTHING else _field_default(field.default)
        yield f"| `{field.name}` | `{_cell(str(field.type))}` | {default} | {_cell(_one_line(texts.get(field.name, '')))} |"
    yield ""


def _field_default(value: Any) -> str:
    if isinstance(value, attrs.Factory):  # type: ignore[arg-type]
        return "see there" if value.takes_self else f"`{value.factory()!r}`"
    return f"`{value!r}`"


def suites() -> Iterator[str]:
    """Each test suite: what it lets be overridden, what it knows that drivers may lack, and its tests."""
    yield "## Test suites\n"
    yield (
        "How they are used is told in [the how-to](how-to.md#test-a-driver-of-your-own). Every suite has the fixture "
        "`anyio_backend` (by default asyncio with the real clock) and the class attribute `lacks`.\n"
    )
    for suite in (
        testing.StoreConformance,
        testing.TableConformance,
        testing.BackendConformance,
        testing.TunBackendConformance,
        testing.KernelBackendConformance,
        testing.RouterConformance,
        testing.ObserverConformance,
    ):
        yield f"### `{suite.__name__}`\n\n{inspect.getdoc(suite)}\n"
        yield "| fixture | meaning |"
        yield "|---|---|"
        for name, meaning in _fixtures(suite):
            yield f"| `{name}` | {_cell(meaning)} |"
        if "capabilities" in vars(suite):
            yield "\n| capability, for `lacks` | meaning |"
            yield "|---|---|"
            for name, meaning in suite.capabilities.items():
                yield f"| `{name}` | {_cell(meaning)} |"
        if any(name.startswith("test_") for name in vars(suite)):
            laws = [name for cls in suite.__mro__[::-1] for name in vars(cls) if name.startswith("test_")]
            yield f"\nTests: {', '.join(f'`{name}`' for name in laws)}."
        yield ""


def _fixtures(suite: type[Any]) -> Iterator[tuple[str, str]]:
    """The fixtures that a suite itself explains, by name. From its source: pytest wraps them, each version otherwise."""
    tree = ast.parse(inspect.getsource(suite))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("test_"):
            marks = {ast.unparse(mark).partition("(")[0] for mark in node.decorator_list}
            text = ast.get_docstring(node)
            if "pytest.fixture" in marks and text:
                yield node.name, " ".join(text.split())


def in_process_network() -> Iterator[str]:
    """The public classes of the in-process network."""
    yield "## The in-process network\n"
    yield "It is used as [the how-to](how-to.md#whole-daemons-without-root) shows.\n"
    for cls in (testing.Network, testing.Node, flow.Packet, flow.Step, flow.Kind):
        yield f"### `{cls.__name__}`\n\n{inspect.getdoc(cls)}\n"
        yield from _members(cls)


def _members(cls: type[Any]) -> Iterator[str]:
    """The methods and properties of a class, each in a line."""
    members = [(name, member) for name, member in vars(cls).items() if not name.startswith("_")]
    for name, member in members:
        if isinstance(member, property):
            yield f"- `{name}`: {_sentence(member)}"
        elif inspect.isfunction(member):
            parameters = ", ".join(p for p in inspect.signature(member).parameters if p != "self")
            kind = "await " if inspect.iscoroutinefunction(member) else ""
            yield f"- `{kind}{name}({parameters})`: {_sentence(member)}"
    if any(isinstance(member, property) or inspect.isfunction(member) for _, member in members):
        yield ""


def _sentence(member: object) -> str:
    return _one_line(str(inspect.getdoc(member)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _default(value: object) -> str:
    if value in (None, (), ""):
        return "none"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
