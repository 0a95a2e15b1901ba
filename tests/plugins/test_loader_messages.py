"""The exact text of what the loader says of rarer faults; those that are met every day are in test_loader."""

import ast
import inspect
import re
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from overlaynet import catalogue as catalogue_module
from overlaynet import checks as checks_module
from overlaynet import commands as commands_module
from overlaynet import entry_points as entry_points_module
from overlaynet import hooks as hooks_module
from overlaynet import options as options_module
from overlaynet import plugins as plugins_module
from overlaynet.backends.alloc import AllocBackend
from overlaynet.catalogue import catalogue, details
from overlaynet.cli import main
from overlaynet.commands import Command, Commands
from overlaynet.drivers import API
from overlaynet.entry_points import GROUPS, OBSERVERS, entries
from overlaynet.errors import PluginError
from overlaynet.hookspecs import hookimpl
from overlaynet.plugins import Plugins, load_driver

Install = Callable[..., None]

OPTIONS = """\
import attrs
from overlaynet.api import one_of, option
from overlaynet.stores.memory import MemoryStore
@attrs.frozen
class O:
    key: FIELD
class X(MemoryStore):
    Options = O
"""


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("int = option('hunter2', secret=True)", "the default of option Key must be a whole number"),
        (
            "str = option('hunter2', secret=True, check=lambda key: f'is {key}')",
            "the default of option Key is refused by its check",
        ),
        (
            "str = option('hunter2', secret=True, check=one_of('a', 'b'))",
            "the default of option Key must be one of a, b",
        ),
        (
            "str = option('hunter2', secret=True, check=lambda key: int(key))",
            "the default of option Key cannot be checked: ValueError",
        ),
        (
            "str = attrs.field(init=False, default='x')",
            "option Key is declared with init=False, so it could never be given; remove that",
        ),
        ("int = attrs.field(factory=lambda: 'x')", "the default of option Key must be a whole number, not 'x'"),
        ("tuple[str, ...] = (1,)", "the default of option Key must be a list of strings, not (1,)"),
        ("float = '1'", "the default of option Key must be a number, not '1'"),
        ("bool = 1", "the default of option Key must be true or false, not 1"),
        ("str = 1", "the default of option Key must be a string, not 1"),
        (
            "int = attrs.field(factory=lambda: 1 // 0)",
            "the default of option Key cannot be made: ZeroDivisionError('integer division or modulo by zero')",
        ),
        (
            "int = option(1, check=lambda key: 1 // 0)",
            "the default of option Key cannot be checked: ZeroDivisionError('integer division or modulo by zero')",
        ),
        (
            "int = option(1, check=lambda key: key == 1)",
            "the default of option Key cannot be checked: its check returns a value of type bool, "
            "not what is wrong as a string, or None",
        ),
        (
            "bytes",
            "option Key has the type <class 'bytes'>; an option has one of int, float, bool, str, tuple[str, ...], "
            "or one of them or None",
        ),
        (
            "int | str | None = None",
            "option Key has the type int | str | None; an option has one of int, float, bool, str, tuple[str, ...], "
            "or one of them or None",
        ),
    ],
)
def test_options_that_cannot_be(install: Install, field: str, message: str) -> None:
    module = f"acme_options_{abs(hash(field))}"
    install("acme", "1.2", f"[overlaynet.stores]\nx = {module}:X\n", module, OPTIONS.replace("FIELD", field))
    with pytest.raises(PluginError) as caught:
        Plugins().driver("store", "x")
    assert str(caught.value) == f"overlaynet.stores: x = {module}:X (acme 1.2): {message}"


