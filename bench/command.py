"""The command ``python -m bench``: what to measure, in which order, and what to tell meanwhile and in the end."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path as FilePath
from types import FrameType

from bench import chart, cpu, measures, paths, peers, results, site, table, traffic, tunnels
from bench.measures import Effort
from bench.paths import Path
from bench.results import Results
from overlaynet import __version__
from overlaynet.errors import OverlaynetError
from overlaynet.testing import namespaces

NATIVE, PYTHON = ("--udp-engine", "native"), ("--udp-engine", "python")
PATHS = {
    path.name: path
    for path in (
        Path("host", "host to host, bare", paths.bare),
        Path("vxlan", "kernel VXLAN", paths.vxlan),
        Path("native", "overlaynet, native", paths.overlaynet(*NATIVE)),
        Path(
            "single", "native, single packets", paths.overlaynet(*NATIVE, "--udp-offload", "off", "--udp-threads", "1")
        ),
        Path("python", "overlaynet, Python", paths.overlaynet(*PYTHON)),
        Path("flanneld", "flanneld, udp", tunnels.flanneld, {"flanneld": None, "etcd": "etcd-server"}),
        Path(
            "wireguard-go",
            "wireguard-go",
            tunnels.wireguard_go,
            {"wireguard-go": "wireguard-go", "wg": "wireguard-tools"},
        ),
        Path("nebula", "nebula", tunnels.nebula, {"nebula": "nebula", "nebula-cert": "nebula"}),
        Path("tinc", "tinc", tunnels.tinc, {"tincd": "tinc"}),
    )
}
TITLES = {path.name: path.title for path in PATHS.values()}

_SET_UP = 3.0
"""Seconds, about, for a pair of hosts."""
_JSON, _CHART = FilePath("build/bench.json"), FilePath("build/bench.svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for. Returns the exit status."""
    chosen = parse(arguments)
    if chosen.read is not None:
        try:
            found = Results.from_json(chosen.read.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"bench: {chosen.read} cannot be read: {error}", file=sys.stderr)
            return 1
        _tell(found, chosen)
        return 0
    effort = Effort(chosen.rounds, chosen.seconds, chosen.pings)
    found = Results(cpu.machine(), _settings(effort))
    try:
        with _interruptible(), _nothing_left():
            _check_requirements()
            _measure(found, chosen, effort)
    except KeyboardInterrupt:
        print("\nbench: interrupted", file=sys.stderr)
        status = 130
    except OverlaynetError as error:
        print(f"bench: {error}", file=sys.stderr)
        status = 1
    else:
        status = 0
    _tell(found, chosen)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make bench ARGUMENTS=...",
        description="Measure paths between two hosts in network namespaces. Only ratios within one run mean anything.",
    )
    parser.add_argument(
        "--mode", choices=[*site.MODES, "both"], default="both", help="of the underlay; both by default"
    )
    parser.add_argument(
        "--paths",
        type=_names,
        metavar="NAMES",
        help=f"of {', '.join(PATHS)}, or none; by default all that this machine has",
    )
    parser.add_argument(
        "--peers",
        type=_counts,
        default=list(peers.COUNTS),
        metavar="NUMBERS",
        help="sizes of the peer table to compare, or none; by default " + ",".join(map(str, peers.COUNTS)),
    )
    parser.add_argument(
        "--engines", type=_engines, default=list(peers.ENGINES), metavar="NAMES", help="for --peers; native,python"
    )
    parser.add_argument("--rounds", type=_positive, default=5, help="times that everything is measured, in turn; 5")
    parser.add_argument("--seconds", type=_positive, default=3, help="of each kind of traffic, in each round; 3")
    parser.add_argument("--pings", type=_positive, default=200, help="for the round trip at rest, in each round; 200")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a glance: 1 round of 1 second, 50 pings, only the wire-like mode, 2 and 10000 peers",
    )
    parser.add_argument("--json", type=FilePath, metavar="FILE", help=f"where to write all raw figures; {_JSON}")
    parser.add_argument(
        "--chart", type=FilePath, metavar="FILE", help=f"where to write a chart (SVG) of the first mode; {_CHART}"
    )
    parser.add_argument(
        "--read",
        type=FilePath,
        metavar="FILE",
        help="measure nothing, but show what --json wrote; a chart only if asked for",
    )
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments. :raises SystemExit: if they are wrong."""
    parser = _parser()
    if parser.parse_args(arguments).quick:
        parser.set_defaults(rounds=1, seconds=1, pings=50, mode="wire", peers=[2, 10_000])
    if parser.parse_args(arguments).read is None:
        parser.set_defaults(json=_JSON, chart=_CHART)
    return parser.parse_args(arguments)


def _measure(found: Results, chosen: argparse.Namespace, effort: Effort) -> None:
    modes = list(site.MODES) if chosen.mode == "both" else [chosen.mode]
    measured = available(chosen.paths)
    steps = effort.rounds * len(modes) * len(measured)
    growth = effort.rounds * len(chosen.engines) * len(chosen.peers)
    growth_seconds = 4 * (effort.seconds + 1.0)
    progress = Progress(steps * effort.path_seconds + growth * growth_seconds + len(modes) * _SET_UP)
    print(f"{found.machine}\n{progress.estimate}")
    load = os.getloadavg()[0]
    if load > 0.3:
        print(f"This machine is busy (load {load:.1f}), so the figures will be off: let it come to rest first.")
    for mode in modes if measured else []:
        with site.build(mode) as hosts:
            for number in range(1, effort.rounds + 1):
                for path in measured:
                    with progress.step(effort.path_seconds, f"{mode} {number}/{effort.rounds} {path.title}"):
                        try:
                            with path.open(hosts) as way:
                                figures = measures.measure(way, effort)
                                found.engines.setdefault(mode, {})[path.name] = way.engines()
                        except OverlaynetError as error:
                            raise OverlaynetError(f"{path.title}, {mode}: {error}") from error
                    results.add(found.paths, mode, path.name, figures)
                    print("    " + _line(measures.MEASURES, figures), flush=True)
    for number in range(1, effort.rounds + 1) if chosen.peers else []:
        # To and fro, so that a machine that grows slower or faster favours neither end.
        counts = chosen.peers if number % 2 else chosen.peers[::-1]
        for engine in chosen.engines:

            def add(count: int, figures: Mapping[str, float], engine: str = engine) -> None:
                results.add(found.peers, engine, str(count), figures)
                print(f"    {count:,}: " + _line(peers.MEASURES, figures), flush=True)

            with progress.step(growth_seconds * len(counts), f"peers {number}/{effort.rounds} {engine}"):
                peers.measure(modes[0], engine, counts, effort, add)


class Progress:
    """Says what is measured, and how long it will take: what was expected, corrected by what the steps really took.

    :param expected: seconds for everything.
    """

    def __init__(self, expected: float) -> None:
        self._left = expected
        self._expected_so_far = 0.0
        self._took = 0.0

    @property
    def estimate(self) -> str:
        """The time that is left, in words."""
        pace = self._took / self._expected_so_far if self._expected_so_far else 1.0
        seconds = self._left * pace
        return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"

    @contextlib.contextmanager
    def step(self, expected: float, what: str) -> Iterator[None]:
        """One part of it, which is expected to take so many seconds."""
        print(f"{what} ({self.estimate})", flush=True)
        start = time.monotonic()
        yield
        self._took += time.monotonic() - start
        self._expected_so_far += expected
        self._left -= expected


def available(names: Sequence[str] | None) -> list[Path]:
    """The chosen paths; by default all that can be had here. :raises OverlaynetError: if a chosen one cannot."""
    chosen = [PATHS[name] for name in (PATHS if names is None else names)]
    lacking = {path.name: path.missing() for path in chosen if path.missing()}
    if lacking:
        commands = {command: package for each in lacking.values() for command, package in each.items()}
        packages = sorted({package for package in commands.values() if package is not None})
        hints = [f"apt-get install {' '.join(packages)}"] if packages else []
        hints += [
            f"no package of Debian's has {name}: put it into PATH" for name, package in commands.items() if not package
        ]
        told = f"not on this machine: {', '.join(lacking)} ({'; '.join(hints)})"
        if names is not None:
            raise OverlaynetError(told)
        print(told)
    return [path for path in chosen if path.name not in lacking]


def _tell(found: Results, chosen: argparse.Namespace) -> None:
    """Print and write what there is, also after an interruption."""
    if not found.paths and not found.peers:
        return
    print(f"\n{table.render(found, TITLES)}", end="")
    if chosen.json is not None and chosen.json != chosen.read:
        _write(chosen.json, found.to_json())
    if chosen.chart is not None and found.paths:
        _write(chosen.chart, chart.render(found, next(iter(found.paths)), TITLES))


def _write(path: FilePath, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"written: {path}")


def _settings(effort: Effort) -> dict[str, str | int | float]:
    return {
        "overlaynet": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": effort.rounds,
        "seconds": effort.seconds,
        "pings": effort.pings,
        "ping_interval_seconds": traffic.PING_INTERVAL,
        "container_mtu": site.CONTAINER_MTU,
    }


def _line(columns: Sequence[measures.Measure], figures: Mapping[str, float]) -> str:
    return ", ".join(
        f"{column.short} {table.figure(figures[column.name])} {column.unit}"
        for column in columns
        if column.name in figures
    )


def _check_requirements() -> None:
    missing = namespaces.requirements()
    if missing:
        raise OverlaynetError(f"nothing can be measured here: {'; '.join(missing)}")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """The first signal that asks to end raises KeyboardInterrupt; further ones do not disturb the cleaning up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _nothing_left() -> Iterator[None]:
    """Delete, in the end, what an interruption kept from being remembered."""
    try:
        yield
    finally:
        for name in namespaces.names():
            if name.startswith(f"overlaynet-{os.getpid()}-"):
                namespaces.delete(name)


def _names(text: str) -> list[str]:
    return _listed(text, PATHS)


def _engines(text: str) -> list[str]:
    return _listed(text, peers.ENGINES)


def _listed(text: str, known: Sequence[str] | Mapping[str, Path]) -> list[str]:
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
    return names


def _counts(text: str) -> list[int]:
    counts = [] if text == "none" else [_positive(part) for part in text.split(",")]
    if any(count > peers.MOST for count in counts):
        raise argparse.ArgumentTypeError(f"there is room for {peers.MOST} subnets at most")
    return counts


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)
