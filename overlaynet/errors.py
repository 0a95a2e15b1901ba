"""What can go wrong, as types.

Every message is one sentence for the operator: it names the thing that is wrong and the way out. The command line prints
it without a traceback and exits non-zero.
"""


class OverlaynetError(Exception):
    """Base of every error that overlaynet raises on purpose."""


class ConfigError(OverlaynetError):
    """A setting, an option or the network document is wrong; nothing was changed."""


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


class LeaseLost(OverlaynetError):
    """The lease is no longer this node's: its record vanished, or another node wrote it."""


class UnderlayError(OverlaynetError):
    """No usable interface or address towards the other hosts."""


class BackendError(OverlaynetError):
    """The backend cannot carry packets."""


class RouterError(OverlaynetError):
    """The kernel refused a route."""
