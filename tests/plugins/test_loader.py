"""Finding and checking drivers and plugins, against installed distributions of every broken kind."""

import importlib.metadata
import logging
import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoints, entry_points
from typing import Any, cast

import pytest

from overlaynet import __version__
from overlaynet.catalogue import catalogue
from overlaynet.errors import PluginError
from overlaynet.hookspecs import hookimpl
from overlaynet.plugins import Plugins
from overlaynet.stores.memory import MemoryStore

Install = Callable[..., None]


GOOD = "from overlaynet.stores.memory import MemoryStore\nclass Good(MemoryStore): pass\n"


def test_a_third_partys_driver_is_found_by_name(install: Install) -> None:
    install("acme", "1.2", "[overlaynet.stores]\nacme = acme_good:Good\n", "acme_good", GOOD)
    assert issubclass(Plugins().driver("store", "acme"), MemoryStore)


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (
            "X",
            "import does_not_exist\n",
            " failed to import: ModuleNotFoundError(\"No module named 'does_not_exist'\"); repair or uninstall acme",
        ),
        (
            "Missing",
            "",
            " failed to import: AttributeError(\"module 'MODULE' has no attribute 'Missing'\"); repair or uninstall acme",
        ),
        (
            "X",
            "X = 5\n",
            " is 5, not a subclass of overlaynet.api.Store; derive it from that, or name another object in the entry point",
        ),
        (
            "X",
            "from overlaynet.api import Backend\nclass X(Backend): pass\n",
            " is <class 'MODULE.X'>, not a subclass of overlaynet.api.Store; derive it from that, "
            "or name another object in the entry point",
        ),
        (
            "X",
            "from overlaynet.api import TableStore\nclass X(TableStore): pass\n",
            " does not implement __str__, make_table; see the contract of overlaynet.api.Store",
        ),
        (
            "X",
            GOOD + "class X(Good): api = (2, 0)\n",
            " is made for version 2.0 of the plugin contract, and this overlaynet has 1.0; upgrade overlaynet",
        ),
        (
            "X",
            GOOD + "class X(Good): api = (1, 99)\n",
            " is made for version 1.99 of the plugin contract, and this overlaynet has 1.0; upgrade overlaynet",
        ),
        (
            "X",
            GOOD + "class X(Good): api = (0, 9)\n",
            " is made for version 0.9 of the plugin contract, and this overlaynet has 1.0; "
            "upgrade the driver's distribution",
        ),
        (
            "X",
            "from overlaynet.api import TableStore\nclass X(TableStore): api = (2, 0)\n",
            " is made for version 2.0 of the plugin contract, and this overlaynet has 1.0; upgrade overlaynet",
        ),
        (
            "X",
            GOOD + "class X(Good): api = '1.0'\n",
            " has api = '1.0'; it must be a pair of whole numbers, such as (1, 0)",
        ),
        (
            "X",
            GOOD + "class X(Good):\n    def renew(self, network, lease): return lease\n",
            ": renew must be a coroutine function; write `async def renew`",
        ),
        (
            "X",
            GOOD + "class X(Good):\n    async def watch(self): return None\n",
            ": watch must not be a coroutine function; write `def watch`",
        ),
        (
            "X",
            GOOD + "class X(Good):\n    class Options: pass\n",
            ": Options is <class 'MODULE.X.Options'>, not an attrs class; decorate it with attrs.frozen",
        ),
        (
            "X",
            GOOD + "import attrs\n@attrs.frozen\nclass O:\n    a: 'Nothing' = 1\nclass X(Good): Options = O\n",
            ": the types of its Options cannot be told: NameError(\"name 'Nothing' is not defined\")",
        ),
        (
            "X",
            GOOD + "import attrs\n@attrs.frozen\nclass O:\n    ports: list[int] = []\nclass X(Good): Options = O\n",
            ": option Ports has the type list[int]; an option has one of int, float, bool, str, tuple[str, ...], "
            "or one of them or None",
        ),
        (
            "X",
            GOOD + "import attrs\n@attrs.frozen\nclass O:\n    port: int = '1'\nclass X(Good): Options = O\n",
            ": the default of option Port must be a whole number, not '1'",
        ),
        (
            "X",
            GOOD + "import attrs\nfrom overlaynet.api import between, option\n@attrs.frozen\nclass O:\n"
            "    port: int = option(0, check=between(1, 9))\nclass X(Good): Options = O\n",
            ": the default of option Port must be between 1 and 9, not 0",
        ),
        (
            "X",
            GOOD + "import attrs\nfrom overlaynet.api import option\n@attrs.frozen\nclass O:\n"
            "    mtu: int = option(1)\n    m_tu: int = option(1, name='MTU')\nclass X(Good): Options = O\n",
            ": option MTU cannot be told from Mtu, as case, - and _ make no difference; rename one",
        ),
    ],
)
def test_a_broken_selected_driver_is_an_error_that_names_everything(
    install: Install, target: str, source: str, message: str
) -> None:
    module = f"acme_broken_{abs(hash((target, source)))}"
    install("acme", "1.2", f"[overlaynet.stores]\nbroken = {module}:{target}\n", module, source)
    with pytest.raises(PluginError) as caught:
        Plugins().driver("store", "broken")
    assert str(caught.value) == (
        f"overlaynet.stores: broken = {module}:{target} (acme 1.2){message.replace('MODULE', module)}"
    )


