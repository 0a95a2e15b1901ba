"""``overlaynet demo``: the whole thing at work, in network namespaces of this machine."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from overlaynet.commands import Command
from overlaynet.errors import OverlaynetError

if TYPE_CHECKING:
    from rich.console import Console

    from overlaynet.demo.scenario import Scenario

MOST_HOSTS = 20
_SHOWN_IN_FULL = 2


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.epilog = (
        "Needs Linux and root. Everything happens in network namespaces: this machine's own network is not touched, and "
        "everything is taken down at the end, also after Ctrl-C. Exit status 0 means that every packet arrived, and that "
        "every header was right."
    )
    parser.add_argument(
        "--store",
        choices=("file", "etcd"),
        default="file",
        help="where the leases are kept: a file store, or a private etcd that is started here (default: file)",
    )
    parser.add_argument(
        "--hosts",
        type=_number_of_hosts,
        default=2,
        metavar="N",
        help=f"how many hosts, from 2 to {MOST_HOSTS} (default: 2)",
    )
    parser.add_argument("--keep", action="store_true", help="leave everything up, and say how to look around")
    parser.add_argument("--down", metavar="NAME", help="take down what --keep has left up, and end")


def run(arguments: argparse.Namespace) -> int:
    """Run the scenario and show it.

    :return: 0 if every packet arrived with the right headers, 1 if not, 128 plus its number after a signal.
    :raises OverlaynetError: if it cannot run here.
    """
    if sys.platform != "linux":
        raise OverlaynetError(f"the demo cannot run here: it needs Linux, and this is {sys.platform}")
    _check_requirements(with_etcd=arguments.store == "etcd" and arguments.down is None)
    if arguments.down is not None:
        return _take_down(arguments.down)
    from overlaynet.demo.scenario import Scenario  # noqa: PLC0415 - slow to import

    with _Signals() as signals:
        scenario = Scenario(arguments.hosts, arguments.store)
        problems: list[str] = []
        kept = False
        try:
            problems, complete = _show(scenario, signals, keep=arguments.keep)
            kept = arguments.keep and complete and signals.received is None
        except _Interrupted:
            pass  # told below, when everything is taken down
        finally:
            if kept:
                scenario.leave_up()
            else:
                scenario.close()
        if signals.received is not None:
            with contextlib.suppress(OSError):  # the terminal may be what went away
                print("overlaynet: interrupted; everything is taken down", file=sys.stderr, flush=True)
            return 128 + signals.received
    return 1 if problems else 0


def _show(scenario: Scenario, signals: _Signals, *, keep: bool) -> tuple[list[str], bool]:
    """Run the scenario and show it; what was wrong, and whether it came to its end."""
    from overlaynet.demo import rendering  # noqa: PLC0415 - slow to import

    console = rendering.make_console()
    begun = time.monotonic()
    console.print(rendering.title(scenario.count, scenario.store))
    problems: list[str] = []
    complete = False
    try:
        for step in scenario.steps():
            with rendering.progress(console, step.text), signals.raised():
                step.action()
        for problem in _show_parts(scenario, signals, console):
            problems.append(problem)
        complete = True
    except (OverlaynetError, TimeoutError) as error:
        problems.append(str(error))
    console.print(rendering.verdict(problems, scenario.last_log_lines(), time.monotonic() - begun))
    if keep and complete:
        # Commands are for copying: the terminal may break their lines, but nobody else.
        around = rendering.look_around(scenario.commands(_program()), f"{_program()} demo --down {scenario.lab.name}")
        console.print(around, soft_wrap=True)
    return problems, complete


def _show_parts(scenario: Scenario, signals: _Signals, console: Console) -> Iterator[str]:
    """Everything once it is up; yields what is wrong."""
    from overlaynet.demo import rendering  # noqa: PLC0415 - slow to import

    first, second = scenario.pair
    with signals.raised():
        facts = scenario.facts()
    console.print(rendering.section("The hosts"))
    for host in facts[:_SHOWN_IN_FULL]:
        console.print(rendering.host_panel(host))
    if facts[_SHOWN_IN_FULL:]:
        console.print(rendering.host_table(facts[_SHOWN_IN_FULL:]))
    for host in facts:
        yield from host.problems

    console.print(rendering.section(f"One ping packet on its way from {first.label} to {second.label}"))
    hosts = (first.host.address.ip, second.host.address.ip)
    console.print(rendering.chart((first.label, second.label), (first.ip, second.ip), hosts))
    with signals.raised():
        walks = scenario.walk()
    console.print(rendering.walk(walks))
    yield from walks.problems

    console.print(rendering.section("Ping times"))
    with rendering.busy(console, "pinging"), signals.raised():
        pings = scenario.ping()
    console.print(rendering.round_trips(pings, first.ip, second.ip))
    if len(pings.milliseconds) < pings.sent:
        yield f"of {pings.sent} pings from {first.label} to {second.label}, {len(pings.milliseconds)} were answered"

    console.print(rendering.section("A TCP transfer"))
    with rendering.busy(console, "sending"), signals.raised():
        transfer = scenario.transfer()
    console.print(rendering.transfer(transfer))
    if transfer.sent_digest != transfer.received_digest:
        yield f"what {second.label} received over TCP is not what {first.label} sent"

    if scenario.count > _SHOWN_IN_FULL:
        console.print(rendering.section("Who reaches whom"))
        with rendering.busy(console, "pinging"), signals.raised():
            reached = scenario.reach()
        console.print(rendering.matrix(reached, {each.label: each.ip for each in scenario.lab.containers}))
        for (source, target), answered in reached.items():
            if not answered:
                yield f"a ping from {source} to {target} was not answered"


def _program() -> str:
    """How to call this program from a shell."""
    if shutil.which("overlaynet") is not None:
        return "overlaynet"
    return sys.argv[0] if Path(sys.argv[0]).name == "overlaynet" else f"{sys.executable} -m overlaynet"


def _take_down(name: str) -> int:
    from overlaynet.testing.lab import standing, take_down  # noqa: PLC0415 - slow to import

    if not take_down(name):
        others = ", ".join(standing()) or "none"
        raise OverlaynetError(f"there is nothing left of {name}; what is up: {others}")
    print(f"{name} is taken down")
    return 0


def _check_requirements(*, with_etcd: bool) -> None:
    from overlaynet.testing.namespaces import requirements  # noqa: PLC0415 - slow to import

    missing = requirements()
    if with_etcd and shutil.which("etcd") is None:
        missing.append("the command etcd is missing (install etcd-server)")
    if missing:
        raise OverlaynetError(f"the demo cannot run here: {'; '.join(missing)}")


def _number_of_hosts(text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text) <= MOST_HOSTS:
        raise argparse.ArgumentTypeError(f"must be a number from 2 to {MOST_HOSTS}, not {text!r}")
    return int(text)


class _Interrupted(BaseException):
    """A signal asks to end. Nothing but :func:`run` may catch it."""


class _Signals:
    """Turns the first signal that asks to end into an :exc:`_Interrupted`, but only where something is waited for.

    Elsewhere (clean-up, and what draws on the terminal) it is remembered until then, and further ones are ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._raise = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raise in this block, at once if a signal came before."""
        self._raise = True
        try:
            if self.received is not None:
                raise _Interrupted
            yield
        finally:
            self._raise = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            if self._raise:
                raise _Interrupted


COMMAND = Command("demo", "show the whole thing at work on this machine, in network namespaces", configure, run)
