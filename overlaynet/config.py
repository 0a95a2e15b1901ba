"""Settings read from where they are given: flags over environment variables over a TOML file over defaults."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from overlaynet import options
from overlaynet.errors import ConfigError, PluginError, SettingsError, did_you_mean
from overlaynet.settings import GROUPS, Settings

ENVIRONMENT_PREFIX = "OVERLAYNET_"


@attrs.frozen
class Resolved:
    """Settings, and for each where its value came from (``default``, ``flag``, ``environment OVERLAYNET_…``, ``file …``)."""

    settings: Settings
    sources: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The effective settings as a TOML file, with the source of each in a comment; secrets are masked."""
        lines = []
        for field in attrs.fields(Settings):
            value = getattr(self.settings, field.name)
            comment = f"  # {self.sources[field.name]}"
            if value is None:
                lines.append(f"# {flag_name(field)[2:]} is not set")
            elif field.metadata["secret"]:
                lines.append(f'{flag_name(field)[2:]} = "{options.MASK}"{comment}')
            else:
                lines.append(f"{flag_name(field)[2:]} = {_toml(value)}{comment}")
        return lines


def flag_name(field: attrs.Attribute[Any]) -> str:
    """The setting's flag: ``--etcd-endpoints``."""
    return "--" + field.name.replace("_", "-")


def environment_name(field: attrs.Attribute[Any]) -> str:
    """The setting's environment variable: ``OVERLAYNET_ETCD_ENDPOINTS``."""
    return ENVIRONMENT_PREFIX + field.name.upper()


def add_flags(parser: argparse.ArgumentParser, groups: typing.Collection[str] = tuple(GROUPS)) -> None:
    """Add the flags of the settings in ``groups``, and ``--config``, to a parser."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help=f"TOML file of settings; also {ENVIRONMENT_PREFIX}CONFIG",
    )
    sections = {group: parser.add_argument_group(title) for group, title in GROUPS.items() if group in groups}
    hints = typing.get_type_hints(Settings)
    for field in attrs.fields(Settings):
        section = sections.get(field.metadata["group"])
        if section is None:
            continue
        text = field.metadata["help"].replace("%", "%%")
        if field.default not in (None, (), False):
            text += f" (default: {_shown_default(field.default)})"
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if hints[field.name] is bool:
            section.add_argument(flag_name(field), action=argparse.BooleanOptionalAction, **common)
        else:
            action = "append" if _is_list(hints[field.name]) else "store"
            section.add_argument(flag_name(field), action=action, metavar=field.metadata["metavar"], **common)


def resolve(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Resolved:
    """Work the settings out from parsed flags (of :func:`add_flags`), the environment, and the file that they name.

    :raises SettingsError: naming the setting, where it came from, and what it should be.
    """
    flags = vars(arguments)
    path = flags.get("config") or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    file = _read_file(path) if path else {}
    hints = typing.get_type_hints(Settings)
    values, sources = {}, {}
    for field in attrs.fields(Settings):
        variable = environment_name(field)
        if field.name in flags:
            given, source, shown = flags[field.name], "flag", f"{flag_name(field)}"
        elif variable in environment:
            given, source = environment[variable], f"environment {variable}"
            shown = f"the environment variable {variable}"
        elif field.name in file:
            given, source, shown = file[field.name], f"file {path}", f"{flag_name(field)[2:]} in {path}"
        else:
            sources[field.name] = "default"
            continue
        values[field.name] = _read(field, hints[field.name], given, shown, from_file=source.startswith("file"))
        sources[field.name] = source
    return Resolved(Settings(**values), sources, tuple(_misspelt(environment)))


@contextlib.contextmanager
def from_settings() -> Iterator[None]:
    """Whatever is refused in the ``with`` block is refused because of the settings: raises it as :exc:`SettingsError`."""
    try:
        yield
    except (ConfigError, PluginError) as error:
        raise SettingsError(str(error)) from error


def store_options(settings: Settings) -> dict[str, object]:
    """What the selected store's driver is to be given: the settings made for it, and those of ``--store-option``."""
    chosen: dict[str, object] = {}
    for field in attrs.fields(Settings):
        driver, name = field.metadata["driver_option"] or (None, "")
        if driver == settings.store:
            chosen[name] = getattr(settings, field.name)
    return chosen


def backend_arguments(settings: Settings, backend: str) -> dict[str, object]:
    """The settings made for the backend of this name, as arguments for its class."""
    chosen: dict[str, object] = {}
    for field in attrs.fields(Settings):
        name, argument = field.metadata["backend_argument"] or (None, "")
        if name == backend:
            chosen[argument] = getattr(settings, field.name)
    return chosen


def key_values(pairs: typing.Iterable[str], flag: str) -> dict[str, str]:
    """Read ``KEY=VALUE`` pairs. :raises SettingsError: naming the flag and the pair that is none."""
    values = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise SettingsError(f"{flag} {pair!r} is not of the form KEY=VALUE")
        values[key.strip()] = value
    return values


def plugin_options(settings: Settings) -> dict[str, dict[str, str]]:
    """The values of ``--plugin-option``, by plugin and option. :raises ConfigError: for one that is not NAME.KEY=VALUE."""
    chosen: dict[str, dict[str, str]] = {}
    for key, value in key_values(settings.plugin_option, "--plugin-option").items():
        name, _, option = key.rpartition(".")
        if not name or not option:
            raise ConfigError(f"--plugin-option {key!r} does not name a plugin's option; write NAME.KEY=VALUE")
        chosen.setdefault(name, {})[option] = value
    return chosen


def _read(field: attrs.Attribute[Any], hint: Any, given: Any, shown: str, *, from_file: bool) -> Any:
    try:
        if from_file:
            value = options.typed(hint, given)
        elif isinstance(given, bool):
            value = given
        elif _is_list(hint):
            texts = given if isinstance(given, list) else [given]
            if field.metadata["split"]:
                texts = [item for text in texts for item in text.split(",")]
            value = tuple(text.strip() for text in texts if text.strip())
        else:
            value = options.read_text(hint, given)
    except ValueError as error:
        wrong: str | None = str(error) if field.metadata["secret"] else f"{error}, not {given!r}"
    else:
        check = field.metadata["check"]
        wrong = check(value) if check is not None and value is not None else None
        if wrong is None:
            return value
    raise SettingsError(f"{shown} {wrong}")


def _read_file(path: str) -> dict[str, object]:
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"the configuration file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the configuration file {path} is not TOML: {error}") from error
    known = {field.name for field in attrs.fields(Settings)}
    values = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            hint = did_you_mean(key, [each.replace("_", "-") for each in known], lambda text: text.replace("_", "-"))
            raise SettingsError(f"the configuration file {path} has an unknown setting {key!r}{hint}")
        values[name] = value
    return values


def _misspelt(environment: Mapping[str, str]) -> typing.Iterator[str]:
    """Variables that look like a misspelt setting. Others may well be somebody else's (Kubernetes makes such names)."""
    known = {environment_name(field) for field in attrs.fields(Settings)} | {f"{ENVIRONMENT_PREFIX}CONFIG"}
    for name in sorted(environment):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                yield f"the environment variable {name} is not a setting and is ignored; did you mean {near[0]}?"


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _shown_default(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)
