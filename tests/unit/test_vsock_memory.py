"""Guest memory and vhost-user messages, byte by byte."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import ProtocolError
from hyperpod.wire.vsock import vhost_user as wire
from hyperpod.wire.vsock.memory import GuestMemory, Region
from hyperpod.wire.vsock.vhost_user import Message, MessageReader, Request

U64 = st.integers(0, 2**64 - 1)


def two_regions() -> GuestMemory:
    return GuestMemory(
        [
            Region(0x1000, 0x70000, memoryview(bytearray(b"a" * 0x100))),
            Region(0x1100, 0x90000, memoryview(bytearray(b"b" * 0x200))),
        ]
    )


def test_both_address_spaces_reach_the_same_bytes() -> None:
    memory = two_regions()
    memory.slice(0x1110, 4)[:] = b"here"
    assert bytes(memory.user_slice(0x90010, 4)) == b"here"


@given(st.one_of(U64, st.integers(0xF00, 0x1400)), st.integers(0, 0x300))
def test_a_slice_is_exactly_what_was_asked_for_or_an_error(address: int, length: int) -> None:
    inside = any(s <= address and address + length <= e for s, e in ((0x1000, 0x1100), (0x1100, 0x1300)))
    try:
        view = two_regions().slice(address, length)
    except ProtocolError:
        assert not inside
    else:
        assert inside
        assert len(view) == length


def test_overlapping_regions_are_refused() -> None:
    region = Region(0x1000, 0x70000, memoryview(bytearray(0x100)))
    with pytest.raises(ProtocolError):
        GuestMemory([region, region._replace(guest_address=0x10FF)])


def read_all(data: bytes, sizes: list[int]) -> list[Message]:
    """Feed `data` in pieces of at most the sizes given, in turn."""
    reader, messages = MessageReader(), []
    turn = 0
    while data:
        size = min(reader.wanted, sizes[turn % len(sizes)])
        turn += 1
        message = reader.feed(data[:size])
        data = data[size:]
        if message is not None:
            messages.append(message)
    return messages


@given(
    st.lists(st.tuples(st.sampled_from(Request), st.binary(max_size=64), st.booleans()), max_size=8),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
def test_messages_survive_any_fragmentation(
    messages: list[tuple[Request, bytes, bool]], sizes: list[int]
) -> None:
    data = b"".join(wire.encode(request, body, flags=8 * ack) for request, body, ack in messages)
    assert read_all(data, sizes) == [Message(request, ack, body) for request, body, ack in messages]


@given(st.binary(max_size=200))
def test_random_bytes_are_messages_or_a_protocol_error(data: bytes) -> None:
    try:
        read_all(data, [7])
    except ProtocolError:
        return
    assert MessageReader().wanted == 12


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<III", 1, 0, 0),  # no version
        struct.pack("<III", 1, 5, 0),  # a reply
        struct.pack("<III", 1, 1, 1 << 20),
        struct.pack("<III", 77, 1, 0),
    ],
)
def test_wrong_headers_are_refused(header: bytes) -> None:
    with pytest.raises(ProtocolError):
        MessageReader().feed(header)


@given(st.binary(max_size=300))
def test_payloads_parse_or_raise_a_protocol_error(payload: bytes) -> None:
    for parse in (wire.u64, wire.vring_state, wire.vring_address, wire.config_window, wire.memory_table):
        try:
            parse(payload)
        except ProtocolError:
            continue
        assert payload


@given(U64, U64, U64, U64)
def test_memory_regions_stay_in_the_address_space(guest: int, size: int, user: int, offset: int) -> None:
    payload = struct.pack("<IIQQQQ", 1, 0, guest, size, user, offset)
    try:
        (region,) = wire.memory_table(payload)
    except ProtocolError:
        return
    assert region.size > 0
    assert region.guest_address + region.size <= 1 << 64
    assert region.user_address + region.size <= 1 << 64
