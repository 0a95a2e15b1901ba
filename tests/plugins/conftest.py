"""Distributions that are as good as installed."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution: its metadata, its entry points and one module, in a directory on ``sys.path``."""

    def install(name: str, version: str, entry_points: str, module: str = "", source: str = "") -> None:
        directory = tmp_path / name
        information = directory / f"{name}-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (information / "entry_points.txt").write_text(entry_points)
        (information / "top_level.txt").write_text(f"{module}\n")
        if module:
            (directory / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(directory))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install
