"""The documentation says what the code does."""

import importlib.util
import inspect
import re
from pathlib import Path

import attrs
import pytest

from overlaynet import api, config, hookspecs, testing
from overlaynet.settings import Settings

ROOT = Path(__file__).parents[2]


def test_the_reference_is_up_to_date() -> None:
    path = ROOT / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "reference.md").read_text() == module.render(), "run: python docs/make_reference.py"


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
            end = r"\(.*\)`( \(optional\))?" if inspect.isfunction(member) else " = .*`"
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
        assert f"### `{name}`" in page
        assert inspect.getdoc(member)
        for attribute in vars(member):
            if attribute.startswith("test_"):
                assert f"`{attribute}`" in page
    for cls in (testing.Network, testing.Node):
        for attribute, value in vars(cls).items():
            if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert re.search(rf"^- `(await )?{attribute}[`(]", page, re.MULTILINE), attribute
                assert inspect.getdoc(value), attribute
    for suite in (
        testing.BackendConformance,
        testing.RouterConformance,
        testing.StoreConformance,
        testing.TableConformance,
    ):
        for capability in suite.capabilities:
            assert f"| `{capability}` |" in page


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"], ids=lambda page: page.name)
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


def test_every_command_line_in_the_documentation_is_one_that_exists() -> None:
    from overlaynet.cli import BUILT_IN  # noqa: PLC0415 - beside its only use

    flags = {config.flag_name(field) for field in attrs.fields(Settings)}
    flags |= {f"--no-{flag[2:]}" for flag in flags}
    for page in [*ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        for line in re.findall(r"^(?:    |\$ )+(?:sudo )?overlaynet ([a-z].*)$", page.read_text(), re.MULTILINE):
            words = line.split()
            assert words[0] in BUILT_IN, f"{page.name}: {line}"
            if words[0] == "run":
                for word in words[1:]:
                    if word.startswith("--"):
                        assert word.split("=")[0] in flags | {"--config", "--print-config"}, f"{page.name}: {line}"


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
