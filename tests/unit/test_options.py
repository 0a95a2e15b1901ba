"""Driver options: declared once, read strictly from documents, files and command lines."""

import math
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlaynet import options
from overlaynet.drivers import NoOptions
from overlaynet.errors import ConfigError
from overlaynet.options import between, display_name, one_of, option


@attrs.frozen
class Options:
    port: int = option(8285, "UDP port", check=between(1, 65535))
    mtu: int | None = option(None, "Largest packet", name="MTU")
    peer_timeout: float = option(30.0)
    mode: str = option("plain", check=one_of("plain", "fast"))
    checksums: bool = option(True)
    endpoints: tuple[str, ...] = option(("http://127.0.0.1:2379",))
    password: str | None = option(None, secret=True)


@attrs.frozen
class Strict:
    key_file: str = option(help="Where the key is")
    size: int = option(secret=True)


def test_defaults() -> None:
    assert options.parse(Options, {}, "Backend x") == Options()


def test_values_of_the_declared_type_are_taken() -> None:
    values = {
        "Port": 1,
        "MTU": 1400,
        "PeerTimeout": 2.5,
        "Mode": "fast",
        "Checksums": False,
        "Endpoints": ["a", "b"],
        "Password": "secret",
    }
    assert options.parse(Options, values, "Backend x") == Options(
        port=1, mtu=1400, peer_timeout=2.5, mode="fast", checksums=False, endpoints=("a", "b"), password="secret"
    )


def test_a_whole_number_serves_as_a_number() -> None:
    parsed = options.parse(Options, {"PeerTimeout": 3}, "Backend x")
    assert parsed.peer_timeout == 3.0
    assert type(parsed.peer_timeout) is float


def test_null_serves_where_it_is_declared() -> None:
    assert options.parse(Options, {"MTU": None}, "Backend x").mtu is None


def test_texts_are_read_as_the_declared_type() -> None:
    values = {
        "port": "1",
        "mtu": "1400",
        "peer-timeout": "2.5",
        "mode": "fast",
        "checksums": "off",
        "endpoints": "a, b,,",
        "password": "7",
    }
    assert options.parse(Options, {}, "Backend x", texts=values) == Options(
        port=1, mtu=1400, peer_timeout=2.5, mode="fast", checksums=False, endpoints=("a", "b"), password="7"
    )


def test_texts_win_over_values() -> None:
    parsed = options.parse(Options, {"Port": 1, "Mode": "fast"}, "Backend x", texts={"port": "2"})
    assert (parsed.port, parsed.mode) == (2, "fast")


def test_only_what_is_given_is_read() -> None:
    assert options.read(Options, {"Port": 1}, "Backend x") == {"port": 1}
    assert options.read(Strict, {"key-file": "k"}, "Backend x", from_text=True) == {"key_file": "k"}


@pytest.mark.parametrize("name", ["PeerTimeout", "peertimeout", "peer_timeout", "peer-timeout", "PEER_TIMEOUT"])
def test_names_are_matched_however_they_are_written(name: str) -> None:
    assert options.parse(Options, {name: 5.0}, "Backend x").peer_timeout == 5.0


@pytest.mark.parametrize("text", ["true", "yes", "on", "1", "True", " ON "])
def test_texts_for_true(text: str) -> None:
    assert options.read_text(bool, text) is True


@pytest.mark.parametrize("text", ["false", "no", "off", "0", "False"])
def test_texts_for_false(text: str) -> None:
    assert options.read_text(bool, text) is False


def test_names_in_documents() -> None:
    assert [display_name(field) for field in attrs.fields(Options)] == [
        "Port",
        "MTU",
        "PeerTimeout",
        "Mode",
        "Checksums",
        "Endpoints",
        "Password",
    ]


HAS = "(it has Checksums, Endpoints, MTU, Mode, Password, PeerTimeout, Port)"
ERRORS: list[tuple[dict[str, object], str]] = [
    ({"Prot": 1}, f"Backend x has no option 'Prot'; did you mean 'Port'? {HAS}"),
    ({"peer-timeot": 1}, f"Backend x has no option 'peer-timeot'; did you mean 'PeerTimeout'? {HAS}"),
    ({"mut": 1}, f"Backend x has no option 'mut'; did you mean 'MTU'? {HAS}"),
    ({"Colour": 1}, f"Backend x has no option 'Colour' {HAS}"),
    ({"Port": "1"}, "Backend x: option Port must be a whole number, not '1'"),
    ({"Port": 1.0}, "Backend x: option Port must be a whole number, not 1.0"),
    ({"Port": True}, "Backend x: option Port must be a whole number, not True"),
    ({"Port": None}, "Backend x: option Port must be a whole number, not None"),
    ({"Port": 0}, "Backend x: option Port must be between 1 and 65535, not 0"),
    ({"Port": 65536}, "Backend x: option Port must be between 1 and 65535, not 65536"),
    ({"PeerTimeout": "1"}, "Backend x: option PeerTimeout must be a number, not '1'"),
    ({"Checksums": 1}, "Backend x: option Checksums must be true or false, not 1"),
    ({"Mode": 1}, "Backend x: option Mode must be a string, not 1"),
    ({"Mode": "slow"}, "Backend x: option Mode must be one of plain, fast, not 'slow'"),
    ({"Endpoints": "a"}, "Backend x: option Endpoints must be a list of strings, not 'a'"),
    ({"Endpoints": ["a", 1]}, "Backend x: option Endpoints must be a list of strings, not ['a', 1]"),
    ({"Password": 12345}, "Backend x: option Password must be a string"),
]


