"""The documentation says what the code does."""

import argparse
import importlib
import importlib.util
import inspect
import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest

from overlaynet import api, config, hookspecs, testing
from overlaynet.cli import BUILT_IN
from overlaynet.commands import Command, Commands
from overlaynet.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """What makes the reference."""
    path = ROOT / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(reference: ModuleType) -> None:
    assert (ROOT / "docs" / "reference.md").read_text() == reference.render(), "run: python docs/make_reference.py"


class Mute:
    """A class, of which not all is explained."""

    def __init__(self, given: int) -> None:
        self.said = 1
        """Explained."""
        self._private = self.unsaid = given

    def explained(self) -> None:
        """Is explained."""


class Deaf:
    """Another."""

    def unexplained(self) -> None: ...


@attrs.frozen
class Blank:
    """A value."""

    empty: int = 0


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loud", action="store_true")


def actions(parser: argparse.ArgumentParser) -> None:
    parser.add_subparsers().add_parser("sing")


@pytest.mark.parametrize(
    ("what", "make"),
    [
        ("Mute.unsaid", lambda module: module.described("###", Mute)),
        ("Deaf.unexplained", lambda module: module.described("###", Deaf)),
        ("Deaf.unexplained", lambda module: module.contract_texts(Deaf)),
        ("Blank.empty", lambda module: module.described("###", Blank)),
        ("--loud of overlaynet bird", lambda module: of_command(module, flags)),
        ("overlaynet bird sing", lambda module: of_command(module, actions)),
    ],
)
def test_what_is_public_and_not_explained_is_named(
    what: str, make: Callable[[ModuleType], Any], reference: ModuleType
) -> None:
    with pytest.raises(reference.Undocumented) as caught:
        list(make(reference))
    assert str(caught.value) == f"{what} is public, and nothing says what it is; write its docstring, or its help"


def of_command(module: ModuleType, configure: Callable[[argparse.ArgumentParser], None]) -> Any:
    parser = argparse.ArgumentParser(prog="overlaynet bird")
    configure(parser)
    return module.command(parser, "sing")