def test_a_broken_driver_that_is_not_selected_costs_nothing(install: Install) -> None:
    install("acme", "1.2", "[overlaynet.stores]\nbroken = acme_trap:X\n", "acme_trap", "raise SystemExit('imported')\n")
    assert Plugins().driver("store", "memory") is MemoryStore
    assert "acme_trap" not in sys.modules


def test_a_name_claimed_twice_names_both_distributions(install: Install) -> None:
    install("acme", "1.2", "[overlaynet.stores]\nmemory = acme_good:Good\n", "acme_good", GOOD)
    with pytest.raises(PluginError) as caught:
        Plugins().driver("store", "memory")
    message = f"overlaynet.stores: 'memory' is claimed by acme 1.2 and overlaynet {__version__}; uninstall all but one"
    assert str(caught.value) == message
    assert {entry.problem for entry in catalogue() if entry.name == "memory"} == {None, message}


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(PluginError) as caught:
        Plugins().driver("store", "memroy")
    assert str(caught.value) == ("there is no store 'memroy'; did you mean 'memory'? (installed: etcd, file, memory)")
    with pytest.raises(PluginError) as caught:
        Plugins().driver("router", "xyz")
    assert str(caught.value) == "there is no router 'xyz' (installed: memory, netlink)"


def test_the_catalogue_lists_all_with_what_is_broken_and_why(install: Install) -> None:
    install("acme", "1.2", "[overlaynet.backends]\nbroken = acme_gone:X\n[overlaynet.plugins]\nwatcher = acme_gone:Y\n")
    found = {(entry.group, entry.name): entry for entry in catalogue()}
    assert found["overlaynet.stores", "memory"].problem is None
    assert found["overlaynet.backends", "udp"].distribution == "overlaynet"
    for key in (("overlaynet.backends", "broken"), ("overlaynet.plugins", "watcher")):
        assert "(acme 1.2) failed to import: ModuleNotFoundError" in str(found[key].problem)


