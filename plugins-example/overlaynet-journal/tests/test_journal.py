"""The journal keeps overlaynet's laws for observers, tells what happened to whole daemons, and reads only what it wrote."""

import asyncio
import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlaynet.cli import main
from overlaynet.testing import VIRTUAL_CLOCK, Network
from overlaynet.testing.observers import LIFE, ObserverConformance
from overlaynet_journal import Journal, JournalOptions
from overlaynet_journal._entries import EVENTS, Entry, NotAnEntry, parse


@pytest.fixture
def anyio_backend() -> object:
    """Days pass at once."""
    return VIRTUAL_CLOCK


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the journal is, for the command as well."""
    path = tmp_path / "logs" / "journal"
    monkeypatch.setenv("OVERLAYNET_PLUGIN_OPTION", f"journal.Path={path}")
    return path


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    """The observer."""
    journal = Journal(JournalOptions(path=str(path)))
    yield journal
    if journal._handler is not None:
        journal._handler.close()


class TestJournal(ObserverConformance):
    """The laws of observers."""

    @pytest.fixture
    def plugin(self, journal: Journal) -> object:
        return journal


def write(journal: Journal, *names: str) -> None:
    """Tell the journal of these events."""
    events = dict(LIFE)
    for name in names:
        hook = f"overlaynet_{name}"
        wanted = {"overlaynet_peer_changed": ("new",)}.get(hook, tuple(events[hook]))
        getattr(journal, hook)(**{argument: events[hook][argument] for argument in wanted})


def test_each_event_is_an_entry(journal: Journal, path: Path) -> None:
    write(journal, *(hook.removeprefix("overlaynet_") for hook, _ in LIFE))
    entries = [parse(line) for line in path.read_text().splitlines()]
    assert sorted(entry.event for entry in entries) == sorted(EVENTS)
    assert [entry.line() for entry in entries] == path.read_text().splitlines()
    lost = next(entry for entry in entries if entry.event == "lost")
    assert lost.reason == "another node holds it"
    changed = next(entry for entry in entries if entry.event == "peer-changed")
    assert str(changed.address) == "2001:db8::2"
    assert len(changed.subnets) == 2


@pytest.mark.anyio
async def test_it_tells_what_happens_to_whole_daemons(journal: Journal, path: Path) -> None:
    async with Network(2) as network:
        a, b = network.nodes
        network.observers = [journal]
        await a.stop()
        a.start()
        await network.converge()
        assert journal._handler is not None
        await b.crash()
        await asyncio.sleep(2 * 86400)
        network.store_down(a)
        await asyncio.sleep(600)
        network.heal()
        await asyncio.sleep(600)
        await a.stop()
    events = [parse(line).event for line in path.read_text().splitlines()]
    for one, other in (
        ("acquired", "ready"), ("ready", "renewed"), ("peer-added", "peer-removed"), ("peer-removed", "degraded"),
        ("degraded", "recovered"), ("recovered", "stopping"),
    ):  # fmt: skip
        assert events.index(one) < events.index(other), events


def test_its_size_is_bounded(tmp_path: Path) -> None:
    journal = Journal(JournalOptions(path=str(tmp_path / "journal"), max_bytes=10_000, files=2))
    for _ in range(1000):
        write(journal, "peer_added")
    assert {file.name for file in tmp_path.iterdir()} == {"journal", "journal.1", "journal.2"}
    assert all(file.stat().st_size <= 10_000 for file in tmp_path.iterdir())
    assert journal._handler is not None
    journal._handler.close()


def test_a_journal_that_cannot_be_written_is_a_warning_and_is_tried_again(
    journal: Journal, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.write_text("in the way")
    write(journal, "recovered")
    assert "journal not written" in caplog.text
    path.parent.unlink()
    write(journal, "stopping")
    assert parse(path.read_text().strip()).event == "stopping"


def test_a_disk_that_is_full_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(JournalOptions(path="/dev/full"))
    write(journal, "recovered")
    write(journal, "recovered")
    assert caplog.text.count("journal not written") == 2
    assert journal._handler is not None
    with pytest.raises(OSError, match="No space left"):
        journal._handler.close()


def test_the_command_shows_all_files_the_oldest_first(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.parent.mkdir()
    for number, file in enumerate((f"{path}.2", f"{path}.1", str(path))):
        time = datetime.datetime(2026, 3, 1 + number, 12, tzinfo=datetime.UTC)
        Path(file).write_text(f"{Entry(time, 'degraded', reason=f'trouble {number}').line()}\n")
    assert main(["history"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 2)[-1].strip() for line in lines] == ["trouble 0", "trouble 1", "trouble 2"]
    assert main(["history", "--json", "--since", "2026-03-03T12:00+00:00"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "time": "2026-03-03T12:00:00.000+00:00",
        "event": "degraded",
        "reason": "trouble 2",
    }
    assert main(["history", "--since", "1s"]) == 0
    assert capsys.readouterr().out == ""


def test_the_command_shows_one_peer(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    write(journal, "ready", "peer_added", "peer_removed", "recovered")
    for name, events in {
        "far": ["peer-added"],
        "192.0.2.2": ["peer-added"],
        "10.244.2.0/24": ["peer-added", "peer-removed"],
        "10.244.2.99": ["peer-added", "peer-removed"],
        "fd00:2::9": ["peer-removed"],
        "near": ["ready"],
        "nobody": [],
    }.items():
        assert main(["history", "--json", "--peer", name]) == 0
        assert [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()] == events, name


def test_a_line_that_is_no_entry_is_named_and_hides_nothing(
    journal: Journal, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(journal, "recovered")
    with path.open("ab") as file:
        file.write(b'{"time": "2026-\xff\n')
    write(journal, "stopping")
    assert main(["history"]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert shown.err == f"{path}, line 2, is no entry: it is not JSON\n"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "it is not JSON"),
        ("[" * 5000, "it is not JSON"),
        ("1", "it is not a JSON object"),
        ("x" * 9000, "it is longer than 8192 characters"),
        ('{"who": 1}', "it has an unknown member 'who'"),
        ('{"event": 1}', "its event is not a printable string"),
        ('{"event": "ready", "reason": "\\u001b[2J"}', "its reason is not a printable string"),
        ('{"event": "rebooted"}', f"its event is not one of {', '.join(EVENTS)}"),
        ('{"event": "ready"}', "Invalid isoformat string: ''"),
        ('{"event": "ready", "time": "2026-03-01"}', "its time has no time zone"),
        (
            '{"event": "ready", "time": "2026-03-01T00:00+00:00", "subnets": [1]}',
            "its subnets are not a list of strings",
        ),
        ('{"event": "ready", "time": "2026-03-01T00:00+00:00", "subnets": ["x"]}', "'x' does not appear to be an IPv4"),
        ('{"event": "ready", "time": "2026-03-01T00:00+00:00", "address": "x"}', "'x' does not appear to be an IPv4"),
    ],
)
def test_only_what_it_wrote_is_an_entry(line: str, problem: str) -> None:
    with pytest.raises(NotAnEntry) as caught:
        parse(line)
    assert str(caught.value).startswith(problem)


def test_without_a_journal_it_says_what_is_missing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history"]) == 1
    assert capsys.readouterr().err == (
        f"overlaynet: the journal {path} cannot be read: there is none; has a daemon run here with the plugin journal?\n"
    )


@pytest.mark.parametrize("text", ["yesterday", "", "5", "5w", "-5m", "999999999d", "2026-02-30"])
def test_a_moment_that_is_none_is_refused(text: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["history", f"--since={text}"])
    assert f"{text!r} is neither a duration such as 90s, 15m, 2h or 3d, nor" in capsys.readouterr().err


def test_the_help_teaches(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["history", "--help"])
    text = capsys.readouterr().out
    for word in ("--since", "--peer", "--json", "overlaynet history --since 2h", f"The daemon writes {path}"):
        assert word in text
