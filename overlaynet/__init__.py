"""overlaynet: one flat IP network for the containers of many hosts.

Plugins import :mod:`overlaynet.api`, and for their tests :mod:`overlaynet.testing`; everything else is internal.
"""

__version__ = "0.1.0"
