"""``overlaynet plugins``, and what the settings on plugins do to the commands."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from overlaynet import __version__
from overlaynet.cli import BUILT_IN, main

Install = Callable[..., None]

OBSERVER = """\
'''Says hello.'''
from overlaynet.api import Command, hookimpl

@hookimpl
def overlaynet_cli(commands):
    commands.add(Command("NAME", "say hello", lambda parser: None, run))

def run(arguments):
    print("hello from", __name__)
    return 0
"""
CARRIER = """\
import attrs
from overlaynet.api import option
from overlaynet.testing.fakes import FakeBackend

@attrs.frozen
class Options:
    port: int = option(1, "where it listens")
    key: str = option(help="what opens it", node=True)

class Carrier(FakeBackend):
    Options = Options
"""
DRIVER = """\
import attrs
from overlaynet.api import between, option
from overlaynet.routers.memory import MemoryRouter

def check_colour(value):
    '''A colour of the rainbow.'''

@attrs.frozen
class Options:
    port: int = option(help="port to use", check=between(1, 9))
    colour: str = option("red", "how it looks", check=check_colour)
    key: str | None = option(None, "what opens it", secret=True)

class Rainbow(MemoryRouter):
    '''Routes in colours.'''
    Options = Options
"""


def observer(install: Install, name: str, command: str, module: str | None = None) -> None:
    module = module or f"{name}_observer"
    source = OBSERVER.replace("NAME", command)
    install(name, "1.0", f"[overlaynet.plugins]\n{name} = {module}\n", module, source)


def test_show_tells_a_driver_and_its_options(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", "1.2", "[overlaynet.routers]\nrainbow = acme_rainbow:Rainbow\n", "acme_rainbow", DRIVER)
    assert main(["plugins", "show", "rainbow"]) == 0
    assert capsys.readouterr().out == (
        "router rainbow\n"
        "  from      acme 1.2\n"
        "  is        acme_rainbow:Rainbow, in the entry-point group overlaynet.routers\n"
        "  contract  1.0\n"
        "\n"
        "  Routes in colours.\n"
        "\n"
        "  options   --router-option NAME=VALUE of `overlaynet run`\n"
        "\n"
        "    Port  (whole number, between 1 and 9, required)\n"
        "        port to use\n"
        "\n"
        '    Colour  (string, a colour of the rainbow, default "red")\n'
        "        how it looks\n"
        "\n"
        "    Key  (string, secret)\n"
        "        what opens it\n"
    )
    assert main(["plugins", "show", "rainbow", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["options"][0] == {
        "name": "Port",
        "type": "whole number",
        "required": True,
        "default": None,
        "check": "between 1 and 9",
        "help": "port to use",
        "secret": False,
        "node": False,
    }


def test_show_tells_an_observer(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    observer(install, "greeter", "hello")
    assert main(["plugins", "show", "greeter"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("observer greeter\n  from      greeter 1.0\n")
    assert "\n  Says hello.\n" in text
    assert text.endswith("  hooks     overlaynet_cli\n")


def test_show_of_a_name_on_two_axes_shows_both_and_of_none_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--json", "show", "memory"]) == 0
    assert [each["axis"] for each in json.loads(capsys.readouterr().out)] == ["store", "router"]
    assert main(["plugins", "show", "memroy"]) == 1
    assert "there is no driver or plugin 'memroy'; did you mean 'memory'? (installed: " in capsys.readouterr().err


def test_doctor_says_that_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"overlaynet {__version__}, version 1.0 of the plugin contract, Python ")
    assert out.endswith(" drivers and plugins checked: no problem\n")


def test_whatever_is_broken_is_told_and_ends_with_1(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", "1.2", "[overlaynet.backends]\nbroken = acme_gone:X\n")
    problem = (
        "overlaynet.backends: broken = acme_gone:X (acme 1.2) failed to import: "
        "ModuleNotFoundError(\"No module named 'acme_gone'\"); repair or uninstall acme"
    )
    assert main(["plugins", "doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-3:-1] == [problem, ""]
    assert main(["plugins", "doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [problem]
    assert main(["plugins", "list"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == problem
    assert main(["plugins", "show", "broken"]) == 1
    assert f"BROKEN    {problem}" in capsys.readouterr().out


def test_two_plugins_that_add_one_command_are_both_named(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    observer(install, "one", "hello")
    observer(install, "two", "hello")
    observer(install, "three", "run")
    assert main(["plugins", "doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [
        "plugin overlaynet.plugins: three = three_observer (three 1.0) failed in overlaynet_cli: "
        "ValueError(\"overlaynet has a command 'run' of its own; choose another name\"); repair or uninstall it",
        'plugin overlaynet.plugins: two = two_observer (two 1.0) failed in overlaynet_cli: ValueError("one 1.0 '
        "(one_observer) has added a command 'hello' already; choose another name\"); repair or uninstall it",
    ]


def test_show_tells_of_a_clash_of_commands_as_doctor_does(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    observer(install, "one", "hello")
    observer(install, "two", "hello")
    assert main(["plugins", "show", "one"]) == 0
    assert main(["plugins", "show", "two"]) == 1
    assert "one 1.0 (one_observer) has added a command 'hello' already" in capsys.readouterr().out


def test_a_plugins_command_runs_unless_no_plugins_are_wanted(
    install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    observer(install, "greeter", "hello")
    assert main(["hello"]) == 0
    assert capsys.readouterr().out == "hello from greeter_observer\n"
    assert main(["helo"]) == 2
    assert "did you mean 'hello'?" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "greeter_observer")
    monkeypatch.setenv("OVERLAYNET_PLUGINS", "no")
    assert main(["hello"]) == 2
    assert f"there is no command 'hello' (there are {', '.join(sorted(BUILT_IN))})" in capsys.readouterr().err
    assert "greeter_observer" not in sys.modules


def test_a_broken_plugin_keeps_no_command_from_running_unless_plugins_are_strict(
    install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    observer(install, "greeter", "hello")
    install("bad", "2.0", "[overlaynet.plugins]\nbad = bad_gone\n")
    assert main(["hello"]) == 0
    assert "bad = bad_gone (bad 2.0) failed to import" in capsys.readouterr().err
    monkeypatch.setenv("OVERLAYNET_STRICT_PLUGINS", "yes")
    assert main(["hello"]) == 2
    assert capsys.readouterr().err.startswith("overlaynet: overlaynet.plugins: bad = bad_gone (bad 2.0) failed to")


def test_a_trace_of_a_plugins_command_goes_to_standard_error(
    install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    observer(install, "greeter", "hello")
    monkeypatch.setenv("OVERLAYNET_TRACE_PLUGINS", "yes")
    monkeypatch.setenv("OVERLAYNET_LOG_LEVEL", "error")
    assert main(["hello"]) == 0
    out, err = capsys.readouterr()
    assert out == "hello from greeter_observer\n"
    assert "hook called  hook=overlaynet_cli plugin=greeter argument_commands=" in err


@pytest.mark.parametrize("given", ["flag", "environment", "file"])
def test_run_with_strict_plugins_ends_at_a_broken_one(
    install: Install, given: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    install("bad", "2.0", "[overlaynet.plugins]\nbad = bad_gone\n")
    # In this process, whose privileges later tests need.
    arguments = ["run", "--store", "memory", "--privileges", "keep"]
    if given == "flag":
        arguments.append("--strict-plugins")
    elif given == "environment":
        monkeypatch.setenv("OVERLAYNET_STRICT_PLUGINS", "true")
    else:
        with open(f"{tmp_path}/settings.toml", "w") as file:
            file.write("strict-plugins = true\n")
        arguments += ["--config", file.name]
    assert main(arguments) == 2
    assert "bad = bad_gone (bad 2.0) failed to import" in capsys.readouterr().err
    assert main([*arguments, "--no-plugins", "--print-config"]) == 0
    assert "plugins = false  # flag" in capsys.readouterr().out


ANSWERING = """\
from overlaynet.api import hookimpl
from overlaynet.backends.alloc import AllocBackend
from overlaynet.routers.memory import MemoryRouter
from overlaynet.stores.file import FileStore

