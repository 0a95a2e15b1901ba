"""The results as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from bench.measures import MEASURES
from bench.peers import MEASURES as PEER_MEASURES
from bench.results import Results, Rounds, ratio, summarise
from bench.site import MODES

BASES = {"vxlan": "to VXLAN", "host": "to bare"}
"""The paths that others are compared with, and what the line with the ratios is called."""


def render(results: Results, titles: Mapping[str, str]) -> str:
    """All tables of a run. :param titles: of the paths, by name."""
    parts = [f"{results.machine}\nmedians of the rounds, and from the lowest to the highest"]
    for mode, paths in results.paths.items():
        parts.append(f"{MODES[mode]}\n\n{_paths(paths, titles)}")
    for engine, counts in results.peers.items():
        parts.append(f"{engine} engine, by the number of subnets in its peer table\n\n{_peers(counts)}")
    return "\n\n".join(parts) + "\n"


def figure(value: float) -> str:
    """Three digits that count, and not more than three decimals: 0.051, 4.95, 118."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(float(f"{value:.2e}"))))  # of what is left after rounding: 9.999 is 10.0
    return f"{value:.{min(3, max(0, 2 - magnitude))}f}"


def _paths(paths: Mapping[str, Rounds], titles: Mapping[str, str]) -> str:
    rows = [["path", "", *(measure.short for measure in MEASURES)], ["", "", *(measure.unit for measure in MEASURES)]]
    for name, rounds in paths.items():
        rows.append([])
        lines = _medians_and_ranges(rounds, [measure.name for measure in MEASURES])
        rows.append([titles.get(name, name), "median", *lines[0]])
        rows.append(["", "range", *lines[1]])
        for base, label in BASES.items():
            if base in paths and base != name:
                rows.append(["", label, *_ratios(rounds, paths[base], [measure.name for measure in MEASURES])])
    return _aligned(rows)


def _peers(counts: Mapping[str, Rounds]) -> str:
    names = [measure.name for measure in PEER_MEASURES]
    rows = [
        ["subnets", "", *(measure.short for measure in PEER_MEASURES)],
        ["", "", *(measure.unit for measure in PEER_MEASURES)],
    ]
    fewest = next(iter(counts))
    for count, rounds in counts.items():
        rows.append([])
        lines = _medians_and_ranges(rounds, names)
        rows.append([f"{int(count):,}", "median", *lines[0]])
        rows.append(["", "range", *lines[1]])
        if count != fewest:
            rows.append(["", f"to {int(fewest):,}", *_ratios(rounds, counts[fewest], names)])
    return _aligned(rows)


def _medians_and_ranges(rounds: Rounds, names: Iterable[str]) -> tuple[list[str], list[str]]:
    summaries = [summarise(rounds[name]) if rounds.get(name) else None for name in names]
    return (
        ["-" if each is None else figure(each.median) for each in summaries],
        ["" if each is None else f"{figure(each.lowest)}-{figure(each.highest)}" for each in summaries],
    )


def _ratios(rounds: Rounds, base: Rounds, names: Iterable[str]) -> list[str]:
    found = [ratio(rounds.get(name, []), base.get(name, [])) for name in names]
    return ["" if each is None else f"{each:.2f}" for each in found]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first two to the left, the others to the right."""
    widths = [max(len(row[place]) for row in rows if row) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