@pytest.mark.parametrize(("values", "text"), ERRORS)
def test_a_wrong_value_is_told_in_one_sentence(values: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.parse(Options, values, "Backend x")
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("port", "many", "Store y: option Port must be a whole number, not 'many'"),
        ("port", "", "Store y: option Port must be a whole number, not ''"),
        ("port", "1.5", "Store y: option Port must be a whole number, not '1.5'"),
        ("port", "70000", "Store y: option Port must be between 1 and 65535, not 70000"),
        ("peer-timeout", "soon", "Store y: option PeerTimeout must be a number, not 'soon'"),
        ("checksums", "maybe", "Store y: option Checksums must be true or false, not 'maybe'"),
    ],
)
def test_a_wrong_text_is_told_in_one_sentence(name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.parse(Options, {}, "Store y", texts={name: text})
    assert str(caught.value) == message


def test_a_required_option_has_to_be_given() -> None:
    with pytest.raises(ConfigError) as caught:
        options.parse(Strict, {"Size": 1}, "Backend x")
    assert str(caught.value) == "Backend x: option KeyFile is missing; it has no default"
    assert options.parse(Strict, {"Size": 1}, "Backend x", texts={"key-file": "k"}).key_file == "k"
    assert options.parse(Strict, {"Size": 1, "KeyFile": "k"}, "Backend x") == Strict(key_file="k", size=1)


def test_a_driver_without_options_says_so() -> None:
    with pytest.raises(ConfigError) as caught:
        options.parse(NoOptions, {"Port": 1}, "Store memory")
    assert str(caught.value) == "Store memory has no options, so 'Port' cannot be set"


def test_no_secret_is_shown() -> None:
    assert "hunter2" not in repr(Options(password="hunter2"))
    for value in ("hunter2", ["hunter2"]):
        with pytest.raises(ConfigError) as caught:
            options.parse(Strict, {"Size": value, "KeyFile": "k"}, "Backend x")
        assert str(caught.value) == "Backend x: option Size must be a whole number"


def test_bounds_are_allowed_themselves() -> None:
    check = between(1, 2)
    assert [check(value) for value in (1, 1.5, 2)] == [None, None, None]
    assert check(math.nan) == "must be between 1 and 2, not nan"


contents = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())
option_names = st.sampled_from([display_name(field) for field in attrs.fields(Options)]) | st.text()


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(option_names, contents, max_size=4))
def test_no_document_does_worse_than_a_config_error(values: dict[str, Any]) -> None:
    try:
        parsed = options.parse(Options, values, "Backend x")
    except ConfigError:
        return
    assert type(parsed.port) is int
    assert 1 <= parsed.port <= 65535
    assert type(parsed.peer_timeout) is float
    assert type(parsed.endpoints) is tuple


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(option_names, st.text(), max_size=4))
def test_no_text_does_worse_than_a_config_error(values: dict[str, str]) -> None:
    try:
        parsed = options.parse(Options, {}, "Backend x", texts=values)
    except ConfigError:
        return
    assert type(parsed.port) is int
    assert type(parsed.checksums) is bool


def test_only_options_that_allow_it_may_be_a_nodes_own() -> None:
    @attrs.frozen
    class Options:
        port: int = option(1, "where it listens")
        key_file: str = option("key", "what opens it", node=True)

    options.check_own(Options, ["KeyFile", "key-file", "unknown"], "backend carrier")
    with pytest.raises(ConfigError) as caught:
        options.check_own(Options, ["key_file", "PORT"], "backend carrier")
    assert str(caught.value) == (
        "backend carrier: option Port is the same for all nodes; set it in the network document, with "
        "`overlaynet network set`, not for this node alone"
    )
    assert [described.node for described in options.describe(Options)] == [False, True]
