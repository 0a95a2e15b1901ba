"""The example observer takes what overlaynet tells it, and its command works."""

from pathlib import Path

import pytest
from overlaynet_example import ExampleObserver, ExampleOptions

from overlaynet.cli import main
from overlaynet.testing.observers import ObserverConformance


class TestExampleObserver(ObserverConformance):
    """The laws of observers."""

    @pytest.fixture
    def plugin(self, tmp_path: Path) -> object:
        return ExampleObserver(ExampleOptions(path=str(tmp_path / "journal")))


def test_the_command_prints_the_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = tmp_path / "journal"
    journal.write_text("one\ntwo\nthree\n")
    monkeypatch.setenv("OVERLAYNET_PLUGIN_OPTION", f"example.Path={journal}")
    assert main(["example", "--last", "2"]) == 0
    assert capsys.readouterr().out == "two\nthree\n"
