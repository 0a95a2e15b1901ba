"""What becomes of packets, step by step, and how that is drawn."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

import attrs

from overlaynet.model import IPAddress

_COLUMN = 24
"""Characters from one node's line to the next."""
_MARGIN = 16
"""Characters before the first line: the time."""
_MOST_COLUMNS = 8
"""Nodes for which there is room; with more, the steps are only listed."""
_MOST_DRAWN = 80
"""Steps that a diagram shows; the earlier ones are left away."""


class Kind(enum.Enum):
    """What happens to a packet in one step."""

    ROUTED = "routed into the device"
    ENCAPSULATED = "encapsulated"
    ON_THE_LINK = "on the link"
    DELIVERED = "delivered"
    DROPPED = "dropped"


@attrs.frozen
class Step:
    """One thing that happened to a packet; or, without a packet, to a node or the whole network."""

    time: float
    """Seconds of the event loop's clock."""
    node: str | None
    """Where it happened; for a step on a link, where the link begins. ``None``: to the network."""
    detail: str
    """In words: the route, the addresses, or the reason why the packet was dropped."""
    kind: Kind | None = None
    """What happened to a packet."""
    packet: int | None = None
    """Number of the packet."""
    to: str | None = None
    """For a step on a link: where the link ends."""

    def __str__(self) -> str:
        place = "" if self.node is None else f" {self.node}{f' to {self.to}' if self.to else ''}"
        what = self.detail if self.kind is None else f"{self.kind.value}: {self.detail}"
        return f"{self.time:.3f} s{'' if self.packet is None else f' #{self.packet}'}{place}: {what}"


@attrs.define(eq=False)
class Packet:
    """A packet from one container to another. Steps are added while it is on its way."""

    number: int
    """From 1, in the order in which they were sent."""
    source: IPAddress
    """Address of the container that sent it."""
    destination: IPAddress
    """Address of the container that it is for."""
    payload: bytes
    """What it carries by UDP."""
    steps: list[Step] = attrs.field(factory=list)
    """What has happened to it so far."""

    @property
    def size(self) -> int:
        """Bytes of the whole IP packet that carries the payload by UDP."""
        return (28 if self.destination.version == 4 else 48) + len(self.payload)

    @property
    def delivered(self) -> bool:
        """True once the other container has it."""
        return bool(self.steps) and self.steps[-1].kind is Kind.DELIVERED

    @property
    def dropped(self) -> str | None:
        """Why it was dropped (``no_route: no peer has 10.244.9.1``), or ``None`` if it was not."""
        return self.steps[-1].detail if self.steps and self.steps[-1].kind is Kind.DROPPED else None


def draw(steps: Sequence[Step], order: Iterable[str]) -> str:
    """A sequence diagram, in text: a column for each node that a packet meets, a line for each step.

    :param order: all nodes, as their columns are to be ordered.
    """
    carrying = {name for step in steps if step.packet is not None for name in (step.node, step.to)}
    told = [step for step in steps if step.node is None or not carrying or step.node in carrying]
    shown = told[-_MOST_DRAWN:]
    involved = {name for step in shown for name in (step.node, step.to)}
    names = [name for name in order if name in involved]
    earlier = [f"({len(told) - len(shown)} earlier steps)"] if len(shown) < len(told) else []
    if len(names) > _MOST_COLUMNS:
        return "\n".join([*earlier, *map(str, shown)])
    columns = {name: place * _COLUMN for place, name in enumerate(names)}
    head = " " * _MARGIN + _row(columns, {place: name for name, place in columns.items()}, rule=" ")
    lines = [f"{step.time:>{_MARGIN - 4}.3f} s  {_drawn(step, columns)}" for step in shown]
    return "\n".join(line.rstrip() for line in [*earlier, head, *lines])


def _drawn(step: Step, columns: dict[str, int]) -> str:
    label = "" if step.packet is None else f"#{step.packet} "
    if step.node is None:
        return _row(columns, {0: f"== {step.detail} =="})
    start = columns[step.node]
    if step.to is None:
        what = step.detail if step.kind is None else f"{step.kind.value}: {step.detail}"
        return _row(columns, {start: f"* {label}{what}"})
    end = columns[step.to]
    left, right = min(start, end), max(start, end)
    lost = step.kind is Kind.DROPPED
    shaft = f" {label}".center(right - left - 3, "-")
    arrow = shaft + ("X" if lost else ">") if start < end else ("X" if lost else "<") + shaft
    return _row(columns, {left: f"|{arrow} |"}) + f"  {step.detail}"


def _row(columns: dict[str, int], texts: dict[int, str], rule: str = "|") -> str:
    """The nodes' lines, with texts written over them from the given places on."""
    row = [" "] * (max(columns.values(), default=0) + 1)
    for place in columns.values():
        row[place] = rule
    for place, text in texts.items():
        row[place : place + len(text)] = text
    return "".join(row)