@pytest.mark.parametrize("api", ["(1,)", "(1, 0, 0)", "(True, 0)", "[1, 0]", "None", "(1, '0')"])
def test_a_version_that_is_no_pair_of_numbers(install: Install, api: str) -> None:
    module = f"acme_version_{abs(hash(api))}"
    source = f"from overlaynet.stores.memory import MemoryStore\nclass X(MemoryStore): api = {api}\n"
    install("acme", "1.2", f"[overlaynet.stores]\nx = {module}:X\n", module, source)
    with pytest.raises(PluginError) as caught:
        Plugins().driver("store", "x")
    assert str(caught.value) == (
        f"overlaynet.stores: x = {module}:X (acme 1.2) has api = {api}; it must be a pair of whole numbers, such as (1, 0)"
    )


def test_the_explanation_quotes_what_is_said_of_a_version_that_does_not_fit(install: Install) -> None:
    page = (Path(__file__).parents[2] / "docs" / "explanation.md").read_text()
    source = "from overlaynet.backends.alloc import AllocBackend\nclass Quic(AllocBackend): api = (2, 0)\n"
    install("acme", "1.2", "[overlaynet.backends]\nquic = acme_quic:Quic\n", "acme_quic", source)
    with pytest.raises(PluginError) as caught:
        Plugins().driver("backend", "quic")
    assert f"\n    {caught.value}\n" in page
    assert f"is now {API[0]}.{API[1]}" in " ".join(page.split())


CAPITALS = (
    "could never be run, as a backend's name in the network document is read in small letters; rename it to 'quic'"
)


