"""Observers with options: declared as a driver's are, given with --plugin-option, and shown by `overlaynet plugins show`."""

from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

from overlaynet.cli import main
from overlaynet.errors import ConfigError, PluginError
from overlaynet.plugins import Plugins

Install = Callable[..., None]

OBSERVER = """\
import attrs
from overlaynet.api import Command, Observer, between, hookimpl, option

@attrs.frozen
class Options:
    colour: str = option("red", "how it looks")
    size: int = option(3, "how large it is", check=between(1, 9))

class Bird(Observer):
    '''Sings.'''
    Options = Options

    @hookimpl
    def overlaynet_cli(self, commands):
        commands.add(Command("bird", "show the bird", lambda parser: None, self.show))

    def show(self, arguments):
        print(self.options.colour, self.options.size)
        return 0
"""


@pytest.fixture
def bird(install: Install) -> None:
    """An observer with options."""
    install("aviary", "1.2", "[overlaynet.plugins]\nbird = aviary_bird:Bird\n", "aviary_bird", OBSERVER)


def problem_of(install: Install, old: str, new: str) -> str:
    """What is said of an observer that was changed."""
    assert old in OBSERVER
    source = OBSERVER.replace(old, new)
    install("aviary", "1.2", "[overlaynet.plugins]\nbird = aviary_bird:Bird\n", "aviary_bird", source)
    (entry,) = entry_points(group="overlaynet.plugins", name="bird")
    with pytest.raises(PluginError) as caught:
        Plugins().load_observer(entry, [entry])
    who = "overlaynet.plugins: bird = aviary_bird:Bird (aviary 1.2)"
    assert str(caught.value).startswith(who)
    return str(caught.value).removeprefix(who)


@pytest.mark.usefixtures("bird")
def test_they_have_their_defaults_unless_they_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bird"]) == 0
    assert capsys.readouterr().out == "red 3\n"
    monkeypatch.setenv("OVERLAYNET_PLUGIN_OPTION", "bird.Size=7")
    assert main(["bird"]) == 0
    assert capsys.readouterr().out == "red 7\n"


@pytest.mark.usefixtures("bird")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("brid.Size=7", "--plugin-option: there is no plugin 'brid'; did you mean 'bird'? (installed: bird)"),
        ("Size=7", "--plugin-option 'Size' does not name a plugin's option; write NAME.KEY=VALUE"),
        ("bird.Size", "--plugin-option 'bird.Size' is not of the form KEY=VALUE"),
        ("bird.Site=7", "plugin bird has no option 'Site'; did you mean 'Size'? (it has Colour, Size)"),
        ("bird.Size=large", "plugin bird: option Size must be a whole number, not 'large'"),
        ("bird.Size=10", "plugin bird: option Size must be between 1 and 9, not 10"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_it(
    given: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OVERLAYNET_PLUGIN_OPTION", given)
    assert main(["bird"]) == 2
    assert capsys.readouterr().err == f"overlaynet: {message}\n"


def test_a_module_has_no_options(install: Install) -> None:
    source = "from overlaynet.api import hookimpl\n@hookimpl\ndef overlaynet_recovered(): pass\n"
    install("aviary", "1.2", "[overlaynet.plugins]\nbird = aviary_bird\n", "aviary_bird", source)
    Plugins().load_observers({})
    with pytest.raises(ConfigError) as caught:
        Plugins().load_observers({"bird": {"Size": "7"}})
    assert str(caught.value) == "plugin bird: it has no options; remove --plugin-option bird.Size"


def test_one_that_cannot_be_made_is_broken(install: Install) -> None:
    problem = problem_of(install, "'''Sings.'''", "def __init__(self, options): raise OSError('no voice')")
    assert problem == " could not be made: OSError('no voice'); repair or uninstall it"


def test_defaults_that_its_class_refuses_are_the_observers_fault(install: Install) -> None:
    refusal = "    def __attrs_post_init__(self): raise ValueError('Colour and Size do not go together')\n"
    problem = problem_of(install, "\nclass Bird", f"{refusal}\nclass Bird")
    assert problem == " refuses its own defaults: plugin bird: Colour and Size do not go together"


def test_an_instance_in_an_entry_point_is_told_to_name_the_class(install: Install) -> None:
    source = f"{OBSERVER}\nbird = Bird(Options())\n"
    install("aviary", "1.2", "[overlaynet.plugins]\nbird = aviary_bird:bird\n", "aviary_bird", source)
    (entry,) = entry_points(group="overlaynet.plugins", name="bird")
    for given in (None, {"size": "3"}):
        with pytest.raises(PluginError) as caught:
            Plugins().load_observer(entry, [entry], given)
        assert str(caught.value) == (
            "overlaynet.plugins: bird = aviary_bird:bird (aviary 1.2) is an instance of Bird; name the class itself in the "
            "entry point, and overlaynet makes one with the options that are given"
        )


@pytest.mark.usefixtures("bird")
@pytest.mark.parametrize("action", [["doctor"], ["show", "bird"], ["list"]])
def test_they_are_looked_at_with_the_options_that_are_configured(
    action: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OVERLAYNET_PLUGIN_OPTION", "bird.Size=10")
    assert main(["plugins", *action]) == 1
    assert "plugin bird: option Size must be between 1 and 9, not 10\n" in capsys.readouterr().out
    monkeypatch.setenv("OVERLAYNET_PLUGIN_OPTION", "brid.Size=1")
    assert main(["plugins", *action]) == 2
    assert capsys.readouterr().err == (
        "overlaynet: --plugin-option: there is no plugin 'brid'; did you mean 'bird'? (installed: bird)\n"
    )


def test_every_option_has_a_default(install: Install) -> None:
    problem = problem_of(install, 'option("red", ', "option(help=")
    assert problem == ": option Colour has no default; an observer is loaded wherever it is installed"


def test_options_are_an_attrs_class(install: Install) -> None:
    problem = problem_of(install, "    Options = Options", "    Options = int")
    assert problem == ": Options is <class 'int'>, not an attrs class; decorate it with attrs.frozen"


def test_one_for_another_version_of_the_contract_is_refused(install: Install) -> None:
    problem = problem_of(install, "'''Sings.'''", "api = (2, 0)")
    assert problem == (
        " is made for version 2.0 of the plugin contract, and this overlaynet has 1.0; upgrade overlaynet"
    )


@pytest.mark.usefixtures("bird")
def test_they_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "show", "bird"]) == 0
    assert capsys.readouterr().out == (
        "observer bird\n"
        "  from      aviary 1.2\n"
        "  is        aviary_bird:Bird, in the entry-point group overlaynet.plugins\n"
        "  contract  1.0\n"
        "\n"
        "  Sings.\n"
        "\n"
        "  hooks     overlaynet_cli\n"
        "  options   --plugin-option bird.NAME=VALUE of `overlaynet run`\n"
        "\n"
        '    Colour  (string, default "red")\n'
        "        how it looks\n"
        "\n"
        "    Size  (whole number, between 1 and 9, default 3)\n"
        "        how large it is\n"
    )
    assert main(["plugins", "doctor"]) == 0
