"""Finding and checking drivers and plugins, against installed distributions of every broken kind."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from overlaynet.errors import PluginError
from overlaynet.hookspecs import hookimpl
from overlaynet.plugins import Plugins, catalogue
from overlaynet.stores.memory import MemoryStore

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution: its metadata, its entry points and one module, in a directory on ``sys.path``."""

    def install(name: str, version: str, entry_points: str, module: str = "", source: str = "") -> None:
        directory = tmp_path / name
        information = directory / f"{name}-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (information / "entry_points.txt").write_text(entry_points)
        if module:
            (directory / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(directory))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


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
            "failed to import: ModuleNotFoundError(\"No module named 'does_not_exist'\")",
        ),
        ("Missing", "", "failed to import: AttributeError(\"module 'MODULE' has no attribute 'Missing'\")"),
        ("X", "X = 5\n", "is 5, not a subclass of overlaynet.api.Store"),
        (
            "X",
            "from overlaynet.api import Backend\nclass X(Backend): pass\n",
            "is <class 'MODULE.X'>, not a subclass of overlaynet.api.Store",
        ),
        (
            "X",
            "from overlaynet.api import TableStore\nclass X(TableStore): pass\n",
            "does not implement __str__, make_table",
        ),
        (
            "X",
            GOOD + "class X(Good): api = (2, 0)\n",
            "is made for version 2.0 of the plugin contract, and this overlaynet has 1.0",
        ),
        (
            "X",
            GOOD + "class X(Good): api = (1, 99)\n",
            "is made for version 1.99 of the plugin contract, and this overlaynet has 1.0",
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
        f"overlaynet.stores: broken = {module}:{target} (acme 1.2) {message.replace('MODULE', module)}"
    )


def test_a_broken_driver_that_is_not_selected_costs_nothing(install: Install) -> None:
    install("acme", "1.2", "[overlaynet.stores]\nbroken = acme_trap:X\n", "acme_trap", "raise SystemExit('imported')\n")
    assert Plugins().driver("store", "memory") is MemoryStore
    assert "acme_trap" not in sys.modules


def test_a_name_claimed_twice_names_both_distributions(install: Install) -> None:
    install("acme", "1.2", "[overlaynet.stores]\nmemory = acme_good:Good\n", "acme_good", GOOD)
    with pytest.raises(
        PluginError, match=r"overlaynet.stores: 'memory' is claimed by .*acme 1.2.*; uninstall all but one"
    ):
        Plugins().driver("store", "memory")


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(PluginError) as caught:
        Plugins().driver("store", "memroy")
    assert str(caught.value).startswith(
        "there is no store 'memroy'; did you mean 'memory'? (installed: etcd, file, memory"
    )


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
    fields = record.fields  # type: ignore[attr-defined]
    assert fields["plugin"] == "overlaynet.plugins: bad = bad_observer (bad 2.0)"
    assert "RuntimeError('boom')" in fields["problem"]


class MisspeltHook:
    @hookimpl
    def overlaynet_stoping(self) -> None: ...


class UnknownArgument:
    @hookimpl
    def overlaynet_ready(self, leese: object) -> None: ...


class Coroutine:
    @hookimpl
    async def overlaynet_ready(self) -> None: ...


class Wrapper:
    @hookimpl(wrapper=True)
    def overlaynet_ready(self) -> object:
        return (yield)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (MisspeltHook(), "plugin p: unknown hook 'overlaynet_stoping' in plugin"),
        (UnknownArgument(), "plugin p: Plugin 'p' for hook 'overlaynet_ready'"),
        (Coroutine(), "plugin p: overlaynet_ready is a coroutine function; hooks are plain functions"),
        (
            Wrapper(),
            "plugin p: overlaynet_ready is a wrapper; hooks are called one by one, so there is nothing to wrap",
        ),
    ],
)
def test_wrong_hooks_are_refused_and_leave_nothing_behind(plugin: object, message: str) -> None:
    plugins = Plugins()
    with pytest.raises(PluginError) as caught:
        plugins.register(plugin, name="p")
    assert str(caught.value).startswith(message)
    plugins.notify("overlaynet_ready", lease=None)
    plugins.register(object(), name="p")


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


def test_a_plugin_answers_for_a_driver_that_has_no_entry_point() -> None:
    class Answering:
        @hookimpl
        def overlaynet_driver(self, axis: str, name: str) -> type[MemoryStore] | None:
            return MemoryStore if (axis, name) == ("store", "mine") else None

    class Raising:
        @hookimpl
        def overlaynet_driver(self, name: str) -> None:
            if name == "raising":
                raise RuntimeError("boom")

    plugins = Plugins()
    plugins.register(Answering(), name="answering")
    plugins.register(Raising(), name="raising")
    assert plugins.driver("store", "mine") is MemoryStore
    with pytest.raises(
        PluginError,
        match="plugin answering is <class .*MemoryStore'>, not a subclass of overlaynet.api.Router|no router",
    ):
        plugins.driver("router", "mine")
    with pytest.raises(PluginError, match="plugin raising failed when asked for the store 'raising': RuntimeError"):
        plugins.driver("store", "raising")
