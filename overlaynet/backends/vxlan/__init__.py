"""The vxlan backend: the kernel carries each packet in a VXLAN datagram (RFC 7348), as with flannel's vxlan."""

from overlaynet.backends.vxlan.backend import VxlanBackend, VxlanOptions

__all__ = ["VxlanBackend", "VxlanOptions"]
