"""How a node makes the backend that its network document names, and refuses one that cannot be."""

from typing import Any, ClassVar

import attrs
import pytest

from overlaynet import joining, network
from overlaynet.drivers import Driver
from overlaynet.errors import ConfigError, SettingsError
from overlaynet.health import Health
from overlaynet.hookspecs import hookimpl
from overlaynet.options import option
from overlaynet.plugins import Plugins
from overlaynet.settings import Settings
from overlaynet.testing.fakes import FakeBackend


@attrs.frozen
class CarrierOptions:
    port: int = option(1, "where it listens")
    key: str = option(help="what opens it", node=True)


class Carrier(FakeBackend):
    Options: ClassVar[type] = CarrierOptions  # type: ignore[assignment]


class Carriers:
    @hookimpl
    def overlaynet_driver(self, axis: str, name: str) -> type[Driver] | None:
        return Carrier if (axis, name) == ("backend", "carrier") else None


def make(backend: str, *own: str) -> object:
    plugins = Plugins()
    plugins.register(Carriers(), name="carriers")
    document = network.parse(f'{{"Network": "10.244.0.0/16", "Backend": {backend}}}')
    return joining.make_backend(plugins, document, Settings(backend_option=own)).options


def test_a_nodes_own_option_wins_over_the_network_document() -> None:
    document = '{"Type": "carrier", "Port": 2, "Key": "everybody\'s"}'
    assert make(document) == CarrierOptions(port=2, key="everybody's")
    assert make(document, "key=mine") == CarrierOptions(port=2, key="mine")


def test_a_required_option_may_be_each_nodes_own() -> None:
    assert make('{"Type": "carrier"}', "Key=mine") == CarrierOptions(port=1, key="mine")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("port=3", "backend carrier: option Port is the same for all nodes; set it in the network document, "),
        ("kee=mine", "backend carrier of the network document has no option 'kee'; did you mean 'Key'? "),
        ("key", "--backend-option 'key' is not of the form KEY=VALUE"),
    ],
)
def test_what_a_node_cannot_have_of_its_own_is_refused(own: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make('{"Type": "carrier", "Key": "everybody\'s"}', own)
    assert str(caught.value).startswith(message)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("backend", "own", "message"),
    [
        ("carier", (), "there is no backend 'carier'"),
        ("upd", (), "there is no backend 'upd'; did you mean 'udp'? (installed: alloc, extension, "),
        (
            "carrier",
            ("port=3",),
            "backend carrier: option Port is the same for all nodes; set it in the network document, ",
        ),
    ],
)
async def test_a_backend_that_is_not_installed_is_refused_before_the_store_is_asked(
    backend: str, own: tuple[str, ...], message: str
) -> None:
    """A store that is away would be waited for, and nobody would hear of it."""
    plugins = Plugins()
    plugins.register(Carriers(), name="carriers")
    nobody: Any = None
    with pytest.raises(SettingsError) as caught:
        await joining.find_network(nobody, Settings(backend=backend, backend_option=own), plugins, Health(plugins))
    assert str(caught.value).startswith(message)
