"""The bench of commands' start."""

import pytest

from bench import startup
from bench.startup import NOTHING
from overlaynet.errors import OverlaynetError


def test_each_command_is_started_in_each_round_and_once_before(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run(name: str, arguments: object) -> tuple[float, float]:
        started.append(name)
        number = len(started) // 2
        return 100.0, (10.0 if name == NOTHING else 13.0) + number

    monkeypatch.setattr(startup, "run", run)
    found = startup.measure({NOTHING: (), "a": ()}, 3)
    assert started == [NOTHING, "a"] * 4
    assert (found[NOTHING].processor.lowest, found[NOTHING].processor.highest) == (11.0, 13.0)
    assert (found["a"].clock.median, found["a"].added.median) == (100.0, 4.0)
    assert found[NOTHING].added.highest == 0.0


def test_every_command_that_it_measures_works(capfd: pytest.CaptureFixture[str]) -> None:
    assert startup.main(["--rounds", "1"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    for name in startup.COMMANDS:
        assert f"\n{name} " in out
    assert "usage:" not in out


def test_a_process_takes_time_and_more_work_takes_more_of_it() -> None:
    clock, processor = startup.run("busy", ("-c", "import time\nwhile time.process_time() < 0.3: pass"))
    assert processor >= 250
    assert clock >= 250


def test_a_command_that_fails_is_no_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OverlaynetError, match="`bad` ended with exit status 3; run it by hand to see why"):
        startup.run("bad", ("-c", "raise SystemExit(3)"))
    monkeypatch.setattr(startup, "COMMANDS", {NOTHING: ("-c", "raise SystemExit(3)")})
    assert startup.main([]) == 1
    assert "ended with exit status 3" in capsys.readouterr().err


def test_no_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        startup.main(["--rounds", "0"])
    assert "--rounds must be 1 or more" in capsys.readouterr().err
