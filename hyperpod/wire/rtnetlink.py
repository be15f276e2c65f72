"""Messages of rtnetlink(7), built and read without a socket: what a pod's interfaces need and no more.

The agent configures the guest's network cards with them, the daemon reads a namespace and moves taps. Numbers are
those of linux/netlink.h and linux/rtnetlink.h, in host byte order; addresses are packed, in network order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_GETLINK = 16, 18
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x400, 0x800

AF_UNSPEC, AF_INET, AF_INET6 = 0, 2, 10
IFF_UP = 0x1
ARPHRD_ETHER = 1
IFA_F_NODAD, IFA_F_PERMANENT, IFA_F_NOPREFIXROUTE = 0x02, 0x80, 0x200
RT_TABLE_MAIN = 254
RTPROT_KERNEL, RTPROT_BOOT = 2, 3
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTN_UNICAST = 1
RTNH_F_ONLINK = 4
NUD_PERMANENT = 0x80

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_NET_NS_FD = 1, 3, 4, 28
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS = 1, 4, 5, 6, 7, 8
RTA_MULTIPATH, RTA_VIA = 9, 18
RTAX_MTU, RTAX_ADVMSS = 2, 8
NDA_DST, NDA_LLADDR = 1, 2

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDR = struct.Struct("=BBBBi")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGH = struct.Struct("=BxxxiHBB")
_ATTRIBUTE = struct.Struct("=HH")


class NetlinkFormatError(ValueError):
    """The kernel's answer is cut off or makes no sense."""


@dataclass(frozen=True)
class Message:
    """One netlink message without its header."""

    type: int
    seq: int
    payload: bytes


@dataclass(frozen=True)
class Link:
    index: int
    name: str
    kind: int
    """ARPHRD_*."""
    flags: int
    mac: str
    mtu: int


@dataclass(frozen=True)
class Address:
    index: int
    family: int
    address: bytes
    prefix: int
    scope: int


@dataclass(frozen=True)
class Route:
    """A unicast route of the main table. Empty bytes: not set; `destination` empty with prefix 0: default."""

    family: int
    destination: bytes
    prefix: int
    index: int = 0
    gateway: bytes = b""
    source: bytes = b""
    metric: int = 0
    protocol: int = RTPROT_BOOT
    onlink: bool = False
    mtu: int = 0
    advmss: int = 0
    """The largest TCP segment that is offered to the other end, in bytes."""


@dataclass(frozen=True)
class Neighbour:
    index: int
    family: int
    address: bytes
    mac: str
    state: int = field(default=NUD_PERMANENT)


# -- building ----------------------------------------------------------------------------------------------


def message(kind: int, flags: int, seq: int, payload: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, seq, 0) + payload


def _attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4)


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def dump_request(kind: int, seq: int, family: int = AF_UNSPEC) -> bytes:
    """Ask for all links, addresses, routes or neighbours (RTM_GET*)."""
    body = {
        RTM_GETLINK: _LINK.pack(family, 0, 0, 0, 0),
        RTM_GETADDR: _ADDR.pack(family, 0, 0, 0, 0),
        RTM_GETROUTE: _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0),
        RTM_GETNEIGH: _NEIGH.pack(family, 0, 0, 0, 0),
    }[kind]
    return message(kind, NLM_F_REQUEST | NLM_F_DUMP, seq, body)


def set_link(
    seq: int,
    index: int,
    *,
    up: bool | None = None,
    name: str = "",
    mtu: int = 0,
    namespace: int | None = None,
) -> bytes:
    """Change a link. `namespace` is a file descriptor of the network namespace that it moves to."""
    flags = change = 0
    if up is not None:
        flags, change = (IFF_UP if up else 0), IFF_UP
    body = _LINK.pack(AF_UNSPEC, 0, index, flags, change)
    if name:
        body += _attribute(IFLA_IFNAME, name.encode() + b"\0")
    if mtu:
        body += _u32(IFLA_MTU, mtu)
    if namespace is not None:
        body += _u32(IFLA_NET_NS_FD, namespace)
    return message(RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK, seq, body)


def new_address(seq: int, address: Address) -> bytes:
    """IPv6 addresses do not wait for duplicate address detection: the plugins' address is the pod's alone.

    The kernel makes no route to the prefix: some plugins (ptp) want it to lead elsewhere."""
    flags = IFA_F_PERMANENT | IFA_F_NOPREFIXROUTE | (IFA_F_NODAD if address.family == AF_INET6 else 0)
    body = _ADDR.pack(address.family, address.prefix, flags & 0xFF, address.scope, address.index)
    body += _attribute(IFA_LOCAL, address.address) + _attribute(IFA_ADDRESS, address.address)
    body += _u32(IFA_FLAGS, flags)
    return message(RTM_NEWADDR, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, seq, body)


