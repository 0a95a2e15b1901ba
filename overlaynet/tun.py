"""TUN devices: network interfaces whose other end is a file descriptor."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from overlaynet.errors import BackendError
from overlaynet.logs import fields

log = logging.getLogger(__name__)

_PATH = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_TUNGETFEATURES = 0x800454CF
_TUNGETIFF = 0x800454D2
_IFF_TUN = 0x0001
_IFF_NAPI = 0x0010
_IFF_MULTI_QUEUE = 0x0100
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_TUN_EXCL = 0x8000
_REQUEST = struct.Struct("16sH22x")
"""``struct ifreq``: a name and flags."""

GRO_FLUSH_TIMEOUT = 50_000
"""Nanoseconds for which a device with GRO waits for one more packet before it hands on what it has joined."""
INTERFACES = Path("/sys/class/net")
"""Where the kernel shows its interfaces (sysfs(5))."""


class DeviceNameTaken(Exception):
    """There is an interface of this name already."""


def open_queues(name: str, count: int, *, offload_header: bool = False, gro: bool = False) -> list[int]:
    """Create the TUN device ``name`` with ``count`` queues; return a descriptor for each, as of :func:`open_tun`.

    If the kernel gives fewer queues (but one at least), that is logged, and the device does with them. Of a device with
    several, each queue has a share of the packets until its descriptor is closed; the device goes with the last one.

    :raises DeviceNameTaken: as :func:`open_tun` does.
    :raises BackendError: likewise; or if somebody deleted or renamed the device before it was complete.
    """
    with contextlib.ExitStack() as undo:
        descriptors = [open_tun(name, offload_header=offload_header, several_queues=count > 1, gro=gro)]
        undo.callback(os.close, descriptors[0])
        while len(descriptors) < count:
            try:
                descriptors.append(_open_next_queue(name, descriptors[0]))
            except OSError as error:
                log.warning(
                    "the device has fewer queues than asked for",
                    extra=fields(device=name, queues=len(descriptors), wanted=count, reason=error.strerror),
                )
                break
            undo.callback(os.close, descriptors[-1])
        # A queue is asked for by the device's name, which may have come to mean another device, or a new one.
        if not are_of(name, descriptors):
            raise BackendError(f"the device {name} was deleted or renamed as soon as it was made; try again")
        undo.pop_all()
    return descriptors


def are_of(name: str, descriptors: Iterable[int]) -> bool:
    """True if they are queues of one device that is there, and has this name now."""
    return {_name_of(descriptor) for descriptor in descriptors} == {name}


def open_tun(name: str, *, offload_header: bool = False, several_queues: bool = False, gro: bool = False) -> int:
    """Create the TUN device ``name`` and return its descriptor: non-blocking, closed on exec.

    Each read returns, and each write takes, one whole IP packet with nothing before it. The device is down, and lives as
    long as the descriptor.

    :param offload_header: if the kernel can do so, have each packet behind the 10 bytes of ``struct virtio_net_hdr``
        (Linux, Documentation/networking/tuntap.rst). Whether it does, ``TUNGETIFF`` tells. All offloads are off.
    :param several_queues: if the kernel can do so, allow further queues (``IFF_MULTI_QUEUE``).
    :param gro: if the kernel can do so, take what is written the way of its generic receive offload (``IFF_NAPI``), which
        joins nothing before :func:`start_gro`.
    :raises DeviceNameTaken: if an interface of this name exists, whatever it is.
    :raises BackendError: if this process cannot have a TUN device.
    """
    try:
        descriptor = os.open(_PATH, os.O_RDWR | os.O_NONBLOCK)  # and not inheritable: PEP 446
    except OSError as error:
        raise BackendError(_explain(error)) from error
    # Exclusive, for without it the kernel would hand over a persistent device that someone else has made.
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_TUN_EXCL
    wanted = (
        (_IFF_VNET_HDR if offload_header else 0)
        | (_IFF_MULTI_QUEUE if several_queues else 0)
        | (_IFF_NAPI if gro else 0)
    )
    try:
        if wanted:
            wanted &= _features(descriptor)
        _create(descriptor, name, flags, wanted)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EBUSY, errno.EEXIST):
            raise DeviceNameTaken(name) from error
        if error.errno in (errno.EPERM, errno.EACCES):
            raise BackendError(
                "making a TUN device needs root, or the capability CAP_NET_ADMIN; run overlaynet with it"
            ) from error
        raise BackendError(
            f"the kernel refuses to make the TUN device {name}: {error.strerror}; see its log (dmesg)"
        ) from error
    return descriptor


def start_gro(name: str, descriptor: int) -> None:
    """Have a device join TCP segments that are written to it one after another, so that they are one packet's work to the host.

    The kernel does so by its own rules: segments of one flow that follow on each other and whose checksums are right; where
    what was joined is too large for its way, the same segments are cut out of it. A packet is handed on when none has come for
    :data:`GRO_FLUSH_TIMEOUT`, and after a tick of the kernel's clock however many come (Linux,
    Documentation/networking/napi.rst, and ``napi_gro_flush``). Idempotent.

    :raises OSError: ``ENOTSUP`` if the device was not made with ``gro``; ``ENODEV`` if ``/sys`` shows another network
        namespace; and as files there do, which belong to root.
    """
    _, flags = _name_and_flags(descriptor)
    if not flags & _IFF_NAPI:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    interface = INTERFACES / name
    # Each /sys belongs to the namespace it was mounted in, whatever that of this thread is.
    if int((interface / "ifindex").read_text()) != socket.if_nametoindex(name):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    (interface / "gro_flush_timeout").write_text(str(GRO_FLUSH_TIMEOUT))


def _create(descriptor: int, name: str, flags: int, wanted: int) -> None:
    """Make a device with the ``wanted`` flags, or those of them that the kernel takes: some say that they can, and refuse."""
    asked = [flag for flag in (_IFF_NAPI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE) if flag & wanted]
    choices = (itertools.combinations(asked, count) for count in range(len(asked) + 1))
    for given_up in map(sum, itertools.chain.from_iterable(choices)):
        try:
            fcntl.ioctl(descriptor, _TUNSETIFF, _REQUEST.pack(name.encode(), flags | wanted & ~given_up))
        except OSError as error:
            if error.errno != errno.EINVAL or given_up == wanted:
                raise
        else:
            return


def _open_next_queue(name: str, first: int) -> int:
    """A further queue of the device that ``first`` belongs to. :raises OSError: if the kernel does not give one."""
    descriptor = os.open(_PATH, os.O_RDWR | os.O_NONBLOCK)
    try:
        _, flags = _name_and_flags(first)
        fcntl.ioctl(descriptor, _TUNSETIFF, _REQUEST.pack(name.encode(), flags))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _name_of(descriptor: int) -> str | None:
    """The name of the device that the descriptor belongs to; ``None`` if it is gone."""
    try:
        name, _ = _name_and_flags(descriptor)
    except OSError:
        return None
    return name


def _name_and_flags(descriptor: int) -> tuple[str, int]:
    """Of the device that the descriptor belongs to. :raises OSError: if it is gone."""
    name, flags = _REQUEST.unpack(fcntl.ioctl(descriptor, _TUNGETIFF, bytes(_REQUEST.size)))
    return name.rstrip(b"\0").decode(), flags


def _features(descriptor: int) -> int:
    features: int = struct.unpack("I", fcntl.ioctl(descriptor, _TUNGETFEATURES, bytes(4)))[0]
    return features


def _explain(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return (
            f"{_PATH} may not be opened: {error.strerror}; let this user read and write it, and hand it in where overlaynet "
            f"is confined (systemd: DeviceAllow={_PATH} rw; a container: --device {_PATH})"
        )
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return (
            f"{_PATH} is missing; load the kernel module with `modprobe tun` "
            f"(in a container, hand the device in: --device {_PATH})"
        )
    return f"{_PATH} cannot be opened: {error.strerror}"
