"""What every observer has to do, as a suite of tests to derive from::

    class TestMyObserver(ObserverConformance):
        @pytest.fixture
        def plugin(self):
            return my_module

An observer is a module or object with functions marked by :data:`overlaynet.api.hookimpl`, or a class derived from
:class:`overlaynet.api.Observer`, of which the fixture returns an instance: ``MyObserver(MyOptions())``.
"""

from __future__ import annotations

import argparse
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from overlaynet.cli import BUILT_IN
from overlaynet.commands import Commands
from overlaynet.drivers import Observer
from overlaynet.errors import PluginError
from overlaynet.hooks import hook_implementations
from overlaynet.model import Lease, LeaseData, Peer, Subnets
from overlaynet.plugins import Plugins, make_observer
from overlaynet.testing._requirements import pytest
from overlaynet.testing.conformance import Conformance, options_are_explained, wrong_values_are_config_errors

_LEASE = Lease(Subnets(IPv4Network("10.244.1.0/24")), IPv4Address("192.0.2.1"), node="near", run="0123456789abcdef")
_PEER = Peer(Subnets(IPv4Network("10.244.2.0/24")), IPv4Address("192.0.2.2"), node="far")
_MOVED = Peer(
    Subnets(IPv4Network("10.244.2.0/24"), IPv6Network("fd00:2::/64")),
    public_ipv6=IPv6Address("2001:db8::2"),
    data=LeaseData("vxlan", {"VNI": 1}),
)

LIFE: tuple[tuple[str, dict[str, object]], ...] = (
    ("overlaynet_lease_acquired", {"lease": _LEASE}),
    ("overlaynet_peer_added", {"peer": _PEER}),
    ("overlaynet_ready", {"lease": _LEASE}),
    ("overlaynet_peer_changed", {"old": _PEER, "new": _MOVED}),
    ("overlaynet_degraded", {"reason": "store: it does not answer"}),
    ("overlaynet_recovered", {}),
    ("overlaynet_lease_renewed", {"lease": _LEASE}),
    ("overlaynet_peer_removed", {"peer": _MOVED}),
    ("overlaynet_lease_lost", {"lease": _LEASE, "reason": "another node holds it"}),
    ("overlaynet_stopping", {}),
)
"""What happens to a node in its life, as observers are told."""


class ObserverConformance(Conformance):
    """The laws of observers. A subclass overrides :meth:`plugin`."""

    @pytest.fixture
    def plugin(self) -> object:
        """The observer. To be overridden."""
        raise NotImplementedError("override the fixture 'plugin'")

    @pytest.fixture
    def plugins(self, plugin: object) -> Plugins:
        """The hooks of a process that has loaded the observer; an exception in it is an error."""
        plugins = Plugins(strict=True)
        plugins.register(plugin)
        return plugins

    @pytest.fixture
    def observer(self, plugin: object) -> Observer:
        """The observer, if it is one of a class that has options."""
        if not isinstance(plugin, Observer):
            pytest.skip("it has no options, for it is not made of a class derived from overlaynet.api.Observer")
        return plugin

    async def test_it_is_an_observer_that_overlaynet_loads(self, observer: Observer) -> None:
        make_observer(type(observer), "observer", type(observer).__name__, {})

    async def test_it_keeps_its_options(self, observer: Observer) -> None:
        assert isinstance(observer.options, observer.Options)

    async def test_every_option_is_explained(self, observer: Observer) -> None:
        options_are_explained(observer.Options)

    async def test_a_value_that_an_option_cannot_have_is_a_config_error(self, observer: Observer) -> None:
        wrong_values_are_config_errors(observer.Options)

    async def test_it_implements_hooks_that_there_are(self, plugins: Plugins, plugin: object) -> None:
        assert hook_implementations(plugin), "it implements no hook; mark its functions with overlaynet.api.hookimpl"

    @pytest.mark.parametrize(("hook", "arguments"), LIFE, ids=[hook for hook, _ in LIFE])
    async def test_it_takes_each_event_by_itself(
        self, plugins: Plugins, hook: str, arguments: dict[str, object]
    ) -> None:
        plugins.notify(hook, **arguments)
        plugins.notify(hook, **arguments)

    async def test_it_takes_a_nodes_whole_life(self, plugins: Plugins) -> None:
        for hook, arguments in LIFE:
            plugins.notify(hook, **arguments)

    async def test_it_answers_for_no_driver_that_is_not_its_own(self, plugins: Plugins) -> None:
        for axis in ("store", "backend", "router"):
            with pytest.raises(PluginError, match=f"there is no {axis} 'no-such-driver'"):
                plugins.driver(axis, "no-such-driver")

    async def test_its_commands_can_be_added_and_explain_themselves(self, plugins: Plugins) -> None:
        commands = Commands(reserved=BUILT_IN)
        plugins.notify("overlaynet_cli", commands=commands)
        for name in commands.names():
            command = commands.get(name)
            assert command is not None
            assert command.summary, f"the command {name} has no summary"
            assert not command.summary.endswith("."), f"the summary of {name} ends with a full stop"
            parser = argparse.ArgumentParser(prog=f"overlaynet {name}")
            command.configure(parser)
            assert parser.format_help()
