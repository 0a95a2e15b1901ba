"""Writes docs/reference.md from the code: settings, options, hooks and contracts cannot drift from what it says.

Run it after a change: ``python docs/make_reference.py``. A test fails while the page differs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from overlaynet import api, config, drivers, errors, hookspecs, leases, model, options, table, testing
from overlaynet.cli import BUILT_IN
from overlaynet.entry_points import GROUPS as AXES
from overlaynet.plugins import Plugins
from overlaynet.settings import GROUPS, Settings
from overlaynet.testing import capture, daemons, etcd, fixtures, flow, lab

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
[the in-process network](#the-in-process-network) · [the lab](#the-lab) · [files and exit statuses](#files-and-exit-statuses)
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

Where `LeaseTTL` is less than 45, a member of etcd is given two ninths of it for an answer, but no less than a second, instead
of 10 seconds: so a member that hangs costs no node its lease.
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


class Undocumented(LookupError):
    """Something that is public has no sentence that says what it is."""


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
            *the_lab(),
            FILES,
        ]
    )


def commands() -> Iterator[str]:
    """Each subcommand, with what only it can be told."""
    yield "## Commands\n"
    yield (
        "What stands in the section on [settings](#settings) can be told to these commands as it says there; below are the "
        "arguments that are theirs alone. `overlaynet COMMAND --help` lists both.\n"
    )
    for name, summary in BUILT_IN.items():
        parser = argparse.ArgumentParser(prog=f"overlaynet {name}")
        importlib.import_module(f"overlaynet.cli.{name}").COMMAND.configure(parser)
        yield from command(parser, summary)


def command(parser: argparse.ArgumentParser, summary: str) -> Iterator[str]:
    """One command, and its actions, from its parser."""
    yield f"### `{parser.prog}`\n"
    yield f"{summary[0].upper()}{summary[1:]}.\n"
    titles = [group.title for group in parser._action_groups if group.title in GROUPS.values()]
    settings = {
        each.dest for group in parser._action_groups if group.title in titles for each in group._group_actions
    } | {"config" if titles else ""}
    rows, actions = [], []
    for argument in parser._actions:
        if isinstance(argument, argparse._SubParsersAction):
            told = {each.dest: each.help for each in argument._choices_actions}
            actions = [(action, told.get(name)) for name, action in argument.choices.items()]
        elif argument.dest != "help" and not (argument.dest in settings and argument.default == argparse.SUPPRESS):
            rows.append(f"| `{_written(argument)}` | {_cell(_meaning(parser, argument))} |")
    if rows:
        yield from ("| argument | meaning |", "|---|---|", *rows, "")
    if titles:
        yield f"Settings: {', '.join(f'[{title}](#{_anchor(title)})' for title in titles)}.\n"
    for action, text in actions:
        yield from command(action, documented(text, action.prog))


def _written(argument: argparse.Action) -> str:
    value = argument.metavar or (f"{{{','.join(map(str, argument.choices))}}}" if argument.choices else argument.dest)
    if not argument.option_strings:
        return str(value)
    shown = ", ".join(argument.option_strings)
    return shown if argument.nargs == 0 else f"{shown} {value}"


def _meaning(parser: argparse.ArgumentParser, argument: argparse.Action) -> str:
    text = documented(argument.help or "", f"{_written(argument)} of {parser.prog}") % {"default": argument.default}
    return f"{text}; required" if argument.required and argument.option_strings else text


def _anchor(heading: str | None) -> str:
    kept = "".join(letter for letter in heading or "" if letter.isalnum() or letter in "-_ ")
    return kept.lower().replace(" ", "-")


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
                notes = (
                    each.check,
                    "secret" if each.secret else None,
                    "each node may have its own" if each.node else None,
                )
                kind = ", ".join((each.type, *(note for note in notes if note is not None)))
                default = "required" if each.required else _default(each.default)
                yield f"| `{each.name}` | {_cell(kind)} | {default} | {_cell(documented(each.help, each.name))} |"
            yield ""


def hooks() -> Iterator[str]:
    """Every pluggy hook."""
    yield "## Hooks\n"
    yield f"{inspect.getdoc(hookspecs)}\n"
    for name, function in vars(hookspecs).items():
        if name.startswith("overlaynet_"):
            yield f"### `{name}{signature(function)}`\n\n{text_of(function, name)}\n"


def contracts() -> Iterator[str]:
    """What each axis's class asks of a driver, and the table that most stores are made of."""
    yield "## Driver contracts\n"
    yield f"Entry-point groups: {', '.join(f'`{group}` ({axis}s)' for axis, group in AXES.items())}.\n"
    yield f"### `API = {drivers.API}`\n\n{attribute_texts(drivers)['API']}\n"
    for cls in CONTRACTS:
        yield from contract_texts(cls)