def new_route(seq: int, route: Route) -> bytes:
    """One more, also where another interface has one to the same network; one that is there is EEXIST."""
    scope = RT_SCOPE_UNIVERSE if route.gateway or route.family == AF_INET6 else RT_SCOPE_LINK
    flags = RTNH_F_ONLINK if route.onlink else 0
    body = _ROUTE.pack(
        route.family, route.prefix, 0, 0, RT_TABLE_MAIN, route.protocol, scope, RTN_UNICAST, flags
    )
    if route.destination:
        body += _attribute(RTA_DST, route.destination)
    if route.gateway:
        body += _attribute(RTA_GATEWAY, route.gateway)
    if route.source:
        body += _attribute(RTA_PREFSRC, route.source)
    if route.metric:
        body += _u32(RTA_PRIORITY, route.metric)
    metrics = ((RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss))
    if nested := b"".join(_u32(kind, value) for kind, value in metrics if value):
        body += _attribute(RTA_METRICS, nested)
    body += _u32(RTA_OIF, route.index)
    return message(RTM_NEWROUTE, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND, seq, body)


def new_neighbour(seq: int, neighbour: Neighbour) -> bytes:
    body = _NEIGH.pack(neighbour.family, neighbour.index, neighbour.state, 0, RTN_UNICAST)
    body += _attribute(NDA_DST, neighbour.address)
    body += _attribute(NDA_LLADDR, bytes.fromhex(neighbour.mac.replace(":", "")))
    return message(RTM_NEWNEIGH, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, seq, body)


# -- reading -----------------------------------------------------------------------------------------------


def messages(data: bytes) -> Iterator[Message]:
    """Split what one recv gave. Raises NetlinkFormatError."""
    at = 0
    while at < len(data):
        if len(data) - at < _HEADER.size:
            raise NetlinkFormatError("a header is cut off")
        length, kind, _, seq, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            raise NetlinkFormatError(f"a message of {length} bytes in {len(data) - at}")
        yield Message(kind, seq, data[at + _HEADER.size : at + length])
        at += (length + 3) & ~3


def error_of(message: Message) -> int:
    """errno of an NLMSG_ERROR or NLMSG_DONE message; 0 is success."""
    if len(message.payload) < 4:
        return 0
    return -int(struct.unpack_from("=i", message.payload)[0])


def _attributes(data: bytes) -> dict[int, bytes]:
    """By type without the nesting bits; the last of a type wins."""
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            raise NetlinkFormatError(f"an attribute of {length} bytes in {len(data) - at}")
        found[kind & 0x3FFF] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def _unpack(layout: struct.Struct, message: Message) -> tuple[tuple[int, ...], dict[int, bytes]]:
    if len(message.payload) < layout.size:
        raise NetlinkFormatError("a message is cut off")
    return layout.unpack_from(message.payload), _attributes(message.payload[layout.size :])


def _number(attributes: dict[int, bytes], kind: int) -> int:
    data = attributes.get(kind, b"")
    return int(struct.unpack("=I", data)[0]) if len(data) == 4 else 0


def _mac(data: bytes) -> str:
    return ":".join(f"{byte:02x}" for byte in data)


def read_link(message: Message) -> Link:
    (_, kind, index, flags, _), attributes = _unpack(_LINK, message)
    name = attributes.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")
    return Link(
        index, name, kind, flags, _mac(attributes.get(IFLA_ADDRESS, b"")), _number(attributes, IFLA_MTU)
    )


def read_address(message: Message) -> Address:
    (family, prefix, _, scope, index), attributes = _unpack(_ADDR, message)
    # On a point-to-point link IFA_ADDRESS is the other end.
    own = attributes.get(IFA_LOCAL) or attributes.get(IFA_ADDRESS, b"")
    return Address(index, family, own, prefix, scope)


def read_route(message: Message) -> Route | None:
    """None for what is not a plain unicast route of the main table, with one gateway of its own family at most."""
    (family, prefix, _, _, table, protocol, _, kind, flags), attributes = _unpack(_ROUTE, message)
    if table != RT_TABLE_MAIN or kind != RTN_UNICAST or family not in (AF_INET, AF_INET6):
        return None
    if RTA_MULTIPATH in attributes or RTA_VIA in attributes:
        return None
    metrics = _attributes(attributes.get(RTA_METRICS, b""))
    return Route(
        family=family,
        destination=attributes.get(RTA_DST, b""),
        prefix=prefix,
        index=_number(attributes, RTA_OIF),
        gateway=attributes.get(RTA_GATEWAY, b""),
        source=attributes.get(RTA_PREFSRC, b""),
        metric=_number(attributes, RTA_PRIORITY),
        protocol=protocol,
        onlink=bool(flags & RTNH_F_ONLINK),
        mtu=_number(metrics, RTAX_MTU),
        advmss=_number(metrics, RTAX_ADVMSS),
    )


def read_neighbour(message: Message) -> Neighbour:
    (family, index, state, _, _), attributes = _unpack(_NEIGH, message)
    return Neighbour(
        index, family, attributes.get(NDA_DST, b""), _mac(attributes.get(NDA_LLADDR, b"")), state
    )
