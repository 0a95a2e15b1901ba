"""The native engine's C sources under the sanitizers: a bounded fuzz from the corpora, and swaps of the table under traffic."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fuzz.fuzzing import HERE, TARGETS, build, compile_c, fuzz

ENGINE = ("packet", "segment", "coalesce", "table", "worker", "send", "receive", "engine")
FUZZ_SECONDS = 10


@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzzer_finds_nothing(tmp_path: Path, target: str) -> None:
    build(target, tmp_path / "fuzz")
    shutil.copytree(HERE / "corpus" / target, tmp_path / "corpus")
    run = fuzz(tmp_path / "fuzz", tmp_path / "corpus", FUZZ_SECONDS)
    # What it does not reach are checks that fail, sums of the sanitizers, and what only a kernel can do.
    assert run.covered > run.edges / 4
    assert run.inputs > len(list((HERE / "corpus" / target).iterdir()))


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_table_is_swapped_without_a_race(tmp_path: Path, sanitizer: str) -> None:
    compiled_and_run(tmp_path / "swap", "swap_tables.c", "1500", options=[f"-fsanitize={sanitizer}"])


def test_a_device_that_takes_nothing_with_its_header_is_told_from_one_that_is_down(tmp_path: Path) -> None:
    options = ["-fsanitize=address,undefined", "-Wl,--wrap=ioctl", str(HERE / "refusals.c")]
    compiled_and_run(tmp_path / "refused", "header_refused.c", options=options)


def compiled_and_run(program: Path, source: str, *arguments: str, options: Sequence[str]) -> None:
    compile_c(os.environ.get("CC", "gcc"), program, source, ENGINE, *options)
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
