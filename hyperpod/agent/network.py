"""The guest's network cards, configured as the plugins configured the pod's interfaces on the host."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable, Iterator, Sequence

from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.errors import InvalidArgument
from hyperpod.netlink import Netlink
from hyperpod.wire import rtnetlink as rt

CARD_TIMEOUT = 5.0
"""Seconds for a card to appear; the kernel has found it before init, unless it was hot-plugged."""


def configure(interfaces: Iterable[v1.NetworkInterface]) -> None:
    """Blocking, some milliseconds. Safe to repeat. Raises InvalidArgument naming the interface."""
    found: list[tuple[v1.NetworkInterface, rt.Link]] = []
    with Netlink() as netlink:
        for interface in interfaces:
            with _named(interface):
                card = _find(netlink, interface.mac, [other.index for _, other in found])
                found.append((interface, card))
                if card.name != interface.name:  # which may be another card's still
                    netlink.do("down", rt.set_link, card.index, up=False)
                    netlink.do("its name", rt.set_link, card.index, name=f"card{card.index}")
        for interface, card in found:
            with _named(interface):
                if card.name != interface.name:
                    netlink.do("its name", rt.set_link, card.index, name=interface.name)
                _configure(netlink, interface, card)


@contextlib.contextmanager
def _named(interface: v1.NetworkInterface) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as exc:
        raise InvalidArgument(f"interface {interface.name[:40]} ({interface.mac[:40]}): {exc}") from exc


def move(interfaces: Iterable[v1.NetworkInterface], namespace: int) -> None:
    """The cards into another network namespace, before they are configured. Raises OSError."""
    moved: list[int] = []
    with Netlink() as netlink:
        for interface in interfaces:
            card = _find(netlink, interface.mac, moved)
            moved.append(card.index)
            netlink.do(f"moving {card.name}", rt.set_link, card.index, namespace=namespace)


def _configure(netlink: Netlink, interface: v1.NetworkInterface, card: rt.Link) -> None:
    # No router of the outside may add to what the plugins gave, and no address waits for its detection.
    for setting in ("accept_ra", "accept_dad"):
        path = f"/proc/sys/net/ipv6/conf/{interface.name}/{setting}"
        with contextlib.suppress(FileNotFoundError), open(path, "w") as file:
            file.write("0")
    netlink.do("up", rt.set_link, card.index, up=True, mtu=interface.mtu)
    for text in interface.addresses:
        family, address, prefix = _network(text)
        new = rt.Address(card.index, family, address, prefix, rt.RT_SCOPE_UNIVERSE)
        netlink.do(f"address {text}", rt.new_address, new)
    for neighbour in interface.neighbours:
        family, address, _ = _network(neighbour.address)
        entry = rt.Neighbour(card.index, family, address, neighbour.mac)
        netlink.do(f"neighbour {neighbour.address}", rt.new_neighbour, entry)
    for route in interface.routes:
        with contextlib.suppress(FileExistsError):  # of a Hello before
            netlink.do(f"route {route.destination}", rt.new_route, _route(route, card.index))


def _find(netlink: Netlink, mac: str, taken: Sequence[int]) -> rt.Link:
    """The next card with this address: those of ipvlan have one and the same."""
    deadline = time.monotonic() + CARD_TIMEOUT
    while True:
        for link in netlink.links():
            if link.kind == rt.ARPHRD_ETHER and link.mac == mac.lower() and link.index not in taken:
                return link
        if time.monotonic() > deadline:
            raise OSError("no such network card")
        time.sleep(0.01)  # before the first container: there is nothing else to do


def _network(text: str) -> tuple[int, bytes, int]:
    """Family, packed address, prefix length (all bits when there is none)."""
    address, _, prefix = text.partition("/")
    family = rt.AF_INET6 if ":" in address else rt.AF_INET
    packed = socket.inet_pton(family, address)
    length = int(prefix) if prefix else len(packed) * 8
    if not 0 <= length <= len(packed) * 8:
        raise ValueError(f"prefix length of {text[:60]}")
    return family, packed, length


def _route(item: v1.Route, index: int) -> rt.Route:
    family, destination, prefix = _network(item.destination)
    return rt.Route(
        family=family,
        destination=destination if prefix else b"",
        prefix=prefix,
        index=index,
        gateway=_network(item.gateway)[1] if item.gateway else b"",
        source=_network(item.source)[1] if item.source else b"",
        metric=item.metric,
        onlink=item.onlink,
        mtu=item.mtu,
        advmss=item.advmss,
    )
