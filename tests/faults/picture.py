"""What a host looks like, to be compared with what it looks like later."""

from collections.abc import Sequence
from typing import Any

from overlaynet.testing.lab import Host


def picture(host: Host, versions: Sequence[int] = (4, 6)) -> dict[str, Any]:
    """What is to be again as it was; of routes and addresses, those of these IP versions."""
    status = host.status()
    packets: Any = status["packets"]
    return {
        **{
            name: status[name]
            for name in ("subnets", "public_ipv4", "public_ipv6", "mtu", "problems", "ready", "device")
        },
        "peers": {subnet: peer["address"] for subnet, peer in packets["peers"].items()},
        "routes": sorted(
            (route["type"], route["dst"], route.get("dev"), route.get("gateway"), route.get("metric"))
            for version in versions
            for route in host.namespace.ip_json(f"-{version}", "route", "show")
        ),
        "addresses": sorted(
            (link["ifname"], link["mtu"], "UP" in link["flags"], entry["local"], entry.get("tentative", False))
            for version in versions
            for link in host.namespace.ip_json(f"-{version}", "address", "show")
            for entry in link["addr_info"]
        ),
    }