def test_a_backend_whose_name_has_capitals_is_refused(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    source = "from overlaynet.backends.alloc import AllocBackend\nclass Quic(AllocBackend): pass\n"
    install("acme", "1.2", "[overlaynet.backends]\nQUIC = acme_quic:Quic\n", "acme_quic", source)
    message = f"overlaynet.backends: QUIC = acme_quic:Quic (acme 1.2) {CAPITALS}"
    with pytest.raises(PluginError) as caught:
        Plugins().driver("backend", "QUIC")
    assert str(caught.value) == message
    assert main(["plugins", "doctor"]) == 1
    assert f"\n{message}\n" in capsys.readouterr().out
    arguments = ["--store", "memory", "--network", "10.244.0.0/16", "--backend", "QUIC"]
    assert main(["network", "set", *arguments]) == 2
    assert capsys.readouterr().err == f"overlaynet: {message}\n"


def test_a_backend_that_a_plugin_answers_for_under_a_name_with_capitals_is_refused() -> None:
    class Answering:
        @hookimpl
        def overlaynet_driver(self, axis: str, name: str) -> type[AllocBackend] | None:
            return AllocBackend if name.lower() == "quic" else None

    plugins = Plugins()
    plugins.register(Answering(), name="answering")
    assert plugins.driver("backend", "quic") is AllocBackend
    with pytest.raises(PluginError) as caught:
        plugins.driver("backend", "Quic")
    assert str(caught.value) == f"backend 'Quic' of plugin answering {CAPITALS}"


@pytest.mark.parametrize("option", ["type: str = option('x', 'h')", "kind: str = option('x', 'h', name='TYPE')"])
def test_an_option_of_a_backend_that_the_document_has_no_place_for(install: Install, option: str) -> None:
    module = f"acme_type_{abs(hash(option))}"
    source = f"import attrs\nfrom overlaynet.api import option\n@attrs.frozen\nclass O:\n    {option}\n"
    backend = "from overlaynet.backends.alloc import AllocBackend\nclass X(AllocBackend): Options = O\n"
    store = "from overlaynet.stores.memory import MemoryStore\nclass Y(MemoryStore): Options = O\n"
    groups = f"[overlaynet.backends]\nx = {module}:X\n[overlaynet.stores]\nx = {module}:Y\n"
    install("acme", "1.2", groups, module, source + backend + store)
    Plugins().driver("store", "x")
    with pytest.raises(PluginError) as caught:
        Plugins().driver("backend", "x")
    assert str(caught.value) == (
        f"overlaynet.backends: x = {module}:X (acme 1.2): option Type could never be given, "
        "as Type in the network document names the backend; rename it"
    )


@pytest.mark.parametrize("axis", ["backend", "router"])
def test_each_axis_names_its_own_contract(install: Install, axis: str) -> None:
    base = axis.capitalize()
    missing = {"backend": "open, routes, set_peers, start", "router": "apply"}[axis]
    source = f"from overlaynet.api import {base}\nclass X({base}): pass\n"
    install("acme", "1.2", f"[overlaynet.{axis}s]\nx = acme_{axis}:X\n", f"acme_{axis}", source)
    with pytest.raises(PluginError) as caught:
        Plugins().driver(axis, "x")
    assert str(caught.value) == (
        f"overlaynet.{axis}s: x = acme_{axis}:X (acme 1.2) does not implement {missing}; "
        f"see the contract of overlaynet.api.{base}"
    )


def test_a_module_that_ends_the_process_is_broken_as_others_are(install: Install) -> None:
    source = "import sys\nsys.exit('this needs a licence')\n"
    install("acme", "1.2", "[overlaynet.stores]\nx = acme_exits:X\n", "acme_exits", source)
    with pytest.raises(PluginError) as caught:
        Plugins().driver("store", "x")
    assert str(caught.value) == (
        "overlaynet.stores: x = acme_exits:X (acme 1.2) failed to import: SystemExit('this needs a licence'); "
        "repair or uninstall acme"
    )


def test_an_entry_point_that_no_distribution_owns_is_named_as_far_as_it_goes() -> None:
    with pytest.raises(PluginError) as caught:
        load_driver("store", EntryPoint("x", "acme_gone:X", "overlaynet.stores"), ())
    assert str(caught.value) == (
        "overlaynet.stores: x = acme_gone:X (unknown distribution) failed to import: "
        "ModuleNotFoundError(\"No module named 'acme_gone'\"); repair or uninstall unknown distribution"
    )


def test_a_group_unlike_any_of_ours_gets_no_hint(install: Install) -> None:
    install("acme", "1.2", "[overlaynet.zzz]\nx = acme_gone:X\n")
    (problem,) = [entry.problem for entry in catalogue() if entry.problem is not None]
    assert problem == (
        "overlaynet.zzz: x = acme_gone:X (acme 1.2) is in a group that overlaynet does not look at "
        "(it looks at overlaynet.stores, overlaynet.backends, overlaynet.routers, overlaynet.plugins)"
    )


@pytest.mark.parametrize(("name", "hint"), [("memroy", "; did you mean 'memory'?"), ("xyz", "")])
def test_a_name_that_nothing_has_is_answered_with_all_there_are(name: str, hint: str) -> None:
    installed = sorted({entry.name for group in (*GROUPS.values(), OBSERVERS) for entry in entries(group)})
    with pytest.raises(PluginError) as caught:
        details(name)
    assert str(caught.value) == f"there is no driver or plugin {name!r}{hint} (installed: {', '.join(installed)})"


def written(source: str) -> types.ModuleType:
    """A plugin's module with this text."""
    module = types.ModuleType("written")
    exec(f"from overlaynet.api import hookimpl\n{source}", vars(module))  # noqa: S102 - the tests' own text
    return module


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            "@hookimpl(hookwrapper=True)\ndef overlaynet_ready(): yield\n",
            "overlaynet_ready is a wrapper; hooks are called one by one, so there is nothing to wrap",
        ),
        (
            "@hookimpl\nasync def overlaynet_ready(): yield\n",
            "overlaynet_ready is a generator function; hooks are plain functions",
        ),
        (
            "@hookimpl\ndef overlaynet_ready(*arguments): pass\n",
            "overlaynet_ready: the parameter *arguments cannot be given; name the arguments that it needs",
        ),
        (
            "@hookimpl\ndef overlaynet_ready(*, lease): pass\n",
            "overlaynet_ready: the parameter lease cannot be given; name the arguments that it needs",
        ),
        (
            "@hookimpl\ndef overlaynet_peer_changed(xyz): pass\n",
            "overlaynet_peer_changed: the hook has no argument 'xyz' (it has old, new)",
        ),
        (
            "@hookimpl(specname='overlaynet_raedy')\ndef on_ready(): pass\n",
            "there is no hook 'overlaynet_raedy'; did you mean 'overlaynet_ready'?",
        ),
        (
            "import functools\noverlaynet_ready = hookimpl(functools.partial(print))\n",
            "overlaynet_ready is marked with overlaynet.api.hookimpl, but is no function (partial), "
            "so it would never be called; write one that calls it",
        ),
    ],
)
def test_hooks_that_cannot_be(source: str, problem: str) -> None:
    with pytest.raises(PluginError) as caught:
        Plugins().register(written(source), name="p")
    assert str(caught.value) == f"plugin p: {problem}"


