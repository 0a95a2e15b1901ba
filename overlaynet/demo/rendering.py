"""How the demonstration looks in a terminal; from 80 columns on, with colours or without, on paper too."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from io import TextIOWrapper
from ipaddress import IPv4Address

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from overlaynet.demo.measure import RoundTrips, Transfer
from overlaynet.demo.scenario import HostFacts, Walks, is_route
from overlaynet.demo.walk import DEVICE, Hop
from overlaynet.testing.packets import ICMP, UDP, IPPacket

WIDEST = 100
_INNER, _OUTER = "green", "yellow"
_BARS = "▁▂▃▄▅▆▇█"
_ICMP_NAMES = {8: "echo request", 0: "echo reply"}


_PLAIN = str.maketrans("→←●•·│└─═✓✗…▁▂▃▄▅▆▇█", "><**.|`-=vx.12345678")


def make_console() -> Console:
    """The console for standard output, not wider than what is easy to read, and with no character that it cannot take."""
    console = Console(highlight=False)
    if isinstance(sys.stdout, TextIOWrapper) and not console.encoding.startswith("utf"):
        codecs.register_error("overlaynet-plain", _replace)
        sys.stdout.reconfigure(errors="overlaynet-plain")
    console.width = min(console.width, WIDEST)
    return console


@contextmanager
def progress(console: Console, text: str) -> Iterator[None]:
    """Say what is being done: with a spinner on a terminal, as a plain line elsewhere."""
    if console.is_terminal:
        with busy(console, f"[bold]{text}"):
            yield
        console.print(f"[green]✓[/] {text}")
    else:
        console.print(f"- {text}")
        yield


@contextmanager
def busy(console: Console, text: str) -> Iterator[None]:
    """Turn a spinner on a terminal, and leave no trace of it."""
    with console.status(text) if console.is_terminal else nullcontext():
        yield


def title(hosts: int, store: str) -> RenderableType:
    """What this is."""
    what = f"{hosts} hosts, {hosts} containers, real packets; the leases are in the {store} store"
    text = Text.assemble(("overlaynet", "bold cyan"), " demo\n", (what, "dim"))
    return Panel(text, box=ROUNDED, border_style="cyan")


def section(text: str) -> RenderableType:
    """A heading."""
    return Padding(Rule(Text(text, "bold"), align="left", style="dim", characters="─"), (1, 0, 0, 0))


def host_panel(facts: HostFacts) -> RenderableType:
    """A host's lease, device and routes."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    rows.add_row("lease", Text.assemble((facts.subnet, "bold"), f" for {_duration(facts.lease_seconds_left)}"))
    device = Text(f"{DEVICE} is missing", "red")
    if facts.link:
        kind = [str(facts.kind), *(flag for flag in facts.flags if flag == "POINTOPOINT")]
        device = Text.assemble((DEVICE, "bold"), f"  {', '.join(kind)}, ", (f"mtu {facts.mtu}", "bold"))
        device.append(f" = {facts.underlay_mtu} - {facts.underlay_mtu - (facts.mtu or 0)}", "dim")
    rows.add_row("device", device)
    rows.add_row("engine", facts.engine)
    rows.add_row("container", facts.container)
    rows.add_row("routes", Text("ip route says, with those of the design marked:", "dim"))
    routes = [*(_route(line, facts.expected_routes) for line in facts.routes)]
    heading = Text.assemble((facts.label, "bold"), f"  {facts.address}")
    return Panel(Group(rows, *routes), title=heading, title_align="left", box=ROUNDED, border_style="blue")


def host_table(facts: Sequence[HostFacts]) -> RenderableType:
    """One line a host, for those that are not shown in full."""
    table = Table("HOST", "ADDRESS", "LEASE", "DEVICE", "MTU", "ROUTES", box=SIMPLE_HEAD, pad_edge=False)
    for host in facts:
        there = sum(
            any(is_route(line, destination, device) for line in host.routes)
            for destination, device in host.expected_routes
        )
        routes = f"{there} of {len(host.expected_routes)}"
        table.add_row(host.label, host.address, host.subnet, f"{host.kind} {DEVICE}", str(host.mtu), routes)
    return table


