"""The extension backend, with real commands; and alloc, which has none."""

import asyncio
import os
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path

import attrs
import pytest

from overlaynet import network as documents
from overlaynet import options
from overlaynet.backends import _command, extension
from overlaynet.backends._command import CommandFailed, check_command, expand, run
from overlaynet.backends.alloc import AllocBackend, AllocOptions
from overlaynet.backends.extension import ExtensionBackend, ExtensionOptions
from overlaynet.errors import BackendError, ConfigError
from overlaynet.model import Device, Lease, LeaseData, Peer, Subnets, Underlay
from overlaynet.testing.fakes import fake_underlay

pytestmark = pytest.mark.anyio

NETWORK = documents.parse('{"Network": "10.244.0.0/16"}')
LEASE = Lease(Subnets(IPv4Network("10.244.1.0/24")))
NAME = f"test{os.getpid()}"
"""Names are claimed for a whole network namespace, and this is the machine's."""


@pytest.fixture
def anyio_backend() -> object:
    """Processes need the real clock."""
    return "asyncio"


class Making:
    """Makes backends that are closed after the test."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.made: list[ExtensionBackend] = []

    def __call__(self, **given: object) -> ExtensionBackend:
        """One whose commands each write their name, their arguments and their standard input into the journal."""
        script = f'echo "$@" "[$(cat)]" >> {shlex.quote(str(self.journal))}'
        written = {
            event: f"sh -c {shlex.quote(script)} sh {event} {arguments}"
            for event, arguments in {
                "PreStartupCommand": "$NETWORK $PUBLIC_IP",
                "PostStartupCommand": "$NETWORK $SUBNET $PUBLIC_IP $INTERFACE $MTU",
                "SubnetAddCommand": "$SUBNET ${PUBLIC_IP}",
                "SubnetRemoveCommand": "$SUBNET",
                "UnderlayChangeCommand": "$SUBNET $PUBLIC_IP $INTERFACE $MTU",
                "ShutdownCommand": "$SUBNET $PUBLIC_IP",
            }.items()
        }
        parsed = options.parse(ExtensionOptions, {"Name": NAME} | written | given, "backend extension")
        self.made.append(ExtensionBackend(parsed))
        return self.made[-1]


@pytest.fixture
async def make(journal: Path) -> AsyncIterator[Making]:
    making = Making(journal)
    yield making
    for made in making.made:
        await made.aclose()


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    path.touch()
    return path


def peer(number: int, data: str | None = None) -> Peer:
    subnets = Subnets(IPv4Network(f"10.244.{number}.0/24"))
    return Peer(subnets, IPv4Address(f"192.0.2.{number}"), data=LeaseData("extension", data))


async def started(made: ExtensionBackend) -> ExtensionBackend:
    await made.open(NETWORK, fake_underlay("192.0.2.1"))
    await made.start(LEASE)
    return made


async def test_every_event_runs_its_command(make: Making, journal: Path) -> None:
    made = make()
    assert await made.open(NETWORK, fake_underlay("192.0.2.1")) == LeaseData("extension", "")
    assert await made.start(LEASE) == Device("eth0", 1500, instance=NAME)
    await made.set_peers([peer(2, "key of 2"), peer(3)])
    await made.set_peers([peer(3), peer(2, "key of 2")])
    await made.set_peers([peer(2, "new key of 2")])
    assert made.routes([peer(2)]) == []
    assert made.status() == {"complete": 1, "failures": {}}
    await made.aclose()
    await made.aclose()
    assert journal.read_text().splitlines() == [
        "PreStartupCommand 10.244.0.0/16 192.0.2.1 []",
        "PostStartupCommand 10.244.0.0/16 10.244.1.0/24 192.0.2.1 eth0 1500 []",
        "SubnetAddCommand 10.244.2.0/24 192.0.2.2 [key of 2]",
        "SubnetAddCommand 10.244.3.0/24 192.0.2.3 []",
        "SubnetRemoveCommand 10.244.2.0/24 [key of 2]",
        "SubnetRemoveCommand 10.244.3.0/24 []",
        "SubnetAddCommand 10.244.2.0/24 192.0.2.2 [new key of 2]",
        "SubnetRemoveCommand 10.244.2.0/24 [new key of 2]",
        "ShutdownCommand 10.244.1.0/24 192.0.2.1 []",
    ]


async def test_what_the_first_command_prints_is_published(make: Making) -> None:
    made = make(PreStartupCommand="sh -c 'echo the key; echo a warning >&2'")
    assert await made.open(NETWORK, fake_underlay("192.0.2.1")) == LeaseData("extension", "the key")
    await made.aclose()
    without = make(PreStartupCommand="")
    assert await without.open(NETWORK, fake_underlay("192.0.2.1")) == LeaseData("extension", None)


async def test_a_device_and_an_mtu_of_the_commands_are_told(make: Making) -> None:
    made = make(Device="tunnel0", MTU=1400, Name=f"{NAME}b")
    await made.open(NETWORK, fake_underlay("192.0.2.1"))
    assert await made.start(LEASE) == Device("tunnel0", 1400, instance=f"{NAME}b")
    too_large = make(MTU=9000)
    with pytest.raises(BackendError) as caught:
        await too_large.open(NETWORK, fake_underlay("192.0.2.1"))
    assert str(caught.value) == (
        "the network document's Backend asks for MTU 9000, but eth0 carries at most 1500; lower the one or raise the other"
    )


async def test_a_peer_with_ipv6_is_told_whole(make: Making, journal: Path) -> None:
    made = await started(make(SubnetAddCommand=f"sh -c 'echo $SUBNET $IPV6SUBNET >> {journal}'"))
    both = Subnets(IPv4Network("10.244.2.0/24"), IPv6Network("fd00:2::/64"))
    await made.set_peers([Peer(both, IPv4Address("192.0.2.2"))])
    assert journal.read_text().splitlines()[-1] == "10.244.2.0/24 fd00:2::/64"


@pytest.mark.parametrize("event", ["PreStartupCommand", "PostStartupCommand"])
async def test_a_startup_command_that_fails_ends_the_start_and_shutdown_is_run(
    make: Making, journal: Path, event: str
) -> None:
    made = make(**{event: "sh -c 'echo no such thing >&2; exit 3'"})
    with pytest.raises(BackendError) as caught:
        await started(made)
    assert str(caught.value) == (
        f"{event} of the network document's Backend failed: 'sh' ended with exit status 3: no such thing"
    )
    await made.aclose()
    assert journal.read_text().splitlines()[-1].startswith("ShutdownCommand")


async def test_a_peers_command_that_fails_keeps_no_other_from_running_and_is_tried_again(
    make: Making, journal: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = tmp_path / "allowed"
    script = (
        f'test "$1" != 10.244.2.0/24 || test -e {allowed} || {{ echo refused >&2; exit 1; }}; echo "$1" >> {journal}'
    )
    made = await started(make(SubnetAddCommand=f"sh -c {shlex.quote(script)} sh $SUBNET"))
    journal.write_text("")
    peers = [peer(2), peer(3)]
    for _ in range(3):
        await made.set_peers(peers)
    assert journal.read_text().split() == ["10.244.3.0/24"]
    assert made.status() == {
        "complete": 1,
        "failures": {"10.244.2.0/24": "SubnetAddCommand: 'sh' ended with exit status 1: refused"},
    }
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == ["command failed"]
    allowed.touch()
    await made.set_peers(peers)
    assert made.status() == {"complete": 2, "failures": {}}
    assert journal.read_text().split() == ["10.244.3.0/24", "10.244.2.0/24"]


async def test_what_a_peer_publishes_that_is_no_text_fails_for_that_peer_alone(make: Making, journal: Path) -> None:
    """A lone surrogate is valid JSON, and no text."""
    made = await started(make())
    journal.write_text("")
    await made.set_peers([peer(2, "\ud800"), peer(3)])
    reason = "SubnetAddCommand: 'sh' cannot be run: its standard input is to have '\\ud800', which is no character"
    assert made.status() == {"complete": 1, "failures": {"10.244.2.0/24": reason}}
    await made.aclose()
    assert journal.read_text().splitlines() == [
        "SubnetAddCommand 10.244.3.0/24 192.0.2.3 []",
        "SubnetRemoveCommand 10.244.3.0/24 []",
        "ShutdownCommand 10.244.1.0/24 192.0.2.1 []",
    ]
    await started(make())  # the name was given up


async def test_where_no_file_can_be_made_each_command_fails_for_itself_and_all_goes_on_later(
    make: Making, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await started(make())
    journal.write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", "/nonexistent")
        await made.set_peers([peer(2), peer(3)])
    assert made.status() == {
        "complete": 0,
        "failures": {
            f"10.244.{number}.0/24": "SubnetAddCommand: 'sh' cannot be run: No such file or directory"
            for number in (2, 3)
        },
    }
    await made.set_peers([peer(2), peer(3)])
    assert made.status() == {"complete": 2, "failures": {}}
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", "/nonexistent")
        await made.aclose()
    await started(make())  # the name was given up all the same


async def test_slow_commands_do_not_hold_the_node_up_and_all_get_their_turn(
    make: Making, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round has time for one command here; those that fail let the others go first."""
    monkeypatch.setattr(extension, "ROUND", 0.0)
    script = f'echo "$1" >> {journal}; test "$1" != 10.244.2.0/24'
    made = await started(make(SubnetAddCommand=f"sh -c {shlex.quote(script)} sh $SUBNET"))
    journal.write_text("")
    peers = [peer(2), peer(3), peer(4)]
    for _ in range(2):
        await made.set_peers(peers)
        async with asyncio.timeout(10):
            await made.changed()
    await made.set_peers(peers)
    waiting = asyncio.create_task(made.changed())
    await asyncio.sleep(0)
    assert not waiting.done(), "what has failed is for the next audit"
    waiting.cancel()
    await made.set_peers(peers)
    assert journal.read_text().split() == ["10.244.2.0/24", "10.244.3.0/24", "10.244.4.0/24", "10.244.2.0/24"]


