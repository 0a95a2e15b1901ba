"""The bench's command line, as far as it measures nothing."""

from pathlib import Path

import pytest

from bench import command, results
from bench.cpu import Machine
from bench.paths import Path as BenchPath
from bench.results import Results
from overlaynet.errors import OverlaynetError


def test_an_unknown_path_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--paths", "host,geneve"])
    assert "'geneve' is not one of host, vxlan, native" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--seconds", "-1"], ["--peers", "2,x"], ["--peers", "10001"], ["--engines", "c"]]
)
def test_numbers_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_quick_means_less_but_never_overrides() -> None:
    quick = command.parse(["--quick", "--seconds", "2"])
    assert (quick.rounds, quick.seconds, quick.mode, quick.peers) == (1, 2, "wire", [2, 10_000])
    whole = command.parse([])
    assert (whole.rounds, whole.seconds, whole.mode) == (5, 3, "both")
    assert whole.peers == [2, 10, 100, 1_000, 10_000]


def test_what_is_not_on_the_machine_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = BenchPath("geneve", "Geneve", command.PATHS["host"].open, {"no-such-command": "geneve-tools"})
    monkeypatch.setattr(command, "PATHS", {"host": command.PATHS["host"], "geneve": lacking})
    assert [path.name for path in command.available(None)] == ["host"]
    assert "not on this machine: geneve (apt-get install geneve-tools)" in capsys.readouterr().out
    with pytest.raises(OverlaynetError, match="apt-get install geneve-tools"):
        command.available(["geneve"])
    nowhere = BenchPath("geneve", "Geneve", command.PATHS["host"].open, {"no-such-command": None})
    monkeypatch.setattr(command, "PATHS", {"geneve": nowhere})
    told = r"not on this machine: geneve \(no package of Debian's has no-such-command: put it into PATH\)"
    with pytest.raises(OverlaynetError, match=told):
        command.available(["geneve"])


def test_an_earlier_run_can_be_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Results(Machine("6.18", "Processor", 2, "3.11.7"), {})
    results.add(found.paths, "plain", "vxlan", {"tcp1": 12.3})
    (tmp_path / "run.json").write_text(found.to_json())
    arguments = ["--read", str(tmp_path / "run.json"), "--chart", str(tmp_path / "run.svg")]
    assert command.main(arguments) == 0
    assert "12.3" in capsys.readouterr().out
    assert "plain veth" in (tmp_path / "run.svg").read_text()
    shown_again = command.parse(["--read", str(tmp_path / "run.json")])
    assert (shown_again.json, shown_again.chart) == (None, None)


def test_a_run_is_written_down_without_being_asked_for() -> None:
    chosen = command.parse([])
    assert (chosen.json, chosen.chart) == (Path("build/bench.json"), Path("build/bench.svg"))


def test_a_file_that_is_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("[]")
    assert command.main(["--read", str(tmp_path / "run.json")]) == 1
    assert "run.json cannot be read" in capsys.readouterr().err


def test_the_estimate_learns_from_what_the_steps_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bench.command.time.monotonic", lambda: now[0])
    progress = command.Progress(60.0)
    assert progress.estimate == "about 60 s left"
    with progress.step(20.0, "a step"):
        now[0] += 40.0
    assert progress.estimate == "about 80 s left"
