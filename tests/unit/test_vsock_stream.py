"""Credit and the life of a stream, against a model with unbounded numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import ProtocolError
from hyperpod.wire.vsock.packet import (
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    Packet,
    decode,
    encode,
)
from hyperpod.wire.vsock.stream import Event, Stream

U16, U32, U64 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
PACKETS = st.builds(Packet, U64, U64, U32, U32, U32, U16, U16, U32, U32, U32)


def packet(op: int, *, length: int = 0, flags: int = 0, alloc: int = 1000, fwd: int = 0) -> Packet:
    return Packet(3, 2, 1024, 99, length, 1, op, flags, alloc, fwd & 0xFFFFFFFF)


def opened(buf_alloc: int = 1000, alloc: int = 1000) -> Stream:
    stream = Stream(99, 1024, buf_alloc)
    assert stream.receive(packet(OP_RESPONSE, alloc=alloc)) is Event.CONNECTED
    return stream


@given(PACKETS)
def test_headers_survive(header: Packet) -> None:
    assert len(encode(header)) == 44
    assert decode(encode(header)) == header


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300)), max_size=60), st.integers(0, 2**32 - 1))
def test_send_room_is_the_peers_buffer_less_what_it_has_not_taken(
    steps: list[tuple[bool, int]], start: int
) -> None:
    """`start`: counters near the wrap behave like all others."""
    stream = opened()
    stream.sent(start)
    stream.receive(packet(OP_CREDIT_UPDATE, fwd=start))
    sent = taken = start
    for is_send, count in steps:
        if is_send:
            stream.sent(min(count, stream.send_room()))
            sent += min(count, 1000 - (sent - taken))
        else:
            taken = min(sent, taken + count)
            stream.receive(packet(OP_CREDIT_UPDATE, fwd=taken))
        assert stream.send_room() == 1000 - (sent - taken)
        assert stream.unacknowledged == sent - taken


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 400)), max_size=60))
def test_never_more_held_than_promised(steps: list[tuple[bool, int]]) -> None:
    stream, held = opened(), 0
    for is_data, count in steps:
        if is_data:
            if held + count > 1000:
                with pytest.raises(ProtocolError):
                    stream.receive(packet(OP_RW, length=count))
                return
            assert stream.receive(packet(OP_RW, length=count)) is Event.DATA
            held += count
        else:
            stream.consumed(min(count, held))
            held -= min(count, held)
        assert stream.held == held


@given(st.lists(PACKETS, max_size=40))
def test_whatever_comes_is_an_event_or_a_protocol_error(packets: list[Packet]) -> None:
    stream = opened()
    for received in packets:
        try:
            event = stream.receive(received._replace(op=received.op % 10, length=received.length % 600))
        except ProtocolError:
            continue
        assert isinstance(event, Event)
        assert 0 <= stream.held <= stream.buf_alloc
        assert stream.send_room() >= 0


def test_news_at_half_of_the_smaller_buffer() -> None:
    stream = opened(buf_alloc=1000, alloc=200)
    stream.receive(packet(OP_RW, length=150, alloc=200))
    assert not stream.consumed(99)
    assert stream.consumed(1)
    stream.told()
    assert not stream.consumed(50)


def test_credit_is_asked_for_once_per_exhaustion() -> None:
    stream = opened(alloc=10)
    stream.sent(10)
    assert [stream.ask_credit() for _ in range(3)] == [True, False, False]
    stream.receive(packet(OP_CREDIT_UPDATE, alloc=10, fwd=0))  # no news
    assert not stream.ask_credit()
    stream.receive(packet(OP_CREDIT_UPDATE, alloc=10, fwd=10))
    stream.sent(10)
    assert stream.ask_credit()


def test_old_and_impossible_counts_are_ignored() -> None:
    stream = opened()
    stream.sent(500)
    stream.receive(packet(OP_CREDIT_UPDATE, fwd=400))
    stream.receive(packet(OP_CREDIT_UPDATE, fwd=300))
    assert stream.unacknowledged == 100
    stream.receive(packet(OP_CREDIT_UPDATE, fwd=501))
    assert stream.unacknowledged == 100


def test_a_shrinking_peer_buffer_leaves_no_negative_room() -> None:
    stream = opened()
    stream.sent(900)
    stream.receive(packet(OP_CREDIT_UPDATE, alloc=10))
    assert stream.send_room() == 0


def test_shutdown_bits_add_up() -> None:
    stream = opened()
    assert stream.receive(packet(OP_SHUTDOWN, flags=1)) is Event.SHUTDOWN
    stream.receive(packet(OP_RW, length=1))
    stream.receive(packet(OP_SHUTDOWN, flags=2))
    assert stream.peer_shutdown == SHUTDOWN_BOTH
    with pytest.raises(ProtocolError):
        stream.receive(packet(OP_RW, length=1))


@pytest.mark.parametrize("op", [OP_RW, OP_SHUTDOWN, OP_CREDIT_UPDATE, OP_CREDIT_REQUEST, OP_REQUEST, 0, 8])
def test_only_response_and_reset_answer_a_request(op: int) -> None:
    with pytest.raises(ProtocolError):
        Stream(99, 1024, 1000).receive(packet(op))
    assert Stream(99, 1024, 1000).receive(packet(OP_RST)) is Event.RESET
