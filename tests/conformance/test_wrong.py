"""The suites reject what is wrong: each driver in the folder ``wrong`` fails the test of the law it breaks, and no other."""

import ast
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.timeout(600)  # each suite runs some fifty times

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
AXES = ("backends", "observers", "routers", "stores", "tables")


def declared(axis: str) -> dict[str, str | None]:
    """The name of each class that is held against the suite, and of the test that it breaks, as the source says."""
    found = {}
    for node in ast.parse((HERE / "wrong" / f"{axis}.py").read_text()).body:
        if isinstance(node, ast.ClassDef):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and getattr(mark.func, "id", None) == "wrong":
                    found[f"Test{node.name}"] = ast.literal_eval(mark.args[0])
    return found


@pytest.fixture(scope="module", params=AXES)
def axis(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each suite made of its wrong drivers; all run at once, for they wait now and then."""
    directory = tmp_path_factory.mktemp("wrong")

    def run(axis: str) -> Path:
        report = directory / f"{axis}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", f"--junit-xml={report}"]
        done = subprocess.run(
            [*command, f"tests/conformance/wrong/{axis}.py"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return report

    with ThreadPoolExecutor() as pool:
        return dict(zip(AXES, pool.map(run, AXES), strict=True))


@pytest.fixture(scope="module")
def failed(axis: str, reports: dict[str, Path]) -> dict[str, set[str]]:
    """The names of the tests that each class failed, without their parameters; classes that failed none, too."""
    classes: dict[str, set[str]] = {}
    for case in ElementTree.parse(reports[axis]).iter("testcase"):  # noqa: S314 - pytest wrote it
        name = case.attrib["classname"].rpartition(".")[2]
        broken = classes.setdefault(name, set())
        if case.find("failure") is not None or case.find("error") is not None:
            broken.add(case.attrib["name"].partition("[")[0])
    return classes


def test_each_wrong_driver_fails_exactly_the_test_of_the_law_it_breaks(axis: str, failed: dict[str, set[str]]) -> None:
    expected = {name: set() if test is None else {test} for name, test in declared(axis).items()}
    assert len(expected) > 5
    assert {name: failed.get(name) for name in expected} == expected


def test_what_they_are_made_of_is_right(axis: str, failed: dict[str, set[str]]) -> None:
    right = {name: broken for name, broken in failed.items() if name.startswith("TestModel")}
    assert "TestModel" in right
    assert set().union(*right.values()) == set()


def test_every_law_is_broken_by_one(axis: str) -> None:
    laws = set()
    for module in ("conformance", axis):
        text = (ROOT / "overlaynet" / "testing" / f"{module}.py").read_text()
        if module == axis or axis not in (
            "observers",
            "tables",
        ):  # which are no drivers, and have none of the common laws
            laws |= set(re.findall(r"^    async def (test_\w+)\(", text, re.MULTILINE))
    assert laws == {test for test in declared(axis).values() if test is not None}
