"""``overlaynet plugins new``: what it writes installs, is found, and passes its tests at once."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from overlaynet import __version__
from overlaynet.cli import main
from overlaynet.cli._new import AXES

FILES = {"README.md", "pyproject.toml", "src/overlaynet_my_own/__init__.py", "src/overlaynet_my_own/py.typed"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A package for each axis, written and installed where ``target`` is."""
    directory = tmp_path_factory.mktemp("new")
    packages = {axis: directory / axis for axis in AXES}
    for axis, package in packages.items():
        assert main(["plugins", "new", f"first-{axis}", "--axis", axis, "--directory", str(package)]) == 0
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory / "target")]
    result = subprocess.run([*pip, *packages.values()], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return packages | {"target": directory / "target"}


def inside(installed: Mapping[str, Path], *command: str | Path, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(installed["target"])},
        timeout=300,
    )


@pytest.mark.parametrize("axis", AXES)
def test_it_passes_its_tests_and_they_are_many(installed: Mapping[str, Path], axis: str) -> None:
    result = inside(
        installed, "-m", "pytest", "-q", "-rs", "-W", "error", "-p", "no:cacheprovider", directory=installed[axis]
    )
    assert result.returncode == 0, result.stdout
    passed = int(result.stdout.splitlines()[-1].split(" passed")[0])
    assert passed >= 15, result.stdout


def test_all_are_found_and_nothing_is_broken(installed: Mapping[str, Path], tmp_path: Path) -> None:
    result = inside(installed, "-m", "overlaynet", "plugins", "--json", directory=tmp_path)
    assert result.returncode == 0, result.stdout
    found = {(entry["group"], entry["name"]): entry["distribution"] for entry in json.loads(result.stdout)}
    for group, axis in (("stores", "store"), ("backends", "backend"), ("routers", "router"), ("plugins", "observer")):
        assert found[f"overlaynet.{group}", f"first-{axis}"] == f"overlaynet-first-{axis}"


def test_one_that_is_broken_fails_its_tests(installed: Mapping[str, Path], tmp_path: Path) -> None:
    package = tmp_path / "package"
    assert main(["plugins", "new", "broken", "--axis", "backend", "--directory", str(package)]) == 0
    driver = package / "src/overlaynet_broken/__init__.py"
    driver.write_text(driver.read_text().replace("for peer in peers\n", "for peer in peers[1:]\n"))
    environment = os.environ | {"PYTHONPATH": str(package / "src")}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, cwd=package, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 1
    assert "test_routes_lead_to_every_peer_and_nowhere_else" in result.stdout


def test_its_backend_is_the_one_that_the_network_document_names(installed: Mapping[str, Path], tmp_path: Path) -> None:
    arguments = ["--store", "file", "--store-path", str(tmp_path / "store")]
    result = inside(
        installed,
        *("-m", "overlaynet", "network", "set", "--network", "10.244.0.0/16", "--backend", "first-backend"),
        *("--backend-option", "MTU=1400", *arguments),
        directory=tmp_path,
    )
    assert json.loads(result.stdout.splitlines()[-1])["Backend"] == {"Type": "first-backend", "MTU": 1400}


@pytest.mark.parametrize("axis", AXES)
def test_what_is_written_is_tidy_and_has_its_names(axis: str, tmp_path: Path) -> None:
    package = tmp_path / "package"
    assert main(["plugins", "new", "my-own", "--axis", axis, "--directory", str(package)]) == 0
    written = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    assert written == FILES | {"tests/test_my_own.py"}
    assert f'\ntest = ["overlaynet[testing]>={__version__}"]\n' in (package / "pyproject.toml").read_text()
    for path in written:
        text = (package / path).read_text()
        assert "example" not in text.lower(), path
        assert re.search("@[a-z]+@", text) is None, path
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "120", str(package)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["", "Upper", "1st", "a--b", "a-", "under_score", "a/b", "ä", "x" * 41, "a b", "a.b"])
def test_a_name_that_cannot_be_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", name, "--axis", "store"]) == 1
    assert capsys.readouterr().err == (
        f"overlaynet: {name!r} cannot be a plugin's name; use small letters, digits and single hyphens, "
        f"beginning with a letter, 40 characters at most, such as 'my-store'\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "axis", "message"),
    [
        ("udp", "backend", f"there is a backend 'udp' already, from overlaynet {__version__}; choose another name"),
        ("run", "observer", "overlaynet has a command 'run' of its own, which the plugin's would clash with"),
    ],
)
def test_a_name_that_is_taken_is_refused(
    name: str, axis: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "new", name, "--axis", axis, "--directory", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == f"overlaynet: {message}\n"
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", "mine", "--axis", "store"]) == 0
    assert (tmp_path / "overlaynet-mine" / "pyproject.toml").exists()
    (tmp_path / "overlaynet-mine" / "README.md").write_text("mine")
    assert main(["plugins", "new", "mine", "--axis", "router"]) == 1
    message = "overlaynet-mine exists, and nothing is overwritten; choose another place with --directory"
    assert capsys.readouterr().err == f"overlaynet: {message}\n"
    assert (tmp_path / "overlaynet-mine" / "README.md").read_text() == "mine"


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["plugins", "new", "mine", "--axis", "store", "--directory", str(tmp_path / "file" / "x")]) == 1
    assert "cannot be written: Not a directory" in capsys.readouterr().err
