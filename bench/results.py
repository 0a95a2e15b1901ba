"""All raw figures of a run, the statistics made of them, and their form in JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence

import attrs

from bench.cpu import Machine
from overlaynet.model import JSON

Rounds = dict[str, list[float]]
"""For each measure, its figure in every round."""


@attrs.frozen
class Summary:
    """Several rounds' figures of one measure."""

    median: float
    lowest: float
    highest: float


@attrs.define
class Results:
    """What a run has found so far."""

    machine: Machine
    settings: Mapping[str, JSON]
    """How it was measured: seconds, pings, versions."""
    paths: dict[str, dict[str, Rounds]] = attrs.field(factory=dict)
    """By mode, then path, then measure."""
    peers: dict[str, dict[str, Rounds]] = attrs.field(factory=dict)
    """By engine, then number of subnets in the peer table, then measure."""
    engines: dict[str, dict[str, JSON]] = attrs.field(factory=dict)
    """By mode, then path: what the daemons last said of themselves."""

    def to_json(self) -> str:
        """As a document that :meth:`from_json` reads."""
        return json.dumps(attrs.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read what :meth:`to_json` wrote. :raises ValueError: if that is something else."""
        try:
            document = json.loads(text)
            return cls(machine=Machine(**document.pop("machine")), **document)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no document of the bench: {error}") from error


def add(table: dict[str, dict[str, Rounds]], row: str, column: str, figures: Mapping[str, float]) -> None:
    """Append one round's figures."""
    rounds = table.setdefault(row, {}).setdefault(column, {})
    for name, figure in figures.items():
        rounds.setdefault(name, []).append(figure)


def summarise(figures: Sequence[float]) -> Summary:
    """:raises statistics.StatisticsError: if there are none."""
    return Summary(statistics.median(figures), min(figures), max(figures))


def ratio(figures: Sequence[float], base: Sequence[float]) -> float | None:
    """The median of the ratios within each round, which a machine that slows down for a while does not disturb.

    ``None`` if there is no round with both, or the base is 0.
    """
    ratios = [figure / other for figure, other in zip(figures, base, strict=False) if other]
    return statistics.median(ratios) if ratios else None