def chart(
    labels: tuple[str, str], addresses: tuple[IPv4Address, IPv4Address], hosts: tuple[IPv4Address, IPv4Address]
) -> RenderableType:
    """The way between two containers on one line, with their addresses and those of their hosts below it."""
    left, right = " ─ ".join([labels[0], "cni0", DEVICE, "eth0"]), " ─ ".join(["eth0", DEVICE, "cni0", labels[1]])
    line = Text.assemble(("  " + left, _INNER), (" ════ ", f"bold {_OUTER}"), (right, _INNER))
    # Each host's address below its eth0, each container's below its name.
    below = f"{addresses[0]}{hosts[0]!s:>{len(left) - len(str(addresses[0]))}}"
    below += f"      {hosts[1]}{addresses[1]!s:>{len(right) - len(str(hosts[1]))}}"
    return Group(line, Text(f"  {below}\n", "dim"))


def walk(walks: Walks) -> RenderableType:
    """The request hop by hop, the reply in short, and what is wrong with them."""
    hops = walks.request.hops
    lines: list[RenderableType] = []
    for place, hop in enumerate(hops):
        lines += _hop(hop, hops[0], last=place == len(hops) - 1)
    back = walks.reply.hops
    if hops and back and back[-1].station == hops[0].station:
        took = back[-1].packet.time - hops[0].packet.time
        lines.append(
            Text.assemble(
                ("\n← ", "bold"),
                f"the echo reply is back after {len(back)} hops and ",
                (f"{took * 1000:.2f} ms", "bold"),
                f", with ttl {back[-1].carried.header.ttl}",
            )
        )
    for hop in [hop for hop in hops if hop.outer is not None][:1]:
        inside = hop.carried.header.total_length
        outside = (hop.outer or hop.carried).header.total_length
        lines.append(
            Text.assemble(
                f"  {inside} bytes inside, {outside} outside: ",
                (f"{outside - inside} more", f"bold {_OUTER}"),
                " (20 of IP, 8 of UDP)",
            )
        )
    lines += [Text(f"✗ {problem}", "red") for problem in walks.problems]
    return Group(*lines)


def round_trips(result: RoundTrips, source: IPv4Address, target: IPv4Address) -> RenderableType:
    """Minimum, average and maximum, and a bar for each."""
    text = Text.assemble(f"  {source} → {target}   {len(result.milliseconds)} of {result.sent} answered")
    if result.milliseconds:
        low, high = min(result.milliseconds), max(result.milliseconds)
        text.append(f"\n  min {low:.2f}  avg ")
        text.append(f"{result.average:.2f}", "bold")
        text.append(f"  max {high:.2f} ms   ")
        for value in result.milliseconds:
            text.append(_BARS[min(int(value / (high or 1) * len(_BARS)), len(_BARS) - 1)], "cyan")
    return text


def transfer(result: Transfer) -> RenderableType:
    """What was sent, how fast, and whether it is what arrived."""
    same = result.sent_digest == result.received_digest
    text = Text.assemble(
        f"  {result.size / 1e6:.1f} MB of random bytes in {result.seconds:.2f} s: ",
        (f"{result.megabits_per_second:.0f} Mbit/s", "bold"),
        "\n",
    )
    if same:
        return text.append(f"  SHA-256 of what was sent and of what arrived: {result.sent_digest[:16]}…, the same")
    return text.append("  what arrived is not what was sent", "red")


