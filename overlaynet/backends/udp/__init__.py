"""The udp backend: each packet of the overlay travels as the payload of one UDP datagram, as with flannel's udp."""

from overlaynet.backends.udp.backend import UdpBackend, UdpOptions

__all__ = ["UdpBackend", "UdpOptions"]
