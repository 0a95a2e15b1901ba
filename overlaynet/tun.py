"""TUN devices: network interfaces whose other end is a file descriptor."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from overlaynet.errors import BackendError

_PATH = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_TUNGETFEATURES = 0x800454CF
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_TUN_EXCL = 0x8000


class DeviceNameTaken(Exception):
    """There is an interface of this name already."""


def open_tun(name: str, *, offload_header: bool = False) -> int:
    """Create the TUN device ``name`` and return its descriptor: non-blocking, closed on exec.

    Each read returns, and each write takes, one whole IP packet with nothing before it. The device is down, and lives as
    long as the descriptor.

    :param offload_header: if the kernel can do so, have each packet behind the 10 bytes of ``struct virtio_net_hdr``
        (Linux, Documentation/networking/tuntap.rst). Whether it does, ``TUNGETIFF`` tells. All offloads are off.
    :raises DeviceNameTaken: if an interface of this name exists, whatever it is.
    :raises BackendError: if this process cannot have a TUN device.
    """
    try:
        descriptor = os.open(_PATH, os.O_RDWR | os.O_NONBLOCK)  # and not inheritable: PEP 446
    except OSError as error:
        raise BackendError(_explain(error)) from error
    # Exclusive, for without it the kernel would hand over a persistent device that someone else has made.
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_TUN_EXCL
    try:
        if offload_header and _features(descriptor) & _IFF_VNET_HDR:
            flags |= _IFF_VNET_HDR
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EBUSY, errno.EEXIST):
            raise DeviceNameTaken(name) from error
        if error.errno in (errno.EPERM, errno.EACCES):
            raise BackendError(_explain(error)) from error
        raise BackendError(
            f"the kernel refuses to make the TUN device {name}: {error.strerror}; see its log (dmesg)"
        ) from error
    return descriptor


def _features(descriptor: int) -> int:
    features: int = struct.unpack("I", fcntl.ioctl(descriptor, _TUNGETFEATURES, bytes(4)))[0]
    return features


def _explain(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return "making a TUN device needs root, or the capability CAP_NET_ADMIN; run overlaynet with it"
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return (
            f"{_PATH} is missing; load the kernel module with `modprobe tun` "
            f"(in a container, hand the device in: --device {_PATH})"
        )
    return f"{_PATH} cannot be opened: {error.strerror}"
