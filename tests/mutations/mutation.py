"""A defect on purpose: one place in the package is changed, and the tests that stand for what it breaks have to fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[2]
_PACKAGE = ROOT / "overlaynet"
_NATIVE = "backends/udp/_native"
_SECONDS, _SECONDS_WITHOUT = 300, 1500
"""For one run of pytest, with a mutation, whose tests need a few, and without any, for the tests of all."""


@attrs.frozen
class Mutation:
    """One change of one file, which breaks one promise."""

    name: str
    breaks: str
    """``law 3``, as in docs/laws.md; or the name of a row in docs/faults.md."""
    file: str
    """Below ``overlaynet/``."""
    old: str
    """What stands there, exactly, and once only."""
    new: str
    tests: tuple[str, ...]
    """Those that have to fail, as pytest names them; of those that guard the promise, the quickest."""

    def __str__(self) -> str:
        return self.name

    @property
    def problem(self) -> str | None:
        """Why it cannot be applied: its text is not there, or not once; or there is no such test."""
        for test in self.tests:
            if not _exists(test):
                return f"the mutation {self.name!r} names {test}, which does not exist; name the test that stands for it now"
        count = (_PACKAGE / self.file).read_text().count(self.old)
        if count == 1:
            return None
        return (
            f"the mutation {self.name!r} no longer fits: overlaynet/{self.file} has the text {self.old!r} {count} times, "
            f"not once; write down the place that breaks {self.breaks!r} now"
        )


def _exists(test: str) -> bool:
    """True if the file of a test, or a suite of :mod:`overlaynet.testing` that it may inherit from, has one of this name."""
    path, _, within = test.partition("::")
    name = within.rpartition("::")[2].partition("[")[0]
    suites = (_PACKAGE / "testing").glob("*.py") if "::" in within else ()
    return any(f"def {name}(" in file.read_text() for file in (ROOT / path, *suites))


def mutation(name: str, breaks: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    """A mutation, its tests named below ``tests/``."""
    return Mutation(name, breaks, file, old, new, tuple(f"tests/{test}" for test in tests))


def failures(mutation: Mutation | None, tests: Collection[str], directory: Path) -> tuple[set[str], str]:
    """Run tests on a copy of the package with the mutation, or without any.

    :param directory: an empty one, for the copy.
    :return: those of ``tests`` that failed, by an assertion or an exception of their own; and what pytest said.
    :raises AssertionError: if the tests could not be run.
    """
    package = directory / "overlaynet"
    shutil.copytree(_PACKAGE, package)  # with the native engine that was built in it
    if mutation is not None:
        assert mutation.problem is None, mutation.problem
        changed = package / mutation.file
        changed.write_text(changed.read_text().replace(mutation.old, mutation.new))
        if mutation.file.startswith(_NATIVE):
            _build(package)
    environment = os.environ | {
        # The copy comes before the sources, which `import tests` needs, and these before what is installed.
        "PYTHONPATH": f"{directory}:{ROOT}",
        "PYTHONSAFEPATH": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(directory / "hypothesis"),
    }
    where = subprocess.run(
        [sys.executable, "-c", "import overlaynet; print(overlaynet.__file__)"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.strip() == str(package / "__init__.py"), "not the copy is tested"
    options = ["-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "--hypothesis-seed=1", "--timeout=60"]
    if len(tests) == 1 and mutation is not None:
        options.append("-x")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS_WITHOUT if mutation is None else _SECONDS,
        check=False,
    )
    # 2 and above: interrupted, not found, nothing collected. 1 may also be a test that could not even begin.
    assert run.returncode in (0, 1), f"the tests could not be run:\n{run.stdout}"
    lines = [line.removeprefix("FAILED ") for line in run.stdout.splitlines() if line.startswith("FAILED ")]
    return {test for test in tests if any(_is_of(line, test) for line in lines)}, run.stdout


def _is_of(line: str, test: str) -> bool:
    """True if a line of pytest's summary is about the test, whatever its parameters and the reason."""
    return line == test or line.startswith((f"{test}[", f"{test} "))


def _build(package: Path) -> None:
    """Build the native engine of a copy, in place of the one that came with it."""
    sources = package / _NATIVE
    command = [
        *(sysconfig.get_config_var("CC") or "cc").split(),
        "-shared",
        "-fPIC",
        "-std=c11",
        "-O1",
        "-pthread",
        "-DPy_LIMITED_API=0x030B0000",
        f"-I{sysconfig.get_path('include')}",
        *map(str, sorted(sources.glob("*.c"))),
        "-o",
        str(sources.with_name("_native.abi3.so")),
    ]
    subprocess.run(command, check=True, capture_output=True)
