"""The extension backend: runs an operator's commands when the node starts and stops, and when peers or its underlay change."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
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
        "", "Run for each peer that goes or changes, and for all of them at the end", check=check_command
    )
    underlay_change_command: str = option(
        "",
        "Run when this node's interface, its MTU or its addresses have changed; flannel has none",
        check=check_command,
    )
    shutdown_command: str = option(
        "", "Run when the node stops, also after a start that failed; flannel has none", check=check_command
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

        They run one after the other. One that fails keeps no other from being run.
        """
        wanted = {peer.subnets: peer for peer in peers}
        self._failures = {subnets: why for subnets, why in self._failures.items() if subnets in wanted | self._added}
        for subnets, peer in list(self._added.items()):
            if wanted.get(subnets) != peer:
                await self._remove(subnets, peer)
        for subnets, peer in wanted.items():
            # While the old one cannot be removed, the new one is not added: it would be removed with it, later.
            if self._added.get(subnets, peer) == peer and subnets not in self._complete:
                await self._add(subnets, peer)

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
        """Run SubnetRemoveCommand for each peer, then ShutdownCommand, once; give the name up. Failures are logged."""
        for subnets, peer in list(self._added.items()):
            await self._remove(subnets, peer)
            self._added.pop(subnets, None)
        self._complete.clear()
        due, self._shutdown_due = self._shutdown_due, False
        if due:
            try:
                await self._run("ShutdownCommand", self.options.shutdown_command, self._variables())
            except CommandFailed as error:
                log.warning("command failed", extra=fields(command="ShutdownCommand", reason=str(error)))
        if self._claim is not None:
            self._claim.close()

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

    async def _add(self, subnets: Subnets, peer: Peer) -> None:
        self._added[subnets] = peer  # before it runs: cancelled half-way, it is to be undone
        if await self._run_for("SubnetAddCommand", self.options.subnet_add_command, peer):
            self._complete.add(subnets)

    async def _remove(self, subnets: Subnets, peer: Peer) -> None:
        self._complete.discard(subnets)
        if await self._run_for("SubnetRemoveCommand", self.options.subnet_remove_command, peer):
            del self._added[subnets]

    async def _run_for(self, command: str, text: str, peer: Peer) -> bool:
        """Run a peer's command; True if it succeeded. A failure is logged when it is another than the last."""
        published = peer.data.ipv4 if isinstance(peer.data.ipv4, str) else ""
        variables = _subnets(peer.subnets) | _present(PUBLIC_IP=peer.public_ipv4, PUBLIC_IPV6=peer.public_ipv6)
        try:
            await self._run(command, text, variables, published)
        except CommandFailed as error:
            reason = f"{command}: {error}"
            if self._failures.get(peer.subnets) != reason:
                log.warning("command failed", extra=fields(command=command, subnet=peer.subnets, reason=str(error)))
            self._failures[peer.subnets] = reason
            return False
        self._failures.pop(peer.subnets, None)
        return True

    async def _run_or_fail(self, command: str, text: str) -> Output | None:
        try:
            return await self._run(command, text, self._variables())
        except CommandFailed as error:
            raise BackendError(f"{command} of the network document's Backend failed: {error}") from error

    async def _run(self, command: str, text: str, variables: Mapping[str, str], stdin: str = "") -> Output | None:
        """Run one command, if there is one, and log what it says."""
        if not text.strip():
            return None
        begun = time.monotonic()
        output = await run(expand(text, variables), variables, self.options.timeout, stdin)
        said = {name: text for name, text in attrs.asdict(output).items() if text}
        log.info("command run", extra=fields(command=command, **variables, **said, seconds=time.monotonic() - begun))
        return output


def _subnets(subnets: Subnets) -> dict[str, str]:
    return _present(SUBNET=subnets.ipv4, IPV6SUBNET=subnets.ipv6)


def _present(**values: object) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}
