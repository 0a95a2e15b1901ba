"""The tutorial on backends builds the example package: what it has its reader write is what stands there."""

import re
from pathlib import Path

import pytest

from overlaynet.cli import main

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "plugins-example" / "overlaynet-tls"
WRITTEN = dict(
    re.findall(
        r"^```\w+ (\S+)\n(.*?)^```$", (ROOT / "docs" / "tutorial-backend.md").read_text(), re.MULTILINE | re.DOTALL
    )
)


@pytest.mark.parametrize("path", sorted(WRITTEN))
def test_a_file_of_the_tutorial_is_that_of_the_package(path: str) -> None:
    assert WRITTEN[path] == (PACKAGE / path).read_text(), f"copy {path} into the page, or out of it"


def test_the_tutorial_has_all_of_the_packages_code() -> None:
    code = {str(path.relative_to(PACKAGE)) for path in PACKAGE.glob("src/**/*.py")}
    assert code == {path for path in WRITTEN if path.startswith("src/")}


def test_what_it_does_not_have_is_what_plugins_new_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Where the package is installed, its name is taken.
    monkeypatch.setattr("overlaynet.cli._new.entries", lambda group: [])
    assert main(["plugins", "new", "tls", "--axis", "backend", "--directory", str(tmp_path / "new")]) == 0
    for path in ("pyproject.toml", "src/overlaynet_tls/py.typed"):
        assert (tmp_path / "new" / path).read_text() == (PACKAGE / path).read_text()
