"""How the demonstration judges the packets that it captured, and how it shows them; no root, no network."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any

import attrs
import pytest
from rich.console import Console, RenderableType
from scapy.layers import inet
from scapy.packet import Raw

from overlaynet.demo import rendering
from overlaynet.demo.measure import RoundTrips, Transfer
from overlaynet.demo.scenario import HostFacts, Walks
from overlaynet.demo.walk import ECHO_REQUEST, Station, Walk, follow, is_echo
from overlaynet.testing.capture import Packet
from overlaynet.testing.packets import parse_ip

INNER = (IPv4Address("10.244.1.96"), IPv4Address("10.244.2.194"))
OUTER = (IPv4Address("172.16.130.140"), IPv4Address("172.16.130.164"))
STATIONS = [
    Station("container-a", "eth0", "it begins"),
    Station("host-a", "cni0"),
    Station("host-a", "overlay0"),
    Station("host-a", "eth0", encapsulated=True),
    Station("host-b", "eth0", encapsulated=True),
    Station("host-b", "overlay0"),
    Station("host-b", "cni0"),
    Station("container-b", "eth0", "it ends"),
]
TTLS = [64, 64, 63, 63, 63, 63, 62, 62]


def echo(ttl: int = 64, source: IPv4Address = INNER[0], payload: bytes = bytes(56), sequence: int = 1) -> Any:
    header = inet.IP(src=str(source), dst=str(INNER[1]), ttl=ttl, id=9)
    return header / inet.ICMP(type=8, id=4711, seq=sequence) / Raw(payload)


def wrap(packet: Any, port: int = 8285, target: IPv4Address = OUTER[1], **fields: Any) -> Any:
    header = inet.IP(src=str(OUTER[0]), dst=str(target), **fields)
    return header / inet.UDP(sport=8285, dport=port) / Raw(bytes(packet))


def captured() -> list[Packet]:
    """What is captured when everything is right."""
    return [
        at(place, wrap(echo(ttl)) if station.encapsulated else echo(ttl))
        for place, (station, ttl) in enumerate(zip(STATIONS, TTLS, strict=True))
    ]


def at(place: int, packet: Any) -> Packet:
    data = bytes(packet)
    return Packet(str(STATIONS[place]), 1000 + place / 1000, outgoing=True, link=None, ip=parse_ip(data), data=data)


def followed(packets: list[Packet]) -> Walk:
    return follow(
        packets,
        STATIONS,
        lambda packet: is_echo(packet, ECHO_REQUEST, 4711, 1),
        "echo request",
        inner=INNER,
        outer=OUTER,
    )


def replace(place: int, packet: Any) -> Callable[[list[Packet]], list[Packet]]:
    return lambda packets: [*packets[:place], at(place, packet), *packets[place + 1 :]]


def test_the_documented_walk_is_right() -> None:
    walk = followed(captured())
    assert walk.problems == ()
    assert [hop.station for hop in walk.hops] == STATIONS
    assert [hop.carried.header.ttl for hop in walk.hops] == TTLS
    assert [hop.outer is not None for hop in walk.hops] == [station.encapsulated for station in STATIONS]


def test_other_packets_do_not_disturb_the_walk() -> None:
    others = [at(0, echo(sequence=2)), at(3, inet.IP() / inet.UDP(dport=53)), at(4, wrap(b"not a packet"))]
    assert followed([*others, *captured()]).problems == ()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda packets: packets[:5] + packets[6:], "was not seen on host-b overlay0"),
        (lambda packets: [*packets, packets[6]], "was seen 2 times on host-b cni0"),
        (
            replace(7, echo(62, source=OUTER[0])),
            "on container-b eth0 goes from 172.16.130.140 to 10.244.2.194, not from",
        ),
        (
            replace(6, echo(62, payload=bytes(55) + b"x")),
            "on host-b cni0 is not the packet that was seen on container-a",
        ),
        (replace(6, echo(64)), "on host-b cni0 has a TTL of 64, more than before (63)"),
        (replace(4, wrap(echo(62))), "on host-b eth0 has other bytes than before"),
        (replace(5, echo(62)), "on host-b overlay0 has other bytes than before"),
        (replace(3, wrap(echo(63), target=OUTER[0])), "is sent from 172.16.130.140 to 172.16.130.140, not from"),
        (replace(3, wrap(echo(63), options=[inet.IPOption_NOP()] * 4)), "on host-a eth0 is 32 bytes longer, not 28"),
    ],
)
def test_what_is_not_as_documented_is_told(damage: Callable[[list[Packet]], list[Packet]], problem: str) -> None:
    problems = followed(damage(captured())).problems
    assert any(problem in each for each in problems), problems
    assert all(each.startswith("the echo request") for each in problems)


def test_another_source_port_is_told() -> None:
    outer = inet.IP(src=str(OUTER[0]), dst=str(OUTER[1])) / inet.UDP(sport=40000, dport=8285) / Raw(bytes(echo(63)))
    problems = followed(replace(3, outer)(captured())).problems
    assert problems == ("the echo request on host-a eth0 has the ports (40000, 8285), not (8285, 8285)",)


def shown(content: RenderableType, width: int = 80, *, terminal: bool = False) -> str:
    output = io.StringIO()
    colours: Any = "truecolor" if terminal else "auto"
    Console(
        file=output, width=width, highlight=False, force_terminal=terminal, color_system=colours, _environ={}
    ).print(content)
    return output.getvalue()


def facts(**changes: Any) -> HostFacts:
    link = {
        "mtu": 1472,
        "flags": ["POINTOPOINT", "MULTICAST", "NOARP", "UP", "LOWER_UP"],
        "linkinfo": {"info_kind": "tun", "info_data": {"type": "tun"}},
    }
    routes = (
        "10.244.0.0/16 dev overlay0 proto 82 scope link",
        "unreachable 10.244.0.0/16 proto 82 metric 4173053590",
        "10.244.1.0/24 dev cni0 proto kernel scope link src 10.244.1.1",
        "172.16.130.0/24 dev eth0 proto kernel scope link src 172.16.130.140",
    )
    expected = (("10.244.1.0/24", "cni0"), ("10.244.0.0/16", "overlay0"), ("172.16.130.0/24", "eth0"))
    host = HostFacts(
        "host-a", "172.16.130.140", "10.244.1.0/24", 86399, "native", "10.244.1.96/24", 1500, link, routes, expected, ()
    )
    return attrs.evolve(host, **changes)


ALL: dict[str, RenderableType] = {
    "title": rendering.title(20, "etcd"),
    "section": rendering.section("One ping packet on its way from container-a to container-b"),
    "host": rendering.host_panel(facts()),
    "host without device": rendering.host_panel(facts(link={}, routes=())),
    "hosts": rendering.host_table([facts(label=f"host-{letter}") for letter in "cdefg"]),
    "chart": rendering.chart(("container-a", "container-b"), INNER, OUTER),
    "walk": rendering.walk(Walks(followed(captured()), followed(captured()), 0)),
    "broken walk": rendering.walk(Walks(followed(captured()[:3]), followed([]), 2)),
    "round trips": rendering.round_trips(
        RoundTrips(10, (0.31, 0.4, 0.38, 4.2, 0.3, 0.29, 0.35, 0.3, 0.3, 0.3)), *INNER
    ),
    "no round trips": rendering.round_trips(RoundTrips(10, ()), *INNER),
    "transfer": rendering.transfer(Transfer(1_250_000_000, 2.0, "ab" * 32, "ab" * 32)),
    "matrix": rendering.matrix(
        {
            (f"container-{a}", f"container-{b}"): a != "c"
            for a in "abcdefghijklmnopqrst"
            for b in "abcdefghijklmnopqrst"
            if a != b
        },
        {f"container-{a}": IPv4Address("10.244.20.10") for a in "abcdefghijklmnopqrst"},
    ),
}


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("name", ALL)
def test_everything_fits_into_the_terminal(name: str, width: int) -> None:
    # One column wider, nothing changes: so nothing was cut or wrapped for lack of room.
    text = shown(ALL[name], width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("\n") == shown(ALL[name], width + 200).count("\n")


@pytest.mark.parametrize("name", ALL)
def test_colours_are_for_terminals_only(name: str) -> None:
    assert "\x1b" not in shown(ALL[name])
    if name not in ("hosts", "no round trips"):
        assert "\x1b[" in shown(ALL[name], terminal=True)


def test_a_host_shows_its_lease_device_and_routes() -> None:
    text = shown(ALL["host"])
    for fact in (
        "host-a  172.16.130.140",
        "10.244.1.0/24 for 24 h",
        "overlay0  tun, POINTOPOINT, mtu 1472 = 1500 - 28",
        "• 10.244.0.0/16 dev overlay0 proto 82 scope link",
        "• 10.244.1.0/24 dev cni0",
        "• 172.16.130.0/24 dev eth0",
        "  unreachable 10.244.0.0/16 proto 82",
    ):
        assert fact in text
    assert "overlay0 is missing" in shown(ALL["host without device"])


def test_the_walk_shows_headers_sizes_and_ttls_at_every_hop() -> None:
    lines = shown(ALL["walk"]).splitlines()
    stations = [line for line in lines if line.startswith("● ")]
    assert [line.split()[1:3] for line in stations] == [[station.place, station.interface] for station in STATIONS]
    assert [line.split()[-2:] for line in stations] == [
        ["112" if station.encapsulated else "84", "bytes"] for station in STATIONS
    ]
    assert stations[2].split()[-4:-2] == ["+2.00", "ms"]
    inner = [line for line in lines if "IP 10.244.1.96 → 10.244.2.194" in line]
    assert [line.split("ttl ")[1].split()[0] for line in inner] == [str(ttl) for ttl in TTLS]
    assert sum("IP 172.16.130.140 → 172.16.130.164" in line and "UDP 8285 → 8285" in line for line in lines) == 2
    assert any("28 more" in line for line in lines)


def test_a_broken_walk_says_what_was_not_seen() -> None:
    text = shown(ALL["broken walk"])
    assert "✗ the echo request reached host-a overlay0, but not host-a eth0" in text
    assert "✗ the echo request was not seen at all" in text
    assert "✗ the capture missed 2 packets" in text
    assert "is back" not in text


def test_a_transfer_that_was_damaged_is_told() -> None:
    assert "5000 Mbit/s" in shown(ALL["transfer"])
    assert "what arrived is not what was sent" in shown(rendering.transfer(Transfer(1000, 1.0, "ab", "cd")))


def test_the_matrix_shows_who_reaches_whom() -> None:
    text = shown(ALL["matrix"])
    assert "361 of 380 pairs reach each other" in text
    assert text.splitlines()[3].split()[:4] == ["c", "✗", "✗", "·"]


def test_the_verdict_is_short_when_all_is_well() -> None:
    assert shown(rendering.verdict([], {"host-a": ["ready"]}, 3.21)) == (
        "\n✓ every packet arrived, with the right headers (3.2 s)\n"
    )


def test_the_verdict_tells_the_problems_and_the_last_lines_of_the_logs() -> None:
    text = shown(rendering.verdict(["no ping"], {"host-a": ["device up"], "host-b": []}, 3.2))
    assert (
        text.index("✗") < text.index("no ping") < text.index("host-a") < text.index("device up") < text.index("host-b")
    )
    assert "(it is empty)" in text


def test_progress_is_a_plain_line_when_nobody_watches() -> None:
    output = io.StringIO()
    with rendering.progress(Console(file=output, force_terminal=False), "overlaynet run on each host"):
        assert output.getvalue() == "- overlaynet run on each host\n"
    assert output.getvalue() == "- overlaynet run on each host\n"


def test_a_step_that_failed_is_not_ticked_off() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True)
    with pytest.raises(ZeroDivisionError), rendering.progress(console, "a step"):
        _ = 1 / 0
    assert "✓" not in output.getvalue()
    with rendering.progress(console, "a step"):
        pass
    assert "✓" in output.getvalue()


def test_an_output_that_cannot_take_the_characters_gets_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with io.TextIOWrapper(buffer, encoding="ascii") as output:
        monkeypatch.setattr(sys, "stdout", output)
        console = rendering.make_console()
        console.print(ALL["walk"])
        console.print("é ✓")
        output.flush()
        text = buffer.getvalue().decode("ascii")
        monkeypatch.undo()
    assert "| IP 172.16.130.140 > 172.16.130.164" in text
    assert "? v" in text