class Router(MemoryRouter):
    async def apply(self, routes):
        print("applied", routes)

DRIVERS = {"backend": AllocBackend, "router": Router, "store": FileStore}

@hookimpl
def overlaynet_driver(axis, name):
    return DRIVERS[axis] if name == "mine" else None
"""


def test_every_command_finds_a_driver_that_only_a_plugin_answers_for(
    install: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install("answers", "1.0", "[overlaynet.plugins]\nanswers = answering_observer\n", "answering_observer", ANSWERING)
    stored = ["--store", "mine", "--store-option", f"Path={tmp_path / 'store'}"]
    for axis, arguments, status, told in (
        (
            "backend",
            ["network", "set", "--network", "10.244.0.0/16", "--backend", "mine", *stored],
            0,
            '"Type": "mine"',
        ),
        ("store", ["network", "show", *stored], 0, '"Type": "mine"'),
        ("store", ["reserve", "10.244.7.0/24", "--node", "b", *stored], 0, "10.244.7.0/24 is reserved for node b"),
        ("store", ["leases", *stored], 0, "10.244.7.0/24"),
        ("store", ["unreserve", "10.244.7.0/24", *stored], 0, "10.244.7.0/24"),
        ("store", ["release", "10.244.7.0/24", *stored], 1, f"files in {tmp_path / 'store'} has no lease on"),
        ("router", ["cleanup", "--device", "nobodys0", "--router", "mine"], 0, "applied []"),
    ):
        assert main([*arguments, "--no-plugins"]) == 2
        assert capsys.readouterr().err.startswith(f"overlaynet: there is no {axis} 'mine' (installed: "), arguments
        assert main(arguments) == status, arguments
        assert told in "".join(capsys.readouterr())


def test_a_broken_plugin_is_told_once_by_a_command_that_needs_drivers(
    install: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install("bad", "2.0", "[overlaynet.plugins]\nbad = bad_gone\n")
    arguments = ["network", "set", "--network", "10.244.0.0/16", "--store", "file", "--store-path", str(tmp_path)]
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("bad = bad_gone (bad 2.0) failed to import") == 1
    assert main([*arguments, "--strict-plugins"]) == 2


def test_show_tells_which_options_each_node_may_have_its_own_of(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme", "1.2", "[overlaynet.backends]\ncarrier = acme_carrier:Carrier\n", "acme_carrier", CARRIER)
    assert main(["plugins", "show", "carrier"]) == 0
    assert capsys.readouterr().out.partition("  options   ")[2] == (
        "members of Backend in the network document, or --backend-option of `overlaynet network set`; "
        "a node's own, --backend-option of `overlaynet run`\n"
        "\n"
        "    Port  (whole number, default 1)\n"
        "        where it listens\n"
        "\n"
        "    Key  (string, each node may have its own, required)\n"
        "        what opens it\n"
    )


def test_show_tells_what_a_plugin_answers_before_the_entry_point(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ANSWERING.replace('"mine"', '"udp"')
    install("answers", "1.0", "[overlaynet.plugins]\nhelper = answering_udp\n", "answering_udp", source)
    install("bad", "2.0", "[overlaynet.plugins]\nbad = bad_gone\n")
    observer(install, "greeter", "hello")
    assert main(["plugins", "show", "udp", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(each["axis"], each["plugin"], each["found"]["target"]) for each in shown] == [
        ("store", "helper", "overlaynet.stores.file:FileStore"),
        ("backend", "helper", "overlaynet.backends.alloc:AllocBackend"),
        ("router", "helper", "answering_udp:Router"),
        ("backend", None, "overlaynet.backends.udp:UdpBackend"),
    ]
    assert main(["plugins", "show", "udp"]) == 0
    assert (
        "router udp\n"
        "  from      answers 1.0\n"
        "  is        answering_udp:Router, which the plugin helper answers with when asked for it, before any entry point\n"
        "  contract  1.0\n"
    ) in capsys.readouterr().out


def test_show_tells_of_a_plugin_that_fails_when_it_is_asked(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        "from overlaynet.api import hookimpl\n@hookimpl\ndef overlaynet_driver(axis): return 1 // (axis != 'store')\n"
    )
    install("acme", "1.2", "[overlaynet.plugins]\nacme = acme_fails\n", "acme_fails", source)
    assert main(["plugins", "show", "xyz"]) == 1
    out = capsys.readouterr().out
    plugin = "overlaynet.plugins: acme = acme_fails (acme 1.2)"
    assert out.startswith(
        "store xyz\n"
        "  from      acme 1.2\n"
        "  is        what the plugin acme answers with when asked for it, before any entry point\n"
        f"  BROKEN    plugin {plugin} failed when asked for the store 'xyz': "
    )
    assert f"  BROKEN    backend 'xyz' of plugin {plugin} is 1, not a subclass of overlaynet.api.Backend" in out
