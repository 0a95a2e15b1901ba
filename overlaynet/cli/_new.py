"""``overlaynet plugins new``: write a package that works, to begin from."""

from __future__ import annotations

import importlib.resources
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from overlaynet import __version__
from overlaynet.cli import BUILT_IN
from overlaynet.entry_points import GROUPS, OBSERVERS, entries, origin
from overlaynet.errors import ConfigError

AXES = (*GROUPS, "observer")
_USE = {
    "backend": "overlaynet network set --network 10.244.0.0/16 --backend example",
    "store": "overlaynet run --store example",
    "router": "overlaynet run --router example",
    "observer": "overlaynet example",
}


def new(name: str, axis: str, directory: Path | None) -> Path:
    """Write the package of a plugin, and return where it is.

    :raises ConfigError: if the name cannot be used, the directory exists, or it cannot be written; then nothing is left.
    """
    _check_name(name, axis)
    directory = Path(f"overlaynet-{name}") if directory is None else directory
    if directory.exists():
        raise ConfigError(f"{directory} exists, and nothing is overwritten; choose another place with --directory")
    try:
        for path, text in _files(name, axis).items():
            file = directory / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from error
    return directory


def _check_name(name: str, axis: str) -> None:
    """A name is part of a distribution's (PEP 508), a module's and a class's; backends' are matched in small letters."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 40:
        raise ConfigError(
            f"{name!r} cannot be a plugin's name; use small letters, digits and single hyphens, beginning with a letter, "
            f"40 characters at most, such as 'my-{axis}'"
        )
    group = GROUPS.get(axis, OBSERVERS)
    for entry in entries(group):
        if entry.name == name:
            raise ConfigError(
                f"there is a {axis} {name!r} already, from {' '.join(origin(entry))}; choose another name"
            )
    if axis == "observer" and name in BUILT_IN:
        raise ConfigError(f"overlaynet has a command {name!r} of its own, which the plugin's would clash with")


def _files(name: str, axis: str) -> Mapping[str, str]:
    """The package's files and their texts."""
    module = f"overlaynet_{name.replace('-', '_')}"
    camel = "".join(part.capitalize() for part in name.split("-"))
    words = {
        "@axis@": axis,
        "@article@": ("An " if axis == "observer" else "A ") + axis,
        "@group@": GROUPS.get(axis, OBSERVERS),
        "@target@": f"overlaynet_example:Example{axis.capitalize()}",
        "@use@": _USE[axis],
        "@version@": __version__,
        # What the templates are called, as it is spelt in its places; the first that fits is taken.
        "overlaynet_example": module,
        "example0": name[:14].rstrip("-") + "0",  # an overlay's name is no longer than an interface's
        "Example": camel,
        "example": name,
    }

    def read(template: str) -> str:
        text = (importlib.resources.files("overlaynet.templates") / template).read_text(encoding="utf-8")
        for word in [word for word in words if word.startswith("@")]:
            text = text.replace(word, words[word])
        return re.sub("overlaynet_example|example0|[eE]xample", lambda match: words[match[0]], text)

    return {
        "pyproject.toml": read("project.toml"),
        "README.md": read("README.md"),
        f"src/{module}/__init__.py": read(f"{axis}.py"),
        f"src/{module}/py.typed": "",
        f"tests/test_{name.replace('-', '_')}.py": read(f"test_{axis}.py"),
    }
