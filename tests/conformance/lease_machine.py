"""The lease protocol as a state machine: what nodes, operators and the network between them and the store may do.

Nodes start, crash and stop at any moment; what they ask of the store arrives, gets lost, is answered in vain, or
arrives after they gave up; time passes meanwhile. After every step the laws hold; and when the faults stop, all come
to rest.
"""

from __future__ import annotations

import enum
import itertools
import json
from collections.abc import Callable
from typing import ClassVar

import attrs
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from overlaynet import network as documents
from overlaynet import records
from overlaynet.errors import LeaseLost, RecordError
from overlaynet.leases import TableStore
from overlaynet.model import Lease, Reservation, Subnets
from overlaynet.network import Network
from overlaynet.plugins import Plugins
from overlaynet.table import Table
from tests.conformance.lease_nodes import Failure, Node, Operator, StoreOn, expected
from tests.conformance.lease_world import Call, MemoryWorld, World

TTL = 120.0
_STEP = 30.0
"""Seconds between two looks at a world that comes to rest; a live node renews its lease within two of them."""
_ROUNDS_TO_EXPIRE = 6
_ROUNDS_TO_REST = 12
_ROUNDS_AT_REST = 8

_NAMES = ("a", "b", "c", "operator")
_nodes = st.integers(0, 2)
_callers = st.integers(0, 3)


class Fate(enum.Enum):
    """What becomes of a call."""

    ARRIVES = "it takes effect, or its answer comes back"
    LOST = "it never takes effect, or its answer is lost; the caller is told that the store is not there"
    ANSWER_LOST = "it takes effect, and the caller is told that the store is not there"
    LATE = "the caller gives up, but it may still take effect"
    CRASH = "the caller dies; it may still take effect"
    CRASH_AFTER = "it takes effect, and the caller dies"
    HELD_UP = "it stays under way, as does whatever the caller asks from then on"


def _document(length: int) -> Network:
    """Five subnets of /26, or nine of /27: few enough for three nodes and a reservation to run into each other."""
    bounds = {"SubnetMin": "10.0.0.0", "SubnetMax": "10.0.1.0"}
    return documents.parse(json.dumps({"Network": "10.0.0.0/23", "SubnetLen": length, "LeaseTTL": TTL, **bounds}))


@attrs.frozen
class _Standing:
    """A lease record, as the machine knows it to stand in the store."""

    lease: Lease | None
    """``None`` for a placeholder of a reservation."""
    expires: float