def test_a_plugin_without_a_name_is_called_by_its_class() -> None:
    class Watcher:
        @hookimpl
        def overlaynet_raedy(self) -> None: ...

    with pytest.raises(PluginError) as caught:
        Plugins().register(Watcher())
    assert str(caught.value) == "plugin Watcher: there is no hook 'overlaynet_raedy'; did you mean 'overlaynet_ready'?"


def test_what_a_plugin_gives_for_a_driver_is_checked_as_an_entry_point_is() -> None:
    class Answering:
        @hookimpl
        def overlaynet_driver(self) -> object:
            return type("Newer", (), {})

    plugins = Plugins()
    plugins.register(Answering(), name="answering")
    with pytest.raises(PluginError) as caught:
        plugins.driver("backend", "x")
    assert str(caught.value) == (
        f"backend 'x' of plugin answering is <class '{__name__}.Newer'>, not a subclass of "
        "overlaynet.api.Backend; derive it from that, or have overlaynet_driver return another class, or None"
    )


def test_a_command_that_is_taken_names_by_whom() -> None:
    def run(arguments: object) -> int:
        return 0

    commands = Commands(reserved={"run"})
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its text is what is tested
        commands.add(Command("run", "run", lambda parser: None, run))
    assert str(caught.value) == "overlaynet has a command 'run' of its own; choose another name"
    commands.add(Command("hello", "say hello", lambda parser: None, run))
    for module, origin in ((run.__module__, f"the module {run.__module__}"), (None, "the module unknown")):
        run.__module__ = module  # type: ignore[assignment]
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            commands.add(Command("hello", "say hello, too", lambda parser: None, run))
        assert str(caught.value) == f"{origin} has added a command 'hello' already; choose another name"


ANYTHING = "\0"
"""Stands for a value in a text."""


def texts(tree: ast.AST) -> Iterator[str]:
    """The texts in a module's code, but for its docstrings; in the place of each value of an f-string, :data:`ANYTHING`."""
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and id(node) not in left_out:
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else ANYTHING for part in node.values)
            left_out |= {id(part) for part in node.values}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.value


MODULES = (
    catalogue_module,
    checks_module,
    commands_module,
    entry_points_module,
    hooks_module,
    options_module,
    plugins_module,
)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_no_message_of_the_loader_is_without_a_test_of_its_text(module: types.ModuleType) -> None:
    here = Path(__file__).parent
    files = [*here.glob("test_*.py"), here.parent / "unit" / "test_options.py"]
    tested = [text for file in files for text in texts(ast.parse(file.read_text(encoding="utf-8")))]
    for text in texts(ast.parse(inspect.getsource(module))):
        if len(text.replace(ANYTHING, "").split()) > 2:
            whole = re.compile(".*".join(map(re.escape, text.strip(f"{ANYTHING}: ").split(ANYTHING))), re.DOTALL)
            assert any(map(whole.search, tested)), (
                f"no single text of a test has all of {text.replace(ANYTHING, '…')!r}"
            )