def test_every_flag_of_every_command_has_a_place_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    for name in BUILT_IN:
        parsers = [parser_of(name)]
        for parser in parsers:
            section = page.partition(f"\n### `{parser.prog}`\n")[2].partition("\n##")[0]
            assert section, parser.prog
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()
                elif action.dest not in ("help", "config"):
                    assert f"`{action.option_strings[0] if action.option_strings else action.metavar}" in (
                        page if action.default == argparse.SUPPRESS else section
                    ), (parser.prog, action)


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command, as the command line makes it."""
    parser = argparse.ArgumentParser(prog=f"overlaynet {command}", allow_abbrev=False)
    found = (
        importlib.import_module(f"overlaynet.cli.{command}").COMMAND if command in BUILT_IN else of_examples(command)
    )
    found.configure(parser)
    return parser


def of_examples(name: str) -> Command:
    """A command that an example package adds."""
    commands = Commands()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "plugins-example" / "overlaynet-journal" / "src"))
        journal = importlib.import_module("overlaynet_journal")
        journal.Journal(journal.JournalOptions()).overlaynet_cli(commands)
    command = commands.get(name)
    assert command is not None, f"there is no command {name}"
    return command


def test_every_setting_and_hook_has_a_place_in_the_reference_and_a_sentence() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    for field in attrs.fields(Settings):
        assert f"| `{config.flag_name(field)}` | `{config.environment_name(field)}` |" in page
        assert field.metadata["help"]
    for name, function in vars(hookspecs).items():
        if name.startswith("overlaynet_"):
            assert f"### `{name}(" in page
            assert inspect.getdoc(function)


def test_all_that_the_api_offers_has_a_place_in_the_reference_and_a_sentence() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()

    for name in api.__all__:
        assert re.search(rf"^- `{name}`.*: [A-Z]|^###+ `{name}\b.*`\n\n[A-Z]", page, re.MULTILINE), name
    for cls in (api.Driver, api.Store, api.TableStore, api.Backend, api.Router, api.Table):
        for name, member in vars(cls).items():
            required = getattr(member, "__isabstractmethod__", False)
            kept = inspect.isfunction(member) and not member.__doc__ and hasattr(cls.__base__, name)
            if (name.startswith("_") and not required) or isinstance(member, property) or kept:
                continue
            start = rf"^#### `(async )?{cls.__name__}\.{name}"
            end = r"\(.*\).*`( \(optional\))?" if inspect.isfunction(member) else " = .*`"
            assert re.search(rf"{start}{end}\n\n[A-Z]", page, re.MULTILINE), f"{cls.__name__}.{name}"
    for value in (getattr(api, name) for name in api.__all__):
        if isinstance(value, type) and attrs.has(value):
            section = page.partition(f"#### `{value.__name__}`\n")[2].partition("\n#")[0]
            for field in attrs.fields(value):
                assert f"\n| `{field.name}` | " in section, f"{value.__name__}.{field.name}"


def test_all_that_the_testing_kit_offers_has_a_place_in_the_reference_and_a_sentence() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    for name in testing.__all__:
        member = getattr(testing, name)
        if name == "VIRTUAL_CLOCK":
            assert f"`{name}`" in page or name in (ROOT / "docs" / "how-to.md").read_text()
            continue
        assert re.search(rf"^### `{name}\b.*`$", page, re.MULTILINE), name
        assert inspect.getdoc(member)
        for attribute in vars(member):
            if attribute.startswith("test_"):
                assert f"`{attribute}`" in page
    for suite in (
        testing.BackendConformance,
        testing.RouterConformance,
        testing.StoreConformance,
        testing.TableConformance,
    ):
        for capability in suite.capabilities:
            assert f"| `{capability}` |" in page


PAGES = [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", *sorted(ROOT.glob("plugins-example/*/README.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_inside_the_project_leads_somewhere(page: Path) -> None:
    headings = {}
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            if file not in headings:
                found = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                headings[file] = {
                    re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in found
                }
            assert anchor in headings[file], target


COMMAND = re.compile(r"(?:\$ |sudo |until |ip netns exec \S+ )*(?:[\w./-]*/)?overlaynet ([a-z-].*)")


def command_lines(page: Path) -> list[str]:
    """What follows ``overlaynet`` in the commands of a page: in blocks of a shell, and in lines that are indented as code."""
    lines, language = [], None
    for line in page.read_text().replace("\\\n", " ").splitlines():
        if line.strip().startswith("```"):
            language = line.strip()[3:] or "text" if language is None else None
        elif language in ("bash", "console", "sh") or (language is None and line.startswith("    ")):
            found = COMMAND.fullmatch(line.strip())
            lines += [] if found is None else [found[1]]
    return lines


def words_of(line: str) -> list[str]:
    """The arguments, up to where the shell's business begins."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    words = list(itertools.takewhile(lambda word: not set(word) <= set(";&|<>()"), reader))
    return words[:-1] if words[-1] in ("1", "2") else words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_in_the_documentation_is_one_that_the_command_takes(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in command_lines(page):
        name, *words = words_of(line)
        status = 0
        try:
            parser_of(name).parse_args(words)
        except SystemExit as ended:
            status = int(ended.code or 0)
        assert status == 0, f"{page.name}: {line}: {capsys.readouterr().err}"


def test_the_commands_of_the_documentation_are_found() -> None:
    found = {str(page.relative_to(ROOT)): [words_of(line) for line in command_lines(page)] for page in PAGES}
    assert ["plugins", "doctor"] in found["docs/how-to.md"]
    assert ["status", "--status-socket", "$host.sock"] in found["docs/tutorial-backend.md"]
    assert ["history", "--since", "2h"] in found["plugins-example/overlaynet-journal/README.md"]
    assert sum(map(len, found.values())) > 50


def test_every_test_that_a_law_names_exists() -> None:
    code = "\n".join(
        file.read_text() for directory in ("tests", "overlaynet/testing") for file in (ROOT / directory).rglob("*.py")
    )
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "laws.md").read_text())
    assert len(named) > 20
    for name in named:
        assert re.search(rf"^ *(async )?def {name}\(", code, re.MULTILINE), name


def test_every_test_that_proves_a_promise_under_a_fault_exists() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| (?!fault |---)(.*) \|$", page, re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        fault, injected, promise, proofs = row.split(" | ")
        assert fault
        assert injected
        assert promise
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", proofs)
        assert len(named) == len(proofs.split(", ")), f"not a test's path and name: {proofs}"
        for path, name in named:
            assert re.search(rf"^ *(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"
