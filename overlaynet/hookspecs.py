"""The pluggy hooks: what a plugin may observe and add.

A plugin is a module or object in the entry-point group ``overlaynet.plugins`` with functions marked by
``overlaynet.api.hookimpl``, or a class derived from ``overlaynet.api.Observer`` with such methods, which can have options.
It implements the hooks it likes and takes the arguments it needs. One that raises is reported and its plugin disabled;
the daemon goes on. No hook is called per packet.

Hooks are called in the daemon's event loop, and while one runs everything else waits: renewals, too, and the end of a
lease that could not be renewed. So they return at once, and leave what takes time to a thread. One that took longer than
a second is reported by its plugin's name; longer than 30 seconds, and its plugin is disabled.

With ``--strict-plugins``, the daemon ends with an error that names the plugin where it would disable it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from overlaynet.commands import Commands
    from overlaynet.drivers import Driver
    from overlaynet.model import Lease, Peer

hookspec = pluggy.HookspecMarker("overlaynet")
hookimpl = pluggy.HookimplMarker("overlaynet")
"""Marks a function as the implementation of the hook of its name, or of the one given as ``specname``."""


@hookspec(firstresult=True)
def overlaynet_driver(axis: str, name: str) -> type[Driver] | None:
    """Answer for the driver ``name`` on ``axis`` (``"store"``, ``"backend"`` or ``"router"``), or return ``None``.

    The first answer wins. The core's own, last-resort answer is the driver that stands under that name in the axis's
    entry-point group; this hook is for drivers that have no entry point, as in tests. Every command that needs a driver
    asks here.
    """


@hookspec
def overlaynet_cli(commands: Commands) -> None:
    """Add subcommands to ``overlaynet`` by ``commands.add``. Called only when no built-in command has the name asked for."""


@hookspec
def overlaynet_lease_acquired(lease: Lease) -> None:
    """The node holds ``lease`` now; called at the start, and when a lease that was lost has been followed by another."""


@hookspec
def overlaynet_lease_renewed(lease: Lease) -> None:
    """The store has granted ``lease`` its whole lifetime again; also after its record had vanished and was taken back."""


@hookspec
def overlaynet_lease_lost(lease: Lease, reason: str) -> None:
    """Another node or process holds ``lease``'s subnets now, so they cannot be taken back.

    The daemon ends; or, with ``--on-lease-lost reacquire``, its peers are removed, and it begins again with another lease.
    """


@hookspec
def overlaynet_peer_added(peer: Peer) -> None:
    """Packets for ``peer.subnets`` are now carried to ``peer``."""


@hookspec
def overlaynet_peer_changed(old: Peer, new: Peer) -> None:
    """The peer with these subnets is reached in another way from now on (address or backend data)."""


@hookspec
def overlaynet_peer_removed(peer: Peer) -> None:
    """Packets for ``peer.subnets`` are no longer carried."""


@hookspec
def overlaynet_ready(lease: Lease) -> None:
    """Lease, device, routes and the first peer table are in place: traffic flows."""


@hookspec
def overlaynet_degraded(reason: str) -> None:
    """Something is wrong (the store does not answer, a route is refused); traffic goes on with what is known."""


@hookspec
def overlaynet_recovered() -> None:
    """What was reported by ``overlaynet_degraded`` is over."""


@hookspec
def overlaynet_stopping() -> None:
    """The daemon was asked to stop; called once, before anything is torn down. Not called when it ends by an error."""
