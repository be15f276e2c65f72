"""Netlink messages: laid out as the kernel's headers say, and never more than ValueError for what is cut off."""

from __future__ import annotations

import contextlib
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.wire import rtnetlink as rt


def parse(data: bytes) -> rt.Message:
    [message] = rt.messages(data)
    return message


def test_a_link_is_set() -> None:
    data = rt.set_link(9, 3, up=True, name="eth0", mtu=1400, namespace=7)
    length, kind, flags, seq, _ = struct.unpack_from("=IHHII", data)
    assert (length, kind, flags, seq) == (len(data), rt.RTM_NEWLINK, rt.NLM_F_REQUEST | rt.NLM_F_ACK, 9)
    assert len(data) % 4 == 0
    link = rt.read_link(parse(data))
    assert (link.index, link.name, link.mtu, link.flags) == (3, "eth0", 1400, rt.IFF_UP)
    assert struct.pack("=HHI", 8, rt.IFLA_NET_NS_FD, 7) in data
    down = rt.set_link(1, 3, up=False)
    assert struct.unpack_from("=II", down, 16 + 8) == (0, rt.IFF_UP), "flags, and which of them change"


def test_addresses_round_trip_and_ipv6_skips_detection() -> None:
    for family, text in ((rt.AF_INET, "10.0.0.5"), (rt.AF_INET6, "fd00::5")):
        address = rt.Address(2, family, socket.inet_pton(family, text), 24, 0)
        data = rt.new_address(1, address)
        assert rt.read_address(parse(data)) == address
        assert bool(data[16 + 2] & rt.IFA_F_NODAD) == (family == rt.AF_INET6)


@pytest.mark.parametrize(
    "route",
    [
        rt.Route(rt.AF_INET, b"", 0, 2, bytes([10, 0, 0, 1])),
        rt.Route(rt.AF_INET, bytes([169, 254, 1, 1]), 32, 2, metric=5),
        rt.Route(rt.AF_INET6, b"", 0, 2, bytes(15) + b"\1", onlink=True),
        rt.Route(rt.AF_INET, bytes(4), 8, 2, source=bytes([10, 0, 0, 7])),
        rt.Route(rt.AF_INET, b"", 0, 2, bytes([10, 0, 0, 1]), mtu=1410, advmss=1370),
    ],
)
def test_routes_round_trip(route: rt.Route) -> None:
    assert rt.read_route(parse(rt.new_route(1, route))) == route


def test_a_route_without_gateway_is_of_the_link() -> None:
    scope = 16 + 6
    assert rt.new_route(1, rt.Route(rt.AF_INET, bytes(4), 8, 2))[scope] == rt.RT_SCOPE_LINK
    assert rt.new_route(1, rt.Route(rt.AF_INET, b"", 0, 2, b"\n\0\0\1"))[scope] == rt.RT_SCOPE_UNIVERSE


@pytest.mark.parametrize("attribute", [rt.RTA_MULTIPATH, rt.RTA_VIA])
def test_several_gateways_or_one_of_the_other_family_make_no_wrong_route(attribute: int) -> None:
    """Read without them it would lead to the link itself."""
    plain = parse(rt.new_route(1, rt.Route(rt.AF_INET, b"", 0, 2)))
    more = plain.payload + struct.pack("=HH", 4, attribute)
    assert rt.read_route(plain) is not None
    assert rt.read_route(rt.Message(plain.type, 1, more)) is None


def test_other_tables_and_kinds_are_no_routes() -> None:
    data = bytearray(rt.new_route(1, rt.Route(rt.AF_INET, bytes(4), 8, 2)))
    for at, value in ((16 + 4, 255), (16 + 7, 2)):  # table local; type local
        changed = bytearray(data)
        changed[at] = value
        assert rt.read_route(parse(bytes(changed))) is None


def test_neighbours_round_trip() -> None:
    entry = rt.Neighbour(2, rt.AF_INET, bytes([169, 254, 1, 1]), "ee:ee:ee:ee:ee:ee")
    assert rt.read_neighbour(parse(rt.new_neighbour(1, entry))) == entry


def test_the_kernel_s_errors() -> None:
    refused = parse(rt.message(rt.NLMSG_ERROR, 0, 1, struct.pack("=i", -17) + bytes(16)))
    assert rt.error_of(refused) == 17
    assert rt.error_of(parse(rt.message(rt.NLMSG_ERROR, 0, 1, bytes(20)))) == 0


def test_several_messages_of_one_read() -> None:
    both = rt.set_link(1, 1, up=True) + rt.set_link(2, 9, mtu=9)
    assert [message.seq for message in rt.messages(both)] == [1, 2]
    with pytest.raises(rt.NetlinkFormatError):
        list(rt.messages(both[:-1]))


@given(st.binary(max_size=64), st.binary(max_size=200))
def test_nonsense_is_a_value_error(head: bytes, body: bytes) -> None:
    with contextlib.suppress(rt.NetlinkFormatError):
        list(rt.messages(head + body))
    for read in (rt.read_link, rt.read_address, rt.read_route, rt.read_neighbour):
        with contextlib.suppress(rt.NetlinkFormatError):
            read(rt.Message(0, 0, body))