def matrix(reached: Mapping[tuple[str, str], bool], addresses: Mapping[str, IPv4Address]) -> RenderableType:
    """Who reaches whom, by label: rows send, columns answer."""
    letters = {label: label.rsplit("-", 1)[-1] for label in addresses}
    width = max(map(len, letters.values()))
    lines = [Text("  from " + " ".join(f"{letter:>{width}}" for letter in letters.values()) + "  ← to", "dim")]
    for source, address in addresses.items():
        line = Text(f"  {letters[source]:>4} ", "dim")
        for target in addresses:
            mark, style = ("·", "dim")
            if source != target:
                mark, style = ("✓", "green") if reached[source, target] else ("✗", "bold red")
            line.append(f"{mark:>{width}} ", style)
        lines.append(line.append(f" {address}", "dim"))
    good = sum(reached.values())
    style = "bold" if good == len(reached) else "bold red"
    return Group(*lines, Text(f"  {good} of {len(reached)} pairs reach each other", style))


def verdict(problems: Sequence[str], logs: Mapping[str, Sequence[str]], seconds: float) -> RenderableType:
    """How it ended; if it did not go well, what went wrong and what the daemons said last."""
    if not problems:
        return Text(f"\n✓ every packet arrived, with the right headers ({seconds:.1f} s)", "bold green")
    lines = [Text("\n✗ not everything is as it should be:", "bold red")]
    lines += [Text(f"  • {problem}") for problem in problems]
    for label, last in logs.items():
        lines.append(Text(f"the last lines of overlaynet's log on {label}:", "bold"))
        lines += [Text(f"  {line}", "dim") for line in last] or [Text("  (it is empty)", "dim")]
    return Group(*lines)


def look_around(commands: Sequence[tuple[str, str]], take_down: str) -> RenderableType:
    """What to try while it stays up: pairs of what it shows and the command."""
    lines = [Text("\nIt stays up. Look around:", "bold")]
    for what, command in commands:
        lines += [Text(f"  # {what}", "dim"), Text(f"  {command}")]
    return Group(*lines, Text("Take it down:", "bold"), Text(f"  {take_down}"))


def _replace(error: UnicodeError) -> tuple[str, int]:
    """An error handler for encoding: what the output cannot take becomes something like it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(character if character.isascii() else "?" for character in plain), error.end


def _route(line: str, expected: Sequence[tuple[str, str]]) -> Text:
    for destination, device in expected:
        if is_route(line, destination, device):
            head = f"{destination} dev {device}"
            return Text.assemble(("• ", "green"), (head, "bold green"), (line[len(head) :], "dim"))
    return Text(f"  {line}", "dim")


def _hop(hop: Hop, first: Hop, *, last: bool) -> Iterator[RenderableType]:
    datagram = hop.outer
    inside = hop.carried
    size = (datagram or inside).header.total_length
    elapsed = (hop.packet.time - first.packet.time) * 1000
    head = Table.grid(expand=True)
    head.add_column()
    head.add_column(justify="right", no_wrap=True)
    name = Text.assemble(
        ("● ", _INNER if datagram is None else _OUTER),
        (f"{hop.station.place} {hop.station.interface}", "bold"),
        (f"  {hop.station.note}", "dim"),
    )
    head.add_row(name, Text.assemble((f"+{elapsed:.2f} ms", "dim"), (f"{size:>6} bytes", "bold")))
    yield head
    rail = Text("  " if last else "│ ", "dim")
    if datagram is None:
        yield rail + _headers(inside, _INNER)
    else:
        yield rail + _headers(datagram, _OUTER)
        yield rail + Text("  └ ", _OUTER) + _headers(inside, _INNER)


def _headers(packet: IPPacket, style: str) -> Text:
    header, transport = packet.header, packet.transport
    text = Text.assemble((f"IP {header.source} → {header.destination}", style), f"  ttl {header.ttl}  ")
    if isinstance(transport, UDP):
        return text.append(f"UDP {transport.source_port} → {transport.destination_port}", style)
    if isinstance(transport, ICMP):
        name = _ICMP_NAMES.get(transport.type, f"type {transport.type}")
        return text.append(f"ICMP {name}, seq {transport.sequence}")
    return text.append(f"protocol {header.protocol}")


def _duration(seconds: int) -> str:
    hours, minutes = divmod((seconds + 30) // 60, 60)
    return f"{hours} h" + (f" {minutes} min" if minutes else "") if hours else f"{minutes} min"
