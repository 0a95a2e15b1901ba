"""The network document of a third party's backend: what `overlaynet network` writes, refuses and shows."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from overlaynet.cli import main
from overlaynet.stores.file import FileStore

Install = Callable[..., None]

CARRIER = """\
import attrs
from overlaynet.api import option
from overlaynet.backends.alloc import AllocBackend

@attrs.frozen
class Options:
    realm: str = option(help="whose network it is")
    pre_shared_key: str | None = option(None, "what opens it", secret=True, name="PSK")
    debug: bool = option(False, "whether it tells more")

    def __attrs_post_init__(self):
        if self.debug and self.pre_shared_key is None:
            raise ValueError("Debug needs PSK; give it, too")

class Carrier(AllocBackend):
    Options = Options
"""


@pytest.fixture(autouse=True)
def carrier(install: Install) -> None:
    """A backend with a required option and a secret one."""
    install("acme", "1.2", "[overlaynet.backends]\ncarrier = acme_carrier:Carrier\n", "acme_carrier", CARRIER)


@pytest.fixture
def store(tmp_path: Path) -> list[str]:
    return ["--store", "file", "--store-path", str(tmp_path / "store")]


def write(path: Path, text: str) -> None:
    """Put a document into the store by hand."""

    async def write() -> None:
        store = FileStore(FileStore.Options(path=str(path / "store")))
        await store.replace_network(text)
        await store.aclose()

    asyncio.run(write())


def put(*options: str) -> list[str]:
    given = [word for option in options for word in ("--backend-option", option)]
    return ["network", "set", "--network", "10.244.0.0/16", "--backend", "carrier", *given]


def test_no_secret_option_of_a_backend_is_shown(store: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*put("Realm=a", "PSK=hunter2"), *store]) == 0
    assert main([*put("Realm=b", "PSK=hunter3"), *store]) == 0
    assert main(["network", "show", *store]) == 0
    shown = capsys.readouterr()
    assert "hunter" not in shown.out + shown.err
    assert '"Backend": {"Type": "carrier", "Realm": "b", "PSK": "********"}' in shown.out.splitlines()[-1]
    assert 'it was: {"Network": "10.244.0.0/16", "Backend": {"Type": "carrier", "Realm": "a", "PSK": "****' in shown.err


def test_a_document_without_secrets_is_shown_as_it_is_written(
    store: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = '{"network":  "10.244.0.0/16", "BACKEND": {"type": "Carrier", "realm": "a"}}'
    write(tmp_path, text)
    assert main(["network", "show", *store]) == 0
    assert capsys.readouterr().out == f"{text}\n"


def test_of_a_backend_that_is_not_installed_no_option_is_shown(
    store: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, '{"Network": "10.244.0.0/16", "Backend": {"Type": "gone", "Key": "hunter2"}}')
    assert main(["network", "show", *store]) == 0
    shown = capsys.readouterr()
    assert shown.out == '{"Network": "10.244.0.0/16", "Backend": {"Type": "gone", "Key": "********"}}\n'
    assert shown.err.startswith(
        "options are masked, as nothing tells which of them are secret: there is no backend 'gone'"
    )


def test_a_secret_of_a_document_that_is_wrong_elsewhere_is_not_shown(
    store: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, '{"Network": "banana", "Backend": {"Type": "carrier", "psk": "hunter2"}}')
    assert main(["network", "show", *store]) == 1
    shown = capsys.readouterr()
    assert shown.out == '{"Network": "banana", "Backend": {"Type": "carrier", "psk": "********"}}\n'
    assert "hunter2" not in shown.err


def test_what_is_no_document_is_shown_with_what_is_wrong(
    store: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ('{"Network": banana}', "[1]"):
        write(tmp_path, text)
        assert main(["network", "show", *store]) == 1
        shown = capsys.readouterr()
        assert shown.out == f"{text}\n"
        assert shown.err.startswith("overlaynet: the network document ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["PSK=a"], "backend carrier: option Realm is missing; it has no default"),
        (["Realm=a", "Debug=yes"], "backend carrier: Debug needs PSK; give it, too"),
    ],
)
def test_what_no_node_could_run_is_not_written(
    options: list[str], message: str, store: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*put(*options), *store]) == 2
    assert capsys.readouterr().err == f"overlaynet: {message}\n"
    assert main(["network", "show", *store]) == 1
    assert "holds no network document" in capsys.readouterr().err
