"""All that a plugin imports.

A driver is a class derived from :class:`Store` (or :class:`TableStore`), :class:`Backend` or :class:`Router`, named by an
entry point in the group ``overlaynet.stores``, ``overlaynet.backends`` or ``overlaynet.routers``. An observer is a
module with :data:`hookimpl` functions (see :mod:`overlaynet.hookspecs`), or a class derived from :class:`Observer` if it
has options, named in the group ``overlaynet.plugins``.
"""

from overlaynet._threads import call_in_thread
from overlaynet.background import Background
from overlaynet.commands import Command, Commands
from overlaynet.delivery import Delivery, Dropped
from overlaynet.devices import Claim, check_name, claim_name
from overlaynet.drivers import API, Backend, Driver, NoOptions, Observer, Router, Store
from overlaynet.encapsulation import fitting_mtu, peer_address
from overlaynet.errors import (
    BackendError,
    ConfigError,
    IdentityTaken,
    LeaseLost,
    OverlaynetError,
    PluginError,
    RecordError,
    ReservationError,
    RouterError,
    StoreError,
    StoreUnavailable,
    SubnetsExhausted,
    UnderlayError,
)
from overlaynet.hookspecs import hookimpl
from overlaynet.leases import TableStore
from overlaynet.logs import fields
from overlaynet.model import (
    JSON,
    Device,
    IPAddress,
    IPNetwork,
    Lease,
    LeaseData,
    LeaseRequest,
    Malformed,
    Peer,
    Reservation,
    Reserved,
    Route,
    Snapshot,
    Subnets,
    Underlay,
)
from overlaynet.network import Network, SubnetRange
from overlaynet.network import parse as parse_network
from overlaynet.options import between, one_of, option
from overlaynet.packet_device import PacketDevice
from overlaynet.retry import Backoff
from overlaynet.table import Record, Table

__all__ = [
    "API",
    "JSON",
    "Backend",
    "BackendError",
    "Background",
    "Backoff",
    "Claim",
    "Command",
    "Commands",
    "ConfigError",
    "Delivery",
    "Device",
    "Driver",
    "Dropped",
    "IPAddress",
    "IPNetwork",
    "IdentityTaken",
    "Lease",
    "LeaseData",
    "LeaseLost",
    "LeaseRequest",
    "Malformed",
    "Network",
    "NoOptions",
    "Observer",
    "OverlaynetError",
    "PacketDevice",
    "Peer",
    "PluginError",
    "Record",
    "RecordError",
    "Reservation",
    "ReservationError",
    "Reserved",
    "Route",
    "Router",
    "RouterError",
    "Snapshot",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "SubnetRange",
    "Subnets",
    "SubnetsExhausted",
    "Table",
    "TableStore",
    "Underlay",
    "UnderlayError",
    "between",
    "call_in_thread",
    "check_name",
    "claim_name",
    "fields",
    "fitting_mtu",
    "hookimpl",
    "one_of",
    "option",
    "parse_network",
    "peer_address",
]
