"""Measures paths between two hosts: overlaynet's engines, the kernel's VXLAN, other tunnels, and no tunnel at all."""
