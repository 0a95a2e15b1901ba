"""The example observer takes what overlaynet tells it, and its command works."""

from pathlib import Path

import overlaynet_example
import pytest

from overlaynet.cli import main
from overlaynet.testing.observers import ObserverConformance


@pytest.fixture(autouse=True)
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A journal of the test's own."""
    path = tmp_path / "journal"
    monkeypatch.setattr(overlaynet_example, "JOURNAL", path)
    return path


class TestExampleObserver(ObserverConformance):
    """The laws of observers."""

    @pytest.fixture
    def plugin(self) -> object:
        return overlaynet_example


def test_the_command_prints_the_last_lines(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal.write_text("one\ntwo\nthree\n")
    assert main(["example", "--last", "2"]) == 0
    assert capsys.readouterr().out == "two\nthree\n"
