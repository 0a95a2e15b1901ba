"""The extension backend: runs an operator's commands when the node starts and stops, and when peers or its underlay change."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import attrs

from overlaynet.backends._command import CommandFailed, Output, check_command, expand, run
from overlaynet.devices import Claim, check_name
from overlaynet.drivers import Backend
from overlaynet.errors import BackendError
from overlaynet.logs import fields
from overlaynet.model import JSON, Device, Lease, LeaseData, Peer, Route, Subnets, Underlay
from overlaynet.network import Network
from overlaynet.options import between, option

log = logging.getLogger(__name__)

ROUND = 5.0
"""Seconds after which no more commands for peers are begun in one go: the node has other things to look after, too."""
AT_THE_END = 5.0
"""Seconds that the peers' commands may take together when the node stops, and then ShutdownCommand: a service manager waits
for them."""


@attrs.frozen
class ExtensionOptions:
    """The members of ``Backend`` in the network document. The commands' names are flannel's; an empty one is not run."""

    pre_startup_command: str = option(
        "", "Run before a subnet is leased; what it prints is published with the lease", check=check_command
    )
    post_startup_command: str = option("", "Run once the subnet is leased", check=check_command)
    subnet_add_command: str = option(
        "",
        "Run for each peer that comes or changes; its standard input is what the peer has published",
        check=check_command,
    )
    subnet_remove_command: str = option(
        "",
        "Run for each peer that goes or changes, and for all of them at the end, when they may take 5 seconds together",
        check=check_command,
    )
    underlay_change_command: str = option(
        "",
        "Run when this node's interface, its MTU or its addresses have changed; flannel has none",
        check=check_command,
    )
    shutdown_command: str = option(
        "",
        "Run when the node stops, also after a start that failed; it may take 5 seconds; flannel has none",
        check=check_command,
    )
    timeout: float = option(30.0, "Seconds that a command may take", check=between(0.1, 3600))
    device: str | None = option(
        None,
        "Device that the commands make, as status and other programs are told; by default the underlay's interface",
    )
    mtu: int | None = option(
        None,
        "Bytes in the largest packet that containers can send; by default the underlay's MTU",
        name="MTU",
        check=between(68, 65535),
    )
    name: str = option(
        "extension",
        "What tells this overlay from another on the same host; no device has this name",
        check=check_name,
    )


class ExtensionBackend(Backend):
    """Runs commands, which do what is needed for packets to reach the peers.

    A command is split into arguments by the rules of shell quoting, and run without a shell. ``$SUBNET`` and its like are
    replaced in each argument, and are environment variables, too. Its output is logged. A command for a peer that fails is
    reported, and run again at each audit until it succeeds; so each is to succeed when there is nothing left to do.

    Commands run one after the other, for they may use what cannot be shared. So that slow ones keep the node from nothing
    else, no more of them are begun after :data:`ROUND` seconds; the rest follows a moment later. Those that take peers away
    come first, and those that have failed come last.

    What commands make in the kernel nobody can recognise but they: after a crash it is for PreStartupCommand to clear away
    what an earlier run left. What this backend does claim is its ``Name``: commands of two nodes on one host would undo
    each other's work, so a second one is refused unless it has another.
    """

    Options: ClassVar[type[ExtensionOptions]] = ExtensionOptions
    options: ExtensionOptions

    def __init__(self, options: ExtensionOptions) -> None:
        super().__init__(options)
        self._claim: Claim | None = None
        self._network: Network | None = None
        self._underlay: Underlay | None = None
        self._followed: Underlay | None = None
        """The underlay that the commands have been told of; ``None`` while one that tells of another has not succeeded."""
        self._subnets: Subnets | None = None
        self._shutdown_due = False
        self._added: dict[Subnets, Peer] = {}
        """The peers whose SubnetAddCommand was begun, and whose SubnetRemoveCommand has not succeeded since."""
        self._complete: set[Subnets] = set()
        """Those of them whose SubnetAddCommand has succeeded."""
        self._failures: dict[Subnets, str] = {}
        """Why the last command for a peer failed; the one that was run last comes last."""
        self._left = asyncio.Event()
        """There was no time for some commands that have not failed."""

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        """Run PreStartupCommand; publish what it prints.

        :raises BackendError: if it fails, or another node on this host has the name; then nothing has been run.
        """
        self._check_mtu(underlay)
        self._claim = Claim(self.options.name)
        self._network, self._underlay, self._followed = network, underlay, underlay
        self._shutdown_due = True
        output = await self._run_or_fail("PreStartupCommand", self.options.pre_startup_command)
        # With flannel, error messages are published, too; here they are only logged.
        return LeaseData("extension", None if output is None else output.stdout)

    async def start(self, lease: Lease) -> Device:
        """Run PostStartupCommand. :raises BackendError: if it fails."""
        underlay = self._check_open()
        self._subnets = lease.subnets
        await self._run_or_fail("PostStartupCommand", self.options.post_startup_command)
        return self._device(underlay)

    async def set_underlay(self, underlay: Underlay) -> Device:
        """Run UnderlayChangeCommand, with this underlay's variables, unless it is known already.

        SubnetAddCommand is run for each peer again then, for what it made may have gone with an interface or an address.

        :raises BackendError: if UnderlayChangeCommand fails; the next call runs it again, whatever underlay that is for.
        """
        self._check_open()
        self._check_mtu(underlay)
        if underlay != self._followed:
            self._underlay, self._followed = underlay, None
            await self._run_or_fail("UnderlayChangeCommand", self.options.underlay_change_command)
            self._followed = underlay
            self._complete.clear()
        return self._device(underlay)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        """Run SubnetRemoveCommand for those that have gone or changed, then SubnetAddCommand for those that are new or changed.

        One that fails keeps no other from being run. For what there is no time, :meth:`changed` returns at once.
        """
        wanted = {peer.subnets: peer for peer in peers}
        self._failures = {subnets: why for subnets, why in self._failures.items() if subnets in wanted | self._added}
        gone = [subnets for subnets, peer in self._added.items() if wanted.get(subnets) != peer]
        new = [peer for peer in peers if peer.subnets in gone or peer.subnets not in self._complete]
        steps = [(subnets, partial(self._remove, subnets, self.options.timeout)) for subnets in gone]
        steps += [(peer.subnets, partial(self._add, peer)) for peer in new]
        left = await self._run_each(steps, asyncio.get_running_loop().time() + ROUND)
        if any(subnets not in self._failures for subnets in left):
            self._left.set()

    async def changed(self) -> None:
        """Return when there was no time for some commands, so that they are run now; what commands make is not watched."""
        await self._left.wait()
        self._left.clear()

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        """None: the commands make what routes are needed."""
        return []

    def status(self) -> Mapping[str, JSON]:
        """How many peers are set up, and the last failure for each that is not."""
        return {
            "complete": len(self._complete),
            "failures": {str(subnets): reason for subnets, reason in self._failures.items()},
        }

    async def aclose(self) -> None:
        """Run SubnetRemoveCommand for each peer, then ShutdownCommand, once; give the name up. Failures are logged.

        When the time for the peers is up, the rest of them is left to ShutdownCommand.
        """
        try:
            await self._remove_all()
            due, self._shutdown_due = self._shutdown_due, False
            if due:
                await self._shut_down()
        finally:
            if self._claim is not None:
                self._claim.close()

    async def _remove_all(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + AT_THE_END

        async def remove(subnets: Subnets) -> None:
            await self._remove(subnets, min(self.options.timeout, max(until - loop.time(), 0.1)))

        left = await self._run_each([(subnets, partial(remove, subnets)) for subnets in self._added], until)
        if left:
            hint = "ShutdownCommand, or PreStartupCommand of the next run, is to clear away what is left"
            log.warning("no time left to remove peers", extra=fields(peers=len(left), hint=hint))
        self._added.clear()
        self._complete.clear()

    async def _shut_down(self) -> None:
        limit = min(self.options.timeout, AT_THE_END)
        try:
            await self._run("ShutdownCommand", self.options.shutdown_command, self._variables(), limit)
        except CommandFailed as error:
            log.warning("command failed", extra=fields(command="ShutdownCommand", reason=str(error)))

    def _device(self, underlay: Underlay) -> Device:
        return Device(
            self.options.device or underlay.interface, self.options.mtu or underlay.mtu, instance=self.options.name
        )

    def _check_open(self) -> Underlay:
        if self._underlay is None:
            raise BackendError("the extension backend is not open; this is a defect of its caller")
        return self._underlay

    def _check_mtu(self, underlay: Underlay) -> None:
        if self.options.mtu is not None and self.options.mtu > underlay.mtu:
            raise BackendError(
                f"the network document's Backend asks for MTU {self.options.mtu}, but {underlay.interface} carries at most "
                f"{underlay.mtu}; lower the one or raise the other"
            )

    def _variables(self) -> dict[str, str]:
        """What is known of this node, for the commands that concern it."""
        network, underlay, subnets = self._network, self._underlay, self._subnets
        known = {} if subnets is None else _subnets(subnets)
        if network is not None and underlay is not None:
            known |= _present(
                NETWORK=None if network.ipv4 is None else network.ipv4.network,
                IPV6NETWORK=None if network.ipv6 is None else network.ipv6.network,
                INTERFACE=underlay.interface,
                MTU=self.options.mtu or underlay.mtu,
                PUBLIC_IP=underlay.public_ipv4,
                PUBLIC_IPV6=underlay.public_ipv6,
            )
        return known

    async def _run_each(
        self, steps: Sequence[tuple[Subnets, Callable[[], Awaitable[None]]]], until: float
    ) -> list[Subnets]:
        """Take the steps, at least one, as long as there is time; those for peers whose command failed last of all.

        :param until: time of the event loop's clock.
        :return: the peers for which there was no time.
        """
        failed = {subnets: number for number, subnets in enumerate(self._failures)}
        queue = deque(sorted(steps, key=lambda step: failed.get(step[0], -1)))
        while queue:
            await queue.popleft()[1]()
            if asyncio.get_running_loop().time() >= until:
                break
        return [subnets for subnets, _ in queue]

    async def _add(self, peer: Peer) -> None:
        if self._added.get(peer.subnets, peer) != peer:
            return  # the old one could not be removed; the new one would be removed with it, later
        self._added[peer.subnets] = peer  # before it runs: cancelled half-way, it is to be undone
        if await self._run_for("SubnetAddCommand", self.options.subnet_add_command, peer, self.options.timeout):
            self._complete.add(peer.subnets)

    async def _remove(self, subnets: Subnets, limit: float) -> None:
        self._complete.discard(subnets)
        if await self._run_for("SubnetRemoveCommand", self.options.subnet_remove_command, self._added[subnets], limit):
            del self._added[subnets]

    async def _run_for(self, command: str, text: str, peer: Peer, limit: float) -> bool:
        """Run a peer's command; True if it succeeded. A failure is logged when it is another than the last."""
        published = peer.data.ipv4 if isinstance(peer.data.ipv4, str) else ""
        variables = _subnets(peer.subnets) | _present(PUBLIC_IP=peer.public_ipv4, PUBLIC_IPV6=peer.public_ipv6)
        before = self._failures.pop(peer.subnets, None)
        try:
            await self._run(command, text, variables, limit, published)
        except CommandFailed as error:
            reason = self._failures[peer.subnets] = f"{command}: {error}"
            if before != reason:
                log.warning("command failed", extra=fields(command=command, subnet=peer.subnets, reason=str(error)))
            return False
        return True

    async def _run_or_fail(self, command: str, text: str) -> Output | None:
        try:
            return await self._run(command, text, self._variables(), self.options.timeout)
        except CommandFailed as error:
            raise BackendError(f"{command} of the network document's Backend failed: {error}") from error

    async def _run(
        self, command: str, text: str, variables: Mapping[str, str], limit: float, stdin: str = ""
    ) -> Output | None:
        """Run one command, if there is one, and log what it says."""
        if not text.strip():
            return None
        begun = time.monotonic()
        output = await run(expand(text, variables), variables, limit, stdin)
        said = {name: text for name, text in attrs.asdict(output).items() if text}
        log.info("command run", extra=fields(command=command, **variables, **said, seconds=time.monotonic() - begun))
        return output


def _subnets(subnets: Subnets) -> dict[str, str]:
    return _present(SUBNET=subnets.ipv4, IPV6SUBNET=subnets.ipv6)


def _present(**values: object) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}