async def test_a_peer_that_cannot_be_taken_away_keeps_no_other_from_its_turn(
    make: Making, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "ROUND", 0.0)
    made = await started(make(SubnetRemoveCommand="false"))
    await made.set_peers([peer(2)])
    for _ in range(2):
        await made.set_peers([peer(3)])
    assert made.status()["complete"] == 1
    assert journal.read_text().splitlines()[-1] == "SubnetAddCommand 10.244.3.0/24 192.0.2.3 []"


async def test_peers_are_taken_away_before_any_is_added(
    make: Making, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await started(make())
    await made.set_peers([peer(2), peer(3)])
    journal.write_text("")
    monkeypatch.setattr(extension, "ROUND", 0.0)
    for _ in range(3):
        await made.set_peers([peer(4)])
    assert journal.read_text().splitlines() == [
        "SubnetRemoveCommand 10.244.2.0/24 []",
        "SubnetRemoveCommand 10.244.3.0/24 []",
        "SubnetAddCommand 10.244.4.0/24 192.0.2.4 []",
    ]


async def test_the_end_waits_for_no_command_for_long_and_shutdown_is_run(
    make: Making, journal: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = await started(make(SubnetRemoveCommand="sleep 300", Timeout=300))
    await made.set_peers([peer(number) for number in range(2, 102)])
    journal.write_text("")
    monkeypatch.setattr(extension, "AT_THE_END", 0.5)
    async with asyncio.timeout(60):
        await made.aclose()
    assert journal.read_text() == "ShutdownCommand 10.244.1.0/24 192.0.2.1 []\n"
    (left,) = [record for record in caplog.records if record.message == "no time left to remove peers"]
    assert left.__dict__["fields"]["peers"] == 99
    await started(make())


async def test_a_shutdown_command_that_hangs_is_ended(
    make: Making, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extension, "AT_THE_END", 0.5)
    made = await started(make(ShutdownCommand="sleep 300", Timeout=300))
    async with asyncio.timeout(60):
        await made.aclose()
    assert [record.__dict__["fields"]["reason"] for record in caplog.records if record.levelname == "WARNING"] == [
        "'sleep' took more than 0.5 seconds, and said nothing"
    ]


async def test_a_peer_that_cannot_be_removed_is_tried_again_before_it_is_added_anew(
    make: Making, journal: Path, tmp_path: Path
) -> None:
    allowed = tmp_path / "allowed"
    made = await started(make(SubnetRemoveCommand=f"test -e {allowed}"))
    await made.set_peers([peer(2, "old")])
    journal.write_text("")
    await made.set_peers([peer(2, "new")])
    await made.set_peers([])
    assert journal.read_text() == ""
    allowed.touch()
    await made.set_peers([peer(2, "new")])
    assert journal.read_text() == "SubnetAddCommand 10.244.2.0/24 192.0.2.2 [new]\n"


async def test_a_command_that_is_cancelled_is_undone_in_the_end(make: Making, journal: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    made = await started(make(SubnetAddCommand=f"sh -c 'touch {begun}; sleep 60'"))
    task = asyncio.create_task(made.set_peers([peer(2)]))
    while not begun.exists():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await made.aclose()
    assert journal.read_text().splitlines()[-2:] == [
        "SubnetRemoveCommand 10.244.2.0/24 []",
        "ShutdownCommand 10.244.1.0/24 192.0.2.1 []",
    ]


async def test_a_change_of_the_underlay_runs_its_command_once_and_adds_the_peers_again(
    make: Making, journal: Path
) -> None:
    made = await started(make())
    await made.set_peers([peer(2), peer(3)])
    journal.write_text("")
    moved = attrs.evolve(fake_underlay("192.0.2.9", mtu=1400), interface="eth1")
    for _ in range(2):
        assert await made.set_underlay(moved) == Device("eth1", 1400, instance=NAME)
    for _ in range(2):
        await made.set_peers([peer(2), peer(3)])
    await made.aclose()
    assert journal.read_text().splitlines() == [
        "UnderlayChangeCommand 10.244.1.0/24 192.0.2.9 eth1 1400 []",
        "SubnetAddCommand 10.244.2.0/24 192.0.2.2 []",
        "SubnetAddCommand 10.244.3.0/24 192.0.2.3 []",
        "SubnetRemoveCommand 10.244.2.0/24 []",
        "SubnetRemoveCommand 10.244.3.0/24 []",
        "ShutdownCommand 10.244.1.0/24 192.0.2.9 []",
    ]


async def test_the_underlay_that_it_was_opened_with_is_no_change(make: Making, journal: Path) -> None:
    made = await started(make())
    journal.write_text("")
    assert await made.set_underlay(fake_underlay("192.0.2.1")) == Device("eth0", 1500, instance=NAME)
    assert journal.read_text() == ""


async def test_a_change_whose_command_fails_is_tried_again_and_so_is_the_way_back(
    make: Making, journal: Path, tmp_path: Path
) -> None:
    refused = tmp_path / "refused"
    script = f'test ! -e {refused} || {{ echo not yet >&2; exit 1; }}; echo "$1" >> {journal}'
    made = await started(make(UnderlayChangeCommand=f"sh -c {shlex.quote(script)} sh $PUBLIC_IP"))
    journal.write_text("")
    refused.touch()
    for _ in range(2):
        with pytest.raises(BackendError) as caught:
            await made.set_underlay(fake_underlay("192.0.2.9"))
        assert str(caught.value) == (
            "UnderlayChangeCommand of the network document's Backend failed: 'sh' ended with exit status 1: not yet"
        )
    refused.unlink()
    await made.set_underlay(fake_underlay("192.0.2.1"))  # nobody knows how far the command came for the other one
    await made.set_underlay(fake_underlay("192.0.2.9"))
    assert journal.read_text().split() == ["192.0.2.1", "192.0.2.9"]


async def test_an_underlay_too_small_for_the_mtu_is_refused_and_nothing_is_run(make: Making, journal: Path) -> None:
    made = await started(make(MTU=1450))
    journal.write_text("")
    with pytest.raises(BackendError, match="Backend asks for MTU 1450, but eth0 carries at most 1400; lower the one"):
        await made.set_underlay(fake_underlay("192.0.2.1", mtu=1400))
    assert journal.read_text() == ""


async def test_a_name_is_one_nodes_until_it_ends(make: Making, journal: Path) -> None:
    first = await started(make())
    journal.write_text("")
    second = make()
    with pytest.raises(
        BackendError, match=f"^{NAME} belongs to another overlaynet that is running; stop it, or choose"
    ):
        await second.open(NETWORK, fake_underlay("192.0.2.1"))
    await second.aclose()
    assert journal.read_text() == ""
    await started(make(Name=f"{NAME}b"))
    await first.aclose()
    await started(make())


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("ip route | grep x", "has an unquoted '|', but is run without a shell; put it into a script, quote it, or"),
        ("a && b", "has an unquoted '&', but"),
        ("echo $(date)", "has an unquoted '(', but"),
        ("cat > /tmp/x", "has an unquoted '>', but"),
        ("echo `date`", "has an unquoted '`', but"),
        ("echo 'x", "cannot be split into arguments: No closing quotation"),
        ("a\0b", "must not contain a NUL character"),
        ("'' x", "must begin with the program to run"),
    ],
)
def test_what_needs_a_shell_or_cannot_be_read_is_refused(command: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.parse(ExtensionOptions, {"SubnetAddCommand": command}, "backend extension")
    assert str(caught.value).startswith(f"backend extension: option SubnetAddCommand {problem}")


@pytest.mark.parametrize("command", ["", "ip route", "sh -c 'a | b; c > d'", 'x --y="a;b"', r"find . -exec x \;"])
def test_quoted_operators_are_arguments(command: str) -> None:
    assert check_command(command) is None


def test_variables_are_replaced_within_one_argument() -> None:
    variables = {"SUBNET": "10.0.0.0/24 x; y", "PUBLIC_IP": "192.0.2.1"}
    assert expand("a $SUBNET '${PUBLIC_IP}:$SUBNETS' \"$HOME\" $$ '\"'", variables) == [
        "a",
        "10.0.0.0/24 x; y",
        "192.0.2.1:$SUBNETS",
        "$HOME",
        "$$",
        '"',
    ]


async def test_a_command_gets_no_settings_of_overlaynet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERLAYNET_ETCD_PASSWORD", "hunter2")
    monkeypatch.setenv("ELSEWHERE", "kept")
    output = await run(["env"], {"SUBNET": "10.0.0.0/24"}, 10)
    assert "hunter2" not in output.stdout
    assert {"ELSEWHERE=kept", "SUBNET=10.0.0.0/24"} <= set(output.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nonexistent/program"], "'/nonexistent/program' cannot be run: No such file or directory"),
        (["/etc"], "'/etc' cannot be run: Permission denied"),
        (["false"], "'false' ended with exit status 1, and said nothing"),
        (["sh", "-c", "kill -9 $$"], "'sh' was ended by SIGKILL, and said nothing"),
        (["sh", "-c", "echo slow >&2; sleep 60"], "'sh' took more than 0.5 seconds: slow"),
    ],
)
async def test_failures_say_what_happened(arguments: list[str], message: str) -> None:
    with pytest.raises(CommandFailed) as caught:
        await run(arguments, {}, 0.5)
    assert str(caught.value) == message


async def ended(pid: int) -> bool:
    """Wait until no process has this number, or it is only waited for."""
    async with asyncio.timeout(20):
        while True:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                return True
            if state in "ZX":
                return True
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("way", ["timeout", "cancel"])
@pytest.mark.parametrize("deaf", [False, True], ids=["", "ignores SIGTERM"])
async def test_a_command_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, *, deaf: bool
) -> None:
    monkeypatch.setattr(_command, "GRACE", 0.2)
    pids = tmp_path / "pids"
    ignore = "trap '' TERM; " if deaf else ""
    script = f"{ignore}sleep 60 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait; sleep 60"
    call = asyncio.create_task(run(["sh", "-c", script], {}, 1.0 if way == "timeout" else 60))
    while not pids.exists():
        await asyncio.sleep(0.01)
    if way == "cancel":
        call.cancel()
    with pytest.raises(CommandFailed if way == "timeout" else asyncio.CancelledError):
        await call
    for pid in pids.read_text().split():
        assert await ended(int(pid))


