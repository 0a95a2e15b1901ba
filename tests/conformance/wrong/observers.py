"""Observers that are wrong on purpose, each in one way; and one that is right, which they are made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import pytest

from overlaynet.api import Backend, Command, Commands, Driver, Lease, Observer, Peer, hookimpl, option
from overlaynet.testing.observers import ObserverConformance


class Model:
    """An observer that is right: it counts the peers, and has a command that tells their number."""

    summary: ClassVar[str] = "tell how many peers there are"

    def __init__(self) -> None:
        self.peers: set[str] = set()

    @hookimpl
    def overlaynet_peer_added(self, peer: Peer) -> None:
        self.peers.add(str(peer.subnets))

    @hookimpl
    def overlaynet_peer_removed(self, peer: Peer) -> None:
        self.peers.discard(str(peer.subnets))

    @hookimpl
    def overlaynet_cli(self, commands: Commands) -> None:
        commands.add(Command("count", self.summary, self.add_arguments, self.run))

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="one JSON number")

    def run(self, arguments: argparse.Namespace) -> int:
        return 0


@attrs.frozen
class Options:
    """Right ones."""

    size: int = option(1, "how many to count at most")


class ModelWithOptions(Observer):
    """An observer with options that is right."""

    Options: ClassVar[type[Any]] = Options

    @hookimpl
    def overlaynet_peer_added(self, peer: Peer) -> None:
        """Count it."""


class Suite(ObserverConformance):
    """The suite, for the observer class that a subclass names, made with these arguments."""

    observed: ClassVar[type[object]] = Model
    arguments: ClassVar[tuple[object, ...]] = ()

    @pytest.fixture
    def plugin(self) -> object:
        return self.observed(*self.arguments)


class TestModel(Suite):
    """The right one passes."""


class TestModelWithOptions(Suite):
    """The right one with options passes."""

    observed = ModelWithOptions
    arguments = (Options(),)


def wrong(test: str | None, *arguments: object) -> Callable[[type[object]], type[object]]:
    """Hold an observer, made with these arguments, against the suite; it is to fail that test, and no other."""

    def hold(observer: type[object]) -> type[object]:
        name = f"Test{observer.__name__}"
        members = {"observed": observer, "arguments": arguments, "__module__": __name__}
        globals()[name] = type(name, (Suite,), members)
        return observer

    return hold


@wrong("test_it_implements_hooks_that_there_are")
class ImplementsNothing:
    """Its functions are there, and none is marked."""

    def peer_added(self, peer: Peer) -> None:
        """Never called."""


@wrong("test_it_takes_each_event_by_itself")
class RemembersOnlyOnePeerEach(Model):
    """Cannot take the same event twice, as after a watch that began anew."""

    @hookimpl
    def overlaynet_peer_added(self, peer: Peer) -> None:
        if str(peer.subnets) in self.peers:
            raise KeyError(peer.subnets)
        self.peers.add(str(peer.subnets))


@wrong("test_it_takes_each_event_by_itself")
class TakesALeaseForGranted(Model):
    """Counts on having been told of the lease before a renewal: an observer may begin in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.lease: Lease | None = None

    @hookimpl
    def overlaynet_lease_acquired(self, lease: Lease) -> None:
        self.lease = lease

    @hookimpl
    def overlaynet_lease_renewed(self, lease: Lease) -> None:
        assert self.lease is not None


@wrong("test_it_takes_a_nodes_whole_life")
class CannotBearAnEnd(Model):
    """Raises when a node that was ready stops."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = False

    @hookimpl
    def overlaynet_ready(self) -> None:
        self.ready = True

    @hookimpl
    def overlaynet_stopping(self) -> None:
        if self.ready:
            raise RuntimeError("so soon?")


@wrong("test_it_answers_for_no_driver_that_is_not_its_own")
class AnswersForEveryDriver(Model):
    """Says that every driver is its own."""

    @hookimpl
    def overlaynet_driver(self, axis: str, name: str) -> type[Driver]:
        return Backend


@wrong("test_its_commands_can_be_added_and_explain_themselves")
class TakesABuiltInName(Model):
    """Adds a command whose name overlaynet has."""

    @hookimpl
    def overlaynet_cli(self, commands: Commands) -> None:
        commands.add(Command("run", self.summary, self.add_arguments, self.run))


@wrong("test_its_commands_can_be_added_and_explain_themselves")
class SaysNothing(Model):
    """Its command has no summary."""

    summary = ""


@wrong("test_its_commands_can_be_added_and_explain_themselves")
class SaysItInASentence(Model):
    """Its command's summary ends with a full stop, which the help puts there."""

    summary = "tell how many peers there are."


@wrong("test_its_commands_can_be_added_and_explain_themselves")
class HelpThatBreaks(Model):
    """The help of an option has a percent sign, which argparse takes for a format."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--share", help="how many % of them")


@wrong("test_it_is_an_observer_that_overlaynet_loads", Options())
class MadeForALaterContract(ModelWithOptions):
    """Says that it needs a version of the contract that there is not."""

    api = (1, 99)


@attrs.frozen
class _Demanding:
    size: int = option(help="how many to count at most")


@wrong("test_it_is_an_observer_that_overlaynet_loads", _Demanding(size=1))
class HasToBeToldSomething(ModelWithOptions):
    """An option has no default, so that it cannot be loaded wherever it is installed."""

    Options = _Demanding


@wrong("test_it_is_an_observer_that_overlaynet_loads", Options(size=2))
class CannotBeMadeWithItsDefaults(ModelWithOptions):
    """Its constructor has more to say than its options."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.size < 2:
            raise ValueError("too few")


@wrong("test_it_keeps_its_options", Options())
class ForgetsItsOptions(ModelWithOptions):
    """Its constructor drops what it is given."""

    def __init__(self, options: Options) -> None:
        super().__init__(None)


@attrs.frozen
class _Silent:
    size: int = option(1)


@wrong("test_every_option_is_explained", _Silent())
class DoesNotExplain(ModelWithOptions):
    """An option has no help."""

    Options = _Silent


@attrs.frozen
class _Careless:
    size: int = option(1, "how many to count at most", check=lambda size: None if 1 // size else "must be 1")


@wrong("test_a_value_that_an_option_cannot_have_is_a_config_error", _Careless())
class WithACarelessCheck(ModelWithOptions):
    """A check raises what is no answer."""

    Options = _Careless
