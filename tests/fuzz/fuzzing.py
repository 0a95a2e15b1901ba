"""Build and run the fuzzers of the native engine: ``python -m tests.fuzz.fuzzing SECONDS`` is ``make fuzz``.

A target ``fuzz_NAME.c`` is built with libFuzzer, AddressSanitizer and UBSan, and starts from ``corpus/NAME``. After a long
run without a finding, what it has come to know is merged into that corpus, as few and small inputs as have all of its coverage.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import attrs

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "overlaynet" / "backends" / "udp" / "_native"
TARGETS = {
    "packets": ("packet", "segment", "coalesce"),
    "receive": ("packet", "segment", "coalesce", "table"),
}
"""Of each target, the sources of the engine that it is linked with."""
LARGEST_INPUT = 16384
"""Bytes."""


@attrs.frozen
class Run:
    """What a run without a finding says of itself."""

    inputs: int
    covered: int
    """Edges of the control flow, of the engine and of the target."""
    edges: int
    """How many there are."""


def compile_c(compiler: str, program: Path, driver: str, parts: tuple[str, ...], *options: str) -> None:
    """Compile ``driver``, of this directory, with parts of the engine; all warnings are errors.

    :raises RuntimeError: with what the compiler said, if that does not work.
    """
    flags = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all", "-pthread"]
    files = [HERE / driver, *(SOURCES / f"{part}.c" for part in parts)]
    command = [compiler, *flags, *options, f"-I{SOURCES}", *map(str, files), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


def build(target: str, program: Path) -> None:
    """Build a target, with clang, as ``program``."""
    compile_c("clang", program, f"fuzz_{target}.c", TARGETS[target], "-fsanitize=fuzzer,address,undefined")


def fuzz(program: Path, corpus: Path, seconds: int) -> Run:
    """Fuzz for so long. The corpus is added to.

    :raises RuntimeError: with the report and the input, at the first finding; the input also lies beside the program.
    """
    log = _run(program, f"-max_total_time={seconds}", "-print_final_stats=1", f"-artifact_prefix={program}-", corpus)
    (edges,) = re.findall(r"Loaded 1 modules +\((\d+) inline 8-bit counters\)", log)
    covered = re.findall(r"^#\d+\s+(?:DONE|INITED)\s+cov: (\d+)", log, re.MULTILINE)
    (inputs,) = re.findall(r"number_of_executed_units: (\d+)", log)
    return Run(int(inputs), int(covered[-1]), int(edges))


def minimise(program: Path, corpus: Path, into: Path) -> None:
    """Put as few and small inputs of the corpus into the empty directory ``into`` as have all of its coverage."""
    _run(program, "-merge=1", into, corpus)


def _run(program: Path, *arguments: object) -> str:
    command = [str(program), f"-max_len={LARGEST_INPUT}", "-timeout=60", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{program.name} has found something: {done.stdout[-2000:]}{done.stderr[-8000:]}")
    return done.stderr


def main(seconds: int) -> None:
    """Fuzz each target for its part of ``seconds``, and keep what it found out."""
    with tempfile.TemporaryDirectory(prefix="overlaynet-fuzz-") as directory:
        for target in TARGETS:
            program, corpus = Path(directory, target), Path(directory, f"{target}-corpus")
            build(target, program)
            shutil.copytree(HERE / "corpus" / target, corpus)
            run = fuzz(program, corpus, seconds // len(TARGETS))
            kept = HERE / "corpus" / target
            shutil.rmtree(kept)
            kept.mkdir()
            minimise(program, corpus, kept)
            print(  # noqa: T201
                f"{target}: {run.inputs} inputs, {run.covered} of {run.edges} edges, no finding; "
                f"{len(list(kept.iterdir()))} inputs kept in {kept}"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]))