async def test_a_child_left_in_the_background_neither_hangs_the_call_nor_is_ended(tmp_path: Path) -> None:
    output = await run(["sh", "-c", "sleep 60 & echo $!"], {}, 10)
    pid = int(output.stdout)
    os.kill(pid, 0)
    os.kill(pid, 9)
    assert await ended(pid)


async def test_endless_output_is_cut(tmp_path: Path) -> None:
    output = await run([sys.executable, "-c", "print('x' * 1000000)"], {}, 30)
    assert output.stdout == "x" * _command.LONGEST_OUTPUT


async def test_alloc_leases_and_does_no_more() -> None:
    made = AllocBackend(AllocOptions())
    assert await made.open(NETWORK, fake_underlay("192.0.2.1", mtu=9000)) == LeaseData()
    assert await made.start(LEASE) == Device("eth0", 9000, instance="alloc")
    await made.set_peers([peer(2)])
    assert made.routes([peer(2)]) == []
    assert not made.backstop
    assert await made.set_underlay(fake_underlay("192.0.2.1", mtu=1400)) == Device("eth0", 1400, instance="alloc")
    await made.aclose()


@pytest.mark.parametrize("made", [AllocBackend(AllocOptions()), ExtensionBackend(ExtensionOptions())], ids=["a", "e"])
async def test_starting_before_opening_is_said(made: AllocBackend | ExtensionBackend) -> None:
    with pytest.raises(BackendError, match="is not open; this is a defect of its caller"):
        await made.start(LEASE)


def test_instances_are_told_apart_by_name() -> None:
    assert Device("eth0", 1500).instance == "eth0"
    assert attrs.evolve(Device("eth0", 1500, instance="a"), mtu=1400).instance == "a"
    assert isinstance(fake_underlay("192.0.2.1"), Underlay)