class LeaseMachine(RuleBasedStateMachine):
    """Three nodes, two of them behind one address, and an operator, on one store.

    Derive from it to set another world or another store.
    """

    make_store: ClassVar[Callable[[Table], TableStore]] = StoreOn
    plugins: ClassVar[Plugins] = Plugins()
    at_rest: ClassVar[bool] = True
    """Whether to let each example come to rest at its end."""

    def make_world(self) -> World:
        """The world of one example; the machine closes it."""
        return MemoryWorld()

    def __init__(self) -> None:
        super().__init__()
        self.world = self.make_world()
        make_store = type(self).make_store
        self.nodes = [
            Node(self.world, name, address, make_store, self.plugins)
            for name, address in (("a", "192.0.2.1"), ("b", "192.0.2.1"), ("c", "192.0.2.3"))
        ]
        for node in self.nodes:
            node.granted = self._granted
        self.operator = Operator(self.world, make_store)
        self.network = _document(26)
        self.standing: dict[str, _Standing] = {}
        """The lease records in the store, by their keys, told from the writes that took effect."""
        self._seen = 0
        self._kept: dict[str, Subnets] = {}
        """The subnets that each node was granted last, while its record has stood without a break."""
        self._networks: dict[str, Network] = {}
        self.reserved: set[str] = set()
        """The keys of the reservations in the store."""
        self._asked_to_reserve: list[Reservation] = []
        """All that an operator has ever asked to reserve."""
        self.held_up: set[str] = set()
        """Those whose calls stay under way until the explorer passes them on; all others are answered at once."""
        self.fates: dict[str, Fate] = {}
        """What is to become of the next write of each caller."""
        self._changes = 0
        self._shown: dict[str, int] = {}
        """The number of changes at which each watcher was shown the store last."""
        self._wiped_after: int | None = None
        """How many writes there were when the store was wiped; ``None`` if it has not been."""
        self._wiped: set[str] = set()
        """The versions that records had before the store was wiped: it can keep no promise that was made with them."""
        self._moved: str | None = None
        self._failed = False

    # What can happen to a node

    @initialize()
    def begin(self) -> None:
        """All nodes are there."""
        for node in self.nodes:
            self._start(node)
        self._serve()

    @rule(
        which=_nodes,
        file=st.sampled_from(["kept", "lost", "of another"]),
        change=st.booleans(),
        reacquire=st.booleans(),
    )
    def start(self, which: int, file: str, change: bool, reacquire: bool) -> None:
        """A node starts, with or without the subnet file of its life before; if it lives, it crashes first.

        Or its lease is given back, and it starts with a copy of another host's disk.

        :param change: the network document changes before.
        :param reacquire: the node goes on with another lease when it loses one.
        """
        if change:
            self.network = _document(26 if self.network == _document(27) else 27)
        node = self.nodes[which]
        if file == "of another":
            self.end(which, "release")
        node.crash()
        if file != "kept":
            node.subnet_file = None if file == "lost" else self.nodes[which - 1].subnet_file
            if len(self._records_of(node)) != 1 or self._creations_under_way(node):
                self._kept.pop(node.name, None)  # it cannot tell which one of several it held
        self._start(node, reacquire=reacquire)
        self._serve()

    @rule(which=_nodes, how=st.sampled_from(["crash", "stop", "release"]))
    def end(self, which: int, how: str) -> None:
        """A node dies at whatever it waits for, though what it has asked may still arrive; or it stops cleanly."""
        node = self.nodes[which]
        if how == "release":
            self._kept.pop(node.name, None)
        if how == "crash":
            node.crash()
        else:
            node.stop(release=how == "release")
        self._serve()

    # What can happen between nodes and store

    @rule(who=_callers, fate=st.sampled_from(Fate))
    def expect(self, who: int, fate: Fate) -> None:
        """Decide what becomes of the next write that a caller asks for."""
        self.fates[_NAMES[who]] = fate

    @rule(who=_callers, long=st.booleans())
    def hold_up(self, who: int, long: bool) -> None:
        """From now on, what a caller asks stays under way until something becomes of each call.

        :param long: for longer than a lease lives; then another node starts that wants the same subnets.
        """
        self.held_up.add(_NAMES[who])
        if long:
            self.wait(1.5 * TTL)
            self.start((who + 1) % len(self.nodes), "of another", change=False, reacquire=False)

    @precondition(lambda self: any(call.caller in self.held_up for call in self.world.calls))
    @rule(pick=_callers, fate=st.sampled_from(Fate))
    def pass_on(self, pick: int, fate: Fate) -> None:
        """Something becomes of one call that is held up."""
        # What is asked is more interesting than what is waited for.
        calls = sorted(
            (call for call in self.world.calls if call.caller in self.held_up), key=lambda call: call.is_watch
        )
        self._pass_on(calls[pick % len(calls)], fate)
        self._serve()

    @precondition(lambda self: self.held_up)
    @rule()
    def free(self) -> None:
        """Nobody is held up any more."""
        self.held_up.clear()
        self._serve()

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0, 1.5 * TTL]))
    def wait(self, seconds: float) -> None:
        """Time passes, for all."""
        while seconds > 0:
            self._pass_time(min(seconds, _STEP))
            self._serve()
            seconds -= _STEP

    # What operators can do

    @rule(
        command=st.sampled_from(["reserve", "reserve for the address", "unreserve", "remove", "kill"]),
        which=_nodes,
        pick=st.integers(0, 8),
    )
    def operate(self, command: str, which: int, pick: int) -> None:
        """An operator begins a command, after killing the one that may still run.

        There is room for one reservation at a time. Only leases of dead nodes are removed.
        """
        self.operator.crash()
        node = self.nodes[which]
        family = self.network.ipv4
        assert family is not None
        subnets = Subnets(family[pick % family.size])

        async def unreserve(store: TableStore) -> None:
            for reservation in (await store.reservations()).reservations:
                await store.unreserve(reservation.subnets)

        async def remove(store: TableStore) -> None:
            for lease in (await store.leases()).leases:
                if lease.node == node.name and not node.alive:
                    await store.remove(lease)

        if command.startswith("reserve") and not self.reserved:
            by_name = command == "reserve"
            wanted = Reservation(subnets, node=node.name) if by_name else Reservation(subnets, public_ipv4=node.address)
            self._asked_to_reserve.append(wanted)
            self.operator.run(lambda store: store.reserve(wanted))
        elif command == "unreserve":
            self.operator.run(unreserve)
        elif command == "remove":
            self.operator.run(remove)
        self._serve()

    # What can happen to the store

    @precondition(lambda self: self._wiped_after is None)
    @rule()
    def wipe(self) -> None:
        """The store loses all that it holds, once."""
        self.world.wipe()
        self._wiped_after = len(self.world.writes)
        self._wiped = {write.record.version for write in self.world.writes if write.record is not None}
        self.standing.clear()
        self.reserved.clear()
        self._kept.clear()
        self._changes += 1
        self._serve()

    # The laws: for what was written before the store was wiped they do not hold, but for all that comes after

    @invariant()
    def no_two_owners_overlap(self) -> None:
        """Law 1."""
        promised = [(node, node.held) for node in self.nodes if node.held and node.held.version not in self._wiped]
        for (one, lease), (other, other_lease) in itertools.combinations(promised, 2):
            self._demand(not lease.subnets.overlaps(other_lease.subnets), f"two owners: {one} and {other}")

    @invariant()
    def no_claim_is_lost(self) -> None:
        """While the store has promised a lease to a node, its record stands."""
        for node in self.nodes:
            if node.held is not None and node.held.version not in self._wiped:
                found = self.standing.get(records.lease_key(node.held.subnets))
                stands = found is not None and found.lease is not None and found.expires > self.world.now
                self._demand(stands, f"claim lost: {node}, but its record is gone")
                assert found is not None
                assert found.lease is not None
                own = (found.lease.node, found.lease.run) == (node.held.node, node.held.run)
                self._demand(own, f"claim lost: {node}, but its record is {found.lease}")

    @invariant()
    def nobody_fails_without_need(self) -> None:
        """A node loses its lease only if it came too late to keep it, and ends, too, if there is no subnet left."""
        for node in self.nodes:
            for failure in node.failures:
                self._demand(
                    expected(failure) or self._taken_since_wiped(node, failure),
                    f"claim lost: {node.name} gave up with {failure.promised:g} s of its lease left: {failure.error!r}",
                )
            node.failures.clear()

    def _taken_since_wiped(self, node: Node, failure: Failure) -> bool:
        """True if a lease was wiped, and somebody else has written to its subnets since."""
        lease = failure.lease
        if lease is None or lease.version not in self._wiped or not isinstance(failure.error, LeaseLost):
            return False
        others = {write.key for write in self.world.writes[self._wiped_after :] if write.caller != node.name}
        leases = [records.parse_lease_key(key) for key in others if key.startswith(records.LEASE_PREFIX)]
        return any(lease.subnets.overlaps(other) for other in leases)

    @invariant()
    def a_restart_keeps_the_subnet(self) -> None:
        """Law 2: whose record stands as it did gets the same subnets again."""
        self._demand(self._moved is None, str(self._moved))

    def _granted(self, lease: Lease) -> None:
        if lease.version in self._wiped:
            return  # written before, and answered only now
        kept, self._kept[lease.node] = self._kept.get(lease.node), lease.subnets
        if kept is None or kept == lease.subnets or not self._networks[lease.node].grants(kept):
            return
        if any(asked.is_for(lease) or asked.subnets.overlaps(kept) for asked in self._asked_to_reserve):
            return  # it may have had to move
        others = (key for key, found in self.standing.items() if found.lease is None or found.lease.node != lease.node)
        if any(kept.overlaps(records.parse_lease_key(key)) for key in others):
            return
        self._moved = f"subnet not kept: {lease.node} held {kept} and was given {lease.subnets}"

    def teardown(self) -> None:
        """When the faults stop, all come to rest: each has a subnet, and nothing is written but renewals."""
        try:
            if self.at_rest and not self._failed:
                self._rest()
        finally:
            for node in self.nodes:
                node.crash()
            self.operator.crash()
            self.world.close()

    def _rest(self) -> None:
        self.held_up.clear()
        self.fates.clear()
        for _ in range(_ROUNDS_TO_EXPIRE):
            self._round()
        live = {node.name for node in self.nodes if node.alive}
        for key, found in self.standing.items():
            gone = found.lease is None or found.lease.node in live
            self._demand(gone, f"no rest: {key} of a node that died long ago has not expired")
        for _ in range(_ROUNDS_TO_REST):
            for node in self.nodes:
                if not node.alive:
                    self._start(node)
            self._round()
        held = [node.held for node in self.nodes]
        self._demand(None not in held, f"no rest: {self.nodes}")
        begun = len(self.world.writes)
        for _ in range(_ROUNDS_AT_REST):
            self._round()
        self._demand([node.held for node in self.nodes] == held, f"no rest: {held} became {self.nodes}")
        keys = {
            node.name: records.lease_key(lease.subnets) for node, lease in zip(self.nodes, held, strict=True) if lease
        }
        renewals = set()
        for write in self.world.writes[begun:]:
            renewal = write.operation == "replace" and write.key == keys.get(write.caller)
            self._demand(renewal, f"no rest: {write} is no renewal of {held}")
            renewals.add(write.caller)
        self._demand(len(renewals) == len(self.nodes), f"no rest: only {renewals} renew their leases")

    def _round(self) -> None:
        """All that is asked is answered; then some time passes."""
        self._serve()
        self.no_two_owners_overlap()
        self.no_claim_is_lost()
        self.nobody_fails_without_need()
        self.a_restart_keeps_the_subnet()
        self._pass_time(_STEP)

    # How it is done

    def _start(self, node: Node, *, reacquire: bool = False) -> None:
        self._networks[node.name] = self.network
        self._shown.pop(node.name, None)
        node.start(self.network, reacquire=reacquire)

    def _pass_time(self, seconds: float) -> None:
        self.world.advance(seconds)
        self._note_expiries()

    def _serve(self) -> None:
        """Answer all who are not held up, until none of them asks any more."""
        for _ in range(100):
            calls = [call for call in self.world.calls if call.caller not in self.held_up and self._due(call)]
            if not calls:
                return
            for call in calls:
                if call.is_watch:
                    self._shown[call.caller] = self._changes
                if call.is_write and (fate := self.fates.pop(call.caller, None)) is not None:
                    self._pass_on(call, fate)
                elif call in self.world.calls and call.caller not in self.held_up:
                    if not call.arrived:
                        self._arrive(call)
                    if call in self.world.calls:
                        self.world.answer(call)
            self.world.settle()
            self.no_two_owners_overlap()
            self.no_claim_is_lost()
        self._demand(False, f"no rest: the store is asked again and again, lately {[call.name for call in calls]}")

    def _pass_on(self, call: Call, fate: Fate) -> None:
        if fate is Fate.HELD_UP:
            self.held_up.add(call.caller)
        elif fate is Fate.ARRIVES and call.arrived:
            self.world.answer(call)
        elif fate is Fate.ARRIVES:
            self._arrive(call)
        else:
            if fate in (Fate.ANSWER_LOST, Fate.CRASH_AFTER) and not call.arrived:
                self._arrive(call)
            if fate in (Fate.CRASH, Fate.CRASH_AFTER):
                everybody: list[Node | Operator] = [*self.nodes, self.operator]
                next(one for one in everybody if one.name == call.caller).crash()
            elif call in self.world.calls:
                self.world.lose(call, late=fate is Fate.LATE)
        self.world.settle()

    def _due(self, call: Call) -> bool:
        return not call.is_watch or self._shown.get(call.caller) != self._changes

    def _arrive(self, call: Call) -> None:
        self._note_expiries()
        self.world.arrive(call)
        self._changes += len(self.world.writes) - self._seen
        for write in self.world.writes[self._seen :]:
            try:
                subnets = records.parse_lease_key(write.key)
            except RecordError:
                (self.reserved.discard if write.record is None else self.reserved.add)(write.key)
                continue
            if write.record is None:
                del self.standing[write.key]
            else:
                lease = records.decode_lease(write.key, write.record.value)
                assert write.record.ttl is not None
                self.standing[write.key] = _Standing(
                    None if records.is_placeholder(lease) else lease, self.world.now + write.record.ttl
                )
            for name, kept in list(self._kept.items()):
                if name != write.caller and kept == subnets:
                    del self._kept[name]
        self._seen = len(self.world.writes)

    def _note_expiries(self) -> None:
        for key, found in list(self.standing.items()):
            if found.expires <= self.world.now:
                del self.standing[key]
                self._changes += 1
                for name, kept in list(self._kept.items()):
                    if records.lease_key(kept) == key:
                        del self._kept[name]

    def _records_of(self, node: Node) -> list[Lease]:
        return [found.lease for found in self.standing.values() if found.lease and found.lease.node == node.name]

    def _creations_under_way(self, node: Node) -> bool:
        return any(call.caller == node.name and call.name.startswith("create ") for call in self.world.calls)

    def _demand(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self._failed = True
        assert holds, otherwise