def contract_texts(cls: type[Any]) -> Iterator[str]:
    """One class of contracts, with all that a driver gives and gets by it."""
    yield f"### `{cls.__name__}`\n\n{text_of(cls, cls.__name__)}\n"
    texts = attribute_texts(cls)
    for name, text in instance_attributes(cls):
        yield f"#### `{cls.__name__}.{name}`\n\n{text}\n"
    for name, member in contract_members(cls):
        whole = f"{cls.__name__}.{name}"
        if not inspect.isfunction(member):
            shown = member.__name__ if isinstance(member, type) else member
            yield f"#### `{whole} = {shown}`\n\n{documented(texts.get(name, ''), whole)}\n"
            continue
        kind = "async " if inspect.iscoroutinefunction(member) else ""
        required = "" if getattr(member, "__isabstractmethod__", False) else " (optional)"
        yield f"#### `{kind}{whole}{signature(member)}`{required}\n\n{text_of(member, whole)}\n"


def contract_members(cls: type[Any]) -> Iterator[tuple[str, Any]]:
    """What a driver gives of its own: class attributes and methods, but those that only keep what a base asks for."""
    for name, member in vars(cls).items():
        public = not name.startswith("_") or getattr(member, "__isabstractmethod__", False)
        if public and not isinstance(member, property) and not keeps(cls, name):
            yield name, member


def keeps(cls: type[Any], name: str) -> bool:
    """Whether a method has no text of its own because it does what a base says."""
    member = vars(cls)[name]
    return inspect.isfunction(member) and not member.__doc__ and any(hasattr(base, name) for base in cls.__mro__[1:])


def documented(text: str | None, what: str) -> str:
    """The text. :raises Undocumented: if there is none."""
    if not text:
        raise Undocumented(f"{what} is public, and nothing says what it is; write its docstring, or its help")
    return text


def text_of(thing: object, what: str) -> str:
    """The docstring of a class, method or function; its own, not one that it inherits. :raises Undocumented: without one."""
    return inspect.cleandoc(documented(thing.__doc__, what))