def test_observers_are_loaded_and_broken_ones_are_reported_and_left_out(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    source = "from overlaynet.api import hookimpl\ncalls = []\n@hookimpl\ndef overlaynet_stopping(): calls.append('stopping')\n"
    install("good", "1.0", "[overlaynet.plugins]\ngood = good_observer\n", "good_observer", source)
    install("bad", "2.0", "[overlaynet.plugins]\nbad = bad_observer\n", "bad_observer", "raise RuntimeError('boom')\n")
    plugins = Plugins()
    plugins.load_observers()
    plugins.notify("overlaynet_stopping")
    import good_observer  # type: ignore[import-not-found]  # noqa: PLC0415 - installed by this test

    assert good_observer.calls == ["stopping"]
    (record,) = caplog.records
    assert record.message == "plugin left out"
    fields = record.fields  # type: ignore[attr-defined]
    assert fields["plugin"] == "overlaynet.plugins: bad = bad_observer (bad 2.0)"
    assert "RuntimeError('boom')" in fields["problem"]


def written(source: str) -> types.ModuleType:
    """A plugin's module with this text."""
    module = types.ModuleType("written")
    exec(f"from overlaynet.api import hookimpl\n{source}", vars(module))  # noqa: S102 - the tests' own text
    return module


WRONG_HOOKS = [
    (
        "@hookimpl\ndef overlaynet_stoping(): pass\n",
        "there is no hook 'overlaynet_stoping'; did you mean 'overlaynet_stopping'?",
    ),
    ("@hookimpl\ndef xyz(): pass\n", "there is no hook 'xyz'"),
    (
        "@hookimpl\ndef overlaynet_ready(leese): pass\n",
        "overlaynet_ready: the hook has no argument 'leese'; did you mean 'lease'? (it has lease)",
    ),
    (
        "@hookimpl\ndef overlaynet_stopping(xyz): pass\n",
        "overlaynet_stopping: the hook has no argument 'xyz' (it has none)",
    ),
    (
        "@hookimpl\ndef overlaynet_ready(lease=None): pass\n",
        "overlaynet_ready: 'lease' has a default, which would hide the hook's argument; remove it",
    ),
    (
        "@hookimpl\ndef overlaynet_ready(**arguments): pass\n",
        "overlaynet_ready: the parameter **arguments cannot be given; name the arguments that it needs",
    ),
    (
        "@hookimpl\nasync def overlaynet_ready(): pass\n",
        "overlaynet_ready is a coroutine function; hooks are plain functions",
    ),
    (
        "@hookimpl(specname='overlaynet_ready')\nasync def on_ready(): pass\n",
        "on_ready is a coroutine function; hooks are plain functions",
    ),
    (
        "@hookimpl\ndef overlaynet_ready(): yield\n",
        "overlaynet_ready is a generator function; hooks are plain functions",
    ),
    (
        "@hookimpl(wrapper=True)\ndef overlaynet_ready(): return (yield)\n",
        "overlaynet_ready is a wrapper; hooks are called one by one, so there is nothing to wrap",
    ),
    (
        "def overlaynet_ready(): pass\n",
        "overlaynet_ready is not marked with overlaynet.api.hookimpl, so it would never be called",
    ),
]


@pytest.mark.parametrize(("source", "problem"), WRONG_HOOKS)
def test_wrong_hooks_are_refused_and_leave_nothing_behind(source: str, problem: str) -> None:
    plugins = Plugins()
    with pytest.raises(PluginError) as caught:
        plugins.register(written(source), name="p")
    assert str(caught.value) == f"plugin p: {problem}"
    plugins.notify("overlaynet_ready", lease=None)
    plugins.register(object(), name="p")


def test_a_class_is_no_plugin_but_its_instance_is() -> None:
    class Watcher:
        @hookimpl
        def overlaynet_stopping(self) -> None: ...

    plugins = Plugins()
    with pytest.raises(PluginError) as caught:
        plugins.register(Watcher)
    message = (
        "plugin Watcher: overlaynet_stopping is a method of the class Watcher; name an instance of it as the plugin"
    )
    assert str(caught.value) == message
    plugins.register(Watcher())


def test_a_plugin_is_registered_once_and_under_a_name_of_its_own() -> None:
    plugins, plugin = Plugins(), written("@hookimpl\ndef overlaynet_stopping(): pass\n")
    plugins.register(plugin, name="a")
    for another, name, message in (
        (plugin, "b", "plugin b: it is registered already, as a; once is enough"),
        (object(), "a", "plugin a: there is a plugin of that name already; give it another"),
    ):
        with pytest.raises(PluginError) as caught:
            plugins.register(another, name=name)
        assert str(caught.value) == message


BROKEN_OBSERVERS = [
    (
        "raise RuntimeError('boom')\n",
        " failed to import: RuntimeError('boom'); repair or uninstall bad",
    ),
    ("x = 1\n", " implements no hook; mark its functions with overlaynet.api.hookimpl"),
    (
        "def overlaynet_ready(): pass\n",
        ": overlaynet_ready is not marked with overlaynet.api.hookimpl, so it would never be called",
    ),
    (
        "from overlaynet.api import hookimpl\n@hookimpl\ndef overlaynet_raedy(): pass\n",
        ": there is no hook 'overlaynet_raedy'; did you mean 'overlaynet_ready'?",
    ),
]


@pytest.mark.parametrize(("source", "message"), BROKEN_OBSERVERS)
def test_a_broken_observer_is_fatal_where_plugins_are_strict(install: Install, source: str, message: str) -> None:
    module = f"bad_observer_{abs(hash(source))}"
    install("bad", "2.0", f"[overlaynet.plugins]\nbad = {module}\n", module, source)
    with pytest.raises(PluginError) as caught:
        Plugins(strict=True).load_observers()
    assert str(caught.value) == f"overlaynet.plugins: bad = {module} (bad 2.0){message}"


def test_two_observers_of_one_name_are_both_left_out(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    source = "from overlaynet.api import hookimpl\ncalls = []\n@hookimpl\ndef overlaynet_stopping(): calls.append(1)\n"
    install("one", "1.0", "[overlaynet.plugins]\nwatcher = one_observer\n", "one_observer", source)
    install("two", "2.0", "[overlaynet.plugins]\nwatcher = two_observer\n", "two_observer", source)
    plugins = Plugins()
    plugins.load_observers()
    plugins.notify("overlaynet_stopping")
    assert "one_observer" not in sys.modules
    assert "two_observer" not in sys.modules
    assert [record.fields["problem"] for record in caplog.records] == [  # type: ignore[attr-defined]
        "overlaynet.plugins: 'watcher' is claimed by one 1.0 and two 2.0; uninstall all but one"
    ] * 2


def test_a_hook_that_raises_is_fatal_where_plugins_are_strict(install: Install) -> None:
    source = "from overlaynet.api import hookimpl\n@hookimpl\ndef overlaynet_stopping(): raise RuntimeError('boom')\n"
    install("bad", "2.0", "[overlaynet.plugins]\nbad = raising_observer\n", "raising_observer", source)
    calls = []

    class Watcher:
        @hookimpl
        def overlaynet_stopping(self) -> None:
            calls.append("stopping")

    plugins = Plugins(strict=True)
    plugins.register(Watcher())
    plugins.load_observers()
    with pytest.raises(PluginError) as caught:
        plugins.notify("overlaynet_stopping")
    assert str(caught.value) == (
        "plugin overlaynet.plugins: bad = raising_observer (bad 2.0) failed in overlaynet_stopping: "
        "RuntimeError('boom'); repair or uninstall it"
    )
    assert calls == ["stopping"]


def test_a_trace_tells_each_call_its_plugin_and_its_result(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger().setLevel(logging.ERROR)
    plugins = Plugins(trace=True)
    plugins.register(written("@hookimpl\ndef overlaynet_driver(name): return None\n"), name="shy")
    plugins.register(written("@hookimpl\ndef overlaynet_degraded(reason): raise RuntimeError(reason)\n"), name="sad")
    assert logging.getLogger("overlaynet.trace").level == logging.NOTSET
    plugins.driver("store", "memory")
    plugins.notify("overlaynet_degraded", reason="x" * 1000)
    plugins.notify("overlaynet_stopping")
    told = [
        {"message": record.message} | record.fields  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "overlaynet.trace"
    ]
    for each in told:
        assert each.pop("milliseconds", 0) >= 0
    assert told == [
        {"message": "hook called", "hook": "overlaynet_driver", "plugin": "shy", "result": "None"}
        | {"argument_axis": "store", "argument_name": "memory"},
        {"message": "hook called", "hook": "overlaynet_driver", "plugin": "entry points"}
        | {"argument_axis": "store", "argument_name": "memory", "result": str(MemoryStore)},
        {"message": "hook failed", "hook": "overlaynet_degraded", "plugin": "sad"}
        | {"argument_reason": "x" * 200 + "…", "error": f"RuntimeError({'x' * 1000!r})"},
        {"message": "hook not implemented", "hook": "overlaynet_stopping"},
    ]


@pytest.mark.parametrize("error", ["SystemExit(3)", "asyncio.CancelledError()"])
def test_what_a_hook_raises_to_end_the_process_or_the_task_disables_its_plugin(
    error: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = f"import asyncio\n@hookimpl\ndef overlaynet_stopping(): raise {error}\n"
    plugins = Plugins()
    plugins.register(written(f"{source}@hookimpl\ndef overlaynet_driver(): raise {error}\n"), name="quitter")
    with pytest.raises(PluginError) as caught:
        plugins.driver("store", "memory")
    assert str(caught.value) == (
        f"plugin quitter failed when asked for the store 'memory': {error.removeprefix('asyncio.')}; "
        "repair or uninstall it, or leave observers out with --no-plugins"
    )
    plugins.notify("overlaynet_stopping")
    assert caplog.messages == ["plugin disabled"]
    assert plugins.driver("store", "memory") is MemoryStore


def test_the_installed_distributions_are_looked_through_once_for_all_plugins(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from overlaynet.api import hookimpl\n@hookimpl\ndef overlaynet_stopping(): pass\n"
    for name in ("one", "two", "three"):
        install(name, "1.0", f"[overlaynet.plugins]\n{name} = {name}_observer\n", f"{name}_observer", source)
    looks = []

    def look(*, group: str) -> EntryPoints:
        looks.append(group)
        return entry_points(group=group)

    monkeypatch.setattr(importlib.metadata, "entry_points", look)
    Plugins(strict=True).load_observers()
    assert looks == ["overlaynet.plugins"]


def test_an_entry_point_in_a_group_that_is_none_of_ours_is_found(install: Install) -> None:
    install("acme", "1.2", "[overlaynet.backend]\nquic = acme_quic:Quic\n[overlayneta.x]\ny = z\n")
    (problem,) = [entry.problem for entry in catalogue() if entry.problem is not None]
    assert problem == (
        "overlaynet.backend: quic = acme_quic:Quic (acme 1.2) is in a group that overlaynet does not look at; "
        "did you mean 'overlaynet.backends'? (it looks at overlaynet.stores, overlaynet.backends, overlaynet.routers, "
        "overlaynet.plugins)"
    )


def test_one_observer_that_raises_does_not_keep_others_from_being_called(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    class Noting:
        def __init__(self, name: str, error: Exception | None = None) -> None:
            self.name, self.error = name, error

        @hookimpl
        def overlaynet_stopping(self) -> None:
            calls.append(self.name)
            if self.error is not None:
                raise self.error

    plugins = Plugins()
    for name, error in (("a", None), ("b", RuntimeError("boom")), ("c", None)):
        plugins.register(Noting(name, error), name=name)
    plugins.notify("overlaynet_stopping")
    plugins.notify("overlaynet_stopping")
    assert sorted(calls) == ["a", "a", "b", "c", "c"]
    assert [record.message for record in caplog.records] == ["plugin disabled"]


@pytest.mark.parametrize(
    ("seconds", "messages", "calls"),
    [(0.9, [], 2), (1.1, ["plugin is slow"] * 2, 2), (29.0, ["plugin is slow"] * 2, 2), (31.0, ["plugin disabled"], 1)],
)
def test_an_observer_that_keeps_others_waiting_is_named_and_one_that_does_so_for_long_is_disabled(
    seconds: float,
    messages: list[str],
    calls: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("overlaynet.plugins.time.monotonic", lambda: now[0])
    called: list[str] = []

    class Slow:
        @hookimpl
        def overlaynet_recovered(self) -> None:
            called.append("slow")
            now[0] += seconds

    class Quick:
        @hookimpl
        def overlaynet_recovered(self) -> None:
            called.append("quick")

    plugins = Plugins()
    plugins.register(Slow(), name="slow one")
    plugins.register(Quick(), name="quick one")
    plugins.notify("overlaynet_recovered")
    plugins.notify("overlaynet_recovered")
    assert (called.count("slow"), called.count("quick")) == (calls, 2)
    assert [record.message for record in caplog.records] == messages
    for record in cast("list[Any]", caplog.records):
        assert (record.fields["plugin"], record.fields["hook"]) == ("slow one", "overlaynet_recovered")
        assert record.fields["seconds"] == seconds
        if record.message == "plugin is slow":
            assert record.fields["hint"] == "everything else waits for it; have it do its work in a thread"
        else:
            assert record.fields["error"] == "everything else waited for it"


def test_an_observer_that_keeps_others_waiting_for_long_is_fatal_where_plugins_are_strict(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("overlaynet.plugins.time.monotonic", lambda: now[0])
    called: list[str] = []
    durations = [29.0, 31.0]

    class Slow:
        @hookimpl
        def overlaynet_recovered(self) -> None:
            called.append("slow")
            now[0] += durations.pop(0)

    class Quick:
        @hookimpl(trylast=True)
        def overlaynet_recovered(self) -> None:
            called.append("quick")

    plugins = Plugins(strict=True)
    plugins.register(Slow(), name="slow one")
    plugins.register(Quick(), name="quick one")
    plugins.notify("overlaynet_recovered")
    with pytest.raises(PluginError) as caught:
        plugins.notify("overlaynet_recovered")
    assert str(caught.value) == (
        "plugin slow one took 31.0 seconds in overlaynet_recovered, and everything else waited for it; "
        "have it do its work in a thread or uninstall it"
    )
    assert called == ["slow", "quick"] * 2
    assert [record.message for record in caplog.records] == ["plugin is slow"]


def test_a_plugin_answers_for_a_driver_that_has_no_entry_point() -> None:
    class Answering:
        @hookimpl
        def overlaynet_driver(self, name: str) -> type[MemoryStore] | None:
            return MemoryStore if name == "mine" else None

    class Raising:
        @hookimpl
        def overlaynet_driver(self, name: str) -> None:
            if name == "raising":
                raise RuntimeError("boom")

    plugins = Plugins()
    plugins.register(Answering(), name="answering")
    plugins.register(Raising(), name="raising")
    assert plugins.driver("store", "mine") is MemoryStore
    with pytest.raises(PluginError) as caught:
        plugins.driver("store", "raising")
    assert str(caught.value) == (
        "plugin raising failed when asked for the store 'raising': RuntimeError('boom'); "
        "repair or uninstall it, or leave observers out with --no-plugins"
    )
    with pytest.raises(PluginError) as caught:
        plugins.driver("router", "mine")
    assert str(caught.value) == (
        f"router 'mine' of plugin answering is {MemoryStore!r}, not a subclass of overlaynet.api.Router; "
        f"derive it from that, or have overlaynet_driver return another class, or None"
    )
