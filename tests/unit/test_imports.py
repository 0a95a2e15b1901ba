"""Imports point downward: cli → daemon → reconcile, drivers → api. Read from the sources, so imports on demand count, too."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import overlaynet

PACKAGE = Path(overlaynet.__file__).parent
ABOVE_THE_API = (
    r"overlaynet\.(__main__|cli|catalogue|config|daemon|demo|joining|lease_keeping|node|plugins|settings|testing)\b"
)
DRIVERS = r"overlaynet\.(backends|routers|stores)\."


def modules() -> Mapping[str, Path]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "templates":
            found[".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(module: str) -> set[str]:
    """The modules of overlaynet that a module imports."""
    named = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            named |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return named & MODULES.keys() - {"overlaynet"}


def reached(module: str) -> set[str]:
    """The module, and all that it imports, and all that those import."""
    found, left = set(), {module}
    while left:
        found |= left
        left = {other for each in left for other in imports(each)} - found
    return found


def driver(module: str) -> str:
    """The driver that a module belongs to: ``overlaynet.stores.etcd`` for ``overlaynet.stores._etcd_watch``."""
    axis, name = module.split(".")[1:3]
    return f"overlaynet.{axis}.{name.lstrip('_').split('_')[0]}"


def test_what_plugins_import_brings_in_neither_the_commands_nor_the_daemon_nor_a_driver() -> None:
    for module in reached("overlaynet.api"):
        assert not re.match(f"{ABOVE_THE_API}|{DRIVERS}", module), module


@pytest.mark.parametrize("module", sorted(name for name in MODULES if re.match(DRIVERS, name)))
def test_a_driver_imports_neither_another_driver_nor_what_uses_drivers(module: str) -> None:
    for other in reached(module):
        assert not re.match(ABOVE_THE_API, other), other
        # Two backends that run commands would share this; it is a driver of nobody's.
        if re.match(DRIVERS, other) and other != "overlaynet.backends._command":
            assert driver(other) == driver(module), other


def test_only_the_commands_and_the_kit_know_the_daemon_and_only_they_know_the_commands() -> None:
    for module in MODULES:
        for other in imports(module):
            if re.match(r"overlaynet\.(cli|daemon)\b", other):
                assert re.match(r"overlaynet\.(__main__|cli|testing)\b", module), f"{module} imports {other}"


def packages_of(module: str) -> set[str]:
    """The distributions, but for overlaynet, of what a module imports when it runs, in whichever function."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    named = set()
    for node in ast.walk(tree):
        if id(node) not in for_types and isinstance(node, ast.Import):
            named |= {alias.name.partition(".")[0] for alias in node.names}
        elif id(node) not in for_types and isinstance(node, ast.ImportFrom):
            named.add(str(node.module).partition(".")[0])
    homes = importlib.metadata.packages_distributions()
    return {normal(home) for name in named - sys.stdlib_module_names - {"overlaynet"} for home in homes[name]}


def normal(distribution: str) -> str:
    """The name as it is compared (PEP 503)."""
    return re.sub("[-_.]+", "-", distribution).lower()


def declared(extra: str | None) -> set[str]:
    """The distributions that overlaynet says it needs, always or with an extra."""
    requirements = [text.replace("'", '"').partition(";") for text in importlib.metadata.requires("overlaynet") or []]
    wanted = "" if extra is None else f'extra == "{extra}"'
    return {normal(re.split(r"[^\w.-]", name)[0]) for name, _, marker in requirements if marker.strip() == wanted}


def test_what_is_imported_is_what_the_package_says_it_needs() -> None:
    kit = {name for name in MODULES if name.startswith("overlaynet.testing.")}
    used = set().union(*(packages_of(module) for module in MODULES.keys() - kit))
    assert used == declared(None)
    # anyio is not imported: it is a plugin of pytest.
    assert set().union(*(packages_of(module) for module in kit)) - declared(None) | {"anyio"} == declared("testing")


@pytest.mark.parametrize("missing", ["pytest", "anyio"])
@pytest.mark.parametrize(
    "statement", ["from overlaynet.testing import StoreConformance", "import overlaynet.testing.fixtures"]
)
def test_who_lacks_what_the_suites_need_is_told_what_to_install(missing: str, statement: str) -> None:
    code = f"import sys\nsys.modules[{missing!r}] = None\n{statement}\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: the tests of overlaynet.testing need {missing}, which is not installed; "
        f"install what they need with: pip install 'overlaynet[testing]'"
    )


def test_what_the_demonstration_needs_of_the_kit_and_the_network_need_no_pytest() -> None:
    needed = "overlaynet.demo.scenario, overlaynet.testing.network"
    code = f"import sys\nsys.modules['pytest'] = sys.modules['anyio'] = None\nimport {needed}\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