class _Plain:
    """An annotation that is shown as it is written in the source."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def signature(function: Callable[..., object]) -> str:
    """The parameters, but for ``self``, and the result, with types and defaults."""
    found = inspect.signature(function)

    def plain(annotation: object) -> object:
        return _Plain(annotation) if isinstance(annotation, str) else annotation

    parameters = [
        each.replace(annotation=plain(each.annotation)) for each in found.parameters.values() if each.name != "self"
    ]
    return str(found.replace(parameters=parameters, return_annotation=plain(found.return_annotation)))


def instance_attributes(cls: type[Any]) -> Iterator[tuple[str, str]]:
    """The public attributes that the constructor of a class sets, each with the sentence below it."""
    if "__init__" not in vars(cls) or attrs.has(cls):
        return
    (constructor,) = ast.parse(textwrap.dedent(inspect.getsource(vars(cls)["__init__"]))).body
    bodies = [node.body for node in ast.walk(constructor) if isinstance(node, (ast.FunctionDef, ast.With, ast.If))]
    texts = {name: text for body in bodies for name, text in _texts_below(body, "self").items()}
    for statement in ast.walk(constructor):
        for target in _targets(statement):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self" and target.attr[0] != "_":
                given = "as given" if f":param {target.attr}:" in str(cls.__doc__) else None
                yield target.attr, documented(texts.get(target.attr, given), f"{cls.__name__}.{target.attr}")


def attribute_texts(owner: Any) -> Mapping[str, str]:
    """The sentences that stand below the attributes of a class or module. From the source: Python keeps none of them."""
    tree = ast.parse(inspect.getsource(owner))
    return _texts_below(tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else tree.body)


def _texts_below(body: list[ast.stmt], owner: str | None = None) -> Mapping[str, str]:
    """The sentence below each assignment to a name, or to an attribute of the owner."""
    found = {}
    for statement, following in itertools.pairwise(body):
        text = following.value if isinstance(following, ast.Expr) else None
        if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
            continue
        for target in _targets(statement):
            if owner is None and isinstance(target, ast.Name):
                found[target.id] = inspect.cleandoc(text.value)
            elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == owner:
                found[target.attr] = inspect.cleandoc(text.value)
    return found


def _targets(statement: ast.AST) -> list[ast.expr]:
    """What a statement assigns to."""
    if isinstance(statement, ast.AnnAssign):
        return [statement.target]
    assigned = statement.targets if isinstance(statement, ast.Assign) else []
    return [part for target in assigned for part in (target.elts if isinstance(target, ast.Tuple) else [target])]


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
            yield from described("####", cls)
    yield "### Functions\n"
    for name, function in offered.items():
        if inspect.isfunction(function):
            yield f"#### `{name}{signature(function)}`\n\n{text_of(function, name)}\n"
    yield "### Errors\n"
    for cls in classes:
        if issubclass(cls, Exception):
            base = "" if cls is errors.OverlaynetError else f", a kind of `{cls.__base__.__name__}`"
            yield f"- `{cls.__name__}`{base}: {_one_line(text_of(cls, cls.__name__))}"
            yield from (f"  - `{name}`: {_one_line(text)}" for name, text in instance_attributes(cls))
    yield ""


def described(level: str, cls: type[Any]) -> Iterator[str]:
    """A class: what it is, how one is made, its fields or attributes, its properties and methods."""
    made = signature(vars(cls)["__init__"]) if "__init__" in vars(cls) and not attrs.has(cls) else ""
    yield f"{level} `{cls.__name__}{made.removesuffix(' -> None')}`\n\n{text_of(cls, cls.__name__)}\n"
    yield from _fields(cls)
    yield from _members(cls)


def _fields(cls: type[Any]) -> Iterator[str]:
    if not attrs.has(cls) or not attrs.fields(cls):
        return
    texts = attribute_texts(cls)
    yield "| field | type | default | meaning |"
    yield "|---|---|---|---|"
    for field in attrs.fields(cls):
        if field.name.startswith("_"):
            continue
        default = "required" if field.default is attrs.NOTHING else _field_default(field.default)
        text = _one_line(documented(texts.get(field.name), f"{cls.__name__}.{field.name}"))
        yield f"| `{field.name}` | `{_cell(str(field.type))}` | {default} | {_cell(text)} |"
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
        yield f"### `{suite.__name__}`\n\n{text_of(suite, suite.__name__)}\n"
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


def _fixtures(suite: Any) -> Iterator[tuple[str, str]]:
    """The fixtures that a suite, or a module, explains itself, by name.

    From its source: pytest wraps them, each version otherwise.
    """
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
        yield from described("###", cls)


def the_lab() -> Iterator[str]:
    """What stands for hosts, containers and servers in tests: real ones in namespaces, and pretended ones."""
    yield "## The lab\n"
    yield (
        "Hosts, containers and links as network namespaces, for tests with root; a private etcd; and pretended devices, for "
        "tests without. They are used as [the how-to](how-to.md#real-hosts-with-root) shows. What has no module named here is "
        "imported from `overlaynet.testing`, and ends with its `with` block.\n"
    )
    for cls in (
        testing.Lab,
        lab.Host,
        lab.Container,
        testing.NetworkNamespace,
        testing.Capture,
        capture.Packet,
        daemons.DaemonProcess,
        testing.EtcdServer,
        testing.HostPair,
        testing.PretendedHosts,
    ):
        yield from described("###", cls)
        if cls.__name__ not in testing.__all__:
            yield f"In `{cls.__module__}`.\n"
    yield f"### `make_certificates{signature(testing.make_certificates)}`\n"
    yield f"{text_of(testing.make_certificates, 'make_certificates')}\n"
    yield from _fields(etcd.Certificates)
    yield "### Fixtures\n"
    yield 'For those who ask for them: `pytest_plugins = ["overlaynet.testing.fixtures"]` in the outermost `conftest.py`.\n'
    yield "| fixture | meaning |"
    yield "|---|---|"
    for name, meaning in _fixtures(fixtures):
        yield f"| `{name}` | {_cell(meaning)} |"
    yield ""


def _members(cls: type[Any]) -> Iterator[str]:
    """The attributes, properties and methods of a class, each in a line."""
    lines = [f"- `{name}`: {_one_line(text)}" for name, text in instance_attributes(cls)]
    for name, member in vars(cls).items():
        whole = f"{cls.__name__}.{name}"
        if name.startswith("_") or keeps(cls, name):
            continue
        if isinstance(member, property):
            lines.append(f"- `{name}`: {_one_line(text_of(member, whole))}")
        elif isinstance(member, (staticmethod, classmethod)) or inspect.isfunction(member):
            function = getattr(member, "__func__", member)
            kind = "await " if inspect.iscoroutinefunction(function) else ""
            lines.append(f"- `{kind}{name}{signature(function)}`: {_one_line(text_of(function, whole))}")
    if lines:
        yield from (*lines, "")


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
