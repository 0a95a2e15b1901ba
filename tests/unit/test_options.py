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


def quoting(value: object) -> str | None:
    """A word in praise of secrets."""
    return f"must be better than {value}"


def quoting_without_a_word(value: object) -> str | None:
    return f"must be better than {value}"


def test_no_check_shows_a_secret() -> None:
    @attrs.frozen
    class Secrets:
        pin: int = option(1, secret=True, check=between(1, 9))
        mode: str = option("a", secret=True, check=one_of("a", "b"))
        word: str | None = option(None, secret=True, check=quoting)
        quiet: str | None = option(None, secret=True, check=quoting_without_a_word)
        raising: str | None = option(None, secret=True, check=lambda value: str(int(value)))
        odd: str | None = option(None, secret=True, check=lambda value: [value])  # type: ignore[arg-type,return-value]

    for name, value, text in (
        ("Pin", 4711, "must be between 1 and 9"),
        ("Mode", "hunter2", "must be one of a, b"),
        ("Word", "hunter2", "must be a word in praise of secrets"),
        ("Quiet", "hunter2", "is refused by its check"),
        ("Raising", "hunter2", "cannot be checked: ValueError"),
        (
            "Odd",
            "hunter2",
            "cannot be checked: its check returns a value of type list, not what is wrong as a string, or None",
        ),
    ):
        for values, texts in (({name: value}, {}), ({}, {name: str(value)})):
            with pytest.raises(ConfigError) as caught:
                options.parse(Secrets, values, "Backend x", texts)
            assert str(caught.value) == f"Backend x: option {name} {text}"


def test_a_check_that_fails_is_told_in_one_sentence() -> None:
    @attrs.frozen
    class Checked:
        port: int = option(1, check=lambda value: None if 1 // (value - 2) else "")
        odd: int = option(1, check=lambda value: value > 1 or None)

    for values, text in (
        ({"Port": 2}, "Port cannot be checked: ZeroDivisionError('integer division or modulo by zero')"),
        (
            {"Odd": 2},
            "Odd cannot be checked: its check returns a value of type bool, not what is wrong as a string, or None",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            options.parse(Checked, values, "Backend x")
        assert str(caught.value) == f"Backend x: option {text}"


@attrs.frozen
class Paired:
    """Options that depend on each other, one of them a secret, one with a name of its own in Python."""

    user: str | None = option(None)
    password: str | None = option(None, secret=True)
    _words: tuple[str, ...] = option((), secret=True)
    size: int = attrs.field(default=1, validator=attrs.validators.le(5))

    def __attrs_post_init__(self) -> None:
        if (self.user is None) != (self.password is None):
            raise ValueError("User and Password belong together; give both, or none")
        if self.password == "hunter2":
            raise ValueError(f"everybody knows {self.password}")
        if self.user == "nobody":
            raise ValueError
        if "xyzzy" in self._words:
            raise ValueError(f"Words has xyzzy, {self._words}")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"User": "me"}, "User and Password belong together; give both, or none"),
        ({"Size": 6}, "'size' must be <= 5: 6"),
        ({"User": "nobody", "Password": "pw"}, "its options are refused, and nothing is said of why"),
        ({"User": "me", "Password": "hunter2"}, "its options are refused by a message that shows a secret one"),
        ({"Words": ["a", "xyzzy"]}, "its options are refused by a message that shows a secret one"),
    ],
)
def test_options_that_do_not_fit_together_are_told_in_one_sentence(values: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.parse(Paired, values, "backend carrier")
    assert str(caught.value) == f"backend carrier: {text}"
    assert (caught.value.__cause__ is None) == ("secret" in text)


def test_an_option_whose_attribute_begins_with_an_underscore_is_given_like_others() -> None:
    assert options.class_problem(Paired) is None
    assert options.parse(Paired, {"Words": ["a"], "Size": 2}, "backend carrier") == Paired(words=("a",), size=2)


def test_what_all_nodes_share_is_complete_and_fits_together() -> None:
    @attrs.frozen
    class Shared:
        realm: str = option()
        key_file: str = option(node=True)

        def __attrs_post_init__(self) -> None:
            raise ValueError("only a node can tell")

    assert options.read_shared(Shared, {"realm": "r"}, "backend x") == {"Realm": "r"}
    assert options.read_shared(Shared, {"realm": "r", "key-file": "k"}, "backend x") == {"Realm": "r", "KeyFile": "k"}
    with pytest.raises(ConfigError) as caught:
        options.read_shared(Shared, {"key-file": "k"}, "backend x")
    assert str(caught.value) == "backend x: option Realm is missing; it has no default"
    assert options.read_shared(Paired, {"user": "me", "password": "p"}, "backend x") == {"User": "me", "Password": "p"}
    with pytest.raises(ConfigError) as caught:
        options.read_shared(Paired, {"user": "me"}, "backend x")
    assert str(caught.value) == "backend x: User and Password belong together; give both, or none"


def test_values_are_shown_without_those_that_may_be_secret() -> None:
    values = {"user": "me", "PASSWORD": "p", "Pasword": "p"}
    assert options.masked(Paired, values) == {"user": "me", "PASSWORD": options.MASK, "Pasword": options.MASK}
    assert set(options.masked(None, values).values()) == {options.MASK}


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
