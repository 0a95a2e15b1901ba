"""Observers that are wrong on purpose, each in one way; and one that is right, which they are made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import ClassVar

import pytest

from overlaynet.api import Backend, Command, Commands, Driver, Lease, Peer, hookimpl
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


class Suite(ObserverConformance):
    """The suite, for the observer class that a subclass names."""

    observer: ClassVar[type[object]] = Model

    @pytest.fixture
    def plugin(self) -> object:
        return self.observer()


class TestModel(Suite):
    """The right one passes."""


def wrong(test: str | None) -> Callable[[type[object]], type[object]]:
    """Hold an observer against the suite; it is to fail that test, and no other."""

    def hold(observer: type[object]) -> type[object]:
        name = f"Test{observer.__name__}"
        globals()[name] = type(name, (Suite,), {"observer": observer, "__module__": __name__})
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
