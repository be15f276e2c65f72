"""What the plugins made in a namespace, read from the kernel: the VM gets the same.

Read and not taken from the plugins' result, since some (Calico's, for example) make routes and neighbours that
they do not tell, and chained ones (tuning) change what earlier ones told. Runs inside the namespace.
"""

from __future__ import annotations

import contextlib
import ipaddress
from pathlib import Path

from hyperpod.errors import NetworkError
from hyperpod.model.network import GuestInterface, GuestNeighbour, GuestRoute
from hyperpod.netlink import Netlink
from hyperpod.wire import rtnetlink as rt

MAX_INTERFACES = 4
"""Of a pod. Each is a card of its VM, which has slots for more than twenty."""

MAX_MTU = 65_521
"""Of a tap: 64 KiB, less 1 and the Ethernet header (the kernel's tun.c)."""

_RTPROT_RA = 9


def tap_name(sandbox_id: str, number: int) -> str:
    """Unique on the host and at most 15 bytes (IFNAMSIZ): `hp`, 12 digits of the sandbox's id, one of the card."""
    return f"hp{sandbox_id[:12]}{number:x}"


def _text(address: bytes) -> str:
    return str(ipaddress.ip_address(address))


def read_interfaces(sandbox_id: str) -> tuple[GuestInterface, ...]:
    """Every Ethernet interface that is up, the default one first. Raises NetworkError for none or too many."""
    with Netlink() as netlink:
        links = [x for x in netlink.links() if x.kind == rt.ARPHRD_ETHER and x.flags & rt.IFF_UP]
        addresses, routes, neighbours = netlink.addresses(), netlink.routes(), netlink.neighbours()
    if not links:
        raise NetworkError("the plugins made no interface that is up in the pod's namespace")
    if len(links) > MAX_INTERFACES:
        raise NetworkError(f"the plugins made {len(links)} interfaces; a VM takes {MAX_INTERFACES}")
    for link in links:
        if link.mtu > MAX_MTU:
            raise NetworkError(
                f"{link.name} has an MTU of {link.mtu}, and a VM's card takes {MAX_MTU} at most: set mtu in the "
                "network's configuration"
            )
    links.sort(key=lambda link: (link.name != "eth0", link.index))
    return tuple(
        GuestInterface(
            name=link.name,
            mac=link.mac,
            mtu=link.mtu,
            tap=tap_name(sandbox_id, number),
            addresses=tuple(
                f"{_text(x.address)}/{x.prefix}"
                for x in addresses
                if x.index == link.index and x.address and not _link_local(x.family, x.address)
            ),
            routes=tuple(_route(x) for x in _ordered(routes, link.index)),
            neighbours=tuple(
                GuestNeighbour(address=_text(x.address), mac=x.mac)
                for x in neighbours
                if x.index == link.index and x.state & rt.NUD_PERMANENT and x.address and x.mac
            ),
        )
        for number, link in enumerate(links)
    )


def _link_local(family: int, address: bytes) -> bool:
    """Every guest makes its own IPv6 one out of the MAC, which is the same."""
    return family == rt.AF_INET6 and address[:2] == b"\xfe\x80"


def _ordered(routes: list[rt.Route], index: int) -> list[rt.Route]:
    """Those of one link that the guest does not make by itself; gateways come after the ways to them."""
    own = [
        route
        for route in routes
        if route.index == index
        and route.protocol != _RTPROT_RA
        and not _link_local(route.family, route.destination)
    ]
    return sorted(own, key=lambda route: bool(route.gateway))


def _route(route: rt.Route) -> GuestRoute:
    zero = bytes(4 if route.family == rt.AF_INET else 16)
    return GuestRoute(
        destination=f"{_text(route.destination or zero)}/{route.prefix}",
        gateway=_text(route.gateway) if route.gateway else "",
        source=_text(route.source) if route.source else "",
        metric=route.metric,
        onlink=route.onlink,
        mtu=route.mtu,
        advmss=route.advmss,
    )


def quiet(tap: str) -> None:
    """No IPv6 of the namespace's own on a tap: its multicasts would go to the guest. Runs inside the namespace."""
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        Path(f"/proc/sys/net/ipv6/conf/{tap}/disable_ipv6").write_text("1")
