"""The native engine's C sources under the sanitizers: a bounded fuzz over the corpus, and swaps of the table under traffic."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "overlaynet" / "backends" / "udp" / "_native"
FUZZ = ROOT / "tests" / "fuzz"
PURE = ("packet", "segment", "coalesce")
ENGINE = (*PURE, "table", "worker", "send", "receive", "engine")


def build(program: Path, driver: str, parts: tuple[str, ...], *options: str) -> None:
    compiler = os.environ.get("CC", "gcc")
    sources = [FUZZ / driver, *(SOURCES / f"{part}.c" for part in parts)]
    flags = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all", "-pthread"]
    done = subprocess.run(
        [compiler, *flags, *options, "-I", SOURCES, *sources, "-o", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def run(program: Path, *arguments: object) -> str:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def test_the_fuzzer_finds_nothing(tmp_path: Path) -> None:
    corpus = sorted((FUZZ / "corpus").iterdir())
    assert len(corpus) > 5
    build(tmp_path / "fuzz", "fuzz_packets.c", PURE, "-DSTANDALONE", "-fsanitize=address,undefined")
    run(tmp_path / "fuzz", 10000, *corpus)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_table_is_swapped_without_a_race(tmp_path: Path, sanitizer: str) -> None:
    build(tmp_path / "swap", "swap_tables.c", ENGINE, f"-fsanitize={sanitizer}")
    run(tmp_path / "swap", 1500)


def test_a_device_that_takes_nothing_with_its_header_is_told_from_one_that_is_down(tmp_path: Path) -> None:
    options = ("-fsanitize=address,undefined", "-Wl,--wrap=ioctl,--wrap=writev")
    build(tmp_path / "refuse", "refuse_header.c", ENGINE, *options)
    run(tmp_path / "refuse")
