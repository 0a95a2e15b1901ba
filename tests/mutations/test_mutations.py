"""Every law, and many a promise under a fault, is broken on purpose; the tests that guard it have to fail.

`make test` breaks each law once. `make mutations` applies every mutation.
"""

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.mutations import faults, laws
from tests.mutations.mutation import ROOT, Mutation, failures

ALL = [*laws.MUTATIONS, *faults.MUTATIONS]
EVERY = os.environ.get("OVERLAYNET_MUTATIONS") == "all"
LAWS = [f"law {number}" for number in range(1, 10)]


def first_of_each_law() -> list[Mutation]:
    firsts: dict[str, Mutation] = {}
    for mutation in laws.MUTATIONS:
        firsts.setdefault(mutation.breaks, mutation)
    return list(firsts.values())


CHOSEN = ALL if EVERY else first_of_each_law()


def test_every_mutation_still_fits_the_sources() -> None:
    problems = [problem for mutation in ALL if (problem := mutation.problem) is not None]
    assert not problems, "\n".join(problems)


def test_every_mutation_breaks_something_that_is_promised() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]+ \| [^|]+ \| `tests/", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 50
    for mutation in ALL:
        assert mutation.breaks in (*LAWS, *rows), f"{mutation}: neither a law nor a row of docs/faults.md"
    count = Counter(mutation.breaks for mutation in ALL)
    for law in LAWS:
        assert count[law] >= 2, f"{law} is broken {count[law]} times"
    assert max(Counter(mutation.name for mutation in ALL).values()) == 1, "two mutations have one name"


@pytest.mark.timeout(1530)
def test_without_a_mutation_their_tests_pass(tmp_path: Path) -> None:
    tests = dict.fromkeys(test for mutation in CHOSEN for test in mutation.tests)
    failed, output = failures(None, tests, tmp_path)
    assert not failed, output
    assert " passed" in output
    assert " skipped" not in output, output


@pytest.mark.timeout(330)
@pytest.mark.parametrize("mutation", CHOSEN, ids=str)
def test_a_mutation_is_caught(mutation: Mutation, tmp_path: Path) -> None:
    failed, output = failures(mutation, mutation.tests, tmp_path)
    missing = set(mutation.tests) - failed
    assert not missing, f"{mutation} breaks {mutation.breaks!r}, and is not seen by {missing}:\n{output}"
