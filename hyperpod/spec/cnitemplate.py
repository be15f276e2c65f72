"""A conflist with holes for the node's pod networks, filled when the kubelet tells them. Pure.

A hole is a whole JSON string: `"{{.PodCIDR}}"` becomes the first network, `"{{.PodCIDRRanges}}"` the value of
host-local's `ranges`, `"{{.Routes}}"` a default route for each family. What comes out is JSON by construction.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from typing import Any

from hyperpod.errors import InvalidArgument
from hyperpod.logs import printable
from hyperpod.spec.cni import CniError, decode, parse_conflist

MAX_NETWORKS = 8


def networks(pod_cidr: str) -> tuple[str, ...]:
    """NetworkConfig.pod_cidr: networks with commas between. Raises InvalidArgument."""
    found = []
    for text in filter(None, (part.strip() for part in pod_cidr.split(","))):
        try:
            found.append(str(ipaddress.ip_network(text, strict=False)))
        except ValueError as exc:
            raise InvalidArgument(
                f"runtime_config.network_config.pod_cidr: {text[:100]!r} is not a network"
            ) from exc
    if len(found) > MAX_NETWORKS:
        raise InvalidArgument(f"runtime_config.network_config.pod_cidr has {len(found)} networks")
    return tuple(found)


def fill(source: str, text: str, cidrs: Sequence[str]) -> str:
    """The conflist's text. `cidrs` is not empty. Raises CniError naming `source` when it makes no conflist."""
    default = {4: "0.0.0.0/0", 6: "::/0"}
    families = dict.fromkeys(ipaddress.ip_network(cidr).version for cidr in cidrs)
    holes: dict[str, Any] = {
        "{{.PodCIDR}}": cidrs[0],
        "{{.PodCIDRRanges}}": [[{"subnet": cidr}] for cidr in cidrs],
        "{{.Routes}}": [{"dst": default[family]} for family in families],
    }

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        if isinstance(value, str) and "{{" in value and value not in holes:
            raise CniError(
                f"{source}: {printable(repr(value), 100)} is no hole that can be filled; these can, each a whole "
                f"string: {', '.join(holes)}"
            )
        return holes.get(value, value) if isinstance(value, str) else value

    done = json.dumps(filled(decode(source, text)), indent=2) + "\n"
    parse_conflist(source, done)
    return done
