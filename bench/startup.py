"""How long commands take before they do anything: ``python -m bench.startup``.

Each is a process of its own. What is told is the processor's time, which a busy machine disturbs least, and the time on
the clock, beside those of a Python that does nothing: that much no command can save.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence

import attrs

from bench.results import Summary, summarise
from overlaynet.errors import OverlaynetError

NOTHING = "python -c pass"
COMMANDS: Mapping[str, Sequence[str]] = {
    NOTHING: ("-c", "pass"),
    "overlaynet --help": ("-m", "overlaynet", "--help"),
    "overlaynet run --help": ("-m", "overlaynet", "run", "--help"),
    "overlaynet status --help": ("-m", "overlaynet", "status", "--help"),
    "overlaynet plugins": ("-m", "overlaynet", "plugins"),
}
"""What is measured: the arguments of Python."""


@attrs.frozen
class Startup:
    """One command's figures, in milliseconds: of a whole process, and of what it adds to one that does nothing."""

    clock: Summary
    processor: Summary
    added: Summary
    """Of the processor's time, by the differences within each round."""


def measure(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, Startup]:
    """Run all commands in turn, so many times, after one round that fills the caches and is not counted.

    :raises OverlaynetError: if one fails.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, arguments in commands.items():
            figures = run(name, arguments)
            if number:
                found[name].append(figures)
    bare = [processor for _, processor in found[NOTHING]]
    return {
        name: Startup(
            summarise([clock for clock, _ in figures]),
            summarise([processor for _, processor in figures]),
            summarise([processor - base for (_, processor), base in zip(figures, bare, strict=True)]),
        )
        for name, figures in found.items()
    }


def run(name: str, arguments: Sequence[str]) -> tuple[float, float]:
    """Milliseconds on the clock, and of the processor, that one process takes. What it prints is dropped.

    :raises OverlaynetError: if it fails.
    """
    silence = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_RDWR, 0) for descriptor in (0, 1, 2)]
    begun = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, "-P", *arguments], os.environ, file_actions=silence)
    _, status, usage = os.wait4(process, 0)
    clock = time.perf_counter() - begun
    if code := os.waitstatus_to_exitcode(status):
        raise OverlaynetError(f"`{name}` ended with exit status {code}; run it by hand to see why")
    return clock * 1000, (usage.ru_utime + usage.ru_stime) * 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description="How long commands take to start.")
    parser.add_argument("--rounds", type=int, default=20, help="times that each is started, in turn; 20")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error("--rounds must be 1 or more")
    try:
        found = measure(COMMANDS, chosen.rounds)
    except OverlaynetError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(f"milliseconds, medians of {chosen.rounds} (lowest to highest)")
    print(f"{'command':26}{'clock':>22}{'processor':>22}{'more than Python':>22}")
    for name, figures in found.items():
        print(f"{name:26}{_cell(figures.clock)}{_cell(figures.processor)}{_cell(figures.added)}")
    return 0


def _cell(figures: Summary) -> str:
    return f"{figures.median:.0f} ({figures.lowest:.0f} to {figures.highest:.0f})".rjust(22)


if __name__ == "__main__":
    sys.exit(main())
