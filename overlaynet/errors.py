"""What can go wrong, as types.

Every message is one sentence for the operator: it names the thing that is wrong and the way out. The command line prints
it without a traceback and exits non-zero.
"""

import difflib
from collections.abc import Callable, Iterable


class OverlaynetError(Exception):
    """Base of every error that overlaynet raises on purpose."""


class ConfigError(OverlaynetError):
    """A setting, an option or the network document is wrong; nothing was changed."""


class SettingsError(ConfigError):
    """What this host was told is wrong, or names a driver that cannot be used; until that is changed, starting again is no use.

    Told by a flag, an environment variable or the configuration file; the network document is the store's.
    """


class PluginError(OverlaynetError):
    """A driver or plugin is missing or broken; the message names group, entry point, distribution and version."""


class RecordError(OverlaynetError):
    """A record of the store cannot be read as a lease; it is reported and skipped."""


class StoreError(OverlaynetError):
    """The store refused for good (credentials, certificates, permissions, a damaged store): trying again is no use."""


class StoreUnavailable(OverlaynetError):
    """The store did not answer, or answered that it cannot serve now; the request may or may not have taken effect.

    Try again later, with a fresh list.
    """


class SubnetsExhausted(OverlaynetError):
    """Every subnet of the network is leased."""


class ReservationError(OverlaynetError):
    """Subnets cannot be reserved, or given back, as was asked; nothing was changed."""


class LeaseInUse(OverlaynetError):
    """A lease may belong to a node that is alive, so it is not ended on an operator's word alone; nothing was changed."""


class LeaseLost(OverlaynetError):
    """The lease is no longer this node's: its record vanished, or another node wrote it."""


class IdentityTaken(LeaseLost):
    """Another process with the identity of this node holds its lease now: two nodes were given one identity."""


class UnderlayError(OverlaynetError):
    """No usable interface or address towards the other hosts."""


class BackendError(OverlaynetError):
    """The backend cannot carry packets."""


class DeviceGone(BackendError):
    """The device no longer exists under the name that it was made with: somebody deleted or renamed it."""


class NoThread(OverlaynetError):
    """The kernel gives no thread now; what needed it was not begun."""


class RouterError(OverlaynetError):
    """The kernel refused a route."""


def did_you_mean(name: str, known: Iterable[str], fold: Callable[[str], str] = str) -> str:
    """What a message about an unknown name goes on with, if one of those that are known is near: a question.

    :param fold: makes those names equal that are to count as one.
    """
    names = {fold(each): each for each in known}
    near = difflib.get_close_matches(fold(name), names, n=1)
    return f"; did you mean {names[near[0]]!r}?" if near else ""
